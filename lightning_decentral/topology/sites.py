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
    r"""Averages within sites, and in every k-th step the first workers of the sites *exchange* their models.

    With `n = s m` workers, rank `i` is worker `i mod m` of site `i // m`, so ranks are numbered site by site. In steps
    0, k, 2k, ... worker 0 of each site replaces its model with that of worker 0 of another site, one edge of the
    exponential graph of the sites, and nobody else sends. In the `k - 1` steps between, each site averages along the
    one-peer exponential graph of its own m workers: `x_i <- (x_i + x_j) / 2`.

    A crossing is a permutation: nothing is averaged at that moment, and the steps that follow do it inside the sites.
    It moves a share `1 / m` of a site's mean, twice what averaging the pair would move for the same bytes. Where a site
    averages exactly between two crossings (m a power of two, `k > log2 m`), the difference of two sites' means shrinks
    by the factor `1 - 2 / m` at each of them; with m = 2 it is gone.

    Each site sends and receives one model in k steps. `OnePeerExponential` sends up to `m` from a site in *every* step,
    `HypercubeMatching` `m` in one step of `log2 n`. The price is slower agreement between the sites: see
    `rounds_to_consensus`, and the larger k the more so. Symmetric for two sites of two; never for D2, as it changes.

    Cost: at most 1 message sent and 1 received per worker and step, and `1 / k` of a model per site between the sites.

    Args:
        size: number of workers n, a multiple of `sites`.
        sites: number of sites s, at least 2, with at least two workers each. Default 2.
        crossing_period: the steps k from one exchange between the sites to the next, at least 2. Default 4.

    Raises:
        TopologyError: if the sites would have different numbers of workers, or one worker each.

    Example:
        >>> from lightning_decentral.topology import Sites
        >>> graph = Sites(8, sites=2, crossing_period=4)
        >>> [graph.edges(step) for step in (0, 4)]
        [[(0, 4), (4, 0)], [(0, 4), (4, 0)]]
        >>> [graph.in_neighbors(rank=5, step=t) for t in range(5)]
        [(), (6,), (7,), (6,), ()]
        >>> graph.weights(rank=0, step=0), graph.weights(rank=0, step=1)
        ({4: 1.0}, {0: 0.5, 1: 0.5})

    References:
        None that we know of for this graph. Both levels are one-peer exponential graphs: Ying, Yuan, Chen, Hu, Pan,
        Yin, *Exponential Graph is Provably Efficient for Decentralized Deep Training*, NeurIPS 2021.
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
        crossing, since = divmod(step, self.crossing_period)
        since = (since - self.crossing_period // 2) % self.crossing_period
        if since == 0:
            hop = (1 << crossing) * members
            return tuple({(r + hop) % self.size if r % members == 0 else r: 1.0} for r in range(self.size))
        hop = 1 << (since - 1) % (members - 1).bit_length()
        return uniform_rows([(r - r % members + (r + hop) % members,) for r in range(self.size)])
