"""The filter's ops, on each backend: the same functions with the same signatures. A backend is chosen by name.

`p` is a Covariance of N weights in L blocks, which changes in place; all other tensors are float64. There are 1 to 8
measurements, M.

project(p, jacobian) -> cross, gram
    cross (M, N) = (P / scale) H, and for each block gram (2, L, M, M) = h_jᵀ cross_k, then h_jᵀ h_k. If `pending` has
    no room for M more vectors, its vectors are first folded into the tiles, which does not change P.
multiply_tiles(p, jacobian) -> z
    The part of `project` that reads tiles: z (M, N) = S H, after folding if need be. `p.tiles` may be any run of P's;
    in `p.layout` the first tile of a block then counts from the first of these. Other parts of `p` do not change.
finish_projection(p, z, jacobian) -> gram
    The rest of `project`, from the sum of z over all tiles: z becomes cross, and `p.state` notes the fold.
correct(p, weights, cross, gram, jacobian, innovation)
    M scalar updates, in order, each exact given those before it (Algorithm 2, lines 8 to 14): the innovations (M,)
    are those at the weights (N,) before the call. A measurement whose innovation or variance is not finite, or whose
    variance is negative, is skipped and counted.
step(p, weights, jacobian, innovation)
    project and correct in one call.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import torch

from rlekf_ext.errors import BackendError, OptionError
from rlekf_ext.ops import native, reference


def backend(name: str, device: torch.device, parts: bool = False) -> ModuleType:
    """The ops of backend `name` for tensors on `device`: "native" (compiled), "triton", "reference" (dense torch), or
    "auto": native or, on a GPU that it has no kernels for, triton. `parts`: ops that take a part of a block's tiles.

    Raises OptionError for an unknown name, and BackendError, with the reason, for one that is absent.
    """
    if name not in ("auto", "native", "triton", "reference"):
        raise OptionError(f"backend must be 'auto', 'native', 'triton' or 'reference' but is: {name!r}.")
    if name == "reference" and not parts:
        return reference
    reasons = []
    if name == "reference":
        reasons.append("The reference backend needs whole blocks, but with process_group blocks are split.")
    if name in ("auto", "native"):
        reason = native.why_absent(device.type)
        if not reason:
            return native
        reasons.append(f"The native backend has no kernels for {device}: {reason}")
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        reason = _why_triton_is_absent(device.type)
        if not reason:
            from rlekf_ext.ops import triton

            return triton
        reasons.append(f"The triton backend cannot run on {device}: {reason}")
    raise BackendError(
        " ".join([*reasons, "backend='auto' finds another." if parts else "backend='reference' runs anywhere."])
    )


def find_device(asked: str | None) -> torch.device:
    """The device to train on: "cpu", "cuda" or "cuda:1", or by default a GPU, if there is one that some backend has
    kernels for. Without a number it is the first GPU or, of processes that torchrun has started, each has its own.

    Raises BackendError, with the reason, for a GPU that cannot be used, and OptionError for another device.
    """
    try:
        device = torch.device(asked or "cuda")
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"The device must be cpu, cuda or cuda:N but is: {asked}.")
    if device.type == "cpu":
        return device
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    reason = _why_gpu_is_absent(device, several)
    if not reason:
        return device
    if asked is None:
        return torch.device("cpu")
    raise BackendError(f"{asked} cannot be used: {reason} The device cpu runs anywhere.")


def _why_gpu_is_absent(device: torch.device, num_processes: int) -> str:
    """The same for all processes of a machine."""
    if not torch.cuda.is_available():
        found = "finds no GPU" if torch.version.cuda else "is built without CUDA"
        return f"torch {torch.__version__} {found}."
    count = torch.cuda.device_count()
    if num_processes > count:
        return f"{num_processes} processes on this machine need a GPU each, but torch finds {count}."
    if device.index >= count:
        return f"torch finds {count} GPU(s), so that the last is cuda:{count - 1}."
    try:
        backend("auto", device)
    except BackendError as error:
        return str(error)
    return ""


def backends() -> dict[str, str]:
    """Every backend, with the reason why it is absent here, or "" if it is available."""
    return {
        "reference": "",
        "cpu": native.why_absent("cpu"),
        "cuda": native.why_absent("cuda"),
        "triton": _why_triton_is_absent("cuda"),
    }


def _why_triton_is_absent(device_type: str) -> str:
    """Triton is an optional package, loaded only here, on request."""
    if find_spec("triton") is None:
        return "triton is not installed: run `pip install 'rlekf_ext[triton]'`."
    from rlekf_ext.ops import triton

    return triton.why_absent(device_type)
