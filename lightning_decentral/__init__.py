"""Decentralized, asynchronous and local-update data-parallel training as PyTorch Lightning strategies.

Importing this package registers the names for ``Trainer(strategy=...)``; the classes are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_decentral.registry import install as _install

if TYPE_CHECKING:
    import lightning_decentral.algorithms as algorithms
    import lightning_decentral.callbacks as callbacks
    import lightning_decentral.compression as compression
    import lightning_decentral.topology as topology
    from lightning_decentral.simulation.cluster import Cluster
    from lightning_decentral.strategies import AsyncStrategy, GossipStrategy, SimulatedStrategy, Strategy

__version__ = "0.1.0"

__all__ = [
    "AsyncStrategy",
    "Cluster",
    "GossipStrategy",
    "SimulatedStrategy",
    "Strategy",
    "algorithms",
    "callbacks",
    "compression",
    "topology",
]

_LOCATIONS = {
    "AsyncStrategy": "lightning_decentral.strategies",
    "Cluster": "lightning_decentral.simulation.cluster",
    "GossipStrategy": "lightning_decentral.strategies",
    "SimulatedStrategy": "lightning_decentral.strategies",
    "Strategy": "lightning_decentral.strategies",
}

_install()


def __getattr__(name: str) -> Any:
    if name in _LOCATIONS:
        return getattr(importlib.import_module(_LOCATIONS[name]), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
