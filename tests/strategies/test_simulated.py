"""Proved here: virtual workers inside Lightning make the iterates of stacked references that see the same batches,
with the user's loss, clipping, accumulation and optimizer; each has its own momentum and BatchNorm; the virtual clock
and the bytes are logged; evaluation and checkpoints are of the consensus; what cannot be simulated is refused."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from reference import methods
from torch import Tensor, nn

from lightning_decentral import Cluster, SimulatedStrategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD, SyncSGD
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.topology import Complete, Ring
from strategies.fits import Regression, Samples, flat, loader, make_trainer

RATE = 0.05
BATCH = 4


class Watching(Callback):
    """What the virtual workers are after every batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.ranks: list[int] = []
        self.models: list[Tensor] = []
        self.staleness: list[int] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.ranks.append(trainer.strategy._due.rank)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        strategy = trainer.strategy
        self.seconds.append(strategy.virtual_seconds)
        self.bytes.append(strategy.traffic.bytes_sent)
        self.models.append(torch.stack([worker.x.buffers[0].clone() for worker in strategy._simulator.workers]))
        self.staleness.append(strategy.staleness)
        self.steps.append(strategy.steps)


def simulate(
    folder: Path, strategy: SimulatedStrategy, module: LightningModule, **options: Any
) -> tuple[Trainer, Watching]:
    watching = Watching()
    callbacks = [watching, *options.pop("callbacks", [])]
    trainer = make_trainer(folder, strategy, 1, **{"max_epochs": 1, "callbacks": callbacks, **options})
    trainer.fit(module)
    return trainer, watching


def linear(size: int = 48, momentum: float = 0.0) -> Regression:
    torch.manual_seed(2)
    return Regression(nn.Linear(4, 1).double(), RATE, momentum, size)


def gradient(x: Tensor, batches: int | slice) -> Tensor:
    """Of the mean squared error of a linear model ``x`` [5] on one batch, or several as one."""
    samples = Samples(4096)
    if isinstance(batches, int):
        batches = slice(batches * BATCH, (batches + 1) * BATCH)
    inputs = torch.cat([samples.inputs[batches], torch.ones(batches.stop - batches.start, 1, dtype=torch.float64)], 1)
    return 2 * inputs.T @ (inputs @ x - samples.targets[batches, 0]) / len(inputs)


def test_synchronous_sgd_is_sgd_on_batches_that_are_n_times_larger(tmp_path: Path) -> None:
    """With momentum and clipping, on a network, against Lightning on one device."""
    small, large = Regression(size=64), Regression(size=64)
    large.train_dataloader = lambda: loader(64, 4 * BATCH)  # type: ignore[method-assign]
    options = {"gradient_clip_val": 0.3}
    simulate(tmp_path, SimulatedStrategy(SyncSGD(), workers=4), small, **options)
    make_trainer(tmp_path, "auto", 1, max_epochs=1, **options).fit(large)
    torch.testing.assert_close(flat(small), flat(large), rtol=0.0, atol=1e-13)
    assert not torch.allclose(flat(small), flat(Regression()), atol=1e-3)


def test_one_worker_is_lightning_on_one_device_bit_for_bit(tmp_path: Path) -> None:
    for algorithm in (SyncSGD(), DPSGD(), D2(), ADPSGD()):
        simulated, plain = Regression(), Regression()
        options = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2, "max_epochs": 2}
        simulate(tmp_path, SimulatedStrategy(algorithm, workers=1), simulated, **options)
        make_trainer(tmp_path, "auto", 1, **options).fit(plain)
        assert torch.equal(flat(simulated), flat(plain)), algorithm


@pytest.mark.parametrize(
    ("algorithm", "reference"),
    [
        (SyncSGD(), methods.sync_sgd),
        (DPSGD(), methods.dpsgd),
        (DPSGD(Ring(4)), methods.dpsgd),
        (DPSGD(Complete(4)), methods.dpsgd),
        (D2(), methods.d2),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_every_round_equals_the_stacked_reference(algorithm: Any, reference: Any, tmp_path: Path) -> None:
    """Equally fast workers take one batch each in every round."""
    module = linear()
    start = flat(module).expand(4, -1)
    _, watching = simulate(tmp_path, SimulatedStrategy(algorithm, workers=4), module)
    taken = [watching.ranks[first : first + 4] for first in (0, 4, 8)]
    assert [sorted(ranks) for ranks in taken] == [[0, 1, 2, 3]] * 3
    rounds = itertools.count()

    def gradients(x: Tensor) -> Tensor:
        number = next(rounds)
        return torch.stack([gradient(x[rank], 4 * number + taken[number].index(rank)) for rank in range(4)])

    topology = getattr(algorithm.resolved(4), "topology", None)
    steps = reference(start, gradients, lambda step: RATE, topology and topology.mixing_matrix)
    expected = list(islice(steps, 3))
    for index, each in enumerate(expected):
        torch.testing.assert_close(watching.models[4 * index + 3], each, rtol=0.0, atol=1e-13)
    torch.testing.assert_close(flat(module), expected[-1].mean(0), rtol=0.0, atol=1e-13)


def test_asynchronous_workers_equal_the_reference_of_events(tmp_path: Path) -> None:
    """Workers of different speed; the k-th batch belongs to the k-th gradient on the virtual clock."""
    seconds = [0.1, 0.13, 0.31, 0.17]
    cluster = Cluster(compute_seconds=0.1, slowdown={rank: second / 0.1 for rank, second in enumerate(seconds)})
    module = linear(size=4 * 30)
    start = flat(module).expand(4, -1)
    _, watching = simulate(tmp_path, SimulatedStrategy(ADPSGD(Complete), 4, cluster, seed=7), module)
    batches = itertools.count()

    def gradients(x: Tensor) -> Tensor:
        batch = next(batches)
        return torch.stack([gradient(x[rank], batch) for rank in range(4)])

    partners = [itertools.cycle([(rank + hop) % 4 for hop in (1, 2, 3)]) for rank in range(4)]
    events = methods.adpsgd(start, gradients, lambda step: RATE, partners, seconds, 0.0, 64)
    expected = list(islice(events, 30))
    torch.testing.assert_close(flat(module), expected[-1].mean(0), rtol=0.0, atol=1e-12)
    counts = [watching.ranks.count(rank) for rank in range(4)]
    assert counts[0] > counts[1] > counts[3] > counts[2]

    by_worker: dict[int, list[int]] = {rank: [] for rank in range(4)}
    for rank, staleness in zip(watching.ranks, watching.staleness, strict=True):
        by_worker[rank].append(staleness)  # of the update that this batch ended in
    mean = {rank: sum(values) / len(values) for rank, values in by_worker.items()}
    assert mean[2] > max(mean[0], mean[1])
    assert mean[2] > 1


def test_a_slow_worker_takes_fewer_batches(tmp_path: Path) -> None:
    cluster = Cluster(slowdown={1: 5.0})
    _, watching = simulate(tmp_path, SimulatedStrategy(workers=4, cluster=cluster), linear(size=4 * 64))
    counts = [watching.ranks.count(rank) for rank in range(4)]
    assert sum(counts) == 64
    assert counts[1] == 4
    assert counts[0] == counts[2] == counts[3] == 20
    assert watching.steps[-1] == 64


def test_the_virtual_clock_and_the_bytes(tmp_path: Path) -> None:
    """Every round computes for 0.25 s, then each of two workers sends 40 bytes, at 40 bytes per second, to the other.

    What is logged with a batch is before its own exchange; no message leaves before the other worker asks for it.
    """
    cluster = Cluster(compute_seconds=0.25, bandwidth_bytes_per_second=40.0)
    logger = CSVLogger(tmp_path)
    _, watching = simulate(
        tmp_path,
        SimulatedStrategy(D2(Complete(2)), workers=2, cluster=cluster),
        linear(size=4 * 8),
        logger=logger,
        log_every_n_steps=1,
    )
    assert watching.bytes[-1] == 2 * 40 * 4
    rows = logger.experiment.metrics or _read(logger)
    assert [float(row["virtual_seconds"]) for row in rows] == pytest.approx(
        [0.25, 0.25, 1.5, 1.5, 2.75, 2.75, 4.0, 4.0]
    )
    assert [float(row["virtual_bytes"]) for row in rows] == pytest.approx([0, 0, 80, 80, 160, 160, 240, 240])


def _read(logger: CSVLogger) -> list[dict[str, str]]:
    import csv

    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row["virtual_seconds"]]


def test_accumulation_gives_consecutive_batches_to_one_worker(tmp_path: Path) -> None:
    module = linear()
    start = flat(module)
    _, watching = simulate(tmp_path, SimulatedStrategy(SyncSGD(), 2), module, accumulate_grad_batches=3)
    assert watching.ranks == [0, 0, 0, 1, 1, 1] * 2
    x = start
    for first in (0, 24):  # samples of one round
        x = x - RATE * (gradient(x, slice(first, first + 12)) + gradient(x, slice(first + 12, first + 24))) / 2
    torch.testing.assert_close(flat(module), x, rtol=0.0, atol=1e-13)
    assert watching.steps[-1] == 4


def test_every_virtual_worker_has_its_own_momentum(tmp_path: Path) -> None:
    """SGD with momentum on its own batches, between the rounds of gossip."""
    module = linear(momentum=0.9)
    x, velocity = flat(module).expand(3, -1).clone(), torch.zeros(3, 5, dtype=torch.float64)
    _, watching = simulate(tmp_path, SimulatedStrategy(DPSGD(Ring(3)), 3), module)
    mixing = Ring(3).mixing_matrix()
    for step in range(4):
        taken = watching.ranks[3 * step : 3 * step + 3]
        gradients = torch.stack([gradient(x[rank], 3 * step + taken.index(rank)) for rank in range(3)])
        velocity = 0.9 * velocity + gradients
        x = mixing @ x - RATE * velocity
    torch.testing.assert_close(flat(module), x.mean(0), rtol=0.0, atol=1e-13)


def test_every_virtual_worker_has_its_own_batch_norm(tmp_path: Path) -> None:
    module = Regression(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), learning_rate=0.0, size=4 * 7)
    copies = [copy.deepcopy(module.network[0]) for _ in range(2)]
    simulate(tmp_path, SimulatedStrategy(DPSGD(), 2), module)
    for batch in range(7):
        copies[batch % 2](Samples(28).inputs[batch * BATCH : (batch + 1) * BATCH])
    normalization = module.network[0]
    torch.testing.assert_close(normalization.running_mean, (copies[0].running_mean + copies[1].running_mean) / 2)
    torch.testing.assert_close(normalization.running_var, (copies[0].running_var + copies[1].running_var) / 2)
    assert int(normalization.num_batches_tracked) == 4


class Evaluated(Regression):
    """Notes its weights in every validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def validation_step(self, batch: Any) -> None:
        self.seen.append(flat(self))
        super().validation_step(batch)

    def val_dataloader(self) -> Any:
        return loader(8, 8)


@pytest.mark.parametrize("algorithm", [DPSGD(), D2(), ADPSGD(), SyncSGD()], ids=repr)
def test_validation_sees_the_consensus_and_changes_nothing(algorithm: Any, tmp_path: Path) -> None:
    quiet, evaluated = Regression(size=64), Evaluated()
    cluster = Cluster(jitter="lognormal")
    _, alone = simulate(tmp_path, SimulatedStrategy(algorithm, 4, cluster), quiet, max_epochs=2)
    evaluated.size = 64
    _, watching = simulate(
        tmp_path,
        SimulatedStrategy(algorithm, 4, cluster),
        evaluated,
        max_epochs=2,
        val_check_interval=4,
        num_sanity_val_steps=1,
    )
    for mine, theirs in zip(watching.models, alone.models, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(flat(quiet), flat(evaluated))
    assert len(evaluated.seen) == 1 + 8
    for check, seen in enumerate(evaluated.seen[1:]):
        torch.testing.assert_close(seen, watching.models[4 * check + 3].mean(0), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(flat(evaluated), watching.models[-1].mean(0), rtol=0.0, atol=1e-14)


def test_a_checkpoint_holds_the_consensus_and_resuming_starts_from_it(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    module = Regression(size=64)
    _, watching = simulate(
        tmp_path, SimulatedStrategy(DPSGD(), 4), module, callbacks=[checkpoint], enable_checkpointing=True, max_epochs=2
    )
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    plain = Regression()
    plain.load_state_dict(state)
    torch.testing.assert_close(flat(plain), watching.models[15].mean(0), rtol=0.0, atol=1e-14)

    class Begin(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.workers = torch.stack([worker.x.buffers[0].clone() for worker in trainer.strategy._simulator.workers])

    begin = Begin()
    trainer = make_trainer(tmp_path, SimulatedStrategy(DPSGD(), 6), 1, max_epochs=2, callbacks=[begin])
    trainer.fit(Regression(size=64), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert torch.equal(begin.workers, flat(plain).expand(6, -1))
    assert trainer.current_epoch == 2


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    def run(seed: int) -> Tensor:
        module = linear(size=4 * 40)
        cluster = Cluster(jitter="pareto", jitter_scale=1.5)
        simulate(tmp_path, SimulatedStrategy(workers=5, cluster=cluster, seed=seed), module)
        return flat(module)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_early_stopping_and_precisions(tmp_path: Path) -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        module = Regression(nn.Linear(4, 1), size=32)
        module.val_dataloader = lambda: loader(8, dtype=torch.float32)  # type: ignore[method-assign]
        stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
        trainer, _ = simulate(
            tmp_path, SimulatedStrategy(workers=3), module, precision=precision, callbacks=[stop], max_epochs=9
        )
        assert trainer.current_epoch == 2
        assert math.isfinite(float(trainer.callback_metrics["val_loss"]))


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    cluster = Cluster(failures={2: 0.55})
    with pytest.raises(PeerLost, match=r"waits for worker 2, which died after 0\.55"):
        simulate(tmp_path, SimulatedStrategy(DPSGD(Ring(4)), 4, cluster), linear(4 * 64))


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]


def scaled() -> dict[str, Any]:
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))}


REFUSED: dict[str, tuple[Callable[[], LightningModule], Callable[[], dict[str, Any]], str]] = {
    "manual optimization": (Manual, dict, "automatic optimization with one optimizer, got 1"),
    "two optimizers": (TwoOptimizers, dict, "automatic optimization with one optimizer, got 4"),
    "a gradient scaler": (Regression, scaled, "gradient scaler"),
}


@pytest.mark.parametrize(("module", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_simulated_is_refused(module: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        simulate(tmp_path, SimulatedStrategy(workers=2), module(), **options())


CLUSTERS = Path(__file__).parents[2] / "clusters"


def test_a_cluster_file_says_how_many_workers_there_are_and_how_fast(tmp_path: Path) -> None:
    (tmp_path / "slow.yaml").write_text("{hosts: 3, compute: 2s, host: {1: {slowdown: 2}}}")
    for path in (tmp_path / "slow.yaml", str(tmp_path / "slow.yaml")):
        strategy = SimulatedStrategy(SyncSGD(), cluster=path)
        assert strategy.workers == SimulatedStrategy(SyncSGD(), 3, path).workers == 3
    _, watching = simulate(tmp_path, strategy, linear(3 * 4 * BATCH))
    assert watching.ranks[:3] == [0, 2, 1]  # the slow one last
    # After a batch, the clock is where the next gradient is due; all wait for the slow one in each of the four steps.
    assert watching.seconds == [2, 4, 6, 6, 8, 10, 10, 12, 14, 14, 16, 18]
    assert SimulatedStrategy(cluster=CLUSTERS / "two_sites.yaml").cluster.sites == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert SimulatedStrategy().workers == 8


def test_a_cluster_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"workers=4, cluster='.*two_sites\.yaml'\): the file has 8 hosts"):
        SimulatedStrategy(workers=4, cluster=CLUSTERS / "two_sites.yaml")
    with pytest.raises(ConfigurationError, match=r"none\.yaml: got no file that can be read"):
        SimulatedStrategy(cluster=str(tmp_path / "none.yaml"))
    (tmp_path / "silent.yaml").write_text("hosts: 4")
    with pytest.raises(ConfigurationError, match="'silent' got no compute time"):
        SimulatedStrategy(cluster=tmp_path / "silent.yaml")
    (tmp_path / "five.yaml").write_text("{hosts: 5, compute: 1s}")
    with pytest.raises(ConfigurationError, match="for 4 workers, but 5 take part"):
        SimulatedStrategy(DPSGD(Ring(4)), cluster=tmp_path / "five.yaml")


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ("clusters/two_sites.yaml", (8, 0.1, 2)),
        ({"class_path": "lightning_decentral.Cluster", "init_args": {"compute_seconds": 3.0}}, (8, 3.0, 0)),
        ({"compute_seconds": 3.0, "sites": [[0, 1], [2, 3, 4, 5, 6, 7]]}, (8, 3.0, 2)),
    ],
)
def test_a_configuration_file_may_name_a_cluster_file_or_have_the_cluster(
    cluster: Any, expected: tuple[int, float, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.chdir(CLUSTERS.parent)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    strategy = {"class_path": "lightning_decentral.SimulatedStrategy", "init_args": {"cluster": cluster}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "logger": False}}))
    cli = LightningCLI(Regression, run=False, args=["--config", str(tmp_path / "config.yaml")])
    made = cli.trainer.strategy
    assert isinstance(made, SimulatedStrategy)
    assert (made.workers, made.cluster.compute_seconds, len(made.cluster.sites)) == expected


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"SimulatedStrategy\(workers=0\)"):
        SimulatedStrategy(workers=0)
    with pytest.raises(ConfigurationError, match="names worker 8, but there are 8"):
        SimulatedStrategy(cluster=Cluster(slowdown={8: 2.0}))
    with pytest.raises(ConfigurationError, match="for 4 workers, but 8 take part"):
        SimulatedStrategy(DPSGD(Ring(4)))
