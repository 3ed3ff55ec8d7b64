"""Compressors: a vector in, a small message out. One scheme per file; error feedback is not in them.

The overview with sizes, errors and speeds is the page *Compression* of the documentation.
"""

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits
from lightning_decentral.compression.bingrad import BinGrad
from lightning_decentral.compression.cast import Cast
from lightning_decentral.compression.chunk_topk import ChunkTopK
from lightning_decentral.compression.countsketch import CountSketch
from lightning_decentral.compression.dct import DCTTopK, cosine_basis
from lightning_decentral.compression.dgc import DGC
from lightning_decentral.compression.error_feedback import ErrorFeedback
from lightning_decentral.compression.fp4 import FP4
from lightning_decentral.compression.fp8 import FP8
from lightning_decentral.compression.identity import Identity
from lightning_decentral.compression.int8 import Int8
from lightning_decentral.compression.lattice import Lattice
from lightning_decentral.compression.names import COMPRESSORS, compressor
from lightning_decentral.compression.natural import NaturalCompression
from lightning_decentral.compression.nuqsgd import NUQSGD
from lightning_decentral.compression.orq import ORQ
from lightning_decentral.compression.powersgd import PowerSGD, orthogonalize
from lightning_decentral.compression.qsgd import QSGD
from lightning_decentral.compression.randomk import RandomBlock, RandomK
from lightning_decentral.compression.sign import OneBitSGD, ScaledSign, SignSGD, majority_vote
from lightning_decentral.compression.terngrad import TernGrad
from lightning_decentral.compression.topk import Threshold, TopK

__all__ = [
    "COMPRESSORS",
    "DGC",
    "FP4",
    "FP8",
    "NUQSGD",
    "ORQ",
    "QSGD",
    "AbstractCompressor",
    "BinGrad",
    "Cast",
    "ChunkTopK",
    "CountSketch",
    "DCTTopK",
    "ErrorFeedback",
    "Field",
    "Identity",
    "Int8",
    "Lattice",
    "NaturalCompression",
    "OneBitSGD",
    "Payload",
    "PowerSGD",
    "RandomBlock",
    "RandomK",
    "ScaledSign",
    "SignSGD",
    "TernGrad",
    "Threshold",
    "TopK",
    "Traits",
    "compressor",
    "cosine_basis",
    "majority_vote",
    "orthogonalize",
]
