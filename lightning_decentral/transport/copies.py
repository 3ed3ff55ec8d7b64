"""What one worker gives another to begin with: a tree of plain values and tensors, over a connection of their own.

Nothing is pickled: the tree is text, and each tensor follows it as bytes, whose number the text has told before.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.transport.edges import gloo_options

_PIECE_BYTES, _PIECES_AHEAD = 1 << 22, 4
_MOST_TEXT_BYTES = 1 << 26
_TYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
_PLAIN = (str, bool, int, float, type(None))


def to_text(tree: Any, tensors: list[Tensor] | None = None) -> str:
    """Return a tree as text; its tensors are put into a list in their order, if there is one.

    Raises:
        ConfigurationError: if it has something else than plain values, tuples, lists, dictionaries and tensors.

    Example:
        >>> from_text(to_text({"a": (1, None)}))
        {'a': (1, None)}
    """

    def encode(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return ["float", repr(value)]
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Tensor) and tensors is not None:
            tensors.append(value)
            return ["tensor", str(value.dtype), list(value.shape)]
        if isinstance(value, dict):
            return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
        if isinstance(value, list | tuple):
            return ["tuple" if isinstance(value, tuple) else "list", [encode(item) for item in value]]
        raise ConfigurationError(
            f"A worker got {type(value).__name__} to send to another one, which takes plain values and tensors: text, "
            "numbers, lists and dictionaries. Keep such things out of what callbacks and optimizers save, and of what "
            "is broadcast."
        )

    return json.dumps(encode(tree))


def from_text(text: str | bytes, tensors: list[Tensor] | None = None) -> Any:
    """Return the tree of a text, with these tensors in their order; for the errors see `to_text`."""
    left = iter(tensors or ())

    def decode(value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        kind, content, *_ = value
        if kind == "float":
            return float(content)
        if kind == "tensor":
            return next(left)
        if kind == "dict":
            return {decode(key): decode(item) for key, item in content}
        if kind in ("list", "tuple"):
            return (tuple if kind == "tuple" else list)(decode(item) for item in content)
        raise ValueError(kind)

    try:
        return decode(json.loads(text))
    except (ValueError, TypeError, StopIteration, RecursionError) as error:
        raise ConfigurationError(
            f"A worker got {text[:60]!r} from another one, which is no tree of plain values; it needs workers of one "
            "version of lightning_decentral. Start all with the same."
        ) from error


def give(store: dist.Store, tree: Any, seconds: float) -> int:
    """Send a tree to who takes it from this place on the store; return how many bytes it had.

    Raises:
        RuntimeError: if the other one is lost, or does not come in time.
    """
    tensors: list[Tensor] = []
    text = to_text(tree, tensors).encode()
    group, limit = _pair(store, 0, seconds), timedelta(seconds=seconds)
    raw = [torch.frombuffer(bytearray(text), dtype=torch.uint8)]
    raw += [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in tensors if each.numel()]
    group.send([torch.tensor([len(text)])], 1, 0).wait(limit)
    _in_pieces(raw, lambda piece: group.send([piece], 1, 1), limit)
    done = torch.zeros(1, dtype=torch.int64)
    group.recv([done], 1, 2).wait(limit)  # or this end might close what the other one still reads
    return sum(each.numel() for each in raw)


def take(store: dist.Store, seconds: float, check: Callable[[int], None]) -> Any:
    """Receive a tree.

    Args:
        store: a place that both ends know.
        seconds: for each piece.
        check: is given how many bytes come, before memory is taken for them; refuses what is too much.

    Raises:
        RuntimeError: if the other one is lost, or does not come in time.
        ConfigurationError: if it sends something else.
    """
    group, limit = _pair(store, 1, seconds), timedelta(seconds=seconds)
    length = torch.zeros(1, dtype=torch.int64)
    group.recv([length], 0, 0).wait(limit)
    if not 0 < int(length) <= _MOST_TEXT_BYTES:
        raise ConfigurationError(
            f"A worker got a text of {int(length)} bytes from the one that it begins with; it needs one of at most "
            f"{_MOST_TEXT_BYTES}. Start all workers with one version of lightning_decentral."
        )

    def receive(raw: list[Tensor]) -> None:
        _in_pieces(raw, lambda piece: group.recv([piece], 0, 1), limit)

    told = torch.empty(int(length), dtype=torch.uint8)
    receive([told])
    text = bytes(told.numpy())
    forms = _forms(json.loads(text))
    check(sum(math.prod(shape) * kind.itemsize for kind, shape in forms))
    tensors = [torch.empty(shape, dtype=kind) for kind, shape in forms]
    receive([each.reshape(-1).view(torch.uint8) for each in tensors if each.numel()])
    group.send([torch.ones(1, dtype=torch.int64)], 0, 2).wait(limit)
    return from_text(text, tensors)


def _in_pieces(raw: Sequence[Tensor], begin: Callable[[Tensor], dist.Work], limit: timedelta) -> None:
    """Send or receive bytes piece by piece; some are under way while the first one is waited for."""
    under_way = deque[dist.Work]()
    for piece in (piece for each in raw for piece in each.split(_PIECE_BYTES)):
        if len(under_way) == _PIECES_AHEAD:
            under_way.popleft().wait(limit)
        under_way.append(begin(piece))
    for work in under_way:
        work.wait(limit)


def _forms(value: Any) -> list[tuple[torch.dtype, list[int]]]:
    """Return types and shapes of the tensors of a tree, in order."""
    if not isinstance(value, list):
        return []
    if value and value[0] == "tensor":
        _, name, shape = value
        if name not in _TYPES or any(type(size) is not int or size < 0 for size in shape):
            raise ConfigurationError(
                f"A worker got a tensor of type {name!r} and shape {shape!r}; it needs a type of torch and sizes "
                "from 0 on. Start all workers with one version of lightning_decentral."
            )
        return [(_TYPES[name], shape)]
    return [form for item in value for form in _forms(item)]


def _pair(store: dist.Store, place: int, seconds: float) -> dist.ProcessGroupGloo:
    store.set_timeout(timedelta(seconds=seconds))
    return dist.ProcessGroupGloo(store, place, 2, gloo_options(timedelta(seconds=seconds), kept=True))
