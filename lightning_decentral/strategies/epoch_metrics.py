"""The metrics of torchmetrics in a run whose workers make unequal numbers of steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class EpochMetrics:
    """Lets a module's metrics be those of all workers at the end of an epoch, and each worker's own inside a step.

    Args:
        module: the user's model; metrics that have a group or a function of their own for this are left alone.
        meets: whether all workers may meet now.
        gather: the tensors of all workers, by rank.
    """

    def __init__(self, module: Module, meets: Callable[[], bool], gather: Callable[[Tensor], list[Tensor]]) -> None:
        self._changed = []
        for metric in module.modules():
            if isinstance(metric, Metric) and metric.dist_sync_fn is None and metric.process_group is None:
                self._changed.append((metric, metric.distributed_available_fn, metric.compute_with_cache))
                metric.distributed_available_fn = _Fleeting(meets, metric.distributed_available_fn)
                metric.dist_sync_fn = _Fleeting(lambda tensor, group=None: gather(tensor), None)
                metric.compute_with_cache = False  # a step's value of its own would be taken for the epoch's

    def close(self) -> None:
        """Leave the metrics as they were."""
        for metric, available, cache in self._changed:
            metric.distributed_available_fn, metric.dist_sync_fn, metric.compute_with_cache = available, None, cache
        self._changed = []


def agree_on_names(results: dict[str, Any], gather: Callable[[bytes], list[bytes]]) -> list[str]:
    """Let all workers reduce the same values of an epoch, in the same order. All workers together.

    A worker that has made fewer steps may not have logged what others log in a later one: that is each worker's own.

    Args:
        results: what was logged, by name; put in order.
        gather: what every worker passes.

    Returns:
        The names of this worker's values that other workers do not have.
    """
    reduced = [name for name, result in results.items() if result.meta.on_epoch and result.meta.sync.should]
    if not reduced:
        return []  # as the others, as a rule: an epoch that ends with nothing in common is no meeting
    names: list[list[str]] = [json.loads(each) for each in gather(json.dumps(reduced).encode())]
    if all(each == names[0] for each in names):
        return []
    common = set(names[0]).intersection(*names[1:])
    alone = [name for name in reduced if name not in common]
    for name in alone:
        results[name].meta.sync.should = False
    ordered = {name: results[name] for name in sorted(results)}
    results.clear()
    results.update(ordered)
    return alone


class _Fleeting:
    """A function that belongs to this run: what is saved of it is another one."""

    def __init__(self, function: Callable[..., Any], saved: Callable[..., Any] | None) -> None:
        self._function, self._saved = function, saved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> _Fleeting:
        return self

    def __reduce__(self) -> Any:
        return _the_same, (self._saved,)


def _the_same(value: Any) -> Any:
    return value
