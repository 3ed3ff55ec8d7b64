"""Which graph to gossip on, for so many workers that may send so many messages in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from lightning_decentral.errors import ConfigurationError, TopologyError
from lightning_decentral.planning.planner import Plan, graph_of_sites, on_graph, plan, recommend
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import (
    TOPOLOGY_NAMES,
    AbstractTopology,
    BaseGraph,
    EquiStatic,
    RandomRegular,
    Ring,
    SmallWorld,
    from_name,
)

_PLANNED_STEPS = 12
_ROUNDING = 1e-9  # of eigenvalues
_FEW_SEEDS = 3  # of random graphs: the best of them


@dataclass(frozen=True)
class GraphChoice:
    """A graph, and why.

    Attributes:
        topology: it.
        reason: in a sentence or two, with the numbers.
        considered: all that were possible, the chosen one among them.
        plan: what D-PSGD on it costs, where a cluster was given.
    """

    topology: AbstractTopology
    reason: str
    considered: tuple[AbstractTopology, ...]
    plan: Plan | None = None


def recommend_graph(
    workers: int,
    degree: int = 1,
    cluster: Cluster | None = None,
    model_bytes: int = 100_000_000,
    static: bool = False,
    symmetric: bool = False,
    smallest_eigenvalue: float = -1.0,
) -> GraphChoice:
    """Choose the graph that averages fastest, of those on which nobody sends more than so many messages in a step.

    Without a cluster a message costs the same everywhere: the best graph is the one with the largest spectral gap, of
    equal ones the one that needs fewer rounds, then the one with fewer messages. With a cluster D-PSGD is planned on
    each: it is the fastest one, and of those within 5 % of it the one that averages best, as `planner.recommend` has
    it.

    Considered are the graphs with a name, `BaseGraph`, `EquiStatic`, `RandomRegular` and `SmallWorld` with this degree,
    random ones with three seeds (`lazy`, too), and `Sites` where the cluster has some.

    Args:
        workers: how many, at least 2.
        degree: messages that one worker may send in a step, at least 1.
        cluster: how fast its links are.
        model_bytes: of the trainable parameters, with a cluster.
        static: whether it has to stay the same, as for D2, EXTRA and CHOCO; then it needs a degree of 2 at least.
        symmetric: whether each message has to be answered with the same weight, as for D2, EXTRA and CHOCO.
        smallest_eigenvalue: above which those of a symmetric graph have to be: -1/3 for D2, -1 for EXTRA.

    Returns:
        The graph, with the reason.

    Cost: the eigenvalues of about 25 matrices; with a cluster the simulator makes a dozen steps on each graph, too.

    Raises:
        ConfigurationError: if there is no such graph.

    Example:
        >>> recommend_graph(8).topology
        OnePeerExponential(size=8)
        >>> recommend_graph(12, degree=2).topology
        BaseGraph(size=12, degree=2)
        >>> recommend_graph(9, degree=2, static=True, symmetric=True, smallest_eigenvalue=-1 / 3).topology  # for D2
        Ring(size=9, lazy=False)
    """
    if workers < 2 or degree < 1:
        raise ConfigurationError(
            f"recommend_graph got {workers} workers and degree={degree}, needs at least 2 and 1. Use degree=1 for one "
            "message in a step."
        )
    symmetric = symmetric or smallest_eigenvalue > -1.0  # others have no such eigenvalue
    possible = [
        graph
        for graph in _candidates(workers, degree, cluster)
        if _messages(graph) <= degree
        and graph.is_connected
        and graph.spectral_gap > 0.0
        and (graph.period == 1 or not static)
        and (graph.is_symmetric or not symmetric)
        and (smallest_eigenvalue <= -1.0 or graph.smallest_eigenvalue > smallest_eigenvalue + _ROUNDING)
    ]
    if not possible:
        raise ConfigurationError(
            f"recommend_graph({workers}, degree={degree}, static={static}, symmetric={symmetric}) found no graph that "
            "is connected. Use degree=2, or static=False."
        )
    if cluster is None:
        best = max(possible, key=_agreement)
        return GraphChoice(best, f"{_told(best)}{_of(possible)}.", tuple(possible))
    plans = [plan(on_graph("dpsgd", graph), workers, model_bytes, cluster, _PLANNED_STEPS) for graph in possible]
    # Of plans that are alike the first is taken: the graphs that average best come first.
    ordered = sorted(zip(possible, plans, strict=True), key=lambda both: _agreement(both[0]), reverse=True)
    chosen = recommend([each for _, each in ordered])
    best = next(graph for graph, its in ordered if its is chosen.plan)
    reason = f"{_told(best)}. D-PSGD makes {chosen.plan.steps_per_second:.3g} steps/s of all workers{_of(possible)}."
    return GraphChoice(best, reason, tuple(possible), chosen.plan)


def _candidates(workers: int, degree: int, cluster: Cluster | None) -> Iterator[AbstractTopology]:
    """Yield graphs that exist for so many workers; simpler ones first."""
    first = ("one_peer_exponential", "ring", "hypercube", "exponential", "complete")
    named = [name for name in (*first, *TOPOLOGY_NAMES) if not name.startswith("bipartite")]  # these are for calls
    makers: list[Callable[[], AbstractTopology]] = [partial(from_name, name, workers) for name in dict.fromkeys(named)]
    makers.append(partial(BaseGraph, workers, degree))
    makers.append(partial(Ring, workers, lazy=True))
    even = degree - degree % 2
    for seed in range(_FEW_SEEDS):
        makers.append(partial(EquiStatic, workers, degree, seed=seed))
        makers.append(partial(EquiStatic, workers, max(1, degree // 2), symmetric=True, seed=seed))
        for lazy in (False, True):
            makers.append(partial(RandomRegular, workers, even if workers % 2 else degree, seed=seed, lazy=lazy))
        makers.append(partial(SmallWorld, workers, even, seed=seed))
    for make in makers:
        try:
            yield make()
        except TopologyError:  # not of so many workers, or not of this degree
            continue
    of_sites = None if cluster is None else graph_of_sites(cluster)
    if of_sites is not None:
        yield of_sites


def _messages(graph: AbstractTopology) -> int:
    steps = range(graph.period or 20)
    return max(len(graph.out_neighbors(rank, step)) for rank in range(graph.size) for step in steps)


def _agreement(graph: AbstractTopology) -> tuple[float, float, int]:
    return round(graph.spectral_gap, 9), -graph.rounds_to_consensus(), -len(graph.edges())


def _told(graph: AbstractTopology) -> str:
    messages = _messages(graph)
    return (
        f"{graph!r}: a spectral gap of {graph.spectral_gap:.3g} for {messages} message{'s' * (messages > 1)} in a "
        f"step; 0.1 % of a disagreement is left after {graph.rounds_to_consensus():g} steps"
    )


def _of(possible: list[AbstractTopology]) -> str:
    return f", the best of {len(possible)} graphs" if len(possible) > 1 else ", the only graph"
