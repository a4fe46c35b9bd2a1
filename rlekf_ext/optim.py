"""RLEKF as a torch.optim.Optimizer: gathers gradients into H, hands the filter's increment to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.filter import KalmanFilter
from rlekf_ext.partition import partition


class RLEKF(torch.optim.Optimizer):
    """Reorganized layer extended Kalman filtering (Hu et al., AAAI 2023, Algorithm 2).

    `params` are tensors, named tensors or groups, as for any torch optimizer; those that need no gradient are left
    out of P. Each is flattened as it is stored: pass `transpose=True` for models that store matrices [in, out], so
    that the weights of a neuron stay adjacent. With named parameters the strategy "lekf" takes the tensors of one
    module as a layer.

    `block_size`, `strategy`: see `partition`. `memory_factor` to `backend`: see `KalmanFilter`. `lr` scales the
    weight increment; it is 1 in the paper, and is there for schedulers.

    Raises ValueError for settings out of range or parameters on several devices, MemoryError when P will not fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        block_size: int = 5120,  # N_b in the paper
        strategy: str = "rlekf",
        memory_factor: float = 0.98,  # λ_1
        forgetting_rate: float = 0.9987,  # ν
        initial_covariance: float = 1.0,  # p_0
        measurement_noise: float | None = None,  # α²R = L, the number of blocks
        process_noise: float = 0.0,
        covariance_dtype: torch.dtype = torch.float64,
        pending: int = 32,
        backend: str = "auto",
        transpose: bool = False,
        lr: float = 1.0,
    ):
        if not lr > 0:
            raise ValueError(f"lr should be above 0 but is {lr}.")
        super().__init__(params, {"lr": lr})
        self._strategy, self._block_size, self._transpose = strategy, block_size, transpose
        parameters = self._parameters()
        if not parameters:
            raise ValueError("RLEKF needs at least one parameter that requires a gradient.")
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            raise ValueError(f"All parameters should be on one device but are on {', '.join(map(str, devices))}.")
        plan = partition([p.numel() for p in parameters], block_size, strategy, self._layers())
        self.filter = KalmanFilter(
            plan,
            memory_factor=memory_factor,
            forgetting_rate=forgetting_rate,
            initial_covariance=initial_covariance,
            measurement_noise=measurement_noise,
            process_noise=process_noise,
            covariance_dtype=covariance_dtype,
            pending=pending,
            backend=backend,
            device=parameters[0].device,
        )

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
        """One tensor per parameter, or None for zeros, as a vector (N,) float64 in the order of the weights."""
        parameters = self._parameters()
        if all(tensor is None for tensor in tensors):
            raise RuntimeError("No parameter has a gradient; call backward() before the update.")
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

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups and, as the state of parameter 0, the whole covariance. Tensors are not copied."""
        return {**super().state_dict(), "state": {0: self.filter.covariance.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where the saved optimizer stood. Raises ValueError for another model or plan of P."""
        # The base class would cast the covariance to the parameters' dtype.
        super().load_state_dict({**state_dict, "state": {}})
        self.filter.covariance.load_state_dict(state_dict["state"][0])

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
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _layers(self) -> list[int] | None:
        """An id per parameter, from the names where they are known: a.weight and a.bias are one layer."""
        if not all("param_names" in group for group in self.param_groups):
            return None
        modules: dict[str, int] = {}
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        return [modules.setdefault(name.rpartition(".")[0], len(modules)) for name, p in named if p.requires_grad]
