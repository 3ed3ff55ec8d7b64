"""Proved here: the virtual clock follows hand-computed arithmetic for computing, links, sites, latency and stragglers;
waiting that cannot end is named, never endless; lost peers are reported; the same seed gives the same bits; started
work keeps its order; a fast worker of an asynchronous method does not notice a slow one."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, ChocoSGD, SyncSGD
from lightning_decentral.errors import CompressionError, ConfigurationError, DeadlockError, PeerLost
from lightning_decentral.flat import AbstractVector, SizeOnlyVector, Vector
from lightning_decentral.protocol import (
    AbstractAlgorithm,
    AbstractAsynchronousAlgorithm,
    AllReduce,
    Call,
    Gradient,
    LocalStep,
    NeighborAverage,
    NeighborExchange,
    Start,
)
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.simulator import Simulator
from lightning_decentral.topology import BipartiteRing, Complete, FromGraph, OnePeerExponential, Ring, Star
from lightning_decentral.worker import Worker

MODEL_BYTES = 1000
# One model: 1 second on a link, then 0.25. Messages leave at once; what it costs that they do not has its own tests.
LINK = {"bandwidth_bytes_per_second": 1000.0, "latency_seconds": 0.25, "rendezvous": False}


def seconds_of(algorithm: AbstractAlgorithm, workers: int, cluster: Cluster, steps: int) -> float:
    simulator = simulate(algorithm, workers, cluster, steps)
    return simulator.seconds


def simulate(algorithm: AbstractAlgorithm, workers: int, cluster: Cluster, steps: int) -> Simulator:
    """Run without values."""
    vector = SizeOnlyVector(MODEL_BYTES)
    simulator = Simulator(algorithm, [vector] * workers, cluster)
    for worker in simulator.workers:
        worker.read_gradient = vector.clone
    for _ in simulator.demands(steps):
        pass
    return simulator


def vectors(workers: int, size: int = 4) -> list[Vector]:
    generator = torch.Generator().manual_seed(0)
    return [Vector([torch.randn(size, generator=generator, dtype=torch.float64)]) for _ in range(workers)]


def pull_to_zero(worker: Worker) -> AbstractVector:
    return worker.snapshot


@dataclass(frozen=True)
class AbstractScript(AbstractAlgorithm):
    """An algorithm for one test: no options, no state."""

    def resolved(self, world_size: int) -> AbstractAlgorithm:
        return self

    def init(self, worker: Worker) -> None:
        worker.state["log"] = []


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [0.5, 1.0, 4.0])
def test_dpsgd_hides_its_exchange_behind_the_gradient(compute: float) -> None:
    cluster = Cluster(compute_seconds=compute, **LINK)
    assert seconds_of(DPSGD(OnePeerExponential(8)), 8, cluster, 10) == pytest.approx(10 * max(compute, 1.25))
    assert seconds_of(DPSGD(Ring(8)), 8, cluster, 10) == pytest.approx(10 * max(compute, 2.25))


def test_d2_waits_for_its_exchange_after_the_gradient() -> None:
    assert seconds_of(D2(Ring(8, lazy=True)), 8, Cluster(compute_seconds=3.0, **LINK), 10) == pytest.approx(52.5)


@pytest.fixture
def in_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduces small vectors as large ones are."""
    monkeypatch.setattr("lightning_decentral.simulation.cluster.DIRECT_BYTES", 0)


def test_a_small_all_reduce_goes_from_each_to_each_in_two_messages() -> None:
    cluster = Cluster(compute_seconds=3.0, slowdown={2: 2.0}, latencies={1: 0.5, 3: 1.0}, **LINK)
    # 2 (n - 1) / n models on each link, twice the largest latency
    assert seconds_of(SyncSGD(), 4, cluster, 10) == pytest.approx(10 * (6.0 + 1.5 + 2 * 1.0))
    # both of them there and back, between the two that are farthest apart
    asking = replace(cluster, rendezvous=True)
    assert seconds_of(SyncSGD(), 4, asking, 10) == pytest.approx(10 * (6.0 + 1.5 + 2 * (1.0 + 0.5)))
    # Each of a site's two workers sends half of its bytes to the two workers of the other site... and they come one by
    # one over its link.
    wide = replace(cluster, sites=((0, 1), (2, 3)), site_bandwidth_bytes_per_second=500.0, site_latency_seconds=2.0)
    simulator = simulate(SyncSGD(), 4, wide, 1)
    assert simulator.seconds == pytest.approx(6.0 + 2 * 2 * 500 / 500.0 + 2 * 3.0)
    assert [link.num_bytes for link in simulator.site_uplinks] == [2000, 2000]


def test_all_reduce_takes_its_closed_form_and_waits_for_the_slowest(in_rings: None) -> None:
    cluster = Cluster(compute_seconds=3.0, slowdown={2: 2.0}, **LINK)
    # 2 (n - 1) / n models on each link, 2 (n - 1) latencies
    assert seconds_of(SyncSGD(), 4, cluster, 10) == pytest.approx(10 * (6.0 + 1.5 + 6 * 0.25))


@pytest.mark.parametrize("workers", [4, 5, 16, 64])
def test_an_exchange_of_everybody_is_limited_by_one_workers_links_only(workers: int) -> None:
    """Links of other workers never add up: n - 1 messages out and in, however many workers there are."""
    cluster = Cluster(compute_seconds=0.0, **LINK)
    assert seconds_of(DPSGD(Complete(workers)), workers, cluster, 1) == pytest.approx(workers - 1 + 0.25)
    assert seconds_of(DPSGD(Ring(workers)), workers, cluster, 1) == pytest.approx(2.25)


def test_messages_to_one_worker_share_its_downlink() -> None:
    cluster = Cluster(compute_seconds=0.0, **LINK)
    # All five others send to the hub at once; the hub's five messages leave one after the other.
    assert seconds_of(DPSGD(Star(6)), 6, cluster, 1) == pytest.approx(5.25)


def test_a_busy_downlink_does_not_hold_up_messages_to_others() -> None:
    @dataclass(frozen=True)
    class Pattern(AbstractScript):
        """0, 1 and 2 send to 3 at once; 2 then sends to 4."""

        async def step(self, worker: Worker) -> None:
            send_to = {0: (3,), 1: (3,), 2: (3, 4)}.get(worker.rank, ())
            receive_from = {3: (0, 1, 2), 4: (2,)}.get(worker.rank, ())
            await NeighborExchange(worker.x, send_to, receive_from)
            await Gradient()

    simulator = simulate(Pattern(), 5, Cluster(**LINK), 1)
    assert simulator.traffic[4].exposed_seconds == pytest.approx(2.25)
    assert simulator.traffic[3].exposed_seconds == pytest.approx(3.25)
    assert simulator.traffic[0].exposed_seconds == pytest.approx(1.0)  # until its last byte has left


def test_a_slow_link_slows_its_own_messages() -> None:
    cluster = Cluster(compute_seconds=0.0, slow_links={1: 3.0}, **LINK)
    assert cluster.transfer_seconds(1000, 0, 1) == cluster.transfer_seconds(1000, 1, 0) == 3.0
    simulator = simulate(DPSGD(OnePeerExponential(4)), 4, cluster, 1)
    waits = [traffic.exposed_seconds for traffic in simulator.traffic]
    # 0 receives from 1, 1 from 2, whose link is busy as long as it sends to 1.
    assert waits == pytest.approx([3.25, 3.25, 3.0, 1.25])


def test_a_slow_worker_holds_up_neighbours_only_one_step_at_a_time() -> None:
    """Its third message leaves at 20; its neighbours need it, and theirs what these send at 10, in their third step."""
    simulator = simulate(DPSGD(Ring(9)), 9, Cluster(compute_seconds=1.0, slowdown={0: 10.0}), 3)
    waited = [traffic.exposed_seconds for traffic in simulator.traffic]
    assert waited == pytest.approx([0, 20 - 3, 10 - 3, 0, 0, 0, 0, 10 - 3, 20 - 3])
    assert simulator.seconds == pytest.approx(30)


@dataclass(frozen=True)
class AnsweredAtOnce(ADPSGD):
    answers_in_parts = False


def test_a_call_takes_two_messages() -> None:
    link = Cluster(compute_seconds=0.0, **LINK)
    alone = BipartiteRing(2)  # worker 0 calls, worker 1 answers
    # One message takes 1.0 and the latency 0.25. Answered in parts, the answer comes back while the call still goes;
    # otherwise it sets out when all of the call is there.
    assert simulate(ADPSGD(alone), 2, link, 1).seconds == pytest.approx(0.25 + 1.0 + 0.25)
    assert simulate(AnsweredAtOnce(alone), 2, link, 1).seconds == pytest.approx(1.25 + 1.25)
    # Both call at once: in parts each link carries the call, then the answer to the other.
    simulator = simulate(ADPSGD(Complete(2)), 2, link, 1)
    assert simulator.seconds == pytest.approx(2.0 + 0.25)
    assert simulate(AnsweredAtOnce(Complete(2)), 2, link, 1).seconds == pytest.approx(1.25 + 1.25)
    assert [(t.bytes_sent, t.messages, t.exchanges, t.calls_answered) for t in simulator.traffic] == [
        (2000, 2, 1, 1)
    ] * 2


def test_an_answer_in_parts_is_not_there_before_the_last_part_of_its_call_could_be_answered() -> None:
    """The uplink of the caller is 4 times slower than the way back: the call sets the pace, and one latency more."""
    cluster = Cluster(
        compute_seconds=0.0, sites=((0,), (1,)), site_bandwidth_bytes_per_second=250.0, site_latency_seconds=1.0, **LINK
    )
    assert simulate(ADPSGD(BipartiteRing(2)), 2, cluster, 1).seconds == pytest.approx(4.0 + 2 * 1.25)


def test_fast_workers_of_adpsgd_are_not_slowed_by_a_slow_one() -> None:
    finished = {}
    simulator = Simulator(ADPSGD(), vectors(8), Cluster(compute_seconds=1.0, slowdown={5: 10.0}, latency_seconds=0.1))
    for worker in simulator.workers:
        worker.read_gradient = worker.x.clone
    for request, worker in simulator.demands(20):
        if type(request) is LocalStep and worker.step == 19:
            finished[worker.rank] = simulator.seconds
    assert finished == pytest.approx({rank: 200.0 if rank == 5 else 20.0 for rank in range(8)})


def test_traffic_counts_what_was_sent() -> None:
    traffic = simulate(DPSGD(Ring(5)), 5, Cluster(), 7).traffic
    assert [(t.bytes_sent, t.messages, t.exchanges) for t in traffic] == [(14 * MODEL_BYTES, 14, 7)] * 5
    traffic = simulate(SyncSGD(), 5, Cluster(), 7).traffic
    assert [(t.bytes_sent, t.messages, t.exchanges) for t in traffic] == [(7 * 8 * MODEL_BYTES // 5, 7, 7)] * 5


def test_an_error_leaves_no_coroutine_behind_that_never_ran() -> None:
    simulator = Simulator(ChocoSGD(), [Vector([torch.full((4,), float("nan"))]) for _ in range(4)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CompressionError, match="NaN"):
            simulator.run(pull_to_zero, 0.1, 3)
        del simulator
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# -- messages that are asked for -----------------------------------------------------------------------------------

ASKED = LINK | {"rendezvous": True}


def test_a_message_leaves_when_its_sender_has_heard_that_it_is_asked_for() -> None:
    cluster = Cluster(compute_seconds=0.0, **ASKED)
    assert seconds_of(DPSGD(OnePeerExponential(8)), 8, cluster, 10) == pytest.approx(10 * (0.25 + 1.0 + 0.25))
    assert seconds_of(DPSGD(Complete(5)), 5, cluster, 1) == pytest.approx(0.25 + 4.0 + 0.25)
    # 0 hears of 1 at 3.0, and has sent at 4.0; 1 hears of 2 at 0.25, and what it sends takes 3.0 to arrive.
    assert waits(((0, 1), (1, 2), (2, 0)), 3, replace(cluster, latencies={1: 3.0})) == pytest.approx([4.0, 4.25, 4.25])


def test_a_sender_waits_for_a_receiver_that_is_not_there_yet() -> None:
    edges = ((0, 1),)
    cluster = Cluster(compute_seconds=2.0, slowdown={1: 5.0}, **ASKED)

    def exposed(cluster: Cluster) -> list[float]:
        return [
            traffic.exposed_seconds
            for traffic in simulate(Messages(edges, after_the_gradient=True), 2, cluster, 1).traffic
        ]

    assert exposed(cluster) == pytest.approx([10.0 - 2.0 + 0.25 + 1.0, 0.25 + 1.0 + 0.25])
    assert exposed(replace(cluster, rendezvous=False)) == pytest.approx([1.0, 0.0])


def test_without_latency_equal_workers_do_not_notice_that_they_ask() -> None:
    for algorithm in (SyncSGD(), DPSGD(Complete(6)), DPSGD(Star(6)), D2(Ring(6, lazy=True)), ADPSGD()):
        cluster = Cluster(bandwidth_bytes_per_second=1000.0)
        seconds = seconds_of(algorithm, 6, cluster, 5)
        assert seconds == pytest.approx(seconds_of(algorithm, 6, replace(cluster, rendezvous=False), 5)), algorithm


@pytest.mark.parametrize("latency", [0.0, 0.01, 10.0])
def test_a_ring_that_asks_ahead_takes_its_closed_form(latency: float, in_rings: None) -> None:
    """Played half by half: what comes first has to be asked for; then each is sent on when it has come, one after the
    other on a link."""
    workers = 4
    half = MODEL_BYTES / (2 * workers) / 1000.0
    came = [latency, latency]  # of each half: when it may leave; all workers do the same at the same time
    link = 0.0
    for _ in range(2 * (workers - 1)):
        for lane in (0, 1):
            link = max(link, came[lane]) + half
            came[lane] = link + latency
    cluster = Cluster(compute_seconds=0.0, bandwidth_bytes_per_second=1000.0, latency_seconds=latency)
    assert seconds_of(SyncSGD(), workers, cluster, 1) == pytest.approx(came[1])


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("latency", [0.0, 0.01, 0.03, 10.0])
def test_a_ring_that_asks_for_its_segments_takes_its_closed_form(workers: int, latency: float) -> None:
    """Played segment by segment as gloo does it: two per worker and round, each asked for when the one of the round
    before has come, sent when asked for and got, one after the other on a link."""
    segment = MODEL_BYTES / (2 * workers) / 1000.0
    total = 0.0
    for _ in range(2):  # reduce-scatter, all-gather
        asked, link = [0.0, 0.0], 0.0  # by lane; all workers do the same at the same time
        for _ in range(workers - 1):
            for lane in (0, 1):
                link = max(link, asked[lane] + latency) + segment
                asked[lane] = link + latency
        total += asked[1]
    cluster = Cluster(compute_seconds=0.0, bandwidth_bytes_per_second=1000.0, latency_seconds=latency)
    assert cluster.ring_seconds(MODEL_BYTES, workers) == pytest.approx(total)


def test_a_call_asks_for_its_parts() -> None:
    """Its header and what asks for the first parts are two latencies; then two parts are on their way at a time."""
    parts = 16
    vector = SizeOnlyVector(parts * (256 << 10))
    cluster = Cluster(compute_seconds=0.0, bandwidth_bytes_per_second=vector.num_bytes / 1.6, latency_seconds=0.5)
    simulator = Simulator(ADPSGD(BipartiteRing(2)), [vector] * 2, cluster)
    for worker in simulator.workers:
        worker.read_gradient = vector.clone
    for _ in simulator.demands(1):
        pass
    came = [2 * 0.5 + 0.5 + 0.1, 2 * 0.5 + 0.5 + 0.2]  # the first two parts
    for part in range(2, parts):
        came.append(max(came[-1], came[part - 2] + 2 * 0.5) + 0.1)
    assert simulator.seconds == pytest.approx(came[-1] + 0.5)


# -- sites and latencies -----------------------------------------------------------------------------------------------

TWO_SITES = ((0, 1, 2, 3), (4, 5, 6, 7))


@dataclass(frozen=True)
class Messages(AbstractScript):
    """One exchange: every edge carries one message."""

    edges: tuple[tuple[int, int], ...] = ()
    after_the_gradient: bool = False

    async def step(self, worker: Worker) -> None:
        if self.after_the_gradient:
            await Gradient()
        send_to = tuple(target for source, target in self.edges if source == worker.rank)
        receive_from = tuple(source for source, target in self.edges if target == worker.rank)
        await NeighborExchange(worker.x, send_to, receive_from)
        if not self.after_the_gradient:
            await Gradient()


def waits(edges: tuple[tuple[int, int], ...], workers: int, cluster: Cluster) -> list[float]:
    """Seconds until each worker has sent its messages and received those to it."""
    return [traffic.exposed_seconds for traffic in simulate(Messages(edges), workers, cluster, 1).traffic]


@pytest.mark.parametrize(
    ("site_bandwidth", "arrivals"),
    [
        (500.0, [2.0, 4.0, 6.0, 8.0]),  # one after the other: k messages of b bytes take k b / B
        (2000.0, [1.0, 1.0, 1.5, 2.0]),  # two workers' links fill it
        (4000.0, [1.0, 1.0, 1.0, 1.0]),  # all four do: nobody notices the others
        (math.inf, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_messages_between_two_sites_share_one_link(site_bandwidth: float, arrivals: list[float]) -> None:
    cluster = Cluster(sites=TWO_SITES, site_bandwidth_bytes_per_second=site_bandwidth, site_latency_seconds=0.5, **LINK)
    edges = tuple((rank, rank + 4) for rank in range(4))
    expected = [arrival + 0.25 + 0.5 for arrival in arrivals]
    assert waits(edges, 8, cluster)[4:] == pytest.approx(expected)
    # The other direction is another link.
    back = tuple((rank + 4, rank) for rank in range(4))
    assert waits((*edges, *back), 8, cluster) == pytest.approx(expected * 2)


def test_a_site_has_one_downlink_for_all_others() -> None:
    sites = ((0, 1), (2, 3), (4, 5, 6, 7))
    cluster = Cluster(sites=sites, site_bandwidth_bytes_per_second=500.0, **LINK)
    # Two sites send at the same time; their four messages enter the third one after the other.
    assert sorted(waits(((0, 4), (1, 5), (2, 6), (3, 7)), 8, cluster)[4:]) == pytest.approx([2.25, 4.25, 6.25, 8.25])


def test_a_busy_link_between_sites_does_not_hold_up_messages_at_home() -> None:
    cluster = Cluster(sites=TWO_SITES, site_bandwidth_bytes_per_second=100.0, **LINK)
    # 3 sends to 4 first, which takes 10 seconds to get there and 1 second of its own uplink; then to 0.
    waited = waits(((3, 4), (3, 0)), 8, cluster)
    assert (waited[4], waited[0], waited[3]) == pytest.approx((10.25, 2.25, 2.0))
    assert cluster.transfer_seconds(MODEL_BYTES, 3, 4) == 10.0
    assert cluster.transfer_seconds(MODEL_BYTES, 3, 0) == 1.0


def test_a_slow_worker_leaves_room_on_the_link_between_sites() -> None:
    slow = Cluster(sites=TWO_SITES, site_bandwidth_bytes_per_second=1000.0, slow_links={0: 10.0}, **LINK)
    # The message of 0 takes 10 seconds, of which the link of the site is busy for one.
    waited = waits(((0, 4), (1, 5)), 8, slow)
    assert (waited[4], waited[5]) == pytest.approx((10.25, 2.25))


def test_messages_to_one_worker_share_its_downlink_also_when_they_come_from_another_site() -> None:
    cluster = Cluster(sites=TWO_SITES, site_bandwidth_bytes_per_second=4000.0, **LINK)
    edges = tuple((rank, 4) for rank in (0, 1, 2, 3, 5))
    assert waits(edges, 8, cluster)[4] == pytest.approx(5.25)


@pytest.mark.parametrize("algorithm", [SyncSGD(), DPSGD(), D2(), ADPSGD()])
def test_one_site_is_no_site(algorithm: AbstractAlgorithm) -> None:
    cluster = Cluster(jitter="lognormal", slow_links={2: 3.0}, **LINK)
    one = replace(cluster, sites=(range(6),), site_bandwidth_bytes_per_second=1.0, site_latency_seconds=100.0)
    assert simulate(algorithm, 6, one, 10).seconds == simulate(algorithm, 6, cluster, 10).seconds


def test_a_worker_may_have_a_latency_of_its_own() -> None:
    cluster = Cluster(latencies={1: 3.0}, **LINK)
    # of what it sends, in place of the others' latency
    assert waits(((0, 1), (1, 2), (2, 0)), 3, cluster) == pytest.approx([1.25, 1.25, 4.0])
    assert waits(((0, 1),), 3, replace(cluster, latencies={0: 0.0}))[1] == pytest.approx(1.0)


def slowest_way(edges: list[float], rounds: int) -> float:
    """The latest time at which a worker of a ring gets something, if everybody sends on at once what it got."""
    times = [0.0] * len(edges)
    for _ in range(rounds):
        times = [max(times[rank], times[rank - 1] + edges[rank - 1]) for rank in range(len(edges))]
    return max(times)


@pytest.mark.parametrize(
    ("sites", "edges"),
    [
        (TWO_SITES, 1),
        (((0, 2, 4, 6), (1, 3, 5, 7)), 4),
        (((0, 1, 4, 5), (2, 3, 6, 7)), 2),
        (((0,), (1, 3, 5, 7), (2, 4, 6)), 4),
    ],
)
@pytest.mark.parametrize("site_bandwidth", [1e9, 100.0])
def test_an_all_reduce_takes_the_slowest_link_of_the_ring(
    sites: tuple[tuple[int, ...], ...], edges: int, site_bandwidth: float, in_rings: None
) -> None:
    cluster = Cluster(
        compute_seconds=3.0,
        sites=sites,
        site_bandwidth_bytes_per_second=site_bandwidth,
        site_latency_seconds=0.5,
        latencies={0: 0.1},
        **LINK,
    )
    sent = 2 * 7 * MODEL_BYTES // 8  # on each of the eight edges i -> i + 1
    site_of = {rank: site for site, ranks in enumerate(sites) for rank in ranks}
    latencies = [(0.25 if i else 0.1) + (0.0 if site_of[i] == site_of[(i + 1) % 8] else 0.5) for i in range(8)]
    seconds = 3.0 + max(sent / 1000.0, edges * sent / site_bandwidth) + slowest_way(latencies, 14)
    simulator = simulate(SyncSGD(), 8, cluster, 10)
    assert simulator.seconds == pytest.approx(10 * seconds)
    assert max(link.num_bytes for link in simulator.site_uplinks) == 10 * edges * sent
    assert max(link.num_bytes for link in simulator.site_downlinks) == 10 * edges * sent


def test_an_all_reduce_goes_over_the_latencies_of_the_ring_one_after_the_other(in_rings: None) -> None:
    assert slowest_way([0.25] * 4, 6) == 6 * 0.25
    cluster = Cluster(compute_seconds=0.0, latencies={2: 1.0}, **LINK)
    expected = 1.5 + slowest_way([0.25, 0.25, 1.0, 0.25], 6)
    assert simulate(SyncSGD(), 4, cluster, 1).seconds == pytest.approx(expected)
    # Between the sites are 1 -> 2 and 3 -> 0.
    cluster = replace(cluster, latencies={3: 0.75}, sites=((0, 1), (2, 3)), site_latency_seconds=0.5)
    expected = 1.5 + slowest_way([0.25, 0.75, 0.25, 1.25], 6)
    assert simulate(SyncSGD(), 4, cluster, 1).seconds == pytest.approx(expected)
    cluster = replace(cluster, latencies={2: 0.6})
    expected = 1.5 + slowest_way([0.25, 0.75, 0.6, 0.75], 6)
    assert simulate(SyncSGD(), 4, cluster, 1).seconds == pytest.approx(expected)
    # Two workers are a ring of two edges.
    cluster = Cluster(compute_seconds=0.0, latencies={1: 1.0}, **LINK)
    assert simulate(SyncSGD(), 2, cluster, 1).seconds == pytest.approx(1.0 + slowest_way([0.25, 1.0], 2))


@pytest.mark.parametrize("algorithm", [DPSGD(), ADPSGD(), SyncSGD()])
def test_a_checkpoint_keeps_the_links_between_sites(algorithm: AbstractAlgorithm) -> None:
    cluster = Cluster(
        compute_seconds=0.5, jitter="lognormal", sites=TWO_SITES, site_bandwidth_bytes_per_second=300.0, **LINK
    )
    halted, resumed = Simulator(algorithm, vectors(8), cluster), Simulator(algorithm, vectors(8), cluster)
    halted.run(pull_to_zero, 0.1, 5)
    resumed.load_state_dict(halted.state_dict())
    for simulator in (halted, resumed):
        simulator.run(pull_to_zero, 0.1, 5)
    assert resumed.seconds == halted.seconds
    assert (resumed.site_uplinks, resumed.site_downlinks) == (halted.site_uplinks, halted.site_downlinks)
    assert all(link.num_bytes > 0 for link in resumed.site_uplinks)
    with pytest.raises(ConfigurationError, match="of 2 sites, this simulation has 1"):
        Simulator(algorithm, vectors(8)).load_state_dict(halted.state_dict())


# -- jitter ------------------------------------------------------------------------------------------------------------


def test_jitter_has_its_stated_distribution() -> None:
    import random

    draws = {}
    for jitter, scale in (("lognormal", 0.5), ("pareto", 3.0)):
        rng = random.Random(0)
        cluster = Cluster(compute_seconds=2.0, jitter=jitter, jitter_scale=scale, slowdown={1: 3.0})
        draws[jitter] = torch.tensor([cluster.gradient_seconds(1, rng) for _ in range(20_000)], dtype=torch.float64)
    # 20 000 draws: the standard error of the mean of the logarithms is 0.0035, of the median's logarithm 0.0044.
    assert float(draws["lognormal"].median()) == pytest.approx(6.0, rel=0.02)
    assert float(draws["lognormal"].log().std()) == pytest.approx(0.5, rel=0.02)
    assert float(draws["pareto"].min()) == pytest.approx(6.0, rel=1e-3)
    assert float(draws["pareto"].mean()) == pytest.approx(6.0 * 3 / 2, rel=0.05)


@pytest.mark.parametrize("algorithm", [SyncSGD(), DPSGD(), D2(), ADPSGD()])
def test_the_same_seed_gives_the_same_bits_and_seconds(algorithm: AbstractAlgorithm) -> None:
    def run(seed: int) -> tuple[list[list[float]], float, list[int]]:
        cluster = Cluster(jitter="pareto", jitter_scale=1.5, bandwidth_bytes_per_second=1e3, latency_seconds=0.01)
        simulator = Simulator(algorithm, vectors(6), cluster, seed)
        simulator.run(pull_to_zero, 0.1, 15)
        bytes_sent = [traffic.bytes_sent for traffic in simulator.traffic]
        return [worker.x.buffers[0].tolist() for worker in simulator.workers], simulator.seconds, bytes_sent

    assert run(3) == run(3)
    assert run(3)[1] != run(4)[1]


# -- waiting that cannot end -------------------------------------------------------------------------------------------


def test_waiting_in_a_circle_is_named() -> None:
    @dataclass(frozen=True)
    class Circle(AbstractScript):
        """Everybody waits for its left neighbour before it sends to the right one."""

        async def step(self, worker: Worker) -> None:
            n = worker.world_size
            await NeighborExchange(worker.x, (), ((worker.rank - 1) % n,))
            await NeighborExchange(worker.x, ((worker.rank + 1) % n,), ())

    with pytest.raises(DeadlockError) as error:
        simulate(Circle(), 3, Cluster(), 1)
    assert "worker 0, step 0, waits for messages from workers [2]" in str(error.value)
    assert "worker 2, step 0, waits for messages from workers [1]" in str(error.value)


def test_an_all_reduce_that_not_all_join_is_named() -> None:
    @dataclass(frozen=True)
    class Partial(AbstractScript):
        async def step(self, worker: Worker) -> None:
            await Gradient()
            if worker.rank != 2:
                ticket = await Start(AllReduce(worker.x))
                await ticket

    with pytest.raises(DeadlockError, match=r"worker 0, step 0, waits for workers \[2\] to join an all-reduce"):
        simulate(Partial(), 3, Cluster(), 1)


def test_a_deadlock_is_found_before_a_death_far_in_the_future() -> None:
    @dataclass(frozen=True)
    class Alone(AbstractScript):
        async def step(self, worker: Worker) -> None:
            if worker.rank == 0:
                await NeighborExchange(worker.x, (), (1,))
            await Gradient()

    with pytest.raises(DeadlockError, match=r"at 0 virtual seconds:\n  worker 0, step 0, waits for messages from"):
        simulate(Alone(), 2, Cluster(compute_seconds=0.0, failures={1: 50.0}), 1)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("died_at", [0.0, 2.5, 3.0])
@pytest.mark.parametrize("algorithm", [SyncSGD(), DPSGD(Complete(4)), DPSGD(), D2(), ADPSGD()])
def test_a_lost_peer_is_reported_by_rank(algorithm: AbstractAlgorithm, died_at: float) -> None:
    simulator = Simulator(algorithm, vectors(4), Cluster(compute_seconds=1.0, failures={2: died_at}, **LINK))
    with pytest.raises(PeerLost, match="waits for worker 2") as error:
        simulator.run(pull_to_zero, 0.1, 30)
    assert error.value.ranks == (2,)
    assert died_at <= simulator.seconds <= died_at + 20


def test_a_death_in_the_middle_of_an_all_reduce_is_reported_at_once() -> None:
    simulator = Simulator(SyncSGD(), vectors(4), Cluster(compute_seconds=1.0, slowdown={0: 10.0}, failures={1: 3.0}))
    with pytest.raises(PeerLost, match=r"which died after 3\.0 virtual seconds"):
        simulator.run(pull_to_zero, 0.1, 1)  # 1 has joined, 2 and 3 too: nobody waits for worker 0 any more
    assert simulator.seconds == 3.0


def test_a_death_after_the_last_step_changes_nothing() -> None:
    late = simulate(DPSGD(), 4, Cluster(compute_seconds=1.0, failures={0: 1e9}), 5)
    assert late.seconds == 5.0
    for _ in late.demands(8):
        pass
    assert [worker.step for worker in late.workers] == [8] * 4


def test_workers_that_nobody_calls_may_die() -> None:
    @dataclass(frozen=True)
    class Apart(AbstractScript):
        async def step(self, worker: Worker) -> None:
            await Gradient()
            await LocalStep()

    simulator = simulate(Apart(), 3, Cluster(compute_seconds=1.0, failures={1: 2.5}), 5)
    assert [worker.step for worker in simulator.workers] == [5, 2, 5]


# -- coroutines --------------------------------------------------------------------------------------------------------


def test_what_a_worker_starts_runs_in_order() -> None:
    @dataclass(frozen=True)
    class Ordered(AbstractScript):
        """Two started exchanges and a third one of the step itself, whose messages would match in the wrong order."""

        async def step(self, worker: Worker) -> None:
            other = (1 - worker.rank,)
            messages = [worker.x.clone().mul_(0.0).add_(worker.state["one"], k) for k in (1.0, 2.0, 3.0)]
            first = await Start(self._log(worker, messages[0]))
            second = await Start(self._log(worker, messages[1]))
            await self._log(worker, messages[2])
            worker.state["log"] += ["both"]
            await second
            await first
            assert await first is await first  # a ticket may be awaited again
            await Gradient()
            worker.state["other"] = other

        async def _log(self, worker: Worker, message: AbstractVector) -> None:
            other = (1 - worker.rank,)
            (received,) = (await NeighborExchange(message, other, other)).values()
            assert isinstance(received, Vector)
            worker.state["log"].append(received.buffers[0].tolist()[0])

        def init(self, worker: Worker) -> None:
            worker.state.update(log=[], one=Vector([torch.ones(1, dtype=torch.float64)]))

    cluster = Cluster(jitter="lognormal", **LINK)
    simulator = Simulator(Ordered(), vectors(2, size=1), cluster)
    for _ in simulator.demands(2):
        pass
    assert [worker.state["log"] for worker in simulator.workers] == [[1.0, 2.0, 3.0, "both"] * 2] * 2


def test_an_average_becomes_the_value_when_it_is_awaited_and_once() -> None:
    @dataclass(frozen=True)
    class Averaging(AbstractScript):
        async def step(self, worker: Worker) -> None:
            other = (1 - worker.rank,)
            average = NeighborAverage(worker.x, other, 0.75, {other[0]: 0.25})
            before = worker.x.clone()
            ticket = await Start(average)
            await Gradient()
            assert worker.x.squared_distance(before) == 0.0
            for _ in range(2):
                assert await ticket is None
                worker.state["log"].append(worker.x.buffers[0].tolist())
            inside = await Start(self._inside(worker, average))
            await average  # what comes next waits for its turn
            await inside
            worker.state["log"].append(worker.x.buffers[0].tolist())

        async def _inside(self, worker: Worker, average: NeighborAverage) -> None:
            await average

    simulator = Simulator(Averaging(), vectors(2), Cluster(**LINK))
    values = torch.stack([value.buffers[0] for value in vectors(2)])
    matrix = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    for _ in simulator.demands(1):
        pass
    for rank, worker in enumerate(simulator.workers):
        log = torch.tensor(worker.state["log"], dtype=torch.float64)
        expected = [(torch.linalg.matrix_power(matrix, power) @ values)[rank] for power in (1, 1, 3)]
        torch.testing.assert_close(log, torch.stack(expected))
        assert simulator.traffic[rank].exchanges == 3


def test_staleness_counts_the_changes_under_a_gradient() -> None:
    @dataclass(frozen=True)
    class Caller(AbstractAsynchronousAlgorithm):
        """Worker 0 calls worker 1, which computes ten times as long, once per step."""

        def resolved(self, world_size: int) -> Caller:
            return self

        def init(self, worker: Worker) -> None:
            pass

        def peers(self, rank: int) -> tuple[int, ...]:
            return (1,) if rank == 0 else ()

        async def step(self, worker: Worker) -> None:
            for peer in self.peers(worker.rank):
                await Call(peer, worker.snapshot)
            await Gradient()
            await LocalStep()

        async def on_call(self, worker: Worker, source: int, theirs: AbstractVector) -> AbstractVector:
            return theirs

    simulator = Simulator(Caller(), vectors(2), Cluster(compute_seconds=1.0, slowdown={1: 10.5}))
    staleness: dict[int, list[int]] = {0: [], 1: []}
    for request, worker in simulator.demands(21):
        if type(request) is LocalStep:
            staleness[worker.rank].append(worker.staleness)
    assert staleness[0] == [0] * 21
    assert staleness[1][:2] == [11, 10]  # calls at 0, 1, ..., 10 and at 11, ..., 20
    assert simulator.workers[1].version == 21 + 21  # its steps and its callers'


def test_a_skipped_update_is_answered_with_false() -> None:
    @dataclass(frozen=True)
    class Skipping(AbstractScript):
        async def step(self, worker: Worker) -> None:
            await Gradient()
            worker.state["log"].append(await LocalStep())

    simulator = Simulator(Skipping(), vectors(1))
    demands = simulator.demands(3)
    next(demands)
    for made in (None, True, None, False, None):
        demands.send(made)
    assert next(demands, None) is None
    assert simulator.workers[0].state["log"] == [True, False, True]


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_seconds": -1.0}, "compute_seconds"),
        ({"compute_seconds": math.nan}, "compute_seconds"),
        ({"latency_seconds": -1.0}, "latency_seconds"),
        ({"bandwidth_bytes_per_second": 0.0}, "bandwidth"),
        ({"jitter": "gauss"}, "lognormal"),
        ({"jitter": "pareto", "jitter_scale": 0.0}, "jitter_scale"),
        ({"slowdown": {0: 0.0}}, "slowdown"),
        ({"slow_links": {0: -2.0}}, "slow_links"),
        ({"latencies": {0: -2.0}}, "latencies"),
        ({"latencies": {0: math.nan}}, "latencies"),
        ({"sites": [[0, 1], [1, 2]]}, "in one site at most"),
        ({"sites": [[0, 0]]}, "in one site at most"),
        ({"sites": [[0], []]}, "no empty site"),
        ({"sites": [[0]], "site_bandwidth_bytes_per_second": 0.0}, "site_bandwidth"),
        ({"sites": [[0]], "site_latency_seconds": -1.0}, "site_latency_seconds"),
        ({"site_bandwidth_bytes_per_second": 1.0}, "needs sites, got none"),
        ({"site_latency_seconds": 1.0}, "needs sites, got none"),
    ],
)
def test_a_cluster_refuses_impossible_numbers(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Cluster(**options)


def test_a_simulation_refuses_workers_that_do_not_exist() -> None:
    with pytest.raises(ConfigurationError, match="at least 1 worker"):
        Simulator(SyncSGD(), [])
    for name in ("slowdown", "slow_links", "failures", "latencies"):
        with pytest.raises(ConfigurationError, match="names worker 4"):
            Simulator(SyncSGD(), vectors(4), replace(Cluster(), **{name: {4: 2.0}}))
    for sites in ([[0, 1], [2]], [[0, 1], [2, 3, 4]], [[-1, 0], [1, 2, 3]]):
        with pytest.raises(ConfigurationError, match="but there are 4"):
            Simulator(SyncSGD(), vectors(4), Cluster(sites=sites))
    with pytest.raises(ConfigurationError, match="for 5 workers, but 4 take part"):
        Simulator(DPSGD(Ring(5)), vectors(4))
    with pytest.raises(ConfigurationError, match="connected"):
        Simulator(DPSGD(FromGraph(_two_pairs())), vectors(4))


def _two_pairs() -> object:
    import networkx

    return networkx.Graph([(0, 1), (2, 3)])


def test_a_checkpoint_in_the_middle_of_a_step_is_refused() -> None:
    simulator = Simulator(DPSGD(), vectors(3))
    demands = simulator.demands(2)
    next(demands)
    with pytest.raises(ConfigurationError, match=r"\[0, 1, 2\] in the middle of a step"):
        simulator.state_dict()
    finished = Simulator(DPSGD(), vectors(3))
    with pytest.raises(ConfigurationError, match="of 3 workers, this simulation has 2"):
        Simulator(DPSGD(), vectors(2)).load_state_dict(finished.state_dict())


def test_means_need_values() -> None:
    with pytest.raises(ConfigurationError, match="vectors that have values"):
        simulate(DPSGD(), 3, Cluster(), 1).consensus()
