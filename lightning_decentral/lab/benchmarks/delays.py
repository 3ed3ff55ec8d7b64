"""What old gradients cost, by how long is trained, and what a stage that is slow costs a pipeline, by the clock.

    python -m lightning_decentral.lab.benchmarks.delays digits [--batches 600,2400] [--rate 0.03] [--seeds 1,2,3]
    python -m lightning_decentral.lab.benchmarks.delays plays [--batches 400,1600] [--rate 0.003] [--seeds 1,2,3]
    python -m lightning_decentral.lab.benchmarks.delays stragglers

The models and data are those of the claims on DSP and Ouroboros, in this process. ``digits`` trains by backpropagation
and by DSP of four stages, ``plays`` by backpropagation and by Ouroboros of four, with delays from the beginning and
with delays that grow, by one after each twelfth of the training. All have the same learning rate, which falls to 0 by a
cosine after 40 batches in which it grows; so each number of batches is a training of its own. ``stragglers`` trains
nothing: it tells by the schedule's clock how fast four stages are, of which one takes twice as long, or each takes four
times as long on one batch in eight, at random.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

import torch

from lightning_decentral.lab.benchmarks.report import mean_and_error, spread
from lightning_decentral.lab.claims.stages import Staged, Task, digits_in_stages, plays_in_stages
from lightning_decentral.lab.results import environment
from lightning_decentral.pipeline.clock import seconds_per_batch
from lightning_decentral.pipeline.schedules import (
    Schedule,
    ddg,
    dsp,
    features_replay,
    gpipe,
    one_f_one_b,
    ouroboros,
    pipe_2bw,
)

Contenders = dict[str, Callable[[int], Schedule]]
"""Schedules for so many batches."""

_BACKPROPAGATION = "backpropagation"
TASKS: dict[str, tuple[Callable[[int], Task], Contenders, str]] = {
    "digits": (
        digits_in_stages,
        {
            _BACKPROPAGATION: lambda batches: gpipe(1, 1),
            "DSP, K = 4": lambda batches: dsp(4),
            "DSP, K = 4, growing delays": lambda batches: dsp(4).warmed_up(batches // 24),
        },
        "accuracy",
    ),
    "plays": (
        plays_in_stages,
        {
            _BACKPROPAGATION: lambda batches: gpipe(1, 1),
            "Ouroboros, K = 4": lambda batches: ouroboros(4),
            "Ouroboros, K = 4, growing delays": lambda batches: ouroboros(4).warmed_up(batches // 12),
        },
        "loss",
    ),
}
STRAGGLERS: dict[str, Schedule] = {
    "DSP": dsp(4),
    "DSP, queues of 2": dsp(4, forward_delays=(2, 2, 2, 0), staleness=(12, 8, 4, 0)),
    "DSP, queues of 4": dsp(4, forward_delays=(4, 4, 4, 0), staleness=(24, 16, 8, 0)),
    "Features Replay": features_replay(4),
    "DSP, graphs kept": dsp(4, recompute=False),
    "DDG": ddg(4),
    "PipeDream-2BW": pipe_2bw(4),
    "GPipe, 4 micro-batches": gpipe(4, 4),
    "1F1B, 4 micro-batches": one_f_one_b(4, 4),
    "GPipe, 16 micro-batches": gpipe(4, 16),
    "one batch at a time": gpipe(4, 1),
}


def train(task: str, batches: list[int], rate: float, seeds: list[int]) -> None:
    """Train by each contender for each number of batches, and compare with backpropagation seed by seed."""
    make, contenders, measured = TASKS[task]
    unit = "accuracy, %" if measured == "accuracy" else "loss on other plays"
    print(f"# What old gradients cost: {task}\n\n{environment()}\n")
    print(f"At the end of so many batches, with a learning rate of {rate:g}; {len(seeds)} seeds.\n")
    print(f"| batches | contender | {unit} | against backpropagation |\n|---|---|---|---|")
    for count in batches:
        base: list[float] = []
        for name, schedule in contenders.items():
            values = [
                Staged(schedule(count), make, count, measured=1, falls=True)(rate, seed)[-1][measured] for seed in seeds
            ]
            base = base or values
            against = [value - other for value, other in zip(values, base, strict=True)]
            told = "" if name == _BACKPROPAGATION else mean_and_error(against, ".3f")
            print(f"| {count} | {name} | {spread(values, '.3f')} | {told} |", flush=True)


def stragglers(batches: int = 240) -> None:
    """Tell what a slow stage costs, by the clock: three draws of those that are slow at random."""

    def seconds(schedule: Schedule, slowdown: Callable[[int, int], float] = lambda stage, batch: 1.0) -> float:
        return seconds_per_batch(schedule, batches, 1 / 12, 2 / 12, 0.0, slowdown)

    def drawn(seed: int) -> Callable[[int, int], float]:
        return lambda stage, batch: 4.0 if random.Random(f"{seed} {stage} {batch}").randrange(8) == 0 else 1.0

    print(f"# Four stages, of which one is slow, or each at random: by the clock\n\n{environment()}\n")
    print(
        "Speed: one device with the whole model is 1. *One slow*: a stage takes 2 times as long. *At random*: each "
        "stage takes 4 times as long on one batch in 8. Shares: of its own speed, undisturbed.\n"
    )
    print(
        "| schedule | staleness | speed, one device = 1 | one slow | of its own, one slow | at random "
        "| of its own, at random |\n|---|---|---|---|---|---|---|"
    )
    for name, schedule in STRAGGLERS.items():
        alone = seconds(schedule)
        slow = seconds(schedule, lambda stage, batch: 2.0 if stage == 2 else 1.0)
        times = [seconds(schedule, drawn(seed)) for seed in (1, 2, 3)]
        shares = spread([alone / each for each in times], ".2f")
        cells = f"{1 / alone:.2f} | {1 / slow:.2f} | {alone / slow:.2f} | {1 / statistics.mean(times):.2f} | {shares}"
        print(f"| {name} | {', '.join(map(str, schedule.staleness))} | {cells} |", flush=True)


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*TASKS, "stragglers"))
    parser.add_argument("--batches", help="of each training, separated by commas")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seeds", default="1,2,3")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "stragglers":
        stragglers()
        return
    batches = options.batches or {"digits": "600,2400", "plays": "400,1600"}[options.what]
    rate = options.rate or {"digits": 0.03, "plays": 0.003}[options.what]
    train(
        options.what, [int(each) for each in batches.split(",")], rate, [int(each) for each in options.seeds.split(",")]
    )


if __name__ == "__main__":
    main()
