"""Normalization layers: Full Normalization, and what it is compared with. They need torch and nothing else of ours.

`FullNorm1d`, `FullNorm2d`, `FullNorm3d` replace BatchNorm where batches do not look like the data; `convert_full_norm`
puts them into a model. For Lightning there is the callback `lightning_decentral.callbacks.NormalizationSwap`.
"""

from lightning_decentral.normalization.batch_renorm import BatchRenorm
from lightning_decentral.normalization.conversion import (
    AbstractNormalization,
    BatchRenormalization,
    FullNormalization,
    GhostNormalization,
    GroupNormalization,
    MovingAverageNormalization,
    SyncNormalization,
    convert_full_norm,
    convert_full_norm_to_batch_norm,
    replace_batch_norm,
)
from lightning_decentral.normalization.full_norm import (
    FullNorm1d,
    FullNorm2d,
    FullNorm3d,
    PowerDecay,
    average_statistics,
    full_norm_layers,
    keep_statistics_local,
    set_loss_scale,
)
from lightning_decentral.normalization.ghost_batch_norm import GhostBatchNorm
from lightning_decentral.normalization.moving_average_batch_norm import MovingAverageBatchNorm, center_weights

__all__ = [
    "AbstractNormalization",
    "BatchRenorm",
    "BatchRenormalization",
    "FullNorm1d",
    "FullNorm2d",
    "FullNorm3d",
    "FullNormalization",
    "GhostBatchNorm",
    "GhostNormalization",
    "GroupNormalization",
    "MovingAverageBatchNorm",
    "MovingAverageNormalization",
    "PowerDecay",
    "SyncNormalization",
    "average_statistics",
    "center_weights",
    "convert_full_norm",
    "convert_full_norm_to_batch_norm",
    "full_norm_layers",
    "keep_statistics_local",
    "replace_batch_norm",
    "set_loss_scale",
]
