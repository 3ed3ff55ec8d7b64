"""Which method to take: for these workers and this network, for data that may differ, and for this optimizer.

The planner knows bytes and seconds. What it does not know is which methods reach the optimum when the data of the
workers differ, and with which optimizers; the table of methods says that (`Method.suits`, `Method.adaptive`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import METHODS, Method
from lightning_decentral.planning.placing import Costs, costs_of, on_graph, on_places
from lightning_decentral.planning.planner import (
    AS_FAST,
    Plan,
    algorithms_of,
    called,
    plan,
    plan_ddp,
    recommend,
    topology_of,
    with_graph_of_sites,
)
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.topology import Placed, mean_cost

Data = Literal["alike", "differ"]
"""Whether the data of all workers look alike, as after a shuffle, or differ, as with a few classes on each worker."""

Optimizer = Literal["sgd", "momentum", "adaptive"]
"""Plain SGD; SGD with momentum; Adam and others that divide by the size of gradients."""

GRAPHS = ("one_peer_exponential", "base_graph", "ring", "exponential")  # of methods that run on any of them
_MUCH_FASTER = 1.2  # a method that was left out is told of if it makes so many times as many steps
_MUCH_WAITING = 0.3  # of a step: from there on fewer bytes are worth a thought


@dataclass(frozen=True)
class Choice:
    """A method for a run, and why.

    Attributes:
        algorithm: it, resolved for the number of workers.
        plan: what it costs.
        reasons: sentences: what it is fast by, what was left out and why, what to try next.
        plans: of all that could have been chosen, the chosen one among them.
    """

    algorithm: AbstractAlgorithm
    plan: Plan
    reasons: tuple[str, ...]
    plans: tuple[Plan, ...]

    @property
    def text(self) -> str:
        """The reasons, as one paragraph."""
        return " ".join(self.reasons)


def choose(
    workers: int,
    model_bytes: int,
    cluster: Cluster,
    data: Data = "alike",
    optimizer: Optimizer = "sgd",
    asynchronous: bool = True,
    element_bytes: int = 4,
    seed: int = 0,
) -> Choice:
    """Choose a method: among those that suit data and optimizer by `planner.recommend`.

    Considered are methods that send what they have as it is, in every step: what compression and local steps cost in
    further steps is not known here. Where links are not alike, each is considered in the order of the ranks, and with
    its workers in the places that `topology.placed` finds. Where the network stays the limit, the reasons name what
    sends less.

    Args:
        workers: how many.
        model_bytes: of the trainable parameters, as they are sent.
        cluster: how fast its workers compute and its links send.
        data: whether the data of the workers look alike or differ. If they differ, methods whose fixed point depends on
            it are left out.
        optimizer: the user's.
        asynchronous: whether methods may be chosen whose workers do not wait for each other.
        element_bytes: of one parameter; 2 in half precision.
        seed: of the cluster's jitter.

    Returns:
        The choice.

    Raises:
        ConfigurationError: for an unknown kind of data or optimizer, or numbers that the planner refuses.

    Example:
        >>> slow = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=25e6, latency_seconds=0.1)
        >>> choose(8, 20_000_000, slow).algorithm
        ADPSGD(topology=BipartiteExponential(size=8))
        >>> choose(8, 20_000_000, slow, data="differ").algorithm
        GradientTracking(topology=OnePeerExponential(size=8))
    """
    for name, value, kind in (("data", data, Data), ("optimizer", optimizer, Optimizer)):
        if value not in get_args(kind):
            raise ConfigurationError(
                f"A choice got {name}={value!r}, needs one of {', '.join(map(repr, get_args(kind)))}. Use "
                f"{get_args(kind)[0]!r} if you do not know."
            )

    def plans(algorithms: Iterable[AbstractAlgorithm]) -> list[Plan]:
        return [plan(each, workers, model_bytes, cluster, 6, seed, element_bytes) for each in algorithms]

    possible = candidates(workers, model_bytes, cluster, data, optimizer, asynchronous)
    planned = plans(possible)
    recommended = recommend(planned)
    best = recommended.plan
    algorithm = next(each for each, its in zip(possible, planned, strict=True) if its is best)
    considered = [method for method in METHODS.values() if method.suits]
    left_out = [m for m in considered if not _suits(m, data, optimizer)]
    uneven = bool(cluster.slowdown) or cluster.jitter != "none"
    waiting_for_nobody = [m for m in considered if m.asynchronous and not asynchronous and uneven and m not in left_out]
    reasons = [
        recommended.reason,
        *_places(algorithm, costs_of(cluster, workers, model_bytes), plans),
        *_left_out(best, plans(_algorithms(left_out, workers, model_bytes, cluster)), data, optimizer),
        *_not_asynchronous(best, plans(_algorithms(waiting_for_nobody, workers, model_bytes, cluster))),
        *_ddp(best, plan_ddp(workers, model_bytes, cluster, 6, seed)),
        *_momentum(best, data, optimizer),
        *_network(best, cluster),
    ]
    return Choice(algorithm, best, tuple(reasons), tuple(planned))


def candidates(
    workers: int,
    model_bytes: int,
    cluster: Cluster,
    data: Data = "alike",
    optimizer: Optimizer = "sgd",
    asynchronous: bool = True,
) -> list[AbstractAlgorithm]:
    """List what `choose` chooses from, resolved; for its arguments see there."""
    methods = (method for method in METHODS.values() if _suits(method, data, optimizer))
    return _algorithms(
        (method for method in methods if asynchronous or not method.asynchronous), workers, model_bytes, cluster
    )


def _algorithms(methods: Iterable[Method], workers: int, model_bytes: int, cluster: Cluster) -> list[AbstractAlgorithm]:
    graphs = GRAPHS if workers > 2 else ("complete",)
    members = cluster.workers_per_site
    in_order = [
        algorithm.on_hosts(members).resolved(workers)
        for method in methods
        for algorithm in with_graph_of_sites(method, cluster, algorithms_of(method.name, workers, graphs))
        if members > 1 or algorithm.on_hosts(members) is algorithm  # what is made for hosts needs some
    ]
    costs = costs_of(cluster, workers, model_bytes)
    placed = (on_places(algorithm, costs) for algorithm in in_order)
    return [*in_order, *(algorithm for algorithm in placed if algorithm is not None)]


def _suits(method: Method, data: Data, optimizer: Optimizer) -> bool:
    return data in method.suits and (data == "alike" or optimizer != "adaptive" or method.adaptive)


def _places(
    algorithm: AbstractAlgorithm, costs: Costs, plans: Callable[[Iterable[AbstractAlgorithm]], list[Plan]]
) -> list[str]:
    """Tell in which order the workers take the places of the graph, if not in that of their ranks, and why."""
    graph = topology_of(algorithm)
    if not isinstance(graph, Placed):
        return []
    (in_order,) = plans([on_graph(algorithm, graph.graph)])
    seconds, before = mean_cost(graph, costs), mean_cost(graph.graph, costs)
    return [
        f"Its places are taken by the workers {', '.join(map(str, graph.ranks))}, in this order: a message takes "
        f"{seconds:.3g} s on average; in the order of the ranks it would take {before:.3g} s, and all together would "
        f"make {in_order.steps_per_second:.3g} steps/s."
    ]


def _left_out(best: Plan, others: Sequence[Plan], data: Data, optimizer: Optimizer) -> list[str]:
    faster = max(others, key=lambda each: each.steps_per_second, default=None)
    if faster is None or data == "alike" or faster.steps_per_second <= (1 + AS_FAST) * best.steps_per_second:
        return []
    why = (
        "where it rests depends on how the data are spread"
        if optimizer != "adaptive"
        else "where it rests depends on how the data are spread, or Adam's steps do not come to rest"
    )
    return [
        f"Left out, because the data of the workers differ: {called(faster)}, "
        f"{faster.speedup_over(best):.2f} times as fast; {why}."
    ]


def _not_asynchronous(best: Plan, others: Sequence[Plan]) -> list[str]:
    faster = max(others, key=lambda each: each.steps_per_second, default=None)
    if faster is None or faster.steps_per_second < _MUCH_FASTER * best.steps_per_second:
        return []
    return [
        f"Without waiting for slow workers {called(faster)} would make {faster.speedup_over(best):.2f} times as many "
        "steps; an asynchronous method has to be asked for by its name."
    ]


def _ddp(best: Plan, ddp: Plan) -> list[str]:
    if best.speedup_over(ddp) > 1 + AS_FAST:
        return []
    return [
        f"Lightning's own strategy='ddp' makes {ddp.steps_per_second:.3g} steps/s here: nothing is won by leaving it, "
        "unless you compare methods."
    ]


def _momentum(best: Plan, data: Data, optimizer: Optimizer) -> list[str]:
    if data == "alike" or optimizer != "momentum" or not best.topology:  # without a graph all take the same steps
        return []
    return [
        "With momentum momentum_tracking is exact, too; qg_dsgdm sends half as much and keeps momentum from adding to "
        "D-PSGD's error. Both bring a momentum of their own: give them SGD without one."
    ]


def _network(best: Plan, cluster: Cluster) -> list[str]:
    slowest = max([1.0, *cluster.slowdown.values()]) * cluster.compute_seconds
    if best.asynchronous or best.seconds_per_step * (1 - _MUCH_WAITING) < slowest:
        return []
    return [
        "The network stays the limit: choco_sgd sends a quarter of the bytes or less, local_sgd and diloco exchange in "
        "a few steps only. What that costs in further steps depends on the model: `lightning-decentral compare`."
    ]
