"""Linear models trained by dual coordinates: losses with their duals, data in rows, a module for Lightning.

The estimators for scikit-learn are in `primal_dual.estimators`.
"""

from lightning_decentral.primal_dual.coordinates import Coordinates
from lightning_decentral.primal_dual.data import LinearDataModule
from lightning_decentral.primal_dual.losses import Loss
from lightning_decentral.primal_dual.module import PrimalDualModule
from lightning_decentral.primal_dual.rows import Rows

__all__ = ["Coordinates", "LinearDataModule", "Loss", "PrimalDualModule", "Rows"]
