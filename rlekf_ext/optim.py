"""RLEKF as a torch.optim.Optimizer: gathers gradients into H, hands the filter's increment to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.diagnostics import Diagnostics
from rlekf_ext.filter import KalmanFilter
from rlekf_ext.partition import partition

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class RLEKF(torch.optim.Optimizer):
    """Reorganized layer extended Kalman filtering (Hu et al., AAAI 2023, Algorithm 2).

    `params` are tensors, named tensors or groups, as for any torch optimizer; those that need no gradient are left
    out of P. Each is flattened as it is stored: pass `transpose=True` for models that store matrices [in, out], so
    that the weights of a neuron stay adjacent. With named parameters the strategy "lekf" takes the tensors of one
    module as a layer.

    `block_size`, `strategy`: see `partition`. `lr` scales the weight increment; it is 1 in the paper, and is there for
    schedulers. All other keywords are those of `KalmanFilter`: memory_factor (λ_1 = 0.98), forgetting_rate (ν =
    0.9987), initial_covariance, measurement_noise, process_noise, covariance_dtype, pending, backend, process_group,
    and the options that keep P healthy.

    Raises ValueError for settings out of range, for parameters on several devices, complex, sparse or given twice, and
    MemoryError when P will not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        block_size: int = 5120,  # N_b in the paper
        strategy: str = "rlekf",
        transpose: bool = False,
        lr: float = 1.0,
        **filter_settings: Any,
    ):
        if not lr > 0:
            raise ValueError(f"lr should be above 0 but is {lr}.")
        super().__init__(params, {"lr": lr})
        self._strategy, self._block_size, self._transpose = strategy, block_size, transpose
        parameters = self._parameters()
        _check(parameters)
        layers = self._layers() or range(len(parameters))
        sized = [(p.numel(), layer) for p, layer in zip(parameters, layers, strict=True) if p.numel()]
        plan = partition([size for size, _ in sized], block_size, strategy, [layer for _, layer in sized])
        self.filter = KalmanFilter(plan, device=parameters[0].device, **filter_settings)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from a closure that returns the error ε >= 0 and leaves its gradient in `.grad`. Returns ε.

        The closure is the usual one: a mean absolute error, `backward()`. Its gradient is -H, its value errY
        (Algorithm 2, lines 1 to 7).
        """
        if closure is None:
            raise ValueError(
                "RLEKF.step needs a closure that returns the error; with gradients set, call update(innovation)."
            )
        with torch.enable_grad():
            loss = closure()
        innovation = loss.detach() if isinstance(loss, Tensor) else loss
        self._apply(-self.flatten([p.grad for p in self._parameters()]), innovation)
        return loss

    def update(self, innovation: Tensor | float, jacobian: Tensor | None = None) -> None:
        """One or several updates from innovations and H, the gradient of what was measured.

        Without `jacobian`, `.grad` holds +H of one measurement. With it: (M, N) in the order of `flatten`, and M
        innovations, all taken at the present weights. An innovation is label minus prediction and may have either
        sign.
        """
        if jacobian is None:
            jacobian = self.flatten([p.grad for p in self._parameters()])
        self._apply(jacobian, innovation)

    def variance(self, jacobian: Tensor) -> Tensor:
        """HᵀPH of a jacobian (N,) or several (M, N), in the order of `flatten`: its prediction's variance."""
        return self.filter.variance(jacobian)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One tensor per parameter, or None for zeros, as a vector (N,) float64 in the order of the weights. Sparse
        ones are made dense."""
        parameters = self._parameters()
        if all(tensor is None for tensor in tensors):
            raise RuntimeError("No parameter has a gradient; call backward() before the update.")
        tensors = [t if t is None or t.layout == torch.strided else t.to_dense() for t in tensors]
        flat = [
            torch.zeros_like(p, memory_format=torch.contiguous_format).reshape(-1)
            if t is None
            else self._stored(t).reshape(-1)
            for p, t in zip(parameters, tensors, strict=True)
        ]
        return torch.cat([tensor.detach().to(torch.float64) for tensor in flat])

    def health(self) -> dict[str, int]:
        """How many measurements were used, and how many skipped, by cause. Waits for the device."""
        return self.filter.health()

    def diagnostics(self) -> Diagnostics:
        """P in a few numbers, for the price of some ten reads of it. Waits for the device."""
        return self.filter.diagnostics()

    def guard_storage(self) -> str:
        """See `KalmanFilter.guard_storage`; worth a call every few hundred updates when S is stored in float32."""
        return self.filter.guard_storage()

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups and, as the state of parameter 0, the whole covariance. Tensors are not copied."""
        return {**super().state_dict(), "state": {0: self.filter.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where the saved optimizer stood, whatever its device and backend.

        Raises ValueError for another model, plan or dtype of P; `Covariance.reblock` tells how to take over its P.
        """
        self.filter.load_state_dict(state_dict["state"].get(0, {}))
        # The base class would cast the covariance to the parameters' dtype.
        super().load_state_dict({**state_dict, "state": {}})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "filter"):
            raise RuntimeError("The blocks of P are fixed when RLEKF is made; give it all parameters then.")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("filter", "_strategy", "_block_size", "_transpose")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __repr__(self) -> str:
        plan, p = self.filter.plan, self.filter.covariance
        return (
            f"RLEKF({plan.num_weights} weights in {plan.num_blocks} blocks of at most {max(plan.sizes)}, "
            f"strategy {self._strategy}, block_size {self._block_size}, backend {self.filter.backend} on "
            f"{p.tiles.device}, P {p.num_bytes / 1e6:.1f} MB in {p.tiles.dtype})"
        )

    @torch.no_grad()
    def _apply(self, jacobian: Tensor, innovation: Tensor | float) -> None:
        plan = self.filter.plan
        increment = torch.zeros(plan.num_weights, dtype=torch.float64, device=jacobian.device)
        self.filter.step(increment, jacobian, innovation)
        parameters = self._parameters()
        rates = [group["lr"] for group in self.param_groups for p in group["params"] if p.requires_grad]
        parts = increment.split([p.numel() for p in parameters])
        for p, part, lr in zip(parameters, parts, rates, strict=True):
            stored = self._stored(p)
            # Added in float64 and rounded once, whatever the dtype of the model.
            stored.copy_(stored + lr * part.view(stored.shape))

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.T if self._transpose and tensor.dim() == 2 else tensor

    def _parameters(self) -> list[Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if hasattr(self, "filter") and sum(p.numel() for p in parameters) != self.filter.plan.num_weights:
            raise RuntimeError(
                f"The parameters that require a gradient have {sum(p.numel() for p in parameters)} weights but P has "
                f"{self.filter.plan.num_weights}: make a new RLEKF after a change of requires_grad or of a shape."
            )
        return parameters

    def _layers(self) -> list[int] | None:
        """An id per parameter, from the names where they are known: a.weight and a.bias are one layer."""
        if not all("param_names" in group for group in self.param_groups):
            return None
        modules: dict[str, int] = {}
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        return [modules.setdefault(name.rpartition(".")[0], len(modules)) for name, p in named if p.requires_grad]


def _check(parameters: list[Tensor]) -> None:
    if not any(p.numel() for p in parameters):
        raise ValueError("RLEKF needs at least one parameter that requires a gradient and is not empty.")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"All parameters should be on one device but are on {', '.join(map(str, devices))}.")
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError("Each parameter should be given once but one is given twice; model.parameters() sees to that.")
    for p in parameters:
        if p.dtype not in DTYPES:
            raise ValueError(
                f"Parameters should be real, float16 to float64, but one is {p.dtype}; hold the real and the imaginary "
                "part of a complex one (torch.view_as_real) as the parameter."
            )
        if p.layout != torch.strided:
            raise ValueError(f"Parameters should be dense but one is {p.layout}; make it dense by to_dense().")
        if p.is_meta:
            raise ValueError("Parameters should have values but one is on the meta device; call to_empty() first.")
