"""RLEKF as a torch.optim.Optimizer: gathers gradients into H, adds the filter's increment to the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rlekf_ext.covariance import STATE, Covariance
from rlekf_ext.diagnostics import Diagnostics
from rlekf_ext.errors import OptionError
from rlekf_ext.filter import KalmanFilter
from rlekf_ext.options import FilterOptions, OptimizerOptions, checked, part, takes
from rlekf_ext.partition import partition
from rlekf_ext.prior import layer_factors
from rlekf_ext.schema import counted

MANY_SKIPPED = 20  # measurements in a row
UPDATES_PER_GUARD = 250  # a check costs ten reads of P; in trials it warned of float32 500 updates or more in advance
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@takes(OptimizerOptions)
class RLEKF(torch.optim.Optimizer):
    """Reorganized layer extended Kalman filtering (Hu et al., AAAI 2023, Algorithm 2).

    `params` are tensors, named tensors or groups, as for any torch optimizer; those that need no gradient are left
    out of P. Each is flattened as it is stored. `transpose=True` reverses the dimensions first: for models that store
    matrices [in, out], so that the weights of a neuron stay adjacent. With named parameters the strategy "lekf" treats
    the tensors of one module as a layer. `lr` scales the weight increment; it is 1 in the paper, and exists for
    schedulers. A parameter group may have its own `lr` and `initial_covariance`. `backend` and `process_group` are
    those of `KalmanFilter`.

        optimizer = RLEKF(model.parameters(), block_size=1024)

        def closure():
            optimizer.zero_grad()
            error = (model(x) - y).abs().mean()
            error.backward()
            return error

        optimizer.step(closure)

    Raises OptionError (a ValueError) for options out of range, ValueError for parameters on several devices, complex,
    sparse or given twice, NotEnoughMemoryError if P does not fit, and BackendError for an absent backend.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        transpose: bool = False,
        lr: float = 1.0,
        backend: str = "auto",
        process_group: Any = None,
        **options: Any,
    ):
        _check_rate(lr)
        if "preset" in options:
            raise OptionError("RLEKF takes no preset: presets are of FrameUpdater, which makes its own RLEKF.")
        super().__init__(params, {"lr": lr})
        self.options: OptimizerOptions = checked(OptimizerOptions, options)
        self._transpose, self._warned, self._unguarded = transpose, False, 0
        self._moves: _Moves | None = None  # made at the first update
        self._trained = self._with_gradient()
        parameters = self.parameters()
        _check(parameters)
        layers = self._layers() or range(len(parameters))
        sized = [(p.numel(), layer) for p, layer in zip(parameters, layers, strict=True) if p.numel()]
        plan = partition(
            [size for size, _ in sized],
            self.options.block_size,
            self.options.strategy,
            [layer for _, layer in sized],
        )
        self.filter = KalmanFilter(
            plan,
            backend=backend,
            device=parameters[0].device,
            process_group=process_group,
            **part(FilterOptions, self.options),
        )
        if any("initial_covariance" in group for group in self.param_groups):
            self._start([1.0] * len(parameters))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from a closure that returns the error ε >= 0 and leaves its gradient in `.grad`. Returns ε.

        The closure is the usual one: a mean absolute error, `backward()`. Its gradient is -H, its value errY
        (Algorithm 2, lines 1 to 7). A squared error also trains, but scales each H by twice its error, and its ε is
        squared. Raises ValueError without a closure, RuntimeError if no parameter has a gradient.
        """
        if not callable(closure):
            raise ValueError(
                "RLEKF.step needs a closure that returns the error; with the prediction's gradients set, call "
                "update(optimizer.jacobian(), innovation)."
            )
        with torch.enable_grad():
            error = closure()
        if not isinstance(error, float | int) and getattr(error, "numel", lambda: 0)() != 1:
            found = tuple(error.shape) if isinstance(error, Tensor) else error
            raise ValueError(
                f"The closure should return the error, a number or a tensor of one element, but returned {found}: "
                "return the mean absolute error."
            )
        self.update(-self.jacobian(), error.detach() if isinstance(error, Tensor) else error)
        self._look_after()
        return error

    @torch.no_grad()
    def update(self, jacobian: Tensor, innovation: Tensor | float) -> None:
        """One update, or M of them, from H and the innovations (Algorithm 2, lines 8 to 14).

        jacobian: +H (N,) or (M, N), the gradients of the measured quantities in the order of `flatten`; innovation: a
        number or (M,), label minus prediction, of either sign. All are taken at the current weights.
        """
        moves = self._current_moves()
        self.filter.update(jacobian, innovation, out=moves.increment)
        moves.apply(self.param_groups)

    @torch.no_grad()
    def take(self, jacobian: Tensor, innovations: Tensor) -> None:
        """`update` without KalmanFilter.note, for a CUDA graph: jacobian (M, N), innovations (M,)."""
        moves = self._current_moves()
        self.filter.take(jacobian, innovations, moves.increment.zero_())
        moves.apply(self.param_groups)

    def form(self) -> tuple[Any, ...]:
        """What decides the work of `take`: the addresses of all that it reads and writes, and the learning rates."""
        p, moves = self.filter.covariance, self._current_moves()
        tensors = p.tiles, p.pending, p.state, p.layout, moves.increment, *self.parameters()
        rates = (group["lr"] for group in self.param_groups)
        return *(tensor.data_ptr() for tensor in tensors), *rates

    @torch.compiler.disable  # which does not know addresses
    def _current_moves(self) -> _Moves:
        self.parameters()  # raises if they have changed
        if self._moves is None or self._moves.stale():
            self._moves = _Moves(self)
        return self._moves

    def jacobian(self) -> Tensor:
        """The gradients in `.grad`, (N,) float64 in the order of `flatten`. Raises RuntimeError if there are none."""
        return self.flatten([p.grad for p in self.parameters()])

    def parameters(self) -> list[Tensor]:
        """The parameters that have weights in P, in order. Raises RuntimeError if they have changed since."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self._with_gradient() != self._trained:
            raise RuntimeError(
                "Other parameters require a gradient than when P was made: make a new RLEKF after changing "
                "requires_grad."
            )
        if hasattr(self, "filter") and sum(p.numel() for p in parameters) != self.filter.plan.num_weights:
            raise RuntimeError(
                f"The parameters that require a gradient have {sum(p.numel() for p in parameters)} weights but P has "
                f"{self.filter.plan.num_weights}: make a new RLEKF after changing requires_grad or a shape."
            )
        return parameters

    def _with_gradient(self) -> list[bool]:
        return [p.requires_grad for group in self.param_groups for p in group["params"]]

    def variance(self, jacobian: Tensor) -> Tensor:
        """The variance HᵀPH of a prediction: () for a jacobian (N,), (M,) for (M, N), in the order of `flatten`."""
        return self.filter.variance(jacobian)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One tensor per parameter, or None for zeros, as a vector (N,) float64 in the order of the weights. Sparse
        ones are made dense. Raises RuntimeError if all are None."""
        parameters = self.parameters()
        if all(tensor is None for tensor in tensors):
            raise RuntimeError(
                "No parameter of this optimizer has a gradient: call backward() first, on a result of these parameters."
            )
        if len(tensors) != len(parameters):
            raise ValueError(f"There should be {len(parameters)} tensors, one per parameter, but are {len(tensors)}.")
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
        """P in a few numbers, at the cost of about ten reads of it. Waits for the device."""
        return self.filter.diagnostics()

    def guard_storage(self) -> str:
        """See `KalmanFilter.guard_storage`; call it every few hundred updates if S is stored in float32."""
        return self.filter.guard_storage()

    def state_dict(self) -> dict[str, Any]:
        """The parameter groups and, as the state of parameter 0, the whole covariance. Tensors are not copied."""
        own = {"transpose": self._transpose, "unguarded": self._unguarded}
        return {**super().state_dict(), "state": {0: self.filter.state_dict()}, **own}

    def check_order(self, saved: dict[str, Any]) -> None:
        """Raise OptionError if the weights of a saved P are in another order: it was made with another `transpose`."""
        if saved.get("transpose", self._transpose) != self._transpose:
            raise OptionError(
                f"The weights of the saved P are in the order of transpose={saved['transpose']}, its own "
                f"in that of transpose={self._transpose}: make it with the other (`rlekf train` has True)."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the saved optimizer was, whatever its device and backend. λ, ν and the noise are those
        that were saved, whatever this optimizer was made with.

        Raises ValueError for another model, plan or dtype of P; `take_over` accepts P with the same weights. Raises
        OptionError for another `transpose`.
        """
        self.check_order(state_dict)
        saved, own = ([len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if saved != own:
            raise ValueError(f"The saved optimizer has groups of {saved} parameters but this one has {own}.")
        self.filter.load_state_dict(state_dict["state"].get(0, {}))
        # The base class would cast the covariance to the parameters' dtype.
        super().load_state_dict({**state_dict, "state": {}})
        self._unguarded = state_dict.get("unguarded", 0)

    def take_over(self, covariance: Covariance) -> None:
        """Replace P by that of another filter of the same weights, whatever its blocks and storage: see
        `Covariance.reblock`. Raises ValueError for another number of weights, NotEnoughMemoryError if it does not fit.
        """
        self.filter.take_over(covariance)

    @torch.no_grad()
    def start_by_layers(self, squares: Tensor) -> None:
        """P starts over with the variance of each layer that prior.py says: `squares` (number of parameters,) are the
        sums of H² over each of them, of energies at the current weights. Raises OptionError for nameless parameters."""
        names, layers = self._names(), self._layers()
        if names is None or layers is None:
            raise OptionError(
                "A prior by layers needs named parameters: make RLEKF of model.named_parameters(), or set prior to "
                "identity."
            )
        biases = [name.rpartition(".")[2] == "bias" for name in names]
        shapes = [tuple(p.shape) for p in self.parameters()]
        self._start(layer_factors(squares.tolist(), layers, biases, shapes))

    def _start(self, factors: Sequence[float]) -> None:
        """P starts over as a diagonal: in each parameter a factor times the initial covariance of its group."""
        default = self.options.initial_covariance
        owned = [
            group.get("initial_covariance", default)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        sizes = torch.tensor([p.numel() for p in self.parameters()])
        variances = torch.tensor(owned, dtype=torch.float64) * torch.tensor(factors, dtype=torch.float64)
        covariance = self.filter.covariance
        covariance.set_diagonal(variances.repeat_interleave(sizes).to(covariance.state.device))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for torch's own constructor. Raises RuntimeError afterwards: the blocks of P are fixed."""
        if hasattr(self, "filter"):
            raise RuntimeError("The blocks of P are fixed when RLEKF is made; give it all parameters then.")
        if unknown := sorted(set(param_group) - {"params", "param_names", "lr", "initial_lr", "initial_covariance"}):
            raise OptionError(f"A parameter group may have lr and initial_covariance, but this one has: {unknown}.")
        if "lr" in param_group:
            _check_rate(param_group["lr"])
        if "initial_covariance" in param_group:
            checked(FilterOptions, {"initial_covariance": param_group["initial_covariance"]})
        super().add_param_group(param_group)

    def has_all_reversed(self, model: torch.nn.Module) -> bool:
        """Whether the weights are all those of this model, in its order, each tensor with its dimensions reversed."""
        return self._transpose and list(map(id, self.parameters())) == list(map(id, model.parameters()))

    def __getstate__(self) -> dict[str, Any]:
        own = ("filter", "options", "_transpose", "_warned", "_unguarded", "_trained")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}, "_moves": None}

    def _look_after(self) -> None:
        """After an update, on CPUs (on a GPU it would wait for the device): warn once if all measurements are skipped,
        and guard P in float32."""
        state = self.filter.covariance.state
        if not state.is_cpu:
            return
        self._unguarded += 1
        if self._unguarded >= UPDATES_PER_GUARD:
            self._unguarded = 0
            if sentence := self.guard_storage():
                warnings.warn(sentence, stacklevel=3)
        if not self._warned and state[STATE["skipped_in_a_row"]] >= MANY_SKIPPED:
            self._warned = True
            counts = {cause: count for cause, count in self.health().items() if count}
            warnings.warn(
                f"The last {MANY_SKIPPED} measurements were all skipped, and the weights stay as they are: {counts}. "
                "Look for labels and predictions that are not finite.",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        plan, p = self.filter.plan, self.filter.covariance
        kept = {name: theirs for name, (theirs, _) in self.filter.differing_constants().items()}
        values = [(f, kept.get(f.name, getattr(self.options, f.name))) for f in fields(self.options)]
        changed = [f"{f.name} {value}" for f, value in values if value != f.default]
        return (
            f"{type(self).__name__}({plan.num_weights} weights in {counted(plan.num_blocks, 'block')} of at most "
            f"{max(plan.sizes)}, "
            f"P {p.num_bytes / 1e6:.1f} MB in {p.tiles.dtype} on {p.tiles.device}, backend {self.filter.backend}"
            f"{''.join(f', {text}' for text in changed)})"
        )

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(reversed(range(tensor.dim())))) if self._transpose else tensor

    def _names(self) -> list[str] | None:
        """The names of the parameters, or None if some have none."""
        if not all("param_names" in group for group in self.param_groups):
            return None
        return [
            name
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
            if p.requires_grad
        ]

    def _layers(self) -> list[int] | None:
        """A layer id per parameter, from the names (a.weight and a.bias are one layer), or None without names."""
        modules: dict[str, int] = {}
        if (names := self._names()) is None:
            return None
        return [modules.setdefault(name.rpartition(".")[0], len(modules)) for name in names]


class _Moves:
    """The increment of the weights, and its pieces beside the parameters that they move."""

    def __init__(self, optimizer: RLEKF):
        self._parameters = optimizer.parameters()
        self._addresses = [p.data_ptr() for p in self._parameters]
        device = self._parameters[0].device
        self.increment = torch.zeros(optimizer.filter.plan.num_weights, dtype=torch.float64, device=device)
        self._stored = [optimizer._stored(p.detach()) for p in self._parameters]
        pieces = self.increment.split([p.numel() for p in self._parameters])
        self._pieces = [piece.view(p.shape) for piece, p in zip(pieces, self._stored, strict=True)]

    def stale(self) -> bool:
        """Whether some parameter is no longer stored where it was."""
        return [p.data_ptr() for p in self._parameters] != self._addresses

    def apply(self, groups: Sequence[dict[str, Any]]) -> None:
        """Add the increment, in float64 and rounded once, whatever the dtype of the model."""
        first = 0
        for group in groups:
            last = first + sum(p.requires_grad for p in group["params"])
            if last > first:  # else all of the group is frozen
                torch._foreach_add_(self._stored[first:last], self._pieces[first:last], alpha=group["lr"])
            first = last


def _check_rate(lr: Any) -> None:
    if isinstance(lr, str) or not lr > 0:
        raise OptionError(f"lr must be > 0 but is: {lr!r}.")


def _check(parameters: list[Tensor]) -> None:
    if not any(p.numel() for p in parameters):
        raise ValueError("RLEKF needs at least one parameter that requires a gradient and is not empty.")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(f"All parameters should be on one device but are on {', '.join(map(str, devices))}.")
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError("Each parameter should be given once but one is given twice; model.parameters() ensures that.")
    for p in parameters:
        if p.dtype not in DTYPES:
            raise ValueError(
                f"Parameters should be real, float16 to float64, but one is {p.dtype}; hold the real and the imaginary "
                "part of a complex one (torch.view_as_real) as the parameter."
            )
        if p.layout != torch.strided:
            raise ValueError(f"Parameters should be dense but one is {p.layout}; make it dense with to_dense().")
        if p.is_meta:
            raise ValueError("Parameters should have values but one is on the meta device; call to_empty() first.")
