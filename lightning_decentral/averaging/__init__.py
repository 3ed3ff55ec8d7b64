"""How the values of several workers become one average. An averager never knows *when* it is used."""

from lightning_decentral.averaging.base import AbstractAverager
from lightning_decentral.averaging.choco import Choco
from lightning_decentral.averaging.compressed_mean import CompressedMean
from lightning_decentral.averaging.dcd import DCD
from lightning_decentral.averaging.ecd import ECD
from lightning_decentral.averaging.gossip import Gossip, neighbor_average, neighbor_exchange
from lightning_decentral.averaging.mean_in_parts import MeanInParts, goes_in_parts
from lightning_decentral.averaging.moniqua import Moniqua
from lightning_decentral.averaging.pairs import LatticePairs
from lightning_decentral.averaging.squeeze import Squeeze

__all__ = [
    "DCD",
    "ECD",
    "AbstractAverager",
    "Choco",
    "CompressedMean",
    "Gossip",
    "LatticePairs",
    "MeanInParts",
    "Moniqua",
    "Squeeze",
    "goes_in_parts",
    "neighbor_average",
    "neighbor_exchange",
]
