"""What it would cost to cut the model into a stage for each worker: the clock of a schedule on a described cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_decentral.pipeline.clock import Span, seconds_per_batch, timeline
from lightning_decentral.pipeline.schedules import SCHEDULES, Schedule
from lightning_decentral.simulation.cluster import Cluster

_FORWARD = 1 / 3  # of the time of a gradient: a backward pass takes twice a forward pass
_BATCHES, _BATCHES_WITH_A_FLUSH = 36, 6


@dataclass(frozen=True)
class PipelinePlan:
    """What a schedule costs with a stage for each worker, Ouroboros's one more, and equal shares of the model.

    Attributes:
        schedule: its name.
        stages: K.
        seconds_per_batch: once the pipeline is full.
        speedup: over one worker of the cluster, undisturbed, that has the whole model.
        bytes_per_batch: sent by the worker that sends most.
        staleness: updates between the forward pass of a batch and its update, of the stage where it is largest.
        kept: batches, or micro-batches, whose inputs or graphs the first stage keeps.
    """

    schedule: str
    stages: int
    seconds_per_batch: float
    speedup: float
    bytes_per_batch: float
    staleness: int
    kept: int


def plan_pipelines(
    workers: int, cluster: Cluster, activation_bytes: int, names: Sequence[str] = tuple(SCHEDULES)
) -> list[PipelinePlan]:
    """Compute what each schedule costs on a cluster, the fastest first.

    Args:
        workers: how many; each has one stage, and its slowdown and link.
        cluster: its ``compute_seconds`` are those of a gradient of a whole batch by the whole model on one worker.
            Times that differ from step to step are not drawn.
        activation_bytes: of a batch at a cut; its errors have as many.
        names: of schedules.

    Raises:
        ConfigurationError: if there are no such workers.

    Example:
        >>> cluster = Cluster(0.4, bandwidth_bytes_per_second=125e6)
        >>> for plan in plan_pipelines(4, cluster, 1_000_000, ("gpipe", "dsp")):
        ...     print(plan.schedule, round(plan.speedup, 1), plan.staleness)
        gpipe 3.3 0
        dsp 3.0 6
    """
    cluster.check_ranks(workers)
    plans = []
    for name in names:
        schedule = SCHEDULES[name](workers + 1 if name == "ouroboros" else workers)
        if schedule.workers == workers:
            plans.append(_plan(schedule, cluster, activation_bytes))
    return sorted(plans, key=lambda plan: plan.seconds_per_batch)  # of equally fast ones, in the order of the table


def planned_timeline(
    name: str, workers: int, cluster: Cluster, activation_bytes: int, batches: int = 8
) -> tuple[Schedule, list[Span]]:
    """Compute when each stage does what on a cluster, drain included.

    Args:
        name: of the schedule.
        workers, cluster, activation_bytes: as in `plan_pipelines`.
        batches: how many.
    """
    schedule = SCHEDULES[name](workers + 1 if name == "ouroboros" else workers)
    return schedule, timeline(schedule, batches, *_times(schedule, cluster, activation_bytes))


def _times(schedule: Schedule, cluster: Cluster, activation_bytes: int) -> tuple[list[float], list[float], list[float]]:
    """Compute the seconds of each stage's forward and backward pass, and of sending at each cut."""
    stages = range(schedule.stages)
    share = [
        cluster.compute_seconds * schedule.shares[k] * cluster.slowdown.get(schedule.worker_of(k), 1.0) for k in stages
    ]
    sending = []
    for stage in stages[:-1]:
        ends = schedule.worker_of(stage), schedule.worker_of(stage + 1)
        link = cluster.transfer_seconds(activation_bytes, *ends) + cluster.message_latency_seconds(*ends)
        sending.append(0.0 if ends[0] == ends[1] else link)
    return [_FORWARD * each for each in share], [(1 - _FORWARD) * each for each in share], sending


def _plan(schedule: Schedule, cluster: Cluster, activation_bytes: int) -> PipelinePlan:
    batches = _BATCHES_WITH_A_FLUSH if schedule.flush else _BATCHES
    seconds = seconds_per_batch(schedule, batches, *_times(schedule, cluster, activation_bytes))
    sent = [0] * schedule.workers
    for stage in range(schedule.stages - 1):
        for source, target in ((stage, stage + 1), (stage + 1, stage)):
            if schedule.worker_of(source) != schedule.worker_of(target):
                sent[schedule.worker_of(source)] += activation_bytes
    return PipelinePlan(
        schedule.name,
        schedule.stages,
        seconds,
        cluster.compute_seconds / seconds if seconds else 0.0,
        max(sent),
        max(schedule.staleness),
        schedule.lags[0] + 1,
    )
