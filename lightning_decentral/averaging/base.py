"""What every averager is: a configuration that brings the values of neighbours together, plainly or compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning_decentral.flat import AbstractVector
from lightning_decentral.protocol import AbstractRequest, Steps
from lightning_decentral.topology import AbstractTopology
from lightning_decentral.worker import Worker

Work = AbstractRequest[Any] | Steps[Any]
"""A request or a coroutine of requests: what can be awaited at once, or begun by `Start`."""


class AbstractAverager(ABC):
    r"""How the values of neighbours become one average. It never knows *when* it is used.

    Subclasses are frozen dataclasses. With ``heard_j`` what worker i knows of the value of its neighbour j, and
    ``heard_i`` what its neighbours know of its own, a round is::

        pull_i  = sum_j W[i, j] (heard_j - heard_i)
        value_i <- value_i + share * pull_i

    Where ``W`` is symmetric two neighbours add the same numbers with opposite signs, so that the mean of the values
    stays, whatever compression loses.

    An algorithm calls `init` in its own ``init``. In each step it goes one of two ways: it awaits `average`, at once or
    through `Start` behind the gradient, and gives the answer to `combine_`; or it awaits `exchange` and gives the
    answer to `pull_`, if it needs the pull itself, as D2 does. What is remembered changes in `combine_` and `pull_`
    alone, so that a checkpoint taken while an exchange is under way is the same on all workers. One averager has one
    value per worker: vectors that are averaged together are one value, ``x.beside(other)``.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def share(self) -> float:
        """The part of the way to the average that a value goes in one round, in (0, 1].

        The matrix of a round is then ``(1 - share) I + share W``, but for what compression leaves for later.
        """

    @property
    @abstractmethod
    def lag(self) -> float:
        """The steps by which what neighbours know of a value is behind it, at most, while it moves on steadily.

        0 if they hear it as it is, or without a bias.
        """

    @abstractmethod
    def check(self, graph: AbstractTopology) -> None:
        """Refuse a graph on which this cannot work.

        Raises:
            TopologyError: if it is one.
        """

    @abstractmethod
    def init(self, worker: Worker, value: AbstractVector, adds_up: bool = False) -> None:
        """Put what is remembered into ``worker.state``, under names of its own.

        Args:
            worker: that remembers.
            value: like those that will be averaged.
            adds_up: whether the algorithm adds up the pulls over the steps. Their sum over the workers, which is zero
                but for rounding, must then be so small that its sum over a whole training can be neglected.

        Raises:
            ConfigurationError: if such values cannot be averaged.
        """

    def average(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Work:
        """Tell what has to be awaited for an average; ``value`` must not change meanwhile. Its answer is for
        `combine_`."""
        return self.exchange(worker, graph, value)

    @abstractmethod
    def combine_(self, worker: Worker, value: AbstractVector, heard: Any) -> None:
        """Bring a value to where the average is, by what `average` has answered."""

    @abstractmethod
    def exchange(self, worker: Worker, graph: AbstractTopology, value: AbstractVector) -> Work:
        """Tell what has to be awaited for a pull; ``value`` must not change meanwhile. Its answer is for `pull_`.

        Args:
            worker: that tells its neighbours of this step, and hears from them.
            graph: W; the round of ``worker.step`` is taken.
            value: the worker's.
        """

    @abstractmethod
    def pull_(
        self, worker: Worker, value: AbstractVector, heard: Any, total: AbstractVector, rest: AbstractVector
    ) -> None:
        """Add ``share * pull`` to a value and to a total, by what `exchange` has answered, which is used up.

        Args:
            worker: that was given to `exchange`.
            value: the same.
            heard: the answer.
            total: sum of all pulls so far, of `AbstractVector.zeros_like` the value.
            rest: what rounding has left out of the value, of `AbstractVector.remainder_like` it; is added too.
        """
