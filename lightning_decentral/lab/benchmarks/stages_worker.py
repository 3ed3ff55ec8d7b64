"""A worker of the benchmark of pipelines, in a process that has imported everything already."""

from __future__ import annotations

import json
import warnings

import torch

from lightning_decentral.lab.benchmarks.report import logging_off
from lightning_decentral.lab.benchmarks.stages import Run, train


def main(arguments: list[str]) -> None:
    """Make a run, given as JSON, as one of its workers; it writes into a folder."""
    warnings.filterwarnings("ignore")
    logging_off()
    torch.set_num_threads(1)
    run, folder = arguments
    train(Run(**json.loads(run)), folder)
