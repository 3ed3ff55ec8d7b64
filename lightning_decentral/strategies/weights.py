"""Whose weights a checkpoint file has: the consensus, this worker's own, or what code of the user has put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def complete(own: dict[str, Any], main: dict[str, Any]) -> None:
    """Take from the main file the tensors that this worker alone had in another shape, or not: no model fits both."""
    if not own.keys() & main.keys():  # the user gives them other names, or keeps them elsewhere
        return
    for name in own.keys() - main.keys():
        del own[name]
    for name, value in main.items():
        if isinstance(value, Tensor) and (name not in own or own[name].shape != value.shape):
            own[name] = value


def put_weights(own: dict[str, Any], local: dict[str, Any], dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Put this worker's own weights into its file: those that the main file has of the consensus.

    Args:
        own: the file. Code of the user may have left weights out on purpose, or put others in their place.
        local: all of this worker's weights.
        dumped: those of the consensus that the user was given.

    Returns:
        What the file has to say of it, beside its weights.
    """
    beside: dict[str, Any] = {}
    given = own.get("state_dict")
    chosen: set[str]
    if given and is_of(given, dumped):
        chosen = local.keys() & given.keys()
        own["state_dict"] = {name: local.get(name, value) for name, value in given.items()}
    else:
        # A callback that averages weights has put its own average there, and wants it back: ours goes beside it.
        found = set(_tensors(own))  # under other names, or in another place
        chosen = {name for name in local if name in (given or ()) or id(dumped.get(name)) in found}
        if given and not chosen:
            chosen = set(local)
        beside["state_dict"] = {name: value for name, value in local.items() if name in chosen}
    beside["left_out"] = sorted(local.keys() - chosen)
    return beside


def _tensors(value: Any) -> Iterator[int]:
    """Return the identities of all tensors in a checkpoint."""
    if isinstance(value, Tensor):
        yield id(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def is_of(given: Mapping[str, Any], dumped: Mapping[str, Any]) -> bool:
    """Tell whether weights are a selection of those that the user was given."""
    return given is dumped or all(value is dumped.get(name) for name, value in given.items())


def own_copy(value: Any) -> Any:
    """Return a copy of a tensor; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value
