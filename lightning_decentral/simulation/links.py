"""The network of links that virtual workers share: when the first and the last byte of a message arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.simulation.cluster import Cluster
from lightning_decentral.simulation.events import Clock
from lightning_decentral.traffic import Traffic

Arrive = Callable[..., None]
"""What is called with two arguments when a message, or its first part, has arrived."""


@dataclass(slots=True)
class SiteLink:
    """One direction of the link between a site and the others, which all workers of the site share.

    Attributes:
        free_at_seconds: the virtual second at which it will have carried all that was sent so far.
        num_bytes: what it has carried, or will have by then.
    """

    free_at_seconds: float = 0.0
    num_bytes: int = 0


class _Message(NamedTuple):
    source: int
    target: int
    num_bytes: int
    occupied: float  # seconds of the sender's uplink, and of the receiver's downlink
    paced: float  # seconds from its first byte to its last, which the slowest link on its way sets
    latency: float
    head: Arrive | None  # called when its first part has arrived
    event: tuple[Arrive, Any, Any]


class Links:
    """Every worker's uplink and downlink, and those of the sites.

    Args:
        cluster: how fast they are.
        clock: by which messages arrive.
        traffic: where it is counted what each worker sends.

    Attributes:
        site_uplinks: of the sites of the cluster, in their order; one, that carries nothing, if it names none.
        site_downlinks: likewise.
    """

    def __init__(self, cluster: Cluster, clock: Clock, traffic: Sequence[Traffic]) -> None:
        self._cluster = cluster
        self._clock = clock
        self._traffic = traffic
        workers = len(traffic)
        self._up_free = [0.0] * workers
        self._down_free = [0.0] * workers
        self._sites = [cluster.site_of(rank) for rank in range(workers)]
        self.site_uplinks = [SiteLink() for _ in cluster.sites or ((),)]
        self.site_downlinks = [SiteLink() for _ in cluster.sites or ((),)]

    def transmit(
        self,
        source: int,
        target: int,
        num_bytes: int,
        arrive: Arrive,
        first: Any,
        other: Any,
        paced: float | None = None,
        head: Arrive | None = None,
    ) -> float:
        """Send a message.

        Args:
            source: who sends.
            target: who receives.
            num_bytes: of the message.
            arrive: called with ``first`` and ``other`` when it is there.
            first: see there.
            other: see there.
            paced: seconds from its first byte to its last; by default those of the slowest link on its way.
            head: called with ``first`` and the number of bytes when its first part is there.

        Returns:
            When its last byte has left the sender.
        """
        traffic = self._traffic[source]
        traffic.bytes_sent += num_bytes
        traffic.messages += 1
        clock, cluster = self._clock, self._cluster
        start = max(clock.seconds, self._up_free[source])
        occupied = cluster.link_seconds(num_bytes, source, target)
        inside = self._sites[source] == self._sites[target]
        if paced is None:
            paced = occupied if inside else cluster.transfer_seconds(num_bytes, source, target)
        latency = cluster.message_latency_seconds(source, target)
        message = _Message(source, target, num_bytes, occupied, paced, latency, head, (arrive, first, other))
        self._up_free[source] = start + occupied
        forward = self._download if inside else self._leave_site
        if start > clock.seconds:  # the next link stays free for others until the first byte leaves
            clock.at(start, forward, message, None)
        else:
            forward(message, None)
        return start + occupied

    def count_between_sites(self, num_bytes: Sequence[float]) -> None:
        """Count what a collective carries out of and into each site."""
        for site, each in enumerate(num_bytes):
            self.site_uplinks[site].num_bytes += round(each)
            self.site_downlinks[site].num_bytes += round(each)

    def _leave_site(self, message: _Message, _: None) -> None:
        self._pass(self.site_uplinks[self._sites[message.source]], message, self._enter_site)

    def _enter_site(self, message: _Message, _: None) -> None:
        self._pass(self.site_downlinks[self._sites[message.target]], message, self._download)

    def _pass(self, link: SiteLink, message: _Message, forward: Arrive) -> None:
        """Note the first byte of a message at a link between sites; ``forward`` is called when it leaves it."""
        now = self._clock.seconds
        occupied = self._cluster.site_link_seconds(message.num_bytes)
        link.free_at_seconds = max(now, link.free_at_seconds) + occupied
        link.num_bytes += message.num_bytes
        # When the last byte has left, less the seconds that the message takes to pass. If a slower link feeds this one,
        # that is now: its bytes find room between those of other messages.
        self._clock.at(max(now, link.free_at_seconds - message.paced), forward, message, None)

    def _download(self, message: _Message, _: None) -> None:
        now = self._clock.seconds
        begin = max(now, self._down_free[message.target])
        received = begin + message.occupied
        self._down_free[message.target] = received
        if message.head is not None:
            self._clock.at(begin + message.latency, message.head, message.event[1], message.num_bytes)
        self._clock.at(max(received, now + message.paced) + message.latency, *message.event)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return until when each link is busy, and what those between sites have carried."""
        return {
            "links": (list(self._up_free), list(self._down_free)),
            "site_links": [[asdict(link) for link in links] for links in (self.site_uplinks, self.site_downlinks)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ConfigurationError: if it is of a cluster with another number of sites.
        """
        sites = len(state["site_links"][0])
        if sites != len(self.site_uplinks):
            raise ConfigurationError(
                f"The checkpoint is of a cluster of {sites} sites, this simulation has {len(self.site_uplinks)}. "
                f"Make it with {sites} sites."
            )
        self._up_free, self._down_free = (list(free) for free in state["links"])
        self.site_uplinks, self.site_downlinks = ([SiteLink(**link) for link in links] for links in state["site_links"])
