"""Proved here: what the callbacks log is what happened: bytes are the arithmetic of the method, the consensus
distance is that of the workers' weights, a straggler is as slow as asked; any logger and the progress bar see it;
mistakes are refused."""

from __future__ import annotations

import csv
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from strategies.fits import OneLongGradient, Recorder, Regression, asynchronous, gossip, loader, make_trainer, saved

from lightning_decentral import Cluster, SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, ACiD, BackupWorkers, Swarm, SyncSGD
from lightning_decentral.callbacks import Arrivals, Communication, ConsensusDistance, Staleness, Stragglers
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import Complete, OnePeerExponential, RandomMatching, Ring

pytestmark = pytest.mark.usefixtures("kept_forks")

BYTES = (4 * 5 + 5 + 5 + 1) * 8  # of the weights of `Regression`


class Bar(Recorder):
    """What the progress bar shows, at every batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        super().on_train_batch_end(trainer, pl_module)
        self.kept.setdefault("bar", []).append(dict(trainer.progress_bar_metrics))


class Validated(Regression):
    def val_dataloader(self) -> Any:
        return loader(12)


def rows(folder: Path, *columns: str) -> list[dict[str, float]]:
    """The rows of a CSV log that have a value in the first of these columns."""
    with open(folder / "log" / "metrics.csv") as file:
        every = list(csv.DictReader(file))
    return [{column: float(row[column]) for column in columns} for row in every if row.get(columns[0])]


def fit(folder: Path, strategy: Any, devices: int, *callbacks: Any, **options: Any) -> None:
    logger = CSVLogger(folder, name="", version="log")
    options = {"max_epochs": 2, "log_every_n_steps": 1, **options}
    trainer = make_trainer(folder, strategy, devices, callbacks=[*callbacks, Bar(folder)], logger=logger, **options)
    trainer.fit(Validated(size=32 * devices))


CASES: list[tuple[Any, int]] = [
    (SyncSGD(), 2 * 3 * BYTES // 4),
    (DPSGD(OnePeerExponential(4)), BYTES),
    (D2(Complete(4)), 3 * BYTES),
]


@pytest.mark.parametrize(("algorithm", "per_step"), CASES, ids=[repr(each) for each, _ in CASES])
def test_communication_is_the_arithmetic_of_the_method(algorithm: Any, per_step: int, tmp_path: Path) -> None:
    fit(tmp_path, gossip(algorithm), 4, Communication(every_n_steps=4), val_check_interval=1.0)
    logged = rows(tmp_path, "communication/megabytes", "step", "communication/exchanges_per_second")
    # Lightning repeats the last value for the loggers until the epoch ends.
    assert [row["step"] + 1 for row in logged] == [4, 5, 6, 7, 8, 12, 13, 14, 15, 16]
    for row in logged:
        steps = (row["step"] + 1) // 4 * 4
        assert row["communication/megabytes"] == pytest.approx(steps * per_step / 1e6, rel=1e-6)
        assert row["communication/exchanges_per_second"] > 1
    totals = rows(tmp_path, "communication/total_megabytes")
    expected = [8 * 4 * per_step / 1e6, 16 * 4 * per_step / 1e6]
    assert [row["communication/total_megabytes"] for row in totals] == pytest.approx(expected, rel=1e-6)
    exposed = rows(tmp_path, "communication/exposed_wait")
    assert all(0.0 <= row["communication/exposed_wait"] <= 1.0 for row in exposed)
    bars = saved(tmp_path, 4)[0]["bar"]
    assert bars[4]["communication/megabytes"] == pytest.approx(4 * per_step / 1e6, rel=1e-6)
    assert "communication/exposed_wait" in bars[4]


def test_communication_under_ddp_is_by_arithmetic(tmp_path: Path) -> None:
    fit(tmp_path, "ddp_fork", 2, Communication(every_n_steps=8))
    logged = rows(tmp_path, "communication/megabytes")
    assert [row["communication/megabytes"] for row in logged] == pytest.approx([8 * BYTES / 1e6, 16 * BYTES / 1e6])
    assert not rows(tmp_path, "communication/exposed_wait")


def test_communication_of_an_asynchronous_run(tmp_path: Path) -> None:
    """A step of its own and a call answered send one model each."""
    fit(tmp_path, asynchronous(), 3, Communication(every_n_steps=1), max_epochs=1)
    total = rows(tmp_path, "communication/total_megabytes")[0]["communication/total_megabytes"] * 1e6
    steps = sum(len(worker["weights"]) for worker in saved(tmp_path, 3))
    assert steps == 24
    # The last calls of slower workers may come after worker 0 has counted.
    assert total <= 2 * steps * BYTES * (1 + 1e-6)
    assert total > 2 * (steps - 4) * BYTES


def test_communication_in_a_simulation_and_on_one_device(tmp_path: Path) -> None:
    fit(tmp_path, SimulatedStrategy(D2(Complete(4)), workers=4), 1, Communication(every_n_steps=1))
    last = rows(tmp_path, "communication/megabytes")[-1]["communication/megabytes"]
    assert last == pytest.approx(4 * 4 * 3 * BYTES / 1e6, rel=0.2)
    alone = tmp_path / "alone"
    alone.mkdir()
    fit(alone, "dpsgd", 1, Communication(every_n_steps=2), ConsensusDistance())
    assert {row["communication/megabytes"] for row in rows(alone, "communication/megabytes")} == {0.0}
    assert {row["consensus_distance"] for row in rows(alone, "consensus_distance")} == {0.0}
    plain = tmp_path / "plain"
    plain.mkdir()
    fit(plain, "auto", 1, Communication(), ConsensusDistance(), Staleness(), Stragglers({}))
    assert not rows(plain, "communication/megabytes")


def test_communication_waits_for_a_straggler(tmp_path: Path) -> None:
    """Worker 0 waits in synchronous SGD most of the time; the straggler itself hardly.

    Few and long steps: what else a step takes on a busy machine, a tenth of a second, must not count much.
    """
    for rank, folder in ((1, tmp_path / "waiting"), (0, tmp_path / "slow")):
        folder.mkdir()
        stragglers = Stragglers({rank: 60.0}, compute_seconds=0.01)
        fit(folder, gossip(SyncSGD()), 2, Communication(every_n_steps=4), stragglers, max_steps=4)
    waiting = [row["communication/exposed_wait"] for row in rows(tmp_path / "waiting", "communication/exposed_wait")]
    slow = [row["communication/exposed_wait"] for row in rows(tmp_path / "slow", "communication/exposed_wait")]
    assert min(waiting) > 0.5
    assert max(slow) < 0.5


@pytest.mark.parametrize("algorithm", [DPSGD(Ring(4)), SyncSGD()], ids=repr)
def test_the_consensus_distance_is_that_of_the_weights(algorithm: Any, tmp_path: Path) -> None:
    fit(tmp_path, gossip(algorithm), 4, ConsensusDistance(every_n_steps=1))
    weights = torch.stack([torch.stack(worker["weights"]) for worker in saved(tmp_path, 4)])  # [workers, steps, n]
    distances = (weights - weights.mean(0)).square().sum(2).mean(0)
    logged = rows(tmp_path, "consensus_distance", "step")
    by_step = [row["consensus_distance"] for row in logged]
    assert len(by_step) >= 16
    for row in logged:
        expected = float(distances[int(row["step"])])
        assert row["consensus_distance"] == pytest.approx(expected, rel=1e-5, abs=1e-25)
    if not isinstance(algorithm, SyncSGD):
        assert float(distances[-1]) > 1e-8
    bars = saved(tmp_path, 4)[0]["bar"]
    assert bars[3]["consensus_distance"] == pytest.approx(float(distances[3]), rel=1e-5, abs=1e-25)


@pytest.mark.parametrize("workers", [1, 4])
def test_an_estimated_consensus_distance_is_right_within_its_error(workers: int, tmp_path: Path) -> None:
    """Of real workers, and of simulated ones. The estimates are logged once each; an exact value stands beside."""
    found: list[tuple[float, float, float]] = []

    class Exact(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            estimated = trainer.callback_metrics
            exact: float = trainer.strategy.consensus_distance()  # type: ignore[attr-defined]
            found.append((exact, float(estimated["consensus_distance"]), float(estimated["consensus_distance_error"])))
            torch.save(found, tmp_path / f"found{trainer.global_rank}.pt")

    strategy = gossip(DPSGD()) if workers == 4 else SimulatedStrategy(DPSGD(), workers=4)
    fit(tmp_path, strategy, workers, ConsensusDistance(every_n_steps=1, sample=400), Exact())
    exact, estimates, errors = torch.tensor(torch.load(tmp_path / "found0.pt")).double().T
    off = (estimates - exact) / errors
    assert len(off) >= 16
    assert float(off.abs().max()) < 5  # each lies within five standard errors,
    assert 0.3 < float(off.square().mean()) ** 0.5 < 2  # and they are of the size that is stated
    assert float((errors / exact).max()) < 0.5


def test_the_consensus_distance_at_every_validation_costs_no_step(tmp_path: Path) -> None:
    fit(tmp_path, gossip(DPSGD()), 4, ConsensusDistance())
    weights = torch.stack([torch.stack(worker["weights"]) for worker in saved(tmp_path, 4)])
    distances = (weights - weights.mean(0)).square().sum(2).mean(0)
    logged = rows(tmp_path, "consensus_distance", "step")
    assert [row["consensus_distance"] for row in logged] == pytest.approx([float(distances[7]), float(distances[15])])


def test_the_consensus_distance_of_a_simulation(tmp_path: Path) -> None:
    fit(tmp_path, SimulatedStrategy(DPSGD(), workers=4), 1, ConsensusDistance(every_n_steps=1))
    logged = [row["consensus_distance"] for row in rows(tmp_path, "consensus_distance")]
    assert len(logged) >= 16
    assert max(logged) > 0


class Pushes(Callback):
    """User code that moves each worker's weights after each update."""

    def __init__(self, length: float) -> None:
        self.length = length

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.length:
            trainer.optimizers[0].param_groups[0]["lr"] = 1e-4  # else updates grow with what they are to correct

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(self.length * (trainer.global_rank - 1.5))


UNEXPLAINED, AS_FAR_AS_LONG = "than the graph and their updates explain", "as far from each other as they are long"


@pytest.mark.parametrize(
    ("algorithm", "length", "said"),
    [
        (DPSGD(Ring(4)), 0.0, set()),
        (DPSGD(RandomMatching(4)), 0.0, set()),
        (DPSGD(Ring(4)), 3.0, {UNEXPLAINED, AS_FAR_AS_LONG}),
    ],
)
def test_a_disagreement_that_nothing_explains_is_named_once(
    algorithm: Any, length: float, said: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sent as a warning by worker 0, in its process, is written to a file."""

    class Told(ConsensusDistance):
        def _tell(self, what: str, text: str) -> None:
            if what not in self._told and torch.distributed.get_rank() == 0:
                with open(tmp_path / "told", "a") as file:
                    file.write(text + "\n")
            super()._tell(what, text)

    fit(tmp_path, gossip(algorithm), 4, Told(), Pushes(length))
    told = (tmp_path / "told").read_text().splitlines() if (tmp_path / "told").exists() else []
    assert len(told) == len(said)
    assert all(any(words in line for line in told) for words in said)
    logged = rows(tmp_path, "consensus_distance", "update_distance")
    assert len(logged) == 2
    explained = 1.0 / algorithm.graph.spectral_gap**2
    held = [row["consensus_distance"] <= explained * row["update_distance"] for row in logged]
    assert all(held) if not said else not any(held)
    gaps = [row["spectral_gap"] for row in rows(tmp_path, "spectral_gap")]
    assert gaps[-1] == pytest.approx(algorithm.graph.gap_over(0, 16), rel=1e-6)
    assert (len(set(gaps)) > 1) == (algorithm.graph.period == 0)


def test_the_gap_of_calls_is_as_large_as_they_are_many(tmp_path: Path) -> None:
    fit(tmp_path, SimulatedStrategy(ADPSGD(), workers=4), 1, ConsensusDistance(), log_every_n_steps=2)
    planned = ADPSGD().resolved(4).mixing(4).spectral_gap
    gaps = [row["spectral_gap"] for row in rows(tmp_path, "spectral_gap")]
    assert gaps
    assert all(0.0 < gap <= planned + 1e-6 for gap in gaps)


class Times(Recorder):
    """When each batch began, and when its gradient was ready."""

    def note(self, when: str) -> None:
        self.kept.setdefault(when, []).append(time.perf_counter())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.note("began")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("ready")


def check_pace(
    folder: Path, stragglers: Stragglers, module: Regression, factors: tuple[float, ...], least: float
) -> None:
    """Every pass takes a worker's factor times what it took by itself, and that at least so many seconds."""
    callbacks = [Times(folder, "outer"), stragglers, Times(folder, "inner")]
    strategy = asynchronous(share_epoch=False)  # each takes its own time: nobody waits for the others
    make_trainer(folder, strategy, len(factors), max_steps=12, callbacks=callbacks).fit(module)
    workers = zip(factors, saved(folder, len(factors), "outer"), saved(folder, len(factors), "inner"), strict=True)
    for factor, outer, inner in workers:
        # The straggler's own clock reads between the two callbacks around it.
        alone = [ready - began for ready, began in zip(outer["ready"], inner["began"], strict=True)]
        seconds = [ready - began for ready, began in zip(inner["ready"], outer["began"], strict=True)]
        excess = [took / (factor * max(least, own)) for took, own in zip(seconds, alone, strict=True)]
        assert len(excess) == 12
        assert min(excess) >= 1.0 - 1e-6
        # Whoever sleeps is woken late on a busy machine, but not 12 times.
        assert min(excess) < 1.5


def test_a_straggler_is_as_slow_as_asked(tmp_path: Path) -> None:
    stragglers = Stragglers({1: 3.0, 2: 6.0}, compute_seconds=0.02)
    check_pace(tmp_path, stragglers, Regression(size=4 * 3 * 12), (1.0, 3.0, 6.0), least=0.02)


def histograms_of(folder: Path) -> dict[int, dict[str, float]]:
    """What the log has of each worker's staleness."""
    with open(folder / "log" / "metrics.csv") as file:
        (last,) = (row for row in csv.DictReader(file) if any(row[name] for name in row if name[:11] == "staleness/0"))
    found: dict[int, dict[str, float]] = {}
    for name, value in last.items():
        parts = name.split("/")
        if parts[0] == "staleness" and len(parts) == 3 and value:
            found.setdefault(int(parts[1]), {})[parts[2]] = float(value)
    return found


class Works(Regression):
    def loss(self, batch: Any) -> Any:
        time.sleep(0.01)
        return super().loss(batch)


def test_a_straggler_without_a_given_time_takes_a_multiple_of_its_own(tmp_path: Path) -> None:
    check_pace(tmp_path, Stragglers({1: 5.0}), Works(size=4 * 2 * 12), (1.0, 5.0), least=0.01)


@pytest.mark.parametrize("algorithm", [ADPSGD(), ACiD(), Swarm(every=1)], ids=["adpsgd", "acid", "swarm"])
def test_staleness_is_logged(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    """Of each worker all updates, each once."""
    fit(tmp_path, asynchronous(algorithm), 3, Staleness(), OneLongGradient(0, 24 - 2), max_epochs=1)
    steps = [row["staleness"] for row in rows(tmp_path, "staleness")]
    means = rows(tmp_path, "staleness/mean", "staleness/max")
    assert means[0]["staleness/max"] == max(steps) >= 1
    assert means[0]["staleness/mean"] == pytest.approx(sum(steps) / len(steps))
    workers = saved(tmp_path, 3)
    assert "staleness" in workers[0]["bar"][-1]
    own, every = Counter(map(int, steps)), histograms_of(tmp_path)
    assert sum(every[0].values()) == sum(own.values()) == len(workers[0]["weights"])
    assert max(own) > 9 or every[0] == {f"{staleness}": count for staleness, count in own.items()}
    assert [sum(every[rank].values()) for rank in range(3)] == [len(worker["weights"]) for worker in workers]


def test_arrivals_tell_whose_gradients_were_dropped_and_how_stale_all_were(tmp_path: Path) -> None:
    """By each server of a model in shards."""
    cluster = Cluster(slowdown={2: 3.0}, jitter="lognormal", jitter_scale=0.1)
    strategy = SimulatedStrategy(BackupWorkers(2, shards=2), workers=3, cluster=cluster)
    fit(tmp_path, strategy, 1, Arrivals())
    assert len(strategy.reports) == 2
    for server, report in zip(("server", "server1"), strategy.reports, strict=True):
        expected = {
            f"{server}/{name}/{rank}": count for name in ("accepted", "dropped") for rank, count in report[name].items()
        }
        expected |= {f"{server}/staleness/{staleness}": count for staleness, count in report["staleness"].items()}
        assert report["dropped"][2] > max(report["dropped"][0], report["dropped"][1])
        assert max(report["staleness"]) < 10  # a bar for each
        (last,) = rows(tmp_path, *expected)
        assert last == expected
        assert sum(report["staleness"].values()) == sum(report["accepted"].values()) + sum(report["dropped"].values())


def test_staleness_of_a_simulation_and_of_a_synchronous_run(tmp_path: Path) -> None:
    cluster = Cluster(slowdown={0: 5.0})
    fit(tmp_path, SimulatedStrategy(workers=4, cluster=cluster), 1, Staleness())
    steps = [row["staleness"] for row in rows(tmp_path, "staleness")]
    assert max(steps) >= 2
    every = histograms_of(tmp_path)
    assert sorted(every) == [0, 1, 2, 3]
    assert sum(sum(counts.values()) for counts in every.values()) == len(steps)
    assert min(map(int, every[0])) > max(int(bar) for rank in (1, 2, 3) for bar in every[rank])  # it is slow
    other = tmp_path / "synchronous"
    other.mkdir()
    fit(other, gossip(), 2, Staleness(), max_epochs=1)
    assert not rows(other, "staleness")


# -- errors -----------------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"every_n_steps=0"):
        ConsensusDistance(every_n_steps=0)
    with pytest.raises(ConfigurationError, match="sample=1000"):
        ConsensusDistance(sample=1000)
    for slowdown in ({0: 0.5}, {-1: 2.0}, {0: float("nan")}):
        with pytest.raises(ConfigurationError, match="a rank >= 0 and a factor >= 1"):
            Stragglers(slowdown)
    with pytest.raises(Exception, match="Stragglers names worker 5, but there are 2"):
        fit(tmp_path, gossip(), 2, Stragglers({5: 2.0}))


def test_a_consensus_distance_by_steps_is_refused_for_asynchronous_workers(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="makes all workers meet"):
        fit(tmp_path, asynchronous(), 2, ConsensusDistance(every_n_steps=5))
    other = tmp_path / "other"
    other.mkdir()
    fit(other, asynchronous(), 2, ConsensusDistance())
    assert len(rows(other, "consensus_distance")) == 2
