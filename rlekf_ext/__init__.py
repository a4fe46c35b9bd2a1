"""Second-order training of neural-network force fields: the RLEKF Kalman filter with compiled kernels.

`RLEKF` is a torch.optim optimizer. `Stepper` makes one update from a prediction and a label, `FrameUpdater` all updates
of a batch of energies and forces; docs/updates.md says which to use.
"""

from rlekf_ext.covariance import Covariance
from rlekf_ext.errors import RlekfError
from rlekf_ext.filter import KalmanFilter
from rlekf_ext.optim import RLEKF
from rlekf_ext.options import PRESETS
from rlekf_ext.partition import BlockPlan
from rlekf_ext.stepper import Stepper
from rlekf_ext.updates import FrameUpdater

__all__ = ["PRESETS", "RLEKF", "BlockPlan", "Covariance", "FrameUpdater", "KalmanFilter", "RlekfError", "Stepper"]
