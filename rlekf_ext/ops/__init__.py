"""The filter's ops, on each backend: functions of one signature. A backend is chosen once, by name.

All tensors but `tiles` and `layout` are float64; `tiles`, `pending` and `state` are those of a `Covariance`, and
change in place. N weights in L blocks; M measurements, 1 to 8.

project(tiles, pending, state, layout, jacobian) -> cross, gram
    cross (M, N) = (P / scale) H, and of each block gram (2, L, M, M) = h_jᵀ cross_k, then h_jᵀ h_k. When the
    `pending` rows would not hold M more vectors, they are first folded into the tiles: P stays what it was, in
    another form.
correct(weights, pending, state, layout, cross, gram, jacobian, innovation)
    M scalar updates, in order, each exact given those before it (Algorithm 2, lines 8 to 14): the innovations (M,)
    are those of the weights as they came in. A measurement whose innovation or variance is not finite, or whose
    variance is negative, is skipped and counted.
step(weights, tiles, pending, state, layout, jacobian, innovation)
    project and correct in one call.
"""

from __future__ import annotations

from types import ModuleType

import torch

from rlekf_ext.ops import native, reference


def backend(name: str, device: torch.device) -> ModuleType:
    """The ops of backend `name` for tensors on `device`: "native" (compiled), "reference" (dense torch), "auto" =
    native.

    Raises ValueError for an unknown name, and RuntimeError, with the reason, for one that is absent.
    """
    if name == "reference":
        return reference
    if name in ("auto", "native"):
        reason = native.why_absent(device.type)
        if reason:
            raise RuntimeError(
                f"The native backend has no kernels for {device}: {reason} backend='reference' runs anywhere."
            )
        return native
    raise ValueError(f"backend should be 'auto', 'native' or 'reference' but is {name!r}.")


def backends() -> dict[str, str]:
    """Every backend, with the reason why it is absent here, or "" when it is there."""
    return {
        "reference": "",
        "cpu": native.why_absent("cpu"),
        "cuda": native.why_absent("cuda"),
        "triton": "not written yet.",
    }
