"""From what the workers measured to the figures of a report: ratios, limits and predictions."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_decentral.gradient_compression.scheme import scheme_of
from lightning_decentral.lab.bench.contenders import Contender, ours
from lightning_decentral.lab.bench.record import Record
from lightning_decentral.lab.bench.runner import Results, Run
from lightning_decentral.planning.planner import Plan, algorithms_of, plan, plan_ddp
from lightning_decentral.simulation.cluster import Cluster

BASELINE = "ddp"
NO_COMMUNICATION = "none"
BUSY = 0.75  # cores that are busier, on average, are the limit in bursts: docs/concepts/bench.md
OWN_WORK = 0.75  # or if all cores are busy for more than this share of the exposed seconds with the exchange's own work


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take the median and range of at least one value; not a number if there is none, or one is none."""
        if not values or any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """What a report says of one contender.

    Attributes:
        contender: who.
        seconds_per_step: mean over the steps of all workers together: the workers, by their steps per second.
        speed: steps per second, as a ratio to torch DDP in the same round.
        exposed_seconds: of a step, beyond those of the same loop without communication in the same round.
        bytes_per_step: that a worker sent, with all headers; mean over the workers. Not a number if nobody counted.
        peak_bytes_per_second: that a worker sent in the second in which most left; median. Not a number on loopback.
        limit_seconds: no step can be shorter: the largest of computing, of sending the busiest worker's bytes over its
            link, of what a link between sites has to carry, and of the latencies that follow each other.
        over_limit: seconds per step by the limit.
        predicted_seconds: by the planner, given how long computing takes; not a number for what it does not know.
        over_prediction: seconds per step by the prediction.
        cpu_seconds_per_step: of one worker's processes.
        cores_busy: share of the machine's cores in use.
        work_seconds: of a step, for which what all workers do beyond the loop without communication would keep all of
            the machine's cores busy: hosts of their own would do it side by side.
        memory_bytes: of one worker, beyond framework and data: resident at the peak.
        most_memory_bytes: of the worker that needs most, as a server may.
        evaluation_loss: of the mean of the workers' models, on held-out data.
        evaluation_accuracy: likewise.
    """

    contender: Contender
    seconds_per_step: Spread
    speed: Spread
    exposed_seconds: Spread
    bytes_per_step: float
    peak_bytes_per_second: float
    limit_seconds: float
    over_limit: Spread
    predicted_seconds: float
    over_prediction: Spread
    cpu_seconds_per_step: float
    cores_busy: float
    work_seconds: float
    memory_bytes: float
    most_memory_bytes: float
    evaluation_loss: float
    evaluation_accuracy: float

    @property
    def cores_are_the_limit(self) -> bool:
        """Whether the figures say more about the cores than about the links."""
        return self.cores_busy > BUSY or self.work_seconds > OWN_WORK * self.exposed_seconds.median > 0.0


def rows(results: Results) -> list[Row]:
    """Return one row for each contender that has run, in their order."""
    by_round: dict[int, dict[str, Run]] = {}
    for run in results.runs:
        by_round.setdefault(run.round, {})[run.contender.name] = run
    return [
        _row(results, contender, [(runs[contender.name], runs) for runs in by_round.values() if contender.name in runs])
        for contender in results.race.contenders
        if contender.name not in results.left_out
    ]


def seconds_per_step(run: Run) -> float:
    """Return those of one worker, if all made as many steps per second: the workers by the sum of their rates."""
    return len(run.records) / sum(record.steps / record.seconds for record in run.records)


def _row(results: Results, contender: Contender, runs: Sequence[tuple[Run, dict[str, Run]]]) -> Row:
    race = results.race
    own = [run for run, _ in runs]
    seconds = [seconds_per_step(run) for run in own]
    baseline = [seconds_per_step(others[BASELINE]) if BASELINE in others else math.nan for _, others in runs]
    alone = [
        seconds_per_step(others[NO_COMMUNICATION]) if NO_COMMUNICATION in others else math.nan for _, others in runs
    ]
    plans = [_plan(results, contender, others) for _, others in runs]
    predicted = [race.workers / one.steps_per_second if one is not None else math.nan for one in plans]
    limits = [_limit(results, run, others, one) for (run, others), one in zip(runs, plans, strict=True)]
    sent = [_bytes_sent(results, run) for run in own]
    losses, accuracies = zip(*(_evaluate(results, run) for run in own), strict=True)
    records = [record for run in own for record in run.records]
    return Row(
        contender=contender,
        seconds_per_step=Spread.of(seconds),
        speed=Spread.of([other / mine for mine, other in zip(seconds, baseline, strict=True)]),
        exposed_seconds=Spread.of([mine - other for mine, other in zip(seconds, alone, strict=True)]),
        bytes_per_step=statistics.median(statistics.mean(one) for one in sent),
        peak_bytes_per_second=statistics.median(map(_peak_bytes_per_second, records)),
        limit_seconds=statistics.median(limits),
        over_limit=Spread.of([mine / limit for mine, limit in zip(seconds, limits, strict=True)]),
        predicted_seconds=statistics.median(predicted),
        over_prediction=Spread.of([mine / other for mine, other in zip(seconds, predicted, strict=True)]),
        cpu_seconds_per_step=sum(record.cpu_seconds for record in records) / sum(record.steps for record in records),
        cores_busy=statistics.median(run.cores_busy for run in own),
        work_seconds=statistics.median(_work_seconds(run, others) for run, others in runs),
        memory_bytes=statistics.median(map(_memory_bytes, records)),
        most_memory_bytes=statistics.median(max(map(_memory_bytes, run.records)) for run in own),
        evaluation_loss=statistics.median(losses),
        evaluation_accuracy=statistics.median(accuracies),
    )


def _memory_bytes(record: Record) -> int:
    return record.memory_peak_bytes - record.memory_before_bytes


def _bytes_sent(results: Results, run: Run) -> list[float]:
    """Count those of each worker, per step. Over loopback the interface's bytes are those of all."""
    shared = results.race.workers if results.race.cluster is None else 1
    return [
        math.nan if record.bytes_sent is None else record.bytes_sent / record.steps / shared for record in run.records
    ]


def _peak_bytes_per_second(record: Record) -> float:
    """Tell how many bytes left in the second in which most did; from one end of a step to another."""
    if len(record.sent_by_then) < 2:
        return math.nan
    ends, sent = record.ends[record.warm_up_steps :], record.sent_by_then
    most, first = 0.0, 0
    for last, end in enumerate(ends):
        while end - ends[first] > 1.0 and first < last - 1:
            first += 1
        most = max(most, (sent[last] - sent[first]) / max(1.0, end - ends[first]))
    return most


def _work_seconds(run: Run, others: dict[str, Run]) -> float:
    alone = others.get(NO_COMMUNICATION)
    if alone is None:
        return math.nan
    return run.cores_busy * seconds_per_step(run) - alone.cores_busy * seconds_per_step(alone)


def _evaluate(results: Results, run: Run) -> tuple[float, float]:
    """Loss and accuracy of the mean of the workers' models."""
    mean = torch.stack([record.parameters for record in run.records]).mean(0)
    model = results.race.task.model(0)
    torch.nn.utils.vector_to_parameters(mean, model.parameters())
    return results.race.task.evaluate(model)


# -- what the planner says ---------------------------------------------------------------------------------------------


def _compute(runs: dict[str, Run]) -> list[float]:
    """Seconds of a step without communication, by worker; none if nobody measured it."""
    alone = runs.get(NO_COMMUNICATION)
    return [] if alone is None else [record.seconds / record.steps for record in alone.records]


def _cluster(results: Results, compute: Sequence[float]) -> Cluster:
    """Return the hosts with the speeds that were measured in this round."""
    fastest = min(compute)
    slowdown = {rank: seconds / fastest for rank, seconds in enumerate(compute)}
    cluster = results.race.cluster
    if cluster is None:
        return Cluster(compute_seconds=fastest, slowdown=slowdown)
    return dataclasses.replace(cluster.model(fastest), slowdown=slowdown)


def _plan(results: Results, contender: Contender, runs: dict[str, Run]) -> Plan | None:
    compute = _compute(runs)
    if contender.method is None or not compute:
        return None
    workers, model_bytes = results.race.workers, results.race.task.actual_bytes
    cluster = _cluster(results, compute)
    method, _, detail = contender.method.partition(" ")
    if method == "ddp":
        return plan_ddp(workers, model_bytes, cluster, scheme=scheme_of(detail) if detail else None)
    if contender.module == "ours":
        algorithm = ours.algorithm_of(contender.options["strategy"], workers)  # with the options that it races with
    else:
        algorithm = next(iter(algorithms_of(method, workers, (detail,))))
    return plan(algorithm, workers, model_bytes, cluster, steps=24)


def _limit(results: Results, run: Run, runs: dict[str, Run], planned: Plan | None) -> float:
    """Return the planner's; for what it does not know, of computing and of the bytes that were counted on each link."""
    if planned is not None:
        return results.race.workers / planned.limit_steps_per_second
    compute = _compute(runs)
    if not compute:
        return math.nan
    alone = seconds_per_step(runs[NO_COMMUNICATION]) if run.contender.asynchronous else max(compute)
    if results.race.cluster is None:
        return alone
    sent, hosts = _bytes_sent(results, run), results.race.cluster.hosts
    return max(alone, *(one / host.rate_bytes_per_second for one, host in zip(sent, hosts, strict=True)))
