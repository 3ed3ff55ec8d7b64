"""Optimizers that do more than the gradient says; no communication, only torch."""

from lightning_decentral.optimizers.clars import CLARS
from lightning_decentral.optimizers.lamb import LAMB
from lightning_decentral.optimizers.lars import LARS
from lightning_decentral.optimizers.schedules import GradualWarmup, warmup_factor

__all__ = ["CLARS", "LAMB", "LARS", "GradualWarmup", "warmup_factor"]
