"""Which samples of a data set belong to which client: the conventions of the papers, which are not the same.

Each function takes the samples' classes and a seed, and gives a `Partition`: a sample belongs to one client at most.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_decentral.errors import ConfigurationError

_DRAWS = 1000  # until every client has enough
_GROUP = 10  # clients among which the epfml convention divides a part of the data


@dataclass(frozen=True)
class Partition:
    """Which samples belong to which client.

    Args:
        indices: of all clients' samples, one client after the other: ``[samples]``, int64.
        sizes: of each client, in samples.
        name: how it was made, and with which seed; for records.

    Example:
        >>> iid(10, clients=3, seed=0).sizes
        (4, 3, 3)
    """

    indices: Tensor
    sizes: tuple[int, ...]
    name: str

    def __post_init__(self) -> None:
        empty = [client for client, size in enumerate(self.sizes) if size < 1]
        if empty:
            raise ConfigurationError(
                f"{self.name} got {len(empty)} of {len(self.sizes)} clients without data, the first of them client "
                f"{empty[0]}; it needs at least 1 sample for each. Use fewer clients, a larger alpha, or another seed."
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, client: int) -> Tensor:
        """Return the samples of a client: ``[samples]``, int64."""
        begin = sum(self.sizes[:client])
        return self.indices[begin : begin + self.sizes[client]]

    def owners(self) -> Tensor:
        """Return the client of each of `indices`: ``[samples]``, int64."""
        return torch.repeat_interleave(torch.tensor(self.sizes))

    def histogram(self, classes: Tensor) -> Tensor:
        """Tell how many samples of each class a client has: ``[clients, classes]``, int64.

        Args:
            classes: of each sample of the data set: ``[all samples]``, int64.
        """
        count = int(classes.max()) + 1
        flat = self.owners() * count + classes[self.indices]
        return torch.bincount(flat, minlength=len(self) * count).view(len(self), count)

    def described(self, classes: Tensor | None = None) -> str:
        """Say in a few lines how the data is divided."""
        sizes = sorted(self.sizes)
        lines = [
            f"{self.name}: {len(self)} clients with {sum(sizes)} samples, from {sizes[0]} to {sizes[-1]}, "
            f"half of them with at most {sizes[len(sizes) // 2]}"
        ]
        if classes is not None:
            shares = self.histogram(classes).double()
            shares /= shares.sum(1, keepdim=True)
            largest = shares.sort(1, descending=True).values
            lines.append(
                f"of {shares.shape[1]} classes a client has {float((shares > 0).sum(1).double().mean()):.1f} on "
                f"average; {100 * float(largest[:, 0].mean()):.0f} % of its samples are of its first"
            )
        return "\n".join(lines)

    def picture(self, classes: Tensor, names: Sequence[str] = (), most: int = 50) -> str:
        """Draw clients against classes, as an SVG: the area of a disc is the number of samples.

        Args:
            classes: of each sample of the data set.
            names: of the classes; their numbers by default.
            most: clients that are drawn: the first ones.
        """
        counts = self.histogram(classes)[:most]
        clients, kinds = counts.shape
        names = names or [str(kind) for kind in range(kinds)]
        left, top, cell = 8 + 7 * max(len(each) for each in names), 24, 16
        width, height = left + cell * clients + 8, top + cell * kinds + 28
        scale = 0.5 * cell / math.sqrt(int(counts.max()))
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="15">{html.escape(self.name)}</text>',
        ]
        for kind, label in enumerate(names):
            y = top + cell * kind + cell // 2
            parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{html.escape(label)}</text>')
            for client in range(clients):
                radius = scale * math.sqrt(int(counts[client, kind]))
                if radius:
                    x = left + cell * client + cell // 2
                    parts.append(f'<circle cx="{x}" cy="{y}" r="{radius:.2f}" fill="#3b6ea5"/>')
        shown = "" if clients == len(self) else f", the first {clients} of {len(self)}"
        parts.append(f'<text x="{left}" y="{height - 8}">clients{shown}</text></svg>')
        return "".join(parts)


def given(parts: Sequence[Sequence[int] | Tensor], name: str = "given parts") -> Partition:
    """Return a partition that the user has made.

    Args:
        parts: of each client the numbers of its samples.
        name: for records.
    """
    tensors = [torch.as_tensor(part, dtype=torch.int64).view(-1) for part in parts]
    indices = torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.int64)
    shared = len(indices) - len(set(indices.tolist()))
    if shared:
        raise ConfigurationError(
            f"{name} got {shared} samples that belong to more than one client; it needs "
            "each to belong to one at most. Remove them from the others."
        )
    return Partition(indices, tuple(len(part) for part in tensors), name)


def iid(samples: int, clients: int, seed: int) -> Partition:
    """Divide samples at random into parts of equal size, but for one sample."""
    order = torch.randperm(samples, generator=_generator(seed))
    return _of_parts(list(torch.tensor_split(order, clients)), f"iid, seed {seed}")


def dirichlet_by_client(classes: Tensor, clients: int, alpha: float, seed: int) -> Partition:
    """Give each client its own shares of the classes, drawn around those of all (Hsu, Qi, Brown, 2019); equal sizes.

    ``q_k ~ Dirichlet(alpha p)`` with the shares p of all; a client draws its samples from q_k, renormalised where a
    class has run out.

    Args:
        classes: of each sample: ``[samples]``, int64.
        clients: how many.
        alpha: above 0; small: few classes for each client. Infinite: iid. The entries of ``alpha p`` sum to alpha.
        seed: of the draws.
    """
    name = f"Dirichlet {alpha:g} by client, seed {seed}"
    _check(name, classes, clients, alpha)
    generator = _generator(seed)
    pools = _pools(classes, generator)
    prior = torch.tensor([len(pool) for pool in pools], dtype=torch.float64)
    left, size = prior.clone(), len(classes) // clients
    parts = []
    for _ in range(clients):
        shares = _dirichlet(alpha * prior / prior.sum(), generator)
        chosen: list[Tensor] = []
        missing = size
        while missing:
            possible = torch.where(left > 0, shares, torch.zeros(()).double())
            if not float(possible.sum()):  # all that it wants has run out
                possible = left
            drawn = torch.multinomial(possible, missing, replacement=True, generator=generator)
            counts = torch.bincount(drawn, minlength=len(pools)).minimum(left.long())
            for kind, count in enumerate(counts.tolist()):
                if count:
                    end = int(left[kind])
                    chosen.append(pools[kind][end - count : end])
                    left[kind] -= count
                    missing -= count
        parts.append(torch.cat(chosen))
    return _of_parts(parts, name)


def dirichlet_by_class(classes: Tensor, clients: int, alpha: float, seed: int, least: int = 10) -> Partition:
    """Divide each class among the clients (Yurochkin et al., 2019; Li et al., 2021); sizes are unequal.

    ``p_c ~ Dirichlet(alpha)`` over the clients for each class c; drawn again until each client has ``least`` samples.

    Args:
        classes: of each sample: ``[samples]``, int64.
        clients: how many.
        alpha: above 0; small: few classes for each client.
        seed: of the draws.
        least: samples that each client has at least; 10 there.
    """
    name = f"Dirichlet {alpha:g} by class, seed {seed}"
    _check(name, classes, clients, alpha)
    if least * clients > len(classes):
        raise ConfigurationError(
            f"{name} got {len(classes)} samples for {clients} clients, needs {least * clients} so that each has "
            f"{least}. Use fewer clients, or a smaller `least`."
        )
    generator = _generator(seed)
    pools = _pools(classes, generator)
    many = torch.tensor([len(pool) for pool in pools])
    for _ in range(_DRAWS):
        shares = _dirichlet(torch.full((len(pools), clients), alpha, dtype=torch.float64), generator)
        cuts = (shares.cumsum(1) * many[:, None]).long().minimum(many[:, None])  # [classes, clients]
        cuts[:, -1] = many
        if int(torch.diff(cuts, prepend=torch.zeros_like(cuts[:, :1])).sum(0).min()) >= least:
            split = [torch.tensor_split(pool, own[:-1]) for pool, own in zip(pools, cuts, strict=True)]
            return _of_parts([torch.cat(part) for part in zip(*split, strict=True)], name)
    raise ConfigurationError(
        f"{name} got, in {_DRAWS} draws, always a client with fewer than {least} of {len(classes)} samples; it needs "
        f"{least} for each of the {clients}. Use dirichlet_by_client, whose sizes are equal, a larger alpha, fewer "
        "clients, or a smaller `least`."
    )


def dirichlet_epfml(classes: Tensor, clients: int, alpha: float, seed: int) -> Partition:
    """Dirichlet shares by class among groups of 10 clients, made equal afterwards (Lin et al., 2021, code of epfml).

    The data is shuffled and cut into a part for each group. In a part each class is divided by ``Dirichlet(alpha)``
    over the group's clients, of which those that are full have none of it; drawn again until the smallest has half of
    an equal size. What the clients have, one after the other, is then cut into equal parts, so that neighbours mix.

    Args:
        classes: of each sample: ``[samples]``, int64.
        clients: how many.
        alpha: above 0; small: few classes for each client.
        seed: of the draws.
    """
    name = f"Dirichlet {alpha:g} of epfml, seed {seed}"
    _check(name, classes, clients, alpha)
    generator = _generator(seed)
    order = torch.randperm(len(classes), generator=generator)
    groups = [min(_GROUP, clients - first) for first in range(0, clients, _GROUP)]
    ends = torch.tensor(groups).cumsum(0).double() / clients * len(classes)
    flat: list[Tensor] = []
    for members, part in zip(groups, torch.tensor_split(order, ends.long()[:-1]), strict=True):
        flat += _epfml_group(name, classes, part, members, alpha, generator)
    return _of_parts(list(torch.tensor_split(torch.cat(flat), clients)), name)


def _epfml_group(
    name: str, classes: Tensor, part: Tensor, members: int, alpha: float, generator: torch.Generator
) -> list[Tensor]:
    size = len(part) / members
    for _ in range(_DRAWS):
        mine: list[list[Tensor]] = [[] for _ in range(members)]
        have = torch.zeros(members, dtype=torch.float64)
        for kind in sorted(set(classes[part].tolist())):
            pool = part[classes[part] == kind]
            pool = pool[torch.randperm(len(pool), generator=generator)]
            shares = _dirichlet(torch.full((members,), alpha, dtype=torch.float64), generator)
            shares = torch.where(have < size, shares, torch.zeros(()).double())
            shares = shares / shares.sum() if float(shares.sum()) else torch.full_like(shares, 1 / members)
            for member, each in enumerate(torch.tensor_split(pool, (shares.cumsum(0) * len(pool)).long()[:-1])):
                mine[member].append(each)
                have[member] += len(each)
        if float(have.min()) >= 0.5 * size:
            return [torch.cat(each) for each in mine]
    raise ConfigurationError(
        f"{name} got, in {_DRAWS} draws, always a client with less than half of an equal part of {len(part)} samples; "
        "it needs more. Use dirichlet_by_client, or a larger alpha."
    )


def shards(classes: Tensor, clients: int, per_client: int, seed: int) -> Partition:
    """Sort by class, cut into ``clients * per_client`` shards, and deal them out (McMahan et al., 2017); equal sizes.

    Args:
        classes: of each sample: ``[samples]``, int64.
        clients: how many.
        per_client: shards of a client; with 2 it has two classes mostly.
        seed: of the draws.
    """
    name = f"{per_client} shards by client, seed {seed}"
    _check(name, classes, clients, 1.0)
    count = clients * per_client
    if per_client < 1 or count > len(classes):
        raise ConfigurationError(
            f"{name} got {per_client} shards for each of {clients} clients and {len(classes)} samples, needs at least "
            "1 shard, and 1 sample in each. Use fewer."
        )
    generator = _generator(seed)
    order = torch.randperm(len(classes), generator=generator)
    order = order[classes[order].sort(stable=True).indices]
    pieces = torch.tensor_split(order, count)
    dealt = torch.randperm(count, generator=generator).view(clients, per_client).tolist()
    return _of_parts([torch.cat([pieces[shard] for shard in own]) for own in dealt], name)


def by_quantity(samples: int, clients: int, alpha: float, seed: int, least: int = 10) -> Partition:
    """Give all clients the same mixture, and sizes that differ: shares are ``Dirichlet(alpha)`` (Li et al., 2021).

    Args:
        samples: how many there are.
        clients: how many.
        alpha: above 0; small: a few clients have nearly all.
        seed: of the draws.
        least: samples that each client has at least.
    """
    name = f"quantity skew {alpha:g}, seed {seed}"
    _check(name, torch.zeros(samples), clients, alpha)
    if least < 1 or least * clients > samples:
        raise ConfigurationError(
            f"{name} got {samples} samples and {clients} clients that need {least} each; it needs {least * clients}, "
            "and 1 for each at least. Use fewer clients, or a smaller `least`."
        )
    generator = _generator(seed)
    shares = _dirichlet(torch.full((clients,), alpha, dtype=torch.float64), generator)
    cuts = least * torch.arange(1, clients) + ((samples - least * clients) * shares.cumsum(0)).long()[:-1]
    order = torch.randperm(samples, generator=generator)
    return _of_parts(list(torch.tensor_split(order, cuts)), name)


def by_group(groups: Sequence[object], name: str = "natural groups", clients: int | None = None) -> Partition:
    """Make each group a client: plays, writers, hospitals; or deal whole groups out to fewer clients.

    Args:
        groups: of each sample; clients are in the order in which their groups appear.
        name: for records.
        clients: how many; none: as many as groups. With fewer of them, the largest group that is left goes to the
            client that has the fewest samples, until all are dealt.
    """
    parts: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        parts.setdefault(group, []).append(index)
    if clients is None or clients == len(parts):
        return given(list(parts.values()), name)
    if not 1 <= clients < len(parts):
        raise ConfigurationError(
            f"{name} got {len(parts)} groups for {clients} clients, needs a group for each client at least. "
            f"Use clients={len(parts)}, or fewer."
        )
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for part in sorted(parts.values(), key=len, reverse=True):
        min(dealt, key=len).extend(part)
    return given(dealt, name)


def _of_parts(parts: Sequence[Tensor], name: str) -> Partition:
    return Partition(torch.cat(list(parts)), tuple(len(part) for part in parts), name)


def _pools(classes: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return the samples of each class, shuffled."""
    order = torch.randperm(len(classes), generator=generator)
    return [order[classes[order] == kind] for kind in range(int(classes.max()) + 1)]


def _dirichlet(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Draw shares along the last dimension, in logarithms: of a small alpha most gamma variables are no floats."""
    # Gamma(a) is Gamma(a + 1) times u ** (1 / a).
    boosted = torch._standard_gamma(concentration + 1.0, generator=generator)
    uniform = torch.rand(concentration.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    logarithms = boosted.log() + uniform.log() / concentration.clamp(min=1e-12)
    logarithms[concentration == 0] = -math.inf
    return torch.softmax(logarithms, -1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check(name: str, classes: Tensor, clients: int, alpha: float) -> None:
    if not alpha > 0.0:
        raise ConfigurationError(f"{name} got alpha={alpha}, needs a number above 0. Use 0.1 for clients that differ.")
    if not 1 <= clients <= len(classes):
        raise ConfigurationError(
            f"{name} got {clients} clients and {len(classes)} samples, needs 1 sample for each client at least. Use "
            "fewer clients."
        )
