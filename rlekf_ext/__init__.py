"""Second-order training of neural-network force fields: the RLEKF Kalman filter with compiled kernels.

`RLEKF` is a torch.optim optimizer. `Stepper` makes one update from a prediction and a label, `FrameUpdater` all updates
of a batch of energies and forces; docs/updates.md says which to use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlekf_ext.covariance import Covariance
    from rlekf_ext.errors import RlekfError
    from rlekf_ext.filter import KalmanFilter
    from rlekf_ext.optim import RLEKF
    from rlekf_ext.options import PRESETS
    from rlekf_ext.partition import BlockPlan
    from rlekf_ext.stepper import Stepper
    from rlekf_ext.updates import FrameUpdater

__all__ = ["PRESETS", "RLEKF", "BlockPlan", "Covariance", "FrameUpdater", "KalmanFilter", "RlekfError", "Stepper"]

MODULES = {
    "PRESETS": "options",
    "RLEKF": "optim",
    "BlockPlan": "partition",
    "Covariance": "covariance",
    "FrameUpdater": "updates",
    "KalmanFilter": "filter",
    "RlekfError": "errors",
    "Stepper": "stepper",
}


def __getattr__(name: str) -> Any:  # so that __main__.py can set what torch reads when it is loaded
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
