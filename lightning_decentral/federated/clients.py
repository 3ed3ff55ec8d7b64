"""Who takes part in which round of federated learning, with how many steps, and how much it counts: pure data.

Everything follows from a seed and the number of the round, so that the algorithm, the loader and any number of workers
agree on it without a message, and a run goes on exactly from the number of its round.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError

Weights = Literal["samples", "all", "equal"]
Sampling = Literal["uniform", "by_samples"]

_DRAWS = 100  # of a round in which everybody fails
_BLOCK = 64  # rounds between two states of the chain that are kept


@dataclass(frozen=True, slots=True)
class Turn:
    """One client's work in a round.

    Attributes:
        client: its number.
        steps: local steps that it makes.
        weight: of what it has moved, in the sum over the round's clients.
    """

    client: int
    steps: int
    weight: float


@dataclass(frozen=True, slots=True)
class Round:
    """What happens in one round.

    Attributes:
        turns: of the clients that count, in the order in which they were drawn.
        asked: how many clients were sent the model.
        dropped: those that failed.
        late: those that were not among the first, or missed the deadline.
        seconds: until the last of those that count has answered, by the clients' speeds.
    """

    turns: tuple[Turn, ...]
    asked: int
    dropped: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    seconds: float = 0.0

    def of_workers(self, workers: int, pinned: bool) -> list[list[Turn]]:
        """Divide the turns among workers, each of which is its clients one after the other.

        Args:
            workers: how many there are.
            pinned: whether a client always has the same worker, ``client % workers``, where its state is. Otherwise
                the longest turns are dealt out first, each to the worker with the fewest steps.
        """
        shares: list[list[tuple[int, Turn]]] = [[] for _ in range(workers)]
        if pinned:
            for place, turn in enumerate(self.turns):
                shares[turn.client % workers].append((place, turn))
        else:
            load = [(0, worker) for worker in range(workers)]
            for place, turn in sorted(enumerate(self.turns), key=lambda each: -each[1].steps):
                steps, worker = load[0]
                shares[worker].append((place, turn))
                heapq.heapreplace(load, (steps + turn.steps, worker))
        return [[turn for _, turn in sorted(share, key=lambda each: each[0])] for share in shares]


@dataclass(frozen=True)
class Availability:
    """Clients come and go: each is a Markov chain of two states, available or not, with one transition per round.

    Args:
        leaves: probability that an available client is not so in the next round, in (0, 1].
        returns: probability that one that is away is back in the next round, in (0, 1]. In the long run a share
            ``returns / (leaves + returns)`` is available; the first round begins there.

    Example:
        >>> Availability(leaves=0.25, returns=0.75).share
        0.75
    """

    leaves: float = 0.1
    returns: float = 0.1

    def __post_init__(self) -> None:
        if not (0.0 < self.leaves <= 1.0 and 0.0 < self.returns <= 1.0):
            raise ConfigurationError(f"{self} needs two probabilities above 0 and at most 1. Use 0.1 and 0.1.")

    @property
    def share(self) -> float:
        """The share of clients that are available in the long run."""
        return self.returns / (self.leaves + self.returns)

    def mask(self, number: int, seed: int, round: int) -> Tensor:
        """Tell which clients are available: ``[number]``, bool."""
        state = _block(self, number, seed, round // _BLOCK)
        for each in range(round // _BLOCK * _BLOCK + 1, round + 1):
            state = _transition(self, state, seed, each)
        return state


def _transition(chain: Availability, state: Tensor, seed: int, round: int) -> Tensor:
    draw = torch.rand(len(state), generator=_generator(seed, round))
    return torch.where(state, draw >= chain.leaves, draw < chain.returns)


def _generator(seed: int, round: int) -> torch.Generator:
    return torch.Generator().manual_seed((1_000_003 * seed + round + 1) % 2**63)


@functools.lru_cache(maxsize=16)
def _block(chain: Availability, number: int, seed: int, block: int) -> Tensor:
    """Return the chain's state at the beginning of a block of rounds."""
    if block == 0:
        return torch.rand(number, generator=_generator(seed, -1)) < chain.share
    state = _block(chain, number, seed, block - 1)
    for each in range((block - 1) * _BLOCK + 1, block * _BLOCK + 1):
        state = _transition(chain, state, seed, each)
    return state


@dataclass(frozen=True)
class Clients:
    r"""A population of clients, a few of which take part in each round.

    In each round some are drawn without replacement. Each begins at the common model, with an optimizer that remembers
    nothing, makes its local steps on its own data, and sends what it has moved; the weighted sum is what the server
    steps along. A client is no process: workers are several clients in turn.

    Args:
        number: of clients, at least 1.
        per_round: how many answers the server wants in a round, at most ``number``. Fewer count if clients drop out.
        local_epochs: passes of a client over its data in a round.
        local_steps: steps of a client in a round, in the place of ``local_epochs``: all make equally many then.
        sampling: ``"uniform"``: all are as likely. ``"by_samples"``: one with twice the samples is drawn with twice the
            weight, successively.
        weights: how much a client counts. ``"samples"``: by its samples among those of the round,
            :math:`n_k / \sum_{j \in S} n_j`: a mean of the round's clients, but biased under ``"uniform"`` where sizes
            differ. ``"all"``: by its samples among all, :math:`(n_k / n)(K / M)` with K clients of which M are wanted:
            right on average, but the sum of a round's weights is not 1, and who drops out counts as one that has not
            moved. ``"equal"``: each alike, which goes with ``"by_samples"``.
        availability: when clients can be drawn at all; all can by default.
        dropout: probability that a drawn client fails, in [0, 1).
        over_selection: how many times ``per_round`` clients are drawn, at least 1; the first ``per_round`` that answer
            count. 1.3 is usual.
        deadline_seconds: after which the server waits for nobody, by the clients' speeds.
        step_seconds: what a step takes on a client of usual speed.
        speed_spread: standard deviation of the logarithm of a client's speed, which stays the same; 0: all are equal.
        stateful: whether clients remember something from one round to the next in which they take part. A thousand
            telephones do not.
        seed: of all that is drawn.
        samples: how many each client has; strategies fill it in from the data.
        batch_size: samples of a step; strategies fill it in, as they do the next one.
        drop_last: whether a client leaves out the last batch of a pass over its data, unless it is the only one, where
            that is smaller.

    Raises:
        ConfigurationError: if that cannot be.

    Example:
        >>> clients = Clients(1000, per_round=20, local_steps=5)
        >>> len(clients.round(0).turns), clients.round(0) == clients.round(0)
        (20, True)
    """

    number: int
    per_round: int
    local_epochs: int = 1
    local_steps: int | None = None
    sampling: Sampling = "uniform"
    weights: Weights = "samples"
    availability: Availability | None = None
    dropout: float = 0.0
    over_selection: float = 1.0
    deadline_seconds: float | None = None
    step_seconds: float = 1.0
    speed_spread: float = 0.0
    stateful: bool = False
    seed: int = 0
    samples: tuple[int, ...] = field(default=(), repr=False)
    batch_size: int = field(default=0, repr=False)
    drop_last: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        name = f"Clients(number={self.number}, per_round={self.per_round})"
        if self.number < 1:
            raise ConfigurationError(f"{name} got {self.number} clients, needs at least 1. Use 100.")
        if not 1 <= self.per_round <= self.number:
            raise ConfigurationError(
                f"{name} got {self.per_round} clients for each round, needs 1 to {self.number}, because nobody is "
                "drawn twice in a round. Use fewer in a round, or more clients."
            )
        if self.local_epochs < 1 or (self.local_steps is not None and self.local_steps < 1):
            raise ConfigurationError(
                f"{name} got local_epochs={self.local_epochs} and local_steps={self.local_steps}, needs at least 1. "
                "Use local_epochs=1."
            )
        if self.sampling not in ("uniform", "by_samples") or self.weights not in ("samples", "all", "equal"):
            raise ConfigurationError(
                f"{name} got sampling={self.sampling!r} and weights={self.weights!r}, needs 'uniform' or 'by_samples', "
                "and 'samples', 'all' or 'equal'. Leave them out for the first of each."
            )
        if not (0.0 <= self.dropout < 1.0 and self.over_selection >= 1.0 and self.speed_spread >= 0.0):
            raise ConfigurationError(
                f"{name} got dropout={self.dropout}, over_selection={self.over_selection} and "
                f"speed_spread={self.speed_spread}, needs one in [0, 1), one of at least 1 and one of at least 0. "
                "Leave them out for none."
            )
        if self.step_seconds <= 0.0 or (self.deadline_seconds is not None and self.deadline_seconds <= 0.0):
            raise ConfigurationError(
                f"{name} got step_seconds={self.step_seconds} and deadline_seconds={self.deadline_seconds}, needs "
                "numbers above 0. Leave the deadline out for none."
            )
        if self.samples and len(self.samples) != self.number:
            raise ConfigurationError(
                f"{name} got the samples of {len(self.samples)} clients, needs one number for each. Give the data to "
                f"{self.number} clients, or use Clients({len(self.samples)}, ...)."
            )
        if self.samples and min(self.samples) < 1:
            without = [client for client, count in enumerate(self.samples) if count < 1]
            raise ConfigurationError(
                f"{name} got {len(without)} clients without data, the first of them client {without[0]}; it needs at "
                "least 1 sample for each. Use fewer clients, or a partition with a smallest size."
            )

    def of_data(self, samples: Sequence[int], batch_size: int, drop_last: bool = False) -> Self:
        """Return these clients, with what each has.

        Args:
            samples: of each client.
            batch_size: of each step, in samples.
            drop_last: see there.
        """
        return dataclasses.replace(self, samples=tuple(samples), batch_size=batch_size, drop_last=drop_last)

    def batches(self, client: int) -> int:
        """Batches of a client's pass over its data.

        Raises:
            ConfigurationError: if the data is not there.
        """
        if not self.samples or self.batch_size < 1:
            raise ConfigurationError(
                f"{self} got no data, needs it to know how many steps {self.local_epochs} local epochs are. Train with "
                "a strategy, which fills it in, or use local_steps, or `of_data`."
            )
        whole, rest = divmod(self.samples[client], self.batch_size)
        return whole if self.drop_last and whole else whole + (rest > 0)

    def steps(self, client: int) -> int:
        """Tell how many local steps a client makes in a round.

        Raises:
            ConfigurationError: if that depends on the data, which is not there.
        """
        return self.local_epochs * self.batches(client) if self.local_steps is None else self.local_steps

    def seconds(self, client: int) -> float:
        """Tell how long a client takes for its part of a round."""
        pace = random.Random(f"pace {self.seed} {client}").gauss(0.0, 1.0) * self.speed_spread
        return self.steps(client) * self.step_seconds * math.exp(pace)

    def round(self, number: int) -> Round:
        """Draw a round.

        Args:
            number: of the round, from 0.

        Raises:
            ConfigurationError: if there is nobody to draw, or nobody is ever in time.
        """
        draws = random.Random(f"round {self.seed} {number}")
        there: Sequence[int] = range(self.number)
        if self.availability is not None:
            there = self.availability.mask(self.number, self.seed, number).nonzero()[:, 0].tolist()
        if not there:
            raise ConfigurationError(
                f"{self} got round {number} without any client that is available; it needs one at least. Use more "
                "clients, or an Availability with a larger share."
            )
        wanted = min(len(there), math.ceil(self.per_round * self.over_selection))
        for _ in range(_DRAWS):
            asked = self._draw(draws, there, wanted)
            dropped = [client for client in asked if draws.random() < self.dropout] if self.dropout else []
            answers = sorted((self.seconds(client), place, client) for place, client in enumerate(asked))
            answers = [each for each in answers if each[2] not in dropped]
            end = math.inf if self.deadline_seconds is None else self.deadline_seconds
            counted = [each for each in answers[: self.per_round] if each[0] <= end]
            if counted:
                break
        else:
            raise ConfigurationError(
                f"{self} got no answer in {_DRAWS} draws of round {number}, because all drop out or are late; it needs "
                "one at least. Use a later deadline, or a smaller dropout."
            )
        clients = [client for _, place, client in sorted(counted, key=lambda each: each[1])]
        late = tuple(client for _, _, client in answers if client not in clients)
        turns = tuple(
            Turn(client, self.steps(client), weight)
            for client, weight in zip(clients, self._weights(clients), strict=True)
        )
        end = end if late and self.deadline_seconds is not None and len(clients) < self.per_round else counted[-1][0]
        return Round(turns, len(asked), tuple(dropped), late, end)

    def _draw(self, draws: random.Random, there: Sequence[int], wanted: int) -> list[int]:
        """Draw some without replacement."""
        if self.sampling == "uniform" or not self.samples:
            return draws.sample(there, wanted)
        # The largest of u ** (1 / weight) are successive draws (Efraimidis, Spirakis, 2006).
        keys = [(math.log(1.0 - draws.random()) / self.samples[client], client) for client in there]
        return [client for _, client in heapq.nlargest(wanted, keys)]

    def share(self, client: int) -> float:
        """Tell how much a client counts among all; these sum to 1."""
        if self.weights == "equal" or not self.samples:
            return 1.0 / self.number
        return self.samples[client] / sum(self.samples)

    def _weights(self, clients: Sequence[int]) -> list[float]:
        if self.weights == "equal" or not self.samples:
            share = self.per_round if self.weights == "all" else len(clients)
            return [1.0 / share] * len(clients)
        own = [self.samples[client] for client in clients]
        if self.weights == "all":
            return [count / sum(self.samples) * self.number / self.per_round for count in own]
        return [count / sum(own) for count in own]
