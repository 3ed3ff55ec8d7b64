"""Communication graphs with mixing weights: pure data that says who sends to whom at which step.

| class | peers per step | symmetric | exact average | numbers of workers |
|---|---|---|---|---|
| `Ring` | 2 | yes | never | 3 or more |
| `Torus` | 4 | yes | never | rows * columns |
| `Hypercube` | log2 n | yes | never | powers of two |
| `Star` | 1; n - 1 for rank 0 | yes | never | 2 or more |
| `Complete` | n - 1 | yes | after 1 round | 1 or more |
| `Exponential` | ceil(log2 n) | no | never | 2 or more |
| `OnePeerExponential` | 1 | no | after log2 n rounds if a power of two | 2 or more |
| `HypercubeMatching` | 1 | yes | after log2 n rounds | powers of two |
| `AlternatingMatching` | 1 | yes | never | even |
| `RandomMatching` | 1 | yes | never | 2 or more |
| `BaseGraph` | 1, or as many as you say | yes | after `2 log(n) / log(k + 1) + 2` rounds at most | 2 or more |
| `EquiStatic` | ceil(log2 n), or as many as you say | no, or yes | never | 2 or more |
| `OnePeerEqui` | 1 | no, or yes | never | 2 or more |
| `RandomRegular` | 4, or as you say | yes | never | 2 or more |
| `SmallWorld` | 4 on average, or as you say | yes | never | 3 or more |
| `Sites` | 1 | no | never | multiples of the sites |
| `BipartiteRing`, `BipartiteExponential` | 2, about 2 log2 n | yes | never | even |
| `DirectedGraph`, `DirectedRounds`, column stochastic | yours | no | never | 2 or more |
| `FromGraph`, `FromMatrix` | yours | yes, yours | yours | 2 or more, 1 or more |
| `Among`: another one, on some of the ranks | as of that one | as of that one | as of that one | any |
| `Placed`: another one, with the workers in another order | as of that one | as of that one | as of that one | any |
| `FastestGraph` | yours, or fewer | yes | yours | 2 or more |
| `Matcha` | half of yours on average, or as you say | yes | never | 2 or more |

The table is about many workers: up to 4, several of these are the complete graph or otherwise exact.
"""

from lightning_decentral.topology.among import Among
from lightning_decentral.topology.base import AbstractPeriodicTopology, AbstractTopology
from lightning_decentral.topology.base_graph import BaseGraph
from lightning_decentral.topology.bipartite import BipartiteExponential, BipartiteRing
from lightning_decentral.topology.custom import FromGraph, FromMatrix
from lightning_decentral.topology.directed import DirectedGraph, DirectedRounds
from lightning_decentral.topology.equitopo import EquiStatic, OnePeerEqui
from lightning_decentral.topology.fastest import FastestGraph
from lightning_decentral.topology.leaders import Leaders
from lightning_decentral.topology.matcha import Matcha
from lightning_decentral.topology.names import TOPOLOGY_NAMES, from_name
from lightning_decentral.topology.of_size import (
    TopologyLike,
    lazy_ring_or_complete,
    one_peer_or_complete,
    ring_or_complete,
)
from lightning_decentral.topology.one_peer import (
    AlternatingMatching,
    HypercubeMatching,
    OnePeerExponential,
    RandomMatching,
)
from lightning_decentral.topology.placement import Placed, mean_cost, placed
from lightning_decentral.topology.random_graphs import RandomRegular, SmallWorld
from lightning_decentral.topology.sites import Sites
from lightning_decentral.topology.spectrum import pairwise_gap
from lightning_decentral.topology.static import Complete, Exponential, Hypercube, Ring, Star, Torus

__all__ = [
    "TOPOLOGY_NAMES",
    "AbstractPeriodicTopology",
    "AbstractTopology",
    "AlternatingMatching",
    "Among",
    "BaseGraph",
    "BipartiteExponential",
    "BipartiteRing",
    "Complete",
    "DirectedGraph",
    "DirectedRounds",
    "EquiStatic",
    "Exponential",
    "FastestGraph",
    "FromGraph",
    "FromMatrix",
    "Hypercube",
    "HypercubeMatching",
    "Leaders",
    "Matcha",
    "OnePeerEqui",
    "OnePeerExponential",
    "Placed",
    "RandomMatching",
    "RandomRegular",
    "Ring",
    "Sites",
    "SmallWorld",
    "Star",
    "TopologyLike",
    "Torus",
    "from_name",
    "lazy_ring_or_complete",
    "mean_cost",
    "one_peer_or_complete",
    "pairwise_gap",
    "placed",
    "ring_or_complete",
]
