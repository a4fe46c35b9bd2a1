"""Second-order training of neural-network force fields: the RLEKF Kalman filter with compiled kernels."""

from rlekf_ext.filter import KalmanFilter
from rlekf_ext.optim import RLEKF
from rlekf_ext.partition import BlockPlan

__all__ = ["RLEKF", "BlockPlan", "KalmanFilter"]
