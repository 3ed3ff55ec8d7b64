"""A strategy that looks at the run first: it measures links, gradients and data, and chooses the method by them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import networkx as nx
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import SGD
from torch.optim import Optimizer as TorchOptimizer

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.planning.choosing import Data, Optimizer, candidates, choose
from lightning_decentral.protocol import AbstractAlgorithm, AllReduce, Gradient, LocalStep
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.strategies.gossip import GossipStrategy
from lightning_decentral.strategies.records import described, log_run
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.probing import Links, measure_links
from lightning_decentral.worker import Worker

TRIAL_STEPS = 10
_UNCOUNTED = 2  # steps at the beginning, in which memory is found and caches fill
_SLOWER = 1.2  # times as slow as the middle one: from there on a worker or its link is a slow one
_MUCH_NEARER = 4.0  # times, than the farthest two hosts are: so near are hosts of one site
_FAR_SECONDS = 5e-3  # one way, between the farthest two: below that the network is one
_DIFFERS = 0.25  # of the variance of gradients, between the workers: from there on their data differ


@dataclass(frozen=True)
class Trial(AbstractAlgorithm):
    r"""Synchronous SGD whose workers remember by how much their gradients differ from the mean of all.

    In each step ``d_i = gradient_i - mean``. After T steps of n workers::

        ratio = T sum_i ||mean over t of d_i(t)||^2 / mean over t of sum_i ||d_i(t)||^2

    It is 1 on average where only chance makes them differ, and T where each worker's differs always in the same way;
    ``(ratio - 1) / (T - 1)`` is the share of the variance that lies between the workers.

    Cost:
        As synchronous SGD; two more copies of the model for as long as it lasts.
    """

    exchanges_gradients = True
    same_updates = True

    def resolved(self, world_size: int) -> Trial:
        return self

    def init(self, worker: Worker) -> None:
        worker.state |= {"sum": worker.x.zeros_like(), "squares": 0.0}

    async def step(self, worker: Worker) -> None:
        await Gradient()
        own = worker.gradient.clone()
        await AllReduce(worker.gradient)
        own.add_(worker.gradient, alpha=-1.0)
        worker.state["sum"].add_(own)
        worker.state["squares"] += _square(own)
        await LocalStep()


class AutoStrategy(GossipStrategy):
    """Measures links, gradients and data in the first steps, chooses a synchronous method by them, and says why.

    The first 10 steps are synchronous SGD. Meanwhile workers measure how long their gradients take, and how much of
    the gradients' variance lies between the workers: that is whether their data differ. Then they measure the links
    between hosts, for about a second; the planner prices the methods that suit data and optimizer, and the run goes on
    with the best one. Hosts that are near each other and far from others count as a site; workers take those places in
    a graph that keep its messages on near links (`topology.placed`), if that is faster. What was measured, what was
    chosen and why is said once, and is in `choice`.

    It is what ``Trainer(strategy="decentral_auto")`` makes. Asynchronous methods are not chosen, since they divide an
    epoch in another way from its beginning; if one would be much faster, that is said. A checkpoint is of the method
    that was chosen: go on with it by its name, as the message says, or with ``resume="consensus"``.

    Args:
        data: ``"alike"`` or ``"differ"``, if you know it; ``None``: as measured.
        options: those of `GossipStrategy`, but for ``algorithm``.

    Raises:
        ConfigurationError: for other data; otherwise as `GossipStrategy`.

    Example:
        >>> strategy = AutoStrategy(data="differ")
    """

    def __init__(self, data: Data | None = None, **options: Any) -> None:
        if data not in (None, "alike", "differ"):
            raise ConfigurationError(
                f"AutoStrategy(data={data!r}): needs 'alike' or 'differ'. Leave it out, and it is measured."
            )
        if "algorithm" in options:
            raise ConfigurationError(
                f"AutoStrategy got algorithm={options['algorithm']!r}, needs none: it chooses one. Use Strategy."
            )
        if options.get("buffers") == "gossip":
            raise ConfigurationError(
                "AutoStrategy got buffers='gossip', and does not know yet how the method that it chooses averages; it "
                "needs 'evaluation' or 'local'. Leave it out, or name the method: Strategy(DPSGD(), buffers='gossip')."
            )
        super().__init__(Trial(), **options)
        self.data = data

    def _clear(self) -> None:
        super()._clear()
        self.choice: str | None = None
        """What was measured, chosen and why; ``None`` before."""
        self._marks: list[tuple[float, float]] = []  # when a step began, and what this worker had waited until then

    def prepare_step(self) -> bool:
        begins = super().prepare_step()
        if begins:
            self._look()
        return begins

    def _begin_step(self) -> None:
        self._look()
        super()._begin_step()

    def _look(self) -> None:
        """Note when a step begins, and choose before the one that follows the trial."""
        if self.choice is None and self.between_steps and self.world_size > 1 and self.steps >= len(self._marks):
            self._marks.append((time.perf_counter(), self.traffic.exposed_seconds))
            if self.steps >= TRIAL_STEPS:
                self._choose()

    def _choose(self) -> None:
        communicator, module = self._communicator, self.lightning_module
        assert communicator is not None
        assert module is not None
        communicator.drain()
        pairs = zip(self._marks[_UNCOUNTED:], self._marks[_UNCOUNTED + 1 :], strict=False)
        seconds = median(max(end - begin - (waited - before), 0.0) for (begin, before), (end, waited) in pairs)
        told = [json.loads(each) for each in communicator.gather(json.dumps(seconds).encode())]
        cluster = cluster_of(measure_links(communicator), told)
        share = between_workers(self._steppers, communicator)
        data: Data = self.data or ("differ" if not share < _DIFFERS else "alike")
        kind = kind_of(self.optimizers)
        model_bytes = sum(stepper.x.num_bytes for stepper in self._steppers)
        possible = candidates(self.world_size, model_bytes, cluster, data, kind, asynchronous=False)
        largest = max(self._steppers, key=lambda stepper: stepper.x.num_bytes).x
        answer = b""
        if self.is_global_zero:
            choice = choose(
                self.world_size,
                model_bytes,
                cluster,
                data,
                kind,
                asynchronous=False,
                element_bytes=largest.buffers[0].element_size(),
            )
            answer = json.dumps([possible.index(choice.algorithm), choice.text]).encode()
        number, reasons = json.loads(communicator.gather(answer)[0])
        self.algorithm = possible[number]
        self.choice = f"{_measured(cluster, share, self.data)} {reasons}"
        for stepper in self._steppers:
            stepper.flat.release()
        for index, (before, optimizer) in enumerate(zip(list(self._steppers), self.optimizers, strict=True)):
            stepper = self._make_stepper(index, optimizer)
            stepper.guarded |= before.guarded
            stepper.worker.step, stepper.worker.version = before.worker.step, before.worker.version
            stepper.worker.rng.setstate(before.worker.rng.getstate())
            self._steppers[index] = stepper
        rank_zero_info(f"{type(self).__name__} goes on with {self.algorithm!r}. {self.choice}")
        log_run(module.trainer, described(self.algorithm, self.world_size))


def between_workers(steppers: Sequence[Stepper], communicator: Communicator) -> float:
    """Tell which share of the variance of the gradients of a `Trial` lies between the workers; NaN if there is none.

    All workers together.
    """
    steps = max(stepper.worker.step for stepper in steppers)
    means = squares = 0.0
    for stepper in steppers:
        means += _square(stepper.worker.state["sum"]) / steps
        squares += stepper.worker.state["squares"] / steps
    what = "a choice of a method"
    means, squares = communicator.agree(means, "sum", what), communicator.agree(squares, "sum", what)
    return (means / squares - 1) / (steps - 1) if squares > 0 and math.isfinite(squares) else math.nan


def cluster_of(links: Links, compute_seconds: Sequence[float]) -> Cluster:
    """Describe the cluster that was measured.

    Hosts that are near each other, and far from others, are a site: the workers there share the links to other sites.
    Otherwise a host with several workers is one: they share its link, and exchange in no time among themselves.

    Args:
        links: between the hosts.
        compute_seconds: of one gradient, by rank.
    """
    compute = median(compute_seconds)
    slowdown = {
        rank: seconds / compute for rank, seconds in enumerate(compute_seconds) if seconds > _SLOWER * compute > 0
    }
    count = len(links.hosts)
    if count == 1:
        return Cluster(compute_seconds=compute, slowdown=slowdown)
    sites = near_hosts(links)
    if len(sites) > 1:
        return _of_sites(links, sites, compute, slowdown)
    latency = median(links.latency_seconds[a][b] for a in range(count) for b in range(a))
    # A rate around the ring is of one host's link out, and the next one's in: a slow link shows in two of them.
    rates = [max(rate, links.bytes_per_second[place - 1]) for place, rate in enumerate(links.bytes_per_second)]
    rate = median(rates)
    if all(len(ranks) == 1 for ranks in links.hosts):
        slow = {ranks[0]: rate / own for ranks, own in zip(links.hosts, rates, strict=True) if rate > _SLOWER * own > 0}
        return Cluster(
            compute_seconds=compute,
            slowdown=slowdown,
            bandwidth_bytes_per_second=rate,
            latency_seconds=latency,
            slow_links=slow,
        )
    return Cluster(
        compute_seconds=compute,
        slowdown=slowdown,
        sites=links.hosts,
        site_bandwidth_bytes_per_second=rate,
        site_latency_seconds=latency,
    )


def near_hosts(links: Links) -> list[list[int]]:
    """Group hosts, by their places in `Links.hosts`, that are much nearer to each other than the farthest two are.

    Returns:
        The groups, in the order of their first hosts; one of all hosts where none is far from another, or where each
        would be a group of its own.
    """
    hosts, latencies = range(len(links.hosts)), links.latency_seconds
    farthest = max(max(row) for row in latencies)
    graph = nx.empty_graph(len(hosts))
    graph.add_edges_from((a, b) for a in hosts for b in range(a) if latencies[a][b] < farthest / _MUCH_NEARER)
    groups = sorted(sorted(group) for group in nx.connected_components(graph))
    return groups if farthest >= _FAR_SECONDS and 1 < len(groups) < len(hosts) else [list(hosts)]


def _of_sites(links: Links, sites: Sequence[Sequence[int]], compute: float, slowdown: dict[int, float]) -> Cluster:
    """Describe a cluster of hosts in groups: `near_hosts`."""
    site_of = {host: number for number, site in enumerate(sites) for host in site}
    count, latencies = len(links.hosts), links.latency_seconds
    pairs = [(a, b) for a in range(count) for b in range(a)]
    inside = median(latencies[a][b] for a, b in pairs if site_of[a] == site_of[b])
    across = median(latencies[a][b] for a, b in pairs if site_of[a] != site_of[b])
    near: list[float] = []
    leaving = [0.0] * len(sites)  # by site: of all its hosts that send to another one
    for host, rate in enumerate(links.bytes_per_second):  # to the next host, while all send
        if site_of[host] == site_of[(host + 1) % count]:
            near.append(rate)
        else:
            leaving[site_of[host]] += rate
    return Cluster(
        compute_seconds=compute,
        slowdown=slowdown,
        bandwidth_bytes_per_second=median(near) if near else math.inf,
        latency_seconds=inside,
        sites=tuple(tuple(rank for host in site for rank in links.hosts[host]) for site in sites),
        site_bandwidth_bytes_per_second=median(leaving),
        site_latency_seconds=max(across - inside, 0.0),
    )


def kind_of(optimizers: Sequence[TorchOptimizer]) -> Optimizer:
    """Tell whether these are SGD, SGD with momentum, or anything else, which counts as adaptive."""
    if not all(isinstance(optimizer, SGD) for optimizer in optimizers):
        return "adaptive"
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return "momentum" if any(group["momentum"] for group in groups) else "sgd"


def _measured(cluster: Cluster, share: float, data: Data | None) -> str:
    rate, latency = cluster.bandwidth_bytes_per_second, cluster.latency_seconds
    hosts = ""
    if cluster.sites:
        rate, latency = cluster.site_bandwidth_bytes_per_second, cluster.site_latency_seconds
        hosts = f", {len(cluster.sites)} hosts or sites"
    network = "one host" if math.isinf(rate) else f"{8 * rate / 1e6:.3g} Mbit/s, {1e3 * latency:.3g} ms{hosts}"
    slow = "".join(f", worker {rank} {factor:.2g} times slower" for rank, factor in sorted(cluster.slowdown.items()))
    if data is not None:
        spread = f"data said to {'be alike' if data == 'alike' else data}"
    elif math.isnan(share):
        spread = "gradients that tell nothing of the data, which are taken to differ"
    else:
        spread = f"{max(share, 0.0):.0%} of the variance of the gradients between the workers"
    return f"Measured: {network}, {1e3 * cluster.compute_seconds:.3g} ms for a gradient{slow}, {spread}."


def _square(vector: Any) -> float:
    assert isinstance(vector, Vector)
    return sum(float(buffer.double().square().sum()) for buffer in vector.buffers)
