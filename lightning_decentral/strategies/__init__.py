"""The methods as Lightning strategies. A strategy knows no method by name: it takes the algorithm as an argument."""

from lightning_decentral.strategies.asynchronous import AsyncStrategy
from lightning_decentral.strategies.auto import AutoStrategy
from lightning_decentral.strategies.base import AbstractDecentralizedStrategy
from lightning_decentral.strategies.fabric import FabricStrategy
from lightning_decentral.strategies.gossip import GossipStrategy
from lightning_decentral.strategies.open import OpenStrategy
from lightning_decentral.strategies.pipeline import PipelineStrategy
from lightning_decentral.strategies.simulated import SimulatedStrategy
from lightning_decentral.strategies.strategy import Strategy

__all__ = [
    "AbstractDecentralizedStrategy",
    "AsyncStrategy",
    "AutoStrategy",
    "FabricStrategy",
    "GossipStrategy",
    "OpenStrategy",
    "PipelineStrategy",
    "SimulatedStrategy",
    "Strategy",
]
