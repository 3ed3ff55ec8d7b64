"""What is under way in a pipeline, as a checkpoint has it: of each stage, and of the same stages only."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KEY = "in_flight"


@dataclass(frozen=True)
class InFlight:
    """What was under way when a checkpoint was saved.

    Attributes:
        schedule: of the pipeline, as it is printed.
        cuts: the first block of each stage but the first.
        pipelines: beside each other.
        batches: micro-batches that were under way in a first stage.
        stages: what each stage of each pipeline had, in bytes; see `pack_flight`.
    """

    schedule: str
    cuts: tuple[int, ...]
    pipelines: int
    batches: int
    stages: Mapping[str, Tensor]

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint has of it."""
        return {_KEY: {**vars(self), "cuts": list(self.cuts), "stages": dict(self.stages)}}

    @classmethod
    def loaded(cls, saved: Mapping[str, Any]) -> InFlight | None:
        """Read what a checkpoint has of it, if it has anything."""
        found = saved.get(_KEY)
        return None if found is None else cls(**{**found, "cuts": tuple(found["cuts"])})

    def of(self, pipeline: int, stages: Iterable[int], device: torch.device) -> dict[int, dict[str, Any]]:
        """Unpack what some stages of a pipeline had, on a device."""
        return {
            stage: torch.load(
                io.BytesIO(self.stages[_name(pipeline, stage)].cpu().numpy().tobytes()),
                map_location=device,
                weights_only=True,
            )
            for stage in stages
        }


def pack_flight(pipeline: int, states: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pack what each stage of a worker has under way into bytes, by a name in the whole run.

    Args:
        pipeline: of the worker.
        states: what `Runner.in_flight` gave.
    """
    packed: dict[str, Tensor] = {}
    for stage, state in states.items():
        file = io.BytesIO()
        torch.save(dict(state), file)
        packed[_name(pipeline, stage)] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return packed


def _name(pipeline: int, stage: int) -> str:
    return f"{pipeline}/{stage}"
