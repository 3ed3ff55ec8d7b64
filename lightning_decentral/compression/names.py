"""Compressors by name, for command lines and configuration files."""

from __future__ import annotations

from dataclasses import MISSING, fields

from lightning_decentral.compression.base import AbstractCompressor
from lightning_decentral.compression.bingrad import BinGrad
from lightning_decentral.compression.cast import Cast
from lightning_decentral.compression.chunk_topk import ChunkTopK
from lightning_decentral.compression.countsketch import CountSketch
from lightning_decentral.compression.dct import DCTTopK
from lightning_decentral.compression.dgc import DGC
from lightning_decentral.compression.fp4 import FP4
from lightning_decentral.compression.fp8 import FP8
from lightning_decentral.compression.identity import Identity
from lightning_decentral.compression.int8 import Int8
from lightning_decentral.compression.lattice import Lattice
from lightning_decentral.compression.natural import NaturalCompression
from lightning_decentral.compression.nuqsgd import NUQSGD
from lightning_decentral.compression.orq import ORQ
from lightning_decentral.compression.powersgd import PowerSGD
from lightning_decentral.compression.qsgd import QSGD
from lightning_decentral.compression.randomk import RandomBlock, RandomK
from lightning_decentral.compression.sign import OneBitSGD, ScaledSign, SignSGD
from lightning_decentral.compression.terngrad import TernGrad
from lightning_decentral.compression.topk import Threshold, TopK
from lightning_decentral.errors import ConfigurationError, did_you_mean

COMPRESSORS: dict[str, type[AbstractCompressor]] = {
    "identity": Identity,
    "cast": Cast,
    "int8": Int8,
    "fp8": FP8,
    "fp4": FP4,
    "scaled_sign": ScaledSign,
    "signsgd": SignSGD,
    "onebit": OneBitSGD,
    "qsgd": QSGD,
    "terngrad": TernGrad,
    "natural": NaturalCompression,
    "nuqsgd": NUQSGD,
    "bingrad": BinGrad,
    "orq": ORQ,
    "topk": TopK,
    "threshold": Threshold,
    "randomk": RandomK,
    "random_block": RandomBlock,
    "chunk_topk": ChunkTopK,
    "dgc": DGC,
    "powersgd": PowerSGD,
    "lattice": Lattice,
    "countsketch": CountSketch,
    "dct_topk": DCTTopK,
}
"""Every compressor that has a name."""


def compressor(name: str, **options: object) -> AbstractCompressor:
    """Make the compressor of this name.

    Args:
        name: one of `COMPRESSORS`; capitals and hyphens do not matter.
        options: its hyper-parameters; what is left out has its default.

    Raises:
        ConfigurationError: for an unknown name or option; the message lists those that exist.

    Example:
        >>> compressor("int8", bucket=256)
        Int8(bucket=256, stochastic=False)
    """
    key = name.lower().replace("-", "_") if isinstance(name, str) else name
    cls = COMPRESSORS.get(key) if isinstance(key, str) else None
    if cls is None:
        raise ConfigurationError(
            f"Got the compressor {name!r}, need one of {', '.join(COMPRESSORS)}. {did_you_mean(name, COMPRESSORS)}"
        )
    known = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    unknown = [option for option in options if option not in known]
    if unknown:
        listed = ", ".join(
            option if default is MISSING else f"{option}={default!r}" for option, default in known.items()
        )
        raise ConfigurationError(
            f"The compressor {key!r} got the option {unknown[0]!r}, needs one of: {listed or 'it has none'}. Correct "
            "or remove it."
        )
    missing = [option for option, default in known.items() if default is MISSING and option not in options]
    if missing:
        raise ConfigurationError(f"The compressor {key!r} got no {missing[0]!r}, which it needs. Pass {missing[0]}=...")
    return cls(**options)
