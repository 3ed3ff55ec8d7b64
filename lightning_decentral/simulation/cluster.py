"""A model of a cluster: how long computing and sending take. The simulator and the planner share it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.traffic import CALL_AHEAD, DIRECT_BYTES, all_reduce_bytes, call_part_bytes


@dataclass(frozen=True)
class Cluster:
    """How fast the workers compute and their links send.

    A message of ``b`` bytes from i to j occupies i's uplink for ``b / bandwidth`` seconds, first come first served. Its
    first byte reaches j's downlink at once, which it occupies as long, first come first served too; it arrives one
    ``latency`` after that. A busy downlink does not hold up what i sends to others.

    Workers may stand at several *sites*. Then every site has one uplink and one downlink to the wide area. A message to
    another site passes both on its way, and occupies each for ``b / site_bandwidth`` seconds, first come first served
    among all workers of the site. Its slowest link sets the seconds between its first and its last byte; a faster link
    carries other messages meanwhile. A busy site link does not hold up what i sends to others.

    With `rendezvous`, as gloo has it, a message leaves only when its receiver has asked for it and its sender has heard
    of that: where both begin an exchange at the same time, one latency later. A call's vector leaves two latencies
    later, after a header and what its responder then asks for: `CALL_AHEAD` parts at a time.

    Args:
        compute_seconds: seconds of one gradient (forward, backward and update) on a normal worker.
        slowdown: rank -> factor for workers that compute slower, as ``{3: 10.0}``.
        jitter: how one gradient's time varies: ``"none"``; ``"lognormal"`` with `jitter_scale` the standard deviation
            of the logarithm; ``"pareto"``, heavy-tailed with shape `jitter_scale` (2 and below: infinite variance). The
            fastest gradient of ``"pareto"`` takes `compute_seconds`; the median one of ``"lognormal"`` does.
        jitter_scale: see ``jitter``; positive.
        bandwidth_bytes_per_second: of every uplink and downlink. 1 Gbit/s is ``125e6``.
        latency_seconds: one way, of every message; 0 or more.
        latencies: rank -> one-way seconds of every message that this worker sends, in place of ``latency_seconds``.
        slow_links: rank -> factor for workers whose link is slower.
        sites: groups of ranks that are joined by slower links; every worker is in one. Empty: all are at one site.
        site_bandwidth_bytes_per_second: of every site's uplink and downlink, which its workers share.
        site_latency_seconds: of every message between two sites, in addition to the sender's latency; 0 or more.
        failures: rank -> virtual second at which the worker dies (simulator only).
        rendezvous: whether a message waits until its sender knows that it is asked for, as gloo's do; ``False``: it
            leaves at once.

    Raises:
        ConfigurationError: if a number is out of its range, or a worker in two sites.

    Example:
        >>> cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=125e6, slowdown={3: 10.0})
        >>> cluster.transfer_seconds(125_000_000, 0, 1)
        1.0
        >>> cluster = Cluster(sites=[[0, 1], [2, 3]], site_bandwidth_bytes_per_second=12.5e6)
        >>> cluster.transfer_seconds(125_000_000, 0, 1), cluster.transfer_seconds(125_000_000, 1, 2)
        (0.0, 10.0)
    """

    compute_seconds: float = 0.1
    slowdown: Mapping[int, float] = field(default_factory=dict)
    jitter: Literal["none", "lognormal", "pareto"] = "none"
    jitter_scale: float = 0.5
    bandwidth_bytes_per_second: float = math.inf
    latency_seconds: float = 0.0
    slow_links: Mapping[int, float] = field(default_factory=dict)
    failures: Mapping[int, float] = field(default_factory=dict)
    latencies: Mapping[int, float] = field(default_factory=dict)
    sites: Sequence[Sequence[int]] = ()
    site_bandwidth_bytes_per_second: float = math.inf
    site_latency_seconds: float = 0.0
    rendezvous: bool = True

    def __post_init__(self) -> None:
        for name in ("compute_seconds", "latency_seconds", "site_latency_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"Cluster({name}={value}): needs a number of seconds >= 0.")
        for name in ("bandwidth_bytes_per_second", "jitter_scale", "site_bandwidth_bytes_per_second"):
            value = getattr(self, name)
            if not value > 0 or (value == math.inf and name == "jitter_scale"):
                raise ConfigurationError(f"Cluster({name}={value}): needs a positive number.")
        if self.jitter not in ("none", "lognormal", "pareto"):
            raise ConfigurationError(f"Cluster(jitter={self.jitter!r}): needs one of 'none', 'lognormal', 'pareto'.")
        for name in ("slowdown", "slow_links"):
            for rank, factor in getattr(self, name).items():
                if not 0 < factor < math.inf:
                    raise ConfigurationError(f"Cluster({name}={{{rank}: {factor}}}): needs a positive factor.")
        for name in ("latencies", "failures"):
            for rank, seconds in getattr(self, name).items():
                if not 0 <= seconds < math.inf:
                    raise ConfigurationError(f"Cluster({name}={{{rank}: {seconds}}}): needs a number of seconds >= 0.")
        if len(self._site_of_rank) < sum(len(site) for site in self.sites) or not all(self.sites):
            raise ConfigurationError(
                f"Cluster(sites={self.sites}): needs every worker in one site at most, and no empty site. "
                "List every rank once."
            )
        if not self.sites and (self.site_bandwidth_bytes_per_second < math.inf or self.site_latency_seconds > 0):
            raise ConfigurationError(
                "Cluster(site_bandwidth_bytes_per_second=..., site_latency_seconds=...): needs sites, got none. "
                "Give sites=[[0, 1], [2, 3]], for example; or leave them out."
            )

    @cached_property
    def _site_of_rank(self) -> dict[int, int]:
        return {rank: index for index, site in enumerate(self.sites) for rank in site}

    def check_ranks(self, workers: int) -> None:
        """Refuse settings for workers that do not exist, and sites that leave one out."""
        for name in ("slowdown", "slow_links", "failures", "latencies"):
            for rank in getattr(self, name):
                if not 0 <= rank < workers:
                    raise ConfigurationError(
                        f"Cluster({name}=...) names worker {rank}, but there are {workers}. "
                        f"Use ranks 0 to {workers - 1}."
                    )
        if self.sites and sorted(self._site_of_rank) != list(range(workers)):
            raise ConfigurationError(
                f"Cluster(sites={self.sites}) has workers {sorted(self._site_of_rank)}, but there are {workers}. "
                f"Put each of the ranks 0 to {workers - 1} into one site."
            )

    def gradient_seconds(self, rank: int, rng: random.Random) -> float:
        """Seconds of one gradient of a worker; draws from ``rng`` unless there is no jitter."""
        seconds = self.compute_seconds * self.slowdown.get(rank, 1.0)
        if self.jitter == "lognormal":
            seconds *= rng.lognormvariate(0.0, self.jitter_scale)
        elif self.jitter == "pareto":
            seconds *= rng.paretovariate(self.jitter_scale)
        return seconds

    @property
    def workers_per_site(self) -> int:
        """The number of workers of each site, where all have equally many, numbered site by site; otherwise 1."""
        members = len(self.sites[0]) if self.sites else 1
        numbered = all(list(site) == list(range(i * members, (i + 1) * members)) for i, site in enumerate(self.sites))
        return members if numbered else 1

    def site_of(self, rank: int) -> int:
        """Index in `sites` of a worker's site; 0 if there are none."""
        return self._site_of_rank.get(rank, 0)

    def _in_one_site(self, first: int, second: int) -> bool:
        return not self.sites or self.site_of(first) == self.site_of(second)

    def link_seconds(self, num_bytes: int, source: int, target: int) -> float:
        """Seconds that a message occupies the sender's uplink and the receiver's downlink."""
        factor = max(self.slow_links.get(source, 1.0), self.slow_links.get(target, 1.0))
        return num_bytes * factor / self.bandwidth_bytes_per_second

    def site_link_seconds(self, num_bytes: float) -> float:
        """Seconds that bytes to another site occupy the link of a site, in each of the two directions."""
        return num_bytes / self.site_bandwidth_bytes_per_second

    def transfer_seconds(self, num_bytes: int, source: int, target: int) -> float:
        """Seconds of a message between two workers when nothing else is on its way: of the slowest link that it passes.

        Latency is not in it.
        """
        seconds = self.link_seconds(num_bytes, source, target)
        if self._in_one_site(source, target):
            return seconds
        return max(seconds, self.site_link_seconds(num_bytes))

    def message_latency_seconds(self, source: int, target: int) -> float:
        """Return one-way latency of a message between two workers."""
        seconds = self.latencies.get(source, self.latency_seconds)
        return seconds if self._in_one_site(source, target) else seconds + self.site_latency_seconds

    def ring_edges_out_of_sites(self, workers: int | Sequence[int]) -> list[int]:
        """Count by site how many edges of the ring of some workers leave it. As many come in.

        Args:
            workers: how many, or which; each sends to the next one.
        """
        ranks = _ranks(workers)
        leaving = [0] * max(1, len(self.sites))
        for position, rank in enumerate(ranks):
            if self.site_of(rank) != self.site_of(ranks[(position + 1) % len(ranks)]):
                leaving[self.site_of(rank)] += 1
        return leaving

    def bytes_out_of_sites(self, num_bytes: int, workers: int | Sequence[int]) -> list[float]:
        """Bytes that leave each site in an all-reduce; as many come in.

        Args:
            num_bytes: of the vector: up to `DIRECT_BYTES` every worker sends to each other one, beyond to the next one.
            workers: how many take part, or which.
        """
        ranks = _ranks(workers)
        sent = all_reduce_bytes(num_bytes, len(ranks))
        if num_bytes > DIRECT_BYTES:
            return [float(edges * sent) for edges in self.ring_edges_out_of_sites(ranks)]
        members = [0] * max(1, len(self.sites))
        for rank in ranks:
            members[self.site_of(rank)] += 1
        return [count * sent * (len(ranks) - count) / max(1, len(ranks) - 1) for count in members]

    def all_reduce_seconds(self, num_bytes: int, workers: int | Sequence[int]) -> float:
        """Seconds of an all-reduce once everybody is there.

        A vector of up to `DIRECT_BYTES` goes part by part from each to each, and its mean too: two latencies, or, with
        `rendezvous`, two times there and back, between the two workers that are farthest apart.

        A larger one goes round a ring, as in `ring_seconds`. With `rendezvous`, what comes in a round was asked for two
        rounds before: only the first message waits to be asked for. With ``R`` the latency there and back between the
        two neighbours that are farthest apart, ``s`` seconds of half a chunk on the slowest link, and ``L`` the
        latencies of the other edges on the slowest way, that is ``R + 2 s`` and the sum of all ``max(2 s, L + s)``.

        Args:
            num_bytes: of the vector.
            workers: how many take part, or which.
        """
        ranks = _ranks(workers)
        if len(ranks) == 1:
            return 0.0
        if num_bytes > DIRECT_BYTES:
            return self._ring_seconds_asked_ahead(num_bytes, ranks)
        crossing = self.site_link_seconds(max(self.bytes_out_of_sites(num_bytes, ranks)))
        transfer = max(self._slowest_link_seconds(num_bytes, ranks), crossing)
        far = len({self.site_of(rank) for rank in ranks}) > 1
        latencies = sorted(
            self.latencies.get(rank, self.latency_seconds) + far * self.site_latency_seconds for rank in ranks
        )
        return transfer + 2 * (sum(latencies[-2:]) if self.rendezvous else latencies[-1])

    def _ring_seconds_asked_ahead(self, num_bytes: int, ranks: Sequence[int]) -> float:
        if not self.rendezvous:
            return self.ring_seconds(num_bytes, ranks)
        edges, round_trip = self._ring_latencies(ranks)
        half = self.ring_transfer_seconds(num_bytes, ranks) / (4 * (len(ranks) - 1))
        turns = [max(2 * half, edge + half) for edge in edges]
        left_out = min(
            turn + turns[rank - 1] for rank, turn in enumerate(turns)
        )  # of twice around, as in `ring_seconds`
        return round_trip + 2 * half + 2 * sum(turns) - left_out - max(turns)

    def _ring_latencies(self, ranks: Sequence[int]) -> tuple[list[float], float]:
        """Return the latency of each edge of a ring, and the one there and back of the longest."""
        pairs = [(rank, ranks[(position + 1) % len(ranks)]) for position, rank in enumerate(ranks)]
        edges = [self.message_latency_seconds(rank, following) for rank, following in pairs]
        back = [self.message_latency_seconds(following, rank) for rank, following in pairs]
        return edges, max(there + again for there, again in zip(edges, back, strict=True))

    def _slowest_link_seconds(self, num_bytes: int, ranks: Sequence[int]) -> float:
        factor = max([1.0, *(self.slow_links.get(rank, 1.0) for rank in ranks)])
        return all_reduce_bytes(num_bytes, len(ranks)) * factor / self.bandwidth_bytes_per_second

    def ring_transfer_seconds(self, num_bytes: int, workers: int | Sequence[int]) -> float:
        """Seconds of a ring all-reduce without latency: of the slowest link in the ring.

        The ring is in the order of the ranks. All its edges that leave a site share the site's uplink, so it takes
        fewest seconds if the workers of a site follow each other.

        Args:
            num_bytes: of the vector.
            workers: how many take part, or which.
        """
        ranks = _ranks(workers)
        sent = all_reduce_bytes(num_bytes, len(ranks))
        edges = max(self.ring_edges_out_of_sites(ranks))
        return max(self._slowest_link_seconds(num_bytes, ranks), self.site_link_seconds(edges * sent))

    def ring_seconds(self, num_bytes: int, workers: int | Sequence[int]) -> float:
        r"""Seconds of gloo's own ring all-reduce, which `DistributedDataParallel` makes, once everybody is there.

        Without `rendezvous`: `ring_transfer_seconds`, and the latencies of ``2 (workers - 1)`` edges of the ring
        that follow each other: what a worker sends in one round is what it received in the round before. The slowest
        such way leaves out, of twice around the ring, the two edges that follow each other with the smallest latency.

        With it, as gloo's ring: every worker passes on two segments per round, of ``s`` seconds each on the slowest
        link, and asks for a segment of the next round when it has got the one of this round. With ``R`` the latency
        there and back between the two neighbours that are farthest apart, each of the two phases takes::

            R + 2 s + (workers - 2) max(2 s, R + s)

        Args:
            num_bytes: of the vector.
            workers: how many take part, or which.
        """
        ranks = _ranks(workers)
        count = len(ranks)
        if count == 1:
            return 0.0
        transfer = self.ring_transfer_seconds(num_bytes, ranks)
        edges, round_trip = self._ring_latencies(ranks)
        if not self.rendezvous:
            return transfer + 2 * sum(edges) - min(edge + edges[rank - 1] for rank, edge in enumerate(edges))
        segment = transfer / (4 * (count - 1))
        return 2 * (round_trip + 2 * segment + (count - 2) * max(2 * segment, round_trip + segment))

    def call_wait_seconds(self, source: int, target: int) -> float:
        """Seconds from the begin of a call until its vector leaves: its header, and what asks for the first parts."""
        if not self.rendezvous:
            return 0.0
        return self.message_latency_seconds(source, target) + self.message_latency_seconds(target, source)

    def call_paced_seconds(self, num_bytes: int, source: int, target: int) -> float:
        """Seconds from the first to the last byte of a call that is answered in parts, if nothing else is on its way.

        Its responder asks for a further part when one has come, so in each time there and back travel `CALL_AHEAD`.
        """
        seconds = self.transfer_seconds(num_bytes, source, target)
        if not self.rendezvous or not num_bytes:
            return seconds
        parts = math.ceil(num_bytes / call_part_bytes(num_bytes))
        part = seconds / parts
        one_turn = self.call_wait_seconds(source, target) + part
        return max(seconds, (math.ceil(parts / CALL_AHEAD) - 1) * one_turn + min(parts, CALL_AHEAD) * part)

    def all_to_all_transfer_seconds(self, num_bytes: float, workers: int) -> float:
        """Seconds without latency in which every worker sends so many bytes, in equal parts to all others."""
        factor = max([1.0, *self.slow_links.values()])
        crossing = max(
            (len(site) * num_bytes * (workers - len(site)) / max(1, workers - 1) for site in self.sites), default=0.0
        )
        return max(
            num_bytes * factor / self.bandwidth_bytes_per_second, crossing / self.site_bandwidth_bytes_per_second
        )

    def largest_latency_seconds(self, workers: int) -> float:
        """Return one-way latency of the slowest message between two workers."""
        pairs = ((i, j) for i in range(workers) for j in range(workers) if i != j)
        return max((self.message_latency_seconds(i, j) for i, j in pairs), default=0.0)


def _ranks(workers: int | Sequence[int]) -> Sequence[int]:
    """Return all ranks of so many workers, or those that are named."""
    return range(workers) if isinstance(workers, int) else workers
