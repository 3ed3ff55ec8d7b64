"""Groups of workers that are near each other, joined by links that are slow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lightning_decentral.errors import TopologyError
from lightning_decentral.topology.base import AbstractPeriodicTopology
from lightning_decentral.topology.rows import Row, uniform_rows
from lightning_decentral.topology.validation import require_integer, require_workers


@final
@dataclass(frozen=True)
class Sites(AbstractPeriodicTopology):
    r"""One peer inside the site per step; every k-th step instead one exchange between the sites. Directed.

    With `n = s m` workers rank i is worker `i mod m` of site `i // m`: ranks are numbered site by site. In one step of
    k, the *crossing*, worker 0 of each site takes the model of worker 0 of another site, `x_i <- x_j`, and all others
    keep theirs. In the `k - 1` steps after it each site averages along a one-peer exponential graph of its own,
    `x_i <- (x_i + x_j) / 2`. Which site comes next is the one-peer exponential graph of the sites.

    A crossing is a permutation: the averaging follows inside the sites, on their own links. It moves the mean of a site
    by a share `1 / m` of the way to the other site's, twice as far as if the two workers had averaged, with the same
    message. If a site averages exactly in between (m a power of two and `k > log2 m`), the distance between two sites
    shrinks by the factor `1 - 2 / m` per crossing; with m = 2 it is gone after one.

    For sites that are joined by a slow link: it carries one model per site in k steps, where `OnePeerExponential` sends
    some in every step and `HypercubeMatching` m per site in one of log2 n. The price is that sites agree more slowly
    (see `rounds_to_consensus`), the more so the larger k and m are. The machines of a cluster, with fast links inside,
    are sites as well.

    Cost: at most 1 message sent and 1 received per worker and step; `1 / k` of a model per step between the sites.

    Args:
        size: number of workers n, a multiple of `sites`.
        sites: number of sites s, at least 2, with at least 2 workers each. Default 2.
        crossing_period: k, at least 3; more than log2 m, and the more the slower the link is. Default 4.

    Raises:
        TopologyError: if the sites would not have equally many workers, or one worker each.

    Example:
        >>> from lightning_decentral.topology import Sites
        >>> graph = Sites(8, sites=2, crossing_period=4)
        >>> [graph.in_neighbors(rank=0, step=t) for t in range(5)], graph.edges(step=2)
        ([(2,), (1,), (4,), (1,), (2,)], [(0, 4), (4, 0)])
        >>> graph.weights(rank=0, step=1), graph.weights(rank=0, step=2)
        ({0: 0.5, 1: 0.5}, {4: 1.0})

    References:
        No paper that we know of has this graph. Its levels are those of Ying, Yuan, Chen, Hu, Pan, Yin, *Exponential
        Graph is Provably Efficient for Decentralized Deep Training*, NeurIPS 2021.
    """

    sites: int = 2
    crossing_period: int = 4

    def _prepare(self) -> None:
        for name, value in (("sites", self.sites), ("crossing_period", self.crossing_period)):
            require_integer("Sites", name, value)
        if self.sites < 2:
            raise TopologyError(
                f"Sites needs at least 2 sites, got {self.sites}. Use OnePeerExponential, which knows no sites."
            )
        if self.crossing_period < 3:
            raise TopologyError(
                f"Sites needs a crossing period of at least 3 steps, got {self.crossing_period}. Use 3 or more: a site "
                "has to average between two crossings."
            )
        require_workers("Sites", self.size, 2 * self.sites, "Use OnePeerExponential: one worker cannot average.")
        if self.size % self.sites:
            raise TopologyError(
                f"Sites needs equally many workers at each of the {self.sites} sites, got {self.size} in all. Start "
                f"{self.size - self.size % self.sites} workers, or use OnePeerExponential, which knows no sites."
            )

    @property
    def period(self) -> int:
        """The crossing period, times `ceil(log2 s)`, the number of different hops between the sites."""
        return self.crossing_period * (self.sites - 1).bit_length()

    def _rows(self, step: int) -> tuple[Row, ...]:
        members = self.size // self.sites
        crossing, place = divmod(step, self.crossing_period)
        # In the middle, so that a period begins and ends with averaging: the first models are equal, and `spectral_gap`
        # is the factor of one period.
        since = (place - self.crossing_period // 2) % self.crossing_period
        if since == 0:
            hop = members << crossing
            return tuple({(rank + hop) % self.size if rank % members == 0 else rank: 1.0} for rank in range(self.size))
        hop = 1 << (since - 1) % (members - 1).bit_length()
        return uniform_rows([(rank - rank % members + (rank + hop) % members,) for rank in range(self.size)])
