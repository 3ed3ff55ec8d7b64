"""The planner: what a method would cost on a cluster, without tensors.

It runs the very coroutines of the methods in the simulator, on vectors of which only the size is known, so that bytes
and seconds cannot drift from what the methods do. PyTorch's own `DistributedDataParallel`, which is no coroutine, is
computed with a formula; what `GradientCompression` sends of its buckets is counted by its own coroutines.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch

from lightning_decentral.errors import ConfigurationError, did_you_mean
from lightning_decentral.flat import SizeOnlyVector
from lightning_decentral.gradient_compression.scheme import Scheme
from lightning_decentral.gradient_compression.sizes import Round, bytes_sent, chosen, rounds
from lightning_decentral.methods import METHODS as TABLE
from lightning_decentral.methods import Method
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm, Mixing
from lightning_decentral.simulation.beside import Beside
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import AbstractTopology, Placed, Sites, from_name
from lightning_decentral.traffic import all_reduce_bytes

DDP_BUCKET_BYTES = 25 * 1024 * 1024  # PyTorch's default, bucket_cap_mb=25
DDP_FIRST_BUCKET_BYTES = 1024 * 1024  # its first bucket is smaller, so that communication begins early
DDP_AT_ONCE = 2  # all-reduces under way at a time: gloo's process groups have two threads
BACKWARD_SHARE = 2 / 3  # of a gradient's seconds: a backward pass costs about twice a forward pass
AS_FAST = 0.05  # methods whose throughput differs by less are equally fast: the model of a cluster is no better
EXACT = ("ddp", *(method.name for method in TABLE.values() if method.exact))  # what is sent arrives as it was
METHODS = (*EXACT, *(method.name for method in TABLE.values() if not method.exact))
TOPOLOGIES = ("ring", "one_peer_exponential", "exponential", "complete")
_LONGEST_NAME = 60  # of a graph in a table


@dataclass(frozen=True)
class Plan:
    """What a method costs in its steady state. *step* means one local gradient of one worker.

    Attributes:
        method: the algorithm with its hyper-parameters.
        topology: its graph; empty if it has none.
        workers: how many train together.
        seconds_per_step: until all workers have made one more step; where they do not wait for each other, the median
            over the workers of their own pace.
        bytes_per_step: payload bytes that a worker sends per step, on average over the workers; what those send that
            only serve is divided among those that train.
        exposed_seconds_per_step: of these seconds, how many a worker does nothing but wait; averaged over the workers.
        limit_seconds: the shortest step that hiding all communication could give: the largest of computing, of sending
            the bytes of the busiest worker, of carrying those of the busiest link between sites, and of the latencies
            that follow each other; where workers do not wait for each other, the median of their own ones. Whom a
            server serves is no faster than its link; a server that trains beside does not wait for that, if it is
            the only one.
        limit_steps_per_second: of all workers together, each at its limit.
        steps_per_second: of all workers together.
        asynchronous: whether the workers go on without the slowest one.
        spectral_gap: 1 minus the factor by which one step's averaging shrinks the distance from consensus; 1 is exact.
        rounds_to_consensus: averaging steps until 0.1 % of a disagreement is left.
        server_limits_from: from how many workers like these on a server's link is the limit, and not what they compute;
            ``None``: there is no server.
    """

    method: str
    topology: str
    workers: int
    seconds_per_step: float
    bytes_per_step: float
    exposed_seconds_per_step: float
    limit_seconds: float
    limit_steps_per_second: float
    steps_per_second: float
    asynchronous: bool
    spectral_gap: float
    rounds_to_consensus: float
    server_limits_from: int | None = None

    def speedup_over(self, other: Plan) -> float:
        """Return how many times as many steps per second this makes as another plan, all workers together."""
        return self.steps_per_second / other.steps_per_second


@dataclass(frozen=True)
class Recommendation:
    """A plan to use, and why: one or two sentences with the numbers."""

    plan: Plan
    reason: str


def plan(
    algorithm: AbstractAlgorithm,
    workers: int,
    model_bytes: int,
    cluster: Cluster,
    steps: int = 20,
    seed: int = 0,
    element_bytes: int = 4,
    buffer_bytes: int = 0,
) -> Plan:
    """Compute what an algorithm costs on a cluster.

    The first few steps, in which the pipeline fills, are not counted. A slow worker holds up its neighbours in the next
    step and theirs in the one after: the pace that all settle on is its own, and is what is reported. Where something
    happens in every so many steps only (see `AbstractAlgorithm.period`), whole periods are measured.

    Args:
        algorithm: the method.
        workers: how many.
        model_bytes: of the trainable parameters, uncompressed.
        cluster: how fast its workers compute and its links send. Failures are left out.
        steps: how many steps to measure, at least, after a few to warm up.
        seed: of partners drawn at random and of the cluster's jitter.
        element_bytes: of one parameter; 2 in half precision. Compressed messages depend on the number of parameters.
        buffer_bytes: of buffers that are averaged in training, as with ``buffers="gossip"``; of methods whose workers
            wait for each other.

    Returns:
        The plan.

    Raises:
        ConfigurationError: if the algorithm cannot run with so many workers, or a number is out of range.

    Example:
        >>> cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=125e6)
        >>> from lightning_decentral.algorithms import DPSGD
        >>> round(plan(DPSGD(), workers=16, model_bytes=100_000_000, cluster=cluster).seconds_per_step, 6)
        0.8
    """
    _check(workers, model_bytes, steps)
    cluster = dataclasses.replace(cluster, failures={})
    vector = SizeOnlyVector(model_bytes, element_bytes)
    beside = _averages_beside(algorithm, workers, cluster, buffer_bytes) if buffer_bytes else None
    simulator = Simulator(algorithm, [vector.clone() for _ in range(workers)], cluster, seed, beside)
    algorithm = simulator.algorithm
    topology = topology_of(algorithm)
    period = algorithm.period(workers)
    if not isinstance(period, int) or period < 1:
        raise ConfigurationError(
            f"{type(algorithm).__name__}.period({workers}) gave {period!r}, needs a whole number of at least 1: steps "
            "after which what a worker sends repeats itself. Return 1 if it is the same in each step."
        )
    warm_up, steps = (math.ceil(count / period) * period for count in (2, steps))
    training = [rank for rank in range(workers) if algorithm.trains(rank)]
    times = {rank: [0.0] for rank in training}
    for worker in simulator.workers:
        worker.read_gradient = vector.clone
    for _, worker in simulator.demands(warm_up + steps):
        if (
            marks := times.get(worker.rank)
        ) is not None and worker.step < warm_up + steps:  # and not an update for others
            del marks[worker.step + 1 :]  # a step is made with its update, or with its gradient if it has none
            marks.append(simulator.seconds)
    _require_steps(algorithm, times, warm_up)
    seconds = [(marks[-1] - marks[warm_up]) / (len(marks) - 1 - warm_up) for marks in times.values()]
    asynchronous = isinstance(algorithm, AbstractAsynchronousAlgorithm)
    # Where workers wait for each other: the pace of the front that leaves no worker behind.
    together = (max(marks[-1] for marks in times.values()) - max(marks[warm_up] for marks in times.values())) / steps
    per_step = median(seconds) if asynchronous else together
    compute = [cluster.compute_seconds * cluster.slowdown.get(rank, 1.0) for rank in range(workers)]
    sent = [traffic.bytes_sent / (warm_up + steps) for traffic in simulator.traffic]
    sending = [cluster.transfer_seconds(1, rank, rank) * bytes_sent for rank, bytes_sent in enumerate(sent)]
    keepers = algorithm.keepers(workers)
    one_model = algorithm.shards > 1 or len(keepers) < workers
    servers = [rank for rank in range(workers) if rank not in times or (one_model and rank in keepers)]
    calls_nobody = {rank for rank in servers if algorithm.shards == 1}  # of several servers each calls the others
    serving = max((sending[rank] for rank in servers), default=0.0)  # whoever they serve is no faster than that
    site_links = (*simulator.site_uplinks, *simulator.site_downlinks)
    shared = cluster.site_link_seconds(max(link.num_bytes for link in site_links)) / (warm_up + steps)
    in_sequence = _latency_seconds(algorithm, workers, cluster, warm_up + steps, seed)
    own_limits = [
        max(compute[rank], 0.0 if rank in calls_nobody else max(sending[rank], serving, shared, in_sequence))
        for rank in training
    ]
    limit = median(own_limits) if asynchronous else max(own_limits)
    served = [rank for rank in training if rank not in calls_nobody]
    limits_from = None
    if serving > 0.0 and served:  # what it sends to one of them in a step takes a share of that
        limits_from = math.floor(median(compute[rank] for rank in served) * len(served) / serving) + 1
        limits_from += workers - len(served)
    mixing = _as_often(algorithm.mixing(workers), simulator, period) if asynchronous else algorithm.mixing(workers)
    return Plan(
        method=repr(algorithm),
        topology=_called(topology) if topology is not None else "",
        workers=workers,
        seconds_per_step=per_step,
        bytes_per_step=sum(sent) / len(training),
        exposed_seconds_per_step=mean(simulator.traffic[rank].exposed_seconds for rank in training) / (warm_up + steps),
        limit_seconds=limit,
        limit_steps_per_second=sum(map(_rate, own_limits)) if asynchronous else len(training) * _rate(limit),
        steps_per_second=sum(_rate(s) for s in seconds) if asynchronous else len(training) * _rate(per_step),
        asynchronous=asynchronous,
        spectral_gap=mixing.spectral_gap,
        rounds_to_consensus=mixing.rounds_to_consensus,
        server_limits_from=limits_from,
    )


def _as_often(mixing: Mixing, simulator: Simulator, period: int) -> Mixing:
    """Return how fast models come together if calls go on beside steps, so that not every step has its own."""
    calls = [
        (traffic.exchanges, worker.step) for traffic, worker in zip(simulator.traffic, simulator.workers, strict=True)
    ]
    shares = [made * period / steps for made, steps in calls if made and steps]
    share = min(1.0, mean(shares) if shares else 1.0)
    if share == 1.0 or mixing.spectral_gap == 1.0:
        return mixing
    gap = 1.0 - (1.0 - mixing.spectral_gap) ** share
    return Mixing(gap, math.ceil(mixing.rounds_to_consensus / share))


def plan_ddp(
    workers: int,
    model_bytes: int,
    cluster: Cluster,
    steps: int = 20,
    seed: int = 0,
    scheme: Scheme | None = None,
) -> Plan:
    r"""Compute by a formula what `DistributedDataParallel` costs: an all-reduce in buckets during the backward pass.

    With ``C`` the seconds of the slowest worker's gradient, one third of it forward. The first bucket has 1 MiB, the
    others 25 MiB at most. Bucket ``k``, that is ready with its share of the backward pass, is reduced in ``a_k``
    seconds, of which it needs the links for ``t_k``; two are under way at a time::

        begin_k = max(ready_k, begin_{k-1} + t_{k-1}, end_{k-2})
        end_k = begin_k + a_k

    The last one's end is the step's. Real buckets end where a tensor does, which is not known here. With one worker
    nothing is sent. Under jitter ``C`` is the mean over `steps` draws of the slowest worker.

    With `GradientCompression` ``a_k`` and ``t_k`` are those of the rounds that the compressed bucket makes, in the way
    that is chosen for it; compressing takes no time here.

    Args:
        workers: how many.
        model_bytes: of the gradients, uncompressed.
        cluster: how fast its workers compute and its links send. Failures are left out.
        steps: how many draws of the jitter to average.
        seed: of the jitter.
        scheme: how `GradientCompression` exchanges them, in float32; ``None``: as they are.

    Returns:
        The plan.
    """
    _check(workers, model_bytes, steps)
    cluster.check_ranks(workers)
    rng = random.Random(seed)
    draws = [[cluster.gradient_seconds(rank, rng) for rank in range(workers)] for _ in range(steps)]
    compute = mean(max(draw) for draw in draws)
    at_once = dataclasses.replace(cluster, rendezvous=False)
    if scheme is None or workers == 1:
        sent = float(all_reduce_bytes(model_bytes, workers))
        limit = max(compute, at_once.ring_seconds(model_bytes, workers))
    else:
        elements = math.ceil(model_bytes / torch.float32.itemsize)
        sent = bytes_sent(scheme, chosen(scheme, elements, workers), elements, workers)
        limit = max(compute, *_exchange_seconds(scheme, elements, workers, at_once))
    seconds = _ddp_seconds(workers, model_bytes, cluster, compute, scheme)
    own_compute = mean(second for draw in draws for second in draw)
    return Plan(
        method="DistributedDataParallel" if scheme is None else f"DistributedDataParallel({scheme.compressor})",
        topology="",
        workers=workers,
        seconds_per_step=seconds,
        bytes_per_step=sent,
        exposed_seconds_per_step=seconds - own_compute,
        limit_seconds=limit,
        limit_steps_per_second=workers * _rate(limit),
        steps_per_second=workers * _rate(seconds),
        asynchronous=False,
        spectral_gap=1.0,
        rounds_to_consensus=1,
    )


def _ddp_seconds(workers: int, model_bytes: int, cluster: Cluster, compute: float, scheme: Scheme | None) -> float:
    """Return the seconds of one step of `DistributedDataParallel`: see `plan_ddp`."""

    def exchange(bucket: int) -> tuple[float, float]:
        """Seconds on the links, and until the last worker has the mean."""
        if workers == 1:
            return 0.0, 0.0
        if scheme is None:
            return cluster.ring_transfer_seconds(bucket, workers), cluster.ring_seconds(bucket, workers)
        transfer, latency = _exchange_seconds(scheme, math.ceil(bucket / torch.float32.itemsize), workers, cluster)
        return transfer, transfer + latency

    ends = [0.0] * DDP_AT_ONCE
    links_free, reduced = 0.0, 0
    while reduced < model_bytes:
        bucket = min(DDP_BUCKET_BYTES if reduced else DDP_FIRST_BUCKET_BYTES, model_bytes - reduced)
        reduced += bucket
        ready = compute * (1 - BACKWARD_SHARE + BACKWARD_SHARE * reduced / model_bytes)
        begin = max(ready, links_free, ends[-DDP_AT_ONCE])
        transfer, seconds = exchange(bucket)
        links_free = begin + transfer
        ends.append(begin + seconds)
    return max(ends)


def _exchange_seconds(scheme: Scheme, elements: int, workers: int, cluster: Cluster) -> tuple[float, float]:
    """Price one exchange of a float32 vector once everybody is there: seconds of sending, and of latencies in sequence.

    Its rounds are those that `GradientCompression` makes; compressing takes no time here.
    """
    coroutines = rounds(scheme, chosen(scheme, elements, workers), elements, workers)
    priced = [[_round_seconds(one, workers, cluster) for one in each] for each in coroutines]
    transfer = sum(seconds for each in priced for seconds, _ in each)
    return transfer, max(sum(latency for _, latency in each) for each in priced)  # they run beside each other


def _round_seconds(one: Round, workers: int, cluster: Cluster) -> tuple[float, float]:
    """Price one round: seconds of sending, and of latencies that follow each other."""
    if one.pattern == "to_all":
        transfer = cluster.all_to_all_transfer_seconds(one.bytes_sent, workers)
        return transfer, cluster.largest_latency_seconds(workers)
    whole = 1 << 30  # what a long vector takes, by its bytes
    transfer = cluster.ring_transfer_seconds(whole, workers) / max(1, all_reduce_bytes(whole, workers))
    latency = cluster.ring_seconds(0, workers)
    return one.bytes_sent * transfer, latency if one.pattern == "twice_around" else latency / 2


def compare_plans(
    workers: int,
    model_bytes: int,
    cluster: Cluster,
    methods: Sequence[str] = EXACT,
    topologies: Sequence[str] = TOPOLOGIES,
    steps: int = 6,
    seed: int = 0,
    element_bytes: int = 4,
) -> list[Plan]:
    """Plans of several methods: D-PSGD on each topology, others that do not say so once with their default one.

    A default topology that does not exist for so many workers is left out, as is what needs two workers if there is
    one. A topology that was asked for must exist. Where the cluster has sites for which there is a `Sites`, that one is
    among the default topologies.

    Args:
        workers: how many.
        model_bytes: of the trainable parameters, as they are sent.
        cluster: how fast its workers compute and its links send.
        methods: some of `METHODS`. Those that compress are planned only if asked for: what their loss costs in
            further steps is not known here.
        topologies: for D-PSGD, and others that say so in the table of methods (`Method.graphs`), some of
            `lightning_decentral.topology.TOPOLOGY_NAMES`.
        steps: how many steps to measure.
        seed: of partners drawn at random and of the cluster's jitter.
        element_bytes: of one parameter; 2 in half precision.

    Returns:
        The plans, in the order of the methods and topologies.

    Raises:
        ConfigurationError: if there is no such method or topology.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigurationError(
                f"Got the method {method!r}, need some of {', '.join(METHODS)}. {did_you_mean(method, METHODS)} "
                "A method of your own is planned from Python, by plan(method, workers, model_bytes, cluster)."
            )
    _check(workers, model_bytes, steps)
    cluster.check_ranks(workers)
    plans = []
    for method in methods:
        if method == "ddp":
            plans.append(plan_ddp(workers, model_bytes, cluster, steps, seed))
            continue
        algorithms = algorithms_of(method, workers, topologies)
        if tuple(topologies) == TOPOLOGIES:
            algorithms = with_graph_of_sites(TABLE[method], cluster, algorithms)
        for algorithm in algorithms:
            plans.append(plan(algorithm, workers, model_bytes, cluster, steps, seed, element_bytes))
    return plans


def with_graph_of_sites(
    method: Method, cluster: Cluster, algorithms: Iterable[AbstractAlgorithm]
) -> Iterable[AbstractAlgorithm]:
    """Give some algorithms, and after them one on the graph for a cluster's sites, if there is one.

    Args:
        method: of the algorithms; it runs on several graphs, or nothing is added.
        cluster: with sites or without.
        algorithms: of this method.
    """
    yield from algorithms
    graph = graph_of_sites(cluster) if method.graphs else None
    if graph is not None:
        yield on_graph(method.name, graph)


def graph_of_sites(cluster: Cluster) -> AbstractTopology | None:
    """Return the graph for a cluster's sites, if each has equally many workers, at least two."""
    count, sizes = len(cluster.sites), {len(site) for site in cluster.sites}
    if count < 2 or len(sizes) > 1 or sizes == {1}:
        return None
    ranks = tuple(rank for site in cluster.sites for rank in site)
    graph = Sites(len(ranks), count)
    return graph if ranks == tuple(range(len(ranks))) else Placed(graph, ranks)


def recommend(plans: Sequence[Plan]) -> Recommendation:
    """Choose the plan to use: the fastest, and among those that are within 5 % of it the one whose workers agree best.

    Throughput alone would prefer, on a fast network, a method that averages badly for a gain too small to notice.

    Args:
        plans: for the same workers, model and cluster; at least one.

    Returns:
        The plan, and one or two sentences on why.

    Raises:
        ConfigurationError: if there is no plan.
    """
    if not plans:
        raise ConfigurationError("A recommendation needs at least 1 plan, got 0. Ask for more methods.")
    fastest = max(plan.steps_per_second for plan in plans)
    as_fast = [plan for plan in plans if plan.steps_per_second >= (1 - AS_FAST) * fastest]
    # Gap 1 is an exact average within a period, which may be several rounds. Then: who sends less, then the first.
    best = max(as_fast, key=lambda plan: (round(plan.spectral_gap, 9), -plan.rounds_to_consensus, -plan.bytes_per_step))
    baseline = plans[0]
    parts = [f"{best.steps_per_second:.3g} steps/s of all {best.workers} workers together"]
    if best is not baseline:
        parts.append(f"{best.speedup_over(baseline):.2f} times {called(baseline)}")
    if len(as_fast) > 1:
        parts.append(f"of the {len(as_fast)} plans within {AS_FAST:.0%} of the fastest the one that averages best")
    agreement = f"0.1 % of a disagreement is left after {best.rounds_to_consensus:g} steps"
    reason = f"{called(best)}: {', '.join(parts)} ({agreement})."
    return Recommendation(best, f"{reason} {_caution(best, plans)}")


def _caution(best: Plan, plans: Sequence[Plan]) -> str:
    waiting = [plan for plan in plans if not plan.asynchronous]
    if best.asynchronous and waiting:
        other = recommend(waiting).plan
        return (
            f"The best method that waits, {called(other)}, makes {other.steps_per_second:.3g} steps/s; the workers' "
            "shares of the steps differ with their speeds, so shuffle the data over all of them."
        )
    share = best.exposed_seconds_per_step / best.seconds_per_step if best.seconds_per_step else 0.0
    return f"Its workers wait during {min(share, 1.0):.0%} of a step of {best.seconds_per_step:.3g} s."


def called(plan: Plan) -> str:
    """Tell the method and its graph, without other options."""
    name = plan.method.split("(")[0]
    return f"{name} on {plan.topology}" if plan.topology else name


def algorithms_of(method: str, workers: int, topologies: Sequence[str]) -> Iterable[AbstractAlgorithm]:
    """Yield what one of `METHODS` but DDP stands for: one algorithm, or one on each of some topologies.

    Args:
        method: its name.
        workers: how many.
        topologies: for a method that is planned on several (`Method.graphs`). Of `TOPOLOGIES`, the default, those that
            are not for so many workers are left out.

    Raises:
        ConfigurationError: for a topology that was asked for and is not for so many workers.
    """
    if not TABLE[method].graphs:
        yield TABLE[method].load()()
        return
    for name in topologies:
        try:
            yield on_graph(method, from_name(name, workers))
        except ConfigurationError:
            if tuple(topologies) != TOPOLOGIES:
                raise


def on_graph(method: str, graph: AbstractTopology) -> AbstractAlgorithm:
    """Return a method of the table, with its defaults, on a graph."""
    cls: Any = TABLE[method].load()
    algorithm: AbstractAlgorithm = cls(topology=graph)
    return algorithm


def _require_steps(algorithm: AbstractAlgorithm, times: Mapping[int, Sequence[float]], warm_up: int) -> None:
    """Refuse a plan of workers that came to their end before there was anything to measure."""
    early = [rank for rank, marks in times.items() if len(marks) <= warm_up + 1]
    if early:
        raise ConfigurationError(
            f"A plan of {type(algorithm).__name__} got workers {early} that make no more than {warm_up} steps before "
            "the others have come to their end; it needs steps of all to measure. Plan more steps, or make the cluster "
            "less uneven."
        )


def _called(topology: AbstractTopology) -> str:
    """Return what a graph is called in a table: one that is given by its edges would need a line for itself."""
    if isinstance(topology, Placed):
        return f"{_called(topology.graph)}, placed"
    edges = repr(topology)
    return edges if len(edges) <= _LONGEST_NAME else f"{type(topology).__name__}(size={topology.size})"


def topology_of(algorithm: AbstractAlgorithm) -> AbstractTopology | None:
    """Return the topology among an algorithm's hyper-parameters, if there is one and the number of workers is known."""
    hyper_parameters: Any = algorithm
    values = [getattr(algorithm, field.name) for field in dataclasses.fields(hyper_parameters)]
    return next((value for value in values if isinstance(value, AbstractTopology)), None)


def _averages_beside(algorithm: AbstractAlgorithm, workers: int, cluster: Cluster, buffer_bytes: int) -> Beside:
    """Return the averages of buffers that are made beside those of the models."""
    resolved = algorithm.on_hosts(cluster.workers_per_site).resolved(workers)
    averages = resolved.for_buffers()
    if averages is None or isinstance(resolved, AbstractAsynchronousAlgorithm):
        raise ConfigurationError(
            f"A plan of {type(algorithm).__name__} got buffer_bytes={buffer_bytes}; it needs a method that averages "
            "models and whose workers wait for each other, as DPSGD or LocalSGD. Leave them out."
        )
    return Beside(averages, [SizeOnlyVector(buffer_bytes) for _ in range(workers)])


def _latency_seconds(algorithm: AbstractAlgorithm, workers: int, cluster: Cluster, steps: int, seed: int) -> float:
    """Seconds per step of the latencies that follow each other, if computing and sending took no time."""
    if not (cluster.latency_seconds or cluster.latencies or cluster.site_latency_seconds):
        return 0.0
    idle = dataclasses.replace(
        cluster,
        compute_seconds=0.0,
        jitter="none",
        bandwidth_bytes_per_second=math.inf,
        site_bandwidth_bytes_per_second=math.inf,
        rendezvous=False,
    )
    vector = SizeOnlyVector(1)
    simulator = Simulator(algorithm, [vector.clone() for _ in range(workers)], idle, seed)
    for worker in simulator.workers:
        worker.read_gradient = vector.clone
    for _ in simulator.demands(steps):
        pass
    return simulator.seconds / steps


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else math.inf


def _check(workers: int, model_bytes: int, steps: int) -> None:
    for name, value in (("workers", workers), ("model_bytes", model_bytes), ("steps", steps)):
        if value < 1:
            raise ConfigurationError(f"A plan needs {name} of at least 1, got {value}. Use a positive whole number.")
