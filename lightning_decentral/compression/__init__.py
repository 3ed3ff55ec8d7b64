"""Compressors: a vector in, a small message out. One scheme per file; error feedback is not in them.

The overview with sizes, errors and speeds is the page *Compression* of the documentation.
"""

from lightning_decentral.compression.base import AbstractCompressor, Field, Payload, Traits
from lightning_decentral.compression.cast import Cast
from lightning_decentral.compression.identity import Identity
from lightning_decentral.compression.int8 import Int8
from lightning_decentral.compression.names import COMPRESSORS, compressor
from lightning_decentral.compression.sign import OneBitSGD, ScaledSign, SignSGD, majority_vote

__all__ = [
    "COMPRESSORS",
    "AbstractCompressor",
    "Cast",
    "Field",
    "Identity",
    "Int8",
    "OneBitSGD",
    "Payload",
    "ScaledSign",
    "SignSGD",
    "Traits",
    "compressor",
    "majority_vote",
]
