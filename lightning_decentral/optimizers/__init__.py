"""Optimizers that do more than the gradient says, or without a gradient; no communication, only torch.

Large batches: `CLARS`, with `LARS`, `LAMB` and `GradualWarmup`. From values of the loss alone: `ZOProxSVRG`,
`ZOProxSAGA`, with `ZOProxSGD` and `ZOSGD`; estimators `CooSGE`, `GauSGE`; proximal operators `L1`, `Ridge`, `Box`,
`GroupLasso`. An iterate that follows momentum SGD: `RSGD`.
"""

from lightning_decentral.optimizers.clars import CLARS
from lightning_decentral.optimizers.lamb import LAMB
from lightning_decentral.optimizers.lars import LARS
from lightning_decentral.optimizers.proximal import L1, AbstractProximal, Box, GroupLasso, Ridge
from lightning_decentral.optimizers.rsgd import RSGD
from lightning_decentral.optimizers.schedules import GradualWarmup, warmup_factor
from lightning_decentral.optimizers.zeroth_order import AbstractEstimator, AbstractZerothOrder, CooSGE, GauSGE
from lightning_decentral.optimizers.zo_prox_saga import ZOProxSAGA
from lightning_decentral.optimizers.zo_prox_svrg import ZOProxSVRG
from lightning_decentral.optimizers.zo_sgd import ZOSGD, ZOProxSGD

__all__ = [
    "CLARS",
    "L1",
    "LAMB",
    "LARS",
    "RSGD",
    "ZOSGD",
    "AbstractEstimator",
    "AbstractProximal",
    "AbstractZerothOrder",
    "Box",
    "CooSGE",
    "GauSGE",
    "GradualWarmup",
    "GroupLasso",
    "Ridge",
    "ZOProxSAGA",
    "ZOProxSGD",
    "ZOProxSVRG",
    "warmup_factor",
]
