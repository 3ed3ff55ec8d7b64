"""What a run is of, in the records of its loggers: the method and its options, so that runs can be grouped by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_decentral.strategies.lightning_private import logs_hyperparameters


def described(algorithm: Any, workers: int) -> dict[str, Any]:
    """Names and plain values of what a run is of: the algorithm's class and options, and the number of workers."""
    options = {field.name: getattr(algorithm, field.name) for field in _fields(algorithm)}
    return record(type(algorithm).__name__, workers, options)


def record(method: str, workers: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Names and plain values of what a run is of.

    Args:
        method: goes by ``decentral/method``.
        workers: how many; goes by ``decentral/workers``.
        options: of the method, by name. ``decentral/topology`` and ``decentral/compressor`` are always there,
            ``"none"`` if there is none.
    """
    values: dict[str, Any] = {"method": method, "workers": workers, "topology": None, "compressor": None, **options}
    return {f"decentral/{name}": "none" if value is None else _plain(value) for name, value in values.items()}


def log_run(trainer: Trainer, values: Mapping[str, Any]) -> None:
    """Log what a run is of as hyper-parameters, once, on rank 0; never fails.

    Lightning logs the user's own after this. They are logged together, because TensorBoard shows the first ones only.

    Args:
        trainer: whose loggers; called before it logs the user's hyper-parameters.
        values: what `record` gives.
    """
    if not trainer.is_global_zero:
        return
    sources = [source for source in (trainer.lightning_module, getattr(trainer, "datamodule", None)) if source]
    for logger in trainer.loggers:
        try:
            users = [source.hparams_initial for source in sources if logs_hyperparameters(source)]
            merged: dict[str, Any] = {}
            for each in users:
                merged |= {name: value for name, value in each.items() if name != "_class_path"}  # LightningCLI's own
            logger.log_hyperparams({**merged, **values})
        except Exception as error:
            rank_zero_warn(
                f"{type(logger).__name__} did not take the method and the number of workers as hyper-parameters, and "
                f"the run goes on without them there: {type(error).__name__}: {error}"
            )


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else repr(value)


def _fields(algorithm: Any) -> tuple[Any, ...]:
    return dataclasses.fields(algorithm) if dataclasses.is_dataclass(algorithm) else ()
