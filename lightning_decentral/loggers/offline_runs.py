"""Reads what W&B left on this machine: the runs in ``wandb/offline-run-*``, without an account and without a network.

A file ``run-ID.wandb`` is a log of records in blocks of 32 KiB, as in LevelDB: each piece has a checksum of 4 bytes,
its length in 2, and in 1 whether it is a whole record (1), or the first, a middle or the last piece of one (2, 3, 4).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_decentral.errors import ConfigurationError

_MAGIC, _FILE_HEADER_BYTES = b":W&B", 7
_BLOCK_BYTES = 32 * 1024
_PIECE = struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


@dataclass
class OfflineRun:
    """A run, as it was logged.

    Args:
        file: it was read from.
        name: of the run.
        project: it belongs to.
        group: of runs that are shown together; ``""``: none.
        job_type: the kind of run within the group, as the method; ``""``: none.
        began: when, in seconds since 1970.
        config: hyper-parameters by name.
        history: what was logged, in order: numbers by name. What began with ``_`` is W&B's own and left out.
    """

    file: Path
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    began: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def read_offline_runs(folder: Path) -> list[OfflineRun]:
    """Read all runs in a folder and below it, in the order in which they began.

    A run that was interrupted, or is still under way, is read as far as its file goes.

    Raises:
        ConfigurationError: if wandb is not installed, there are no runs, or a file is not W&B's.
    """
    if find_spec("wandb") is None:
        raise ConfigurationError(
            "Runs of W&B are read by the package wandb, which is not installed. Install it: "
            'pip install "lightning-decentral[wandb]", or in a clone pip install ".[wandb]".'
        )
    files = sorted(folder.glob("**/*run-*/run-*.wandb"))
    if not files:
        raise ConfigurationError(
            f"Got the folder {str(folder)!r}, need one with runs of W&B (wandb/offline-run-*) in it or below. Name "
            "the folder that the runs were logged to: Lightning's WandbLogger takes the one in which the script ran."
        )
    return sorted((_read(file) for file in files), key=lambda run: run.began)


def _read(file: Path) -> OfflineRun:
    records = import_module("wandb.proto.wandb_internal_pb2")
    run = OfflineRun(file)
    for data in _records(file):
        record = records.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.project, run.group = record.run.display_name, record.run.project, record.run.run_group
            run.job_type, run.began = record.run.job_type, record.run.start_time.ToNanoseconds() / 1e9
            run.config.update(_values(record.run.config.update))
        elif kind == "config":
            run.config.update(_values(record.config.update))
        elif kind == "history":
            point = _values(record.history.item)
            run.history.append({key: float(value) for key, value in point.items() if isinstance(value, int | float)})
    return run


def _values(items: Any) -> dict[str, Any]:
    """Return what the items of a record say, by name."""
    named = ((item.key or "/".join(item.nested_key), item.value_json) for item in items)
    return {key: json.loads(value) for key, value in named if not key.startswith("_")}


def _records(file: Path) -> Iterator[bytes]:
    """Take the records out of a file, up to its end or to where it was cut off."""
    data = file.read_bytes()
    if not data.startswith(_MAGIC):
        raise ConfigurationError(f"{file} is no file of W&B: it begins with {data[:4]!r}, needs {_MAGIC!r}. Remove it.")
    place, record = _FILE_HEADER_BYTES, b""
    while place + _PIECE.size <= len(data):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _PIECE.size:  # too little for a piece: the block is filled up
            place += left
            continue
        _, size, kind = _PIECE.unpack_from(data, place)
        place += _PIECE.size
        if place + size > len(data) or kind == 0:
            return
        record += data[place : place + size]
        place += size
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
