"""Decentralized and asynchronous data-parallel training as PyTorch Lightning strategies.

Importing this package registers the names for ``Trainer(strategy=...)``. What users name is here, and is imported when
it is used: the strategies, every algorithm and every topology, `Cluster`, `Simulator`, `Vector` and `plan`.
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
    from lightning_decentral.algorithms import *  # noqa: F403
    from lightning_decentral.flat import Vector
    from lightning_decentral.planning.planner import plan
    from lightning_decentral.simulation.cluster import Cluster
    from lightning_decentral.simulation.simulator import Simulator
    from lightning_decentral.strategies import (
        AsyncStrategy,
        AutoStrategy,
        FabricStrategy,
        GossipStrategy,
        OpenStrategy,
        PipelineStrategy,
        SimulatedStrategy,
        Strategy,
    )
    from lightning_decentral.topology import *  # noqa: F403

__version__ = "0.1.0"

__all__ = [
    "AsyncStrategy",
    "AutoStrategy",
    "Cluster",
    "FabricStrategy",
    "GossipStrategy",
    "OpenStrategy",
    "PipelineStrategy",
    "SimulatedStrategy",
    "Simulator",
    "Strategy",
    "Vector",
    "algorithms",
    "callbacks",
    "compression",
    "plan",
    "topology",
]
"""Beside these, all that `algorithms` and `topology` have in theirs: see `__dir__`."""

_LOCATIONS = {
    "AsyncStrategy": "strategies",
    "AutoStrategy": "strategies",
    "Cluster": "simulation.cluster",
    "FabricStrategy": "strategies",
    "GossipStrategy": "strategies",
    "OpenStrategy": "strategies",
    "PipelineStrategy": "strategies",
    "SimulatedStrategy": "strategies",
    "Simulator": "simulation.simulator",
    "Strategy": "strategies",
    "Vector": "flat",
    "plan": "planning.planner",
}
_ROOMS = ("algorithms", "topology")  # of which every class is here

_install()


def __getattr__(name: str) -> Any:
    if name in _LOCATIONS:
        return getattr(importlib.import_module(f"{__name__}.{_LOCATIONS[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    if name[:1].isupper():  # no module is: whoever asks for one does not wait for torch
        for room in _ROOMS:
            module = importlib.import_module(f"{__name__}.{room}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    classes = (importlib.import_module(f"{__name__}.{room}").__all__ for room in _ROOMS)
    return sorted({*globals(), *__all__, *(name for names in classes for name in names if name[:1].isupper())})
