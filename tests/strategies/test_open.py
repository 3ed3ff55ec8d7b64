"""Proved here, on real processes: workers are killed, come back, leave at a signal and join, and the others go on;
strangers are refused by name. The rules alone are proved in `test_membership`."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coming_and_going import Town, town
from helpers.waiting import wait_until
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_decentral import OpenStrategy
from lightning_decentral.algorithms import (
    ADPSGD,
    APSGD,
    D2,
    DPSGD,
    AsyncEASGD,
    BackupWorkers,
    DelayedNesterov,
    DiLoCo,
    FedBuff,
    GradientTracking,
    LocalSGD,
    Ringleader,
    StreamingDiLoCo,
    Swarm,
    SyncSGD,
)
from lightning_decentral.averaging import Choco
from lightning_decentral.callbacks import Staleness
from lightning_decentral.compression import Int8
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies.shared_epoch import why_not_shared
from lightning_decentral.topology import Ring

from .fits import Samples, make_trainer

BATCHES, WORKERS = 48, 3


class Slow(LightningModule):
    """A worker whose steps take some time; it prints each epoch's steps and its model at the end."""

    def __init__(self, rank: int, seconds: float) -> None:
        super().__init__()
        self.rank, self.seconds, self.steps = rank, seconds, 0
        self.net = nn.Linear(4, 1 + int(os.environ.get("WIDER", "0"))).double()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Samples(BATCHES), batch_size=1, shuffle=True)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        time.sleep(self.seconds)
        while (awaited := os.environ.get("AWAITED")) and not os.path.exists(awaited):
            time.sleep(0.02)
        self.steps += 1
        return (self.net(batch[0]).mean(1) - batch[1].mean(1)).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("loss", self.training_step(batch), sync_dist=True)
        self.steps -= 1

    def on_train_epoch_start(self) -> None:
        print("begins an epoch")

    def on_train_epoch_end(self) -> None:
        loss = float(self.trainer.callback_metrics["loss"])
        print(f"epoch {self.current_epoch}: {self.steps} steps, loss {loss:.12f}")
        self.steps = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train(folder: Path, rank: int, method: Any, limit: dict[str, int], **options: Any) -> None:
    """Fit one worker, as its own script would."""
    log = logging.getLogger("lightning.pytorch")  # whatever other tests of this process have made of it
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stdout)]
    logging.getLogger("lightning.pytorch.decentral").setLevel(logging.DEBUG)
    torch.manual_seed(rank)  # the founder's model counts
    limits = {"exchange_timeout_seconds": float(os.environ.get("TIMEOUT", "60"))}
    limits["heartbeat_seconds"] = min(5.0, limits["exchange_timeout_seconds"] / 4)
    least = int(os.environ["LEAST"]) if "LEAST" in os.environ else None
    strategy = OpenStrategy(method, least_workers=least, **limits, **options)
    module = Slow(rank, seconds=float(os.environ.get("SECONDS", "0.1")))
    kept = folder / f"kept-by-{os.getpid()}"  # as by a logger's version
    keeps = ModelCheckpoint(kept, monitor="loss", save_on_exception=True)
    place = {"devices": 1, "num_nodes": WORKERS, "enable_checkpointing": True}
    trainer = make_trainer(folder, strategy, **place, **limit, callbacks=[keeps, Leaves(), Staleness()])
    whole = DataLoader(Samples(12), batch_size=12)
    trainer.fit(module, val_dataloaders=whole)
    trainer.save_checkpoint(folder / f"end-{rank}.ckpt")
    if not trainer.received_sigterm:  # all the data were validated, however many were there, as one does alone now
        of_all = float(trainer.callback_metrics["loss"])
        assert abs(trainer.validate(module, whole, verbose=False)[0]["loss"] - of_all) < 1e-12
    print("end", [f"{float(value):.12f}" for value in module.net.weight.detach().reshape(-1)], keeps.best_model_path)


def lines(text: str, begin: str) -> list[str]:
    """The lines that begin so."""
    return [line for line in text.splitlines() if line.startswith(begin)]


def job(folder: Path, method: Any = None, options: Any = None, **limit: int) -> AbstractContextManager[Town]:
    """A town whose workers train."""
    return town(folder, lambda rank: train(folder, rank, method or ADPSGD(), limit, **(options or {})))


@pytest.mark.parametrize("method", [ADPSGD(), DiLoCo(every=4), DPSGD(Ring)], ids=["adpsgd", "diloco", "dpsgd"])
def test_workers_are_killed_and_come_back_the_first_one_too_and_all_data_are_used_once(
    method: Any, tmp_path: Path
) -> None:
    with job(tmp_path, method, max_epochs=4) as workers:
        for rank in range(WORKERS):
            workers.start(rank)
        for rank in range(WORKERS):
            workers.wait_for(rank, "sees workers [0, 1, 2]")
        workers.send(0, signal.SIGKILL)
        workers.start(0)
        workers.wait_for(0, "takes part", 2)
        codes = workers.join()
        assert codes == {0: 0, 1: 0, 2: 0}, workers.text(0) + workers.text(1) + workers.text(2)
        texts = [workers.text(rank) for rank in range(WORKERS)]
    assert len({lines(text, "end")[-1] for text in texts}) == 1
    rounds = [re.findall(r"averaged (round \d+ of epoch \d+ with workers .*?) in", text) for text in texts]
    assert rounds[1] == rounds[2]
    assert bool(rounds[1]) != isinstance(method, ADPSGD)
    for epoch in range(4):
        ends = [line for text in texts for line in lines(text, f"epoch {epoch}")]
        assert len({line.split("loss")[1] for line in ends}) == 1
        steps = sum(int(line.split()[2]) for line in ends)
        assert steps == BATCHES or (steps < BATCHES and epoch < 2), ends  # or a life that was killed has made the rest


@pytest.mark.parametrize("method", [Swarm(every=2), DiLoCo(every=1000)], ids=["swarm", "diloco"])
def test_a_worker_more_joins_and_one_leaves_at_sigterm(method: AbstractAlgorithm, tmp_path: Path) -> None:
    """With messages in few bits; and with rounds that are not over when it leaves, and end for it."""
    with job(tmp_path, method, max_epochs=8) as workers:
        for rank in range(WORKERS):
            workers.start(rank)
        workers.wait_for(2, "sees workers [0, 1, 2]")
        workers.start(3)
        workers.wait_for(3, "takes part")
        workers.wait_for(1, "begins", workers.text(1).count("begins") + 1)  # and so in the middle of an epoch
        workers.send(1, signal.SIGTERM)
        workers.wait_for(3, "sees workers [0, 2, 3]")
        workers.start(4, WIDER="1")  # another model
        workers.start(5, LIGHTNING_DECENTRAL_TOKEN="another")
        workers.start(6, PL_GLOBAL_SEED="7")  # another order of the data
        codes = workers.join()
        assert codes == {0: 0, 1: 1, 2: 0, 3: 0, 4: 1, 5: 1, 6: 1}, workers.text(2) + workers.text(3)
        assert "got another model than the workers that train" in workers.text(4)
        assert "got another token" in workers.text(5)
        assert "got another data than the workers that train: 48 samples in 48 batches of 1, shuffled with seed 7" in (
            workers.text(6)
        )
        assert lines(workers.text(2), "end") == lines(workers.text(3), "end")
        left = lines(workers.text(1), "epoch")[-1]
        epoch = left.split(":")[0]
        steps = [int(line.split()[2]) for rank in range(4) for line in lines(workers.text(rank), f"{epoch}:")]
        assert sum(steps) == BATCHES, steps  # what it had taken went to others, and what it had made was not made again
        assert "leaves after SIGTERM" in workers.text(1)
        (file,) = (path for path in tmp_path.rglob("*-of-worker-1.ckpt"))
        assert "optimizer_states" in torch.load(file, weights_only=True)
        ended = [
            re.findall(rf"averaged round 0 of {epoch} with workers .*1, 2, 3", workers.text(rank)) for rank in (1, 3)
        ]
        assert all(ended) == isinstance(method, DiLoCo), ended
        told = "".join(workers.text(rank) for rank in (0, 2, 3)).partition("Updates by their staleness")[2]
        assert re.findall(r"^  worker (\d) +\d", told, re.MULTILINE) == ["0", "2", "3"]  # those that are there


@pytest.mark.parametrize(
    "method",
    [BackupWorkers(3), DelayedNesterov(every=2), AsyncEASGD(every=2)],
    ids=["all wait for each gradient", "local steps", "replicas"],
)
def test_the_workers_of_a_server_are_killed_and_come_back_and_its_own_loss_ends_the_run(
    method: AbstractAlgorithm, tmp_path: Path
) -> None:
    with job(tmp_path, method, max_epochs=100) as workers:
        for rank in range(WORKERS):
            workers.start(rank)
        for rank in range(WORKERS):
            workers.wait_for(rank, "sees workers [0, 1, 2]")
        workers.send(1, signal.SIGKILL)
        workers.start(1)
        workers.wait_for(1, "takes part", 2)
        workers.wait_for(2, "sees workers [0, 1, 2]", 2)
        for rank in (0, 2):
            workers.wait_for(rank, " steps, loss")
        workers.send(0, signal.SIGKILL)
        assert workers.join() == {0: -signal.SIGKILL, 1: 1, 2: 1}
        for rank in (1, 2):
            assert "PeerLost: Worker 0 does not take part" in workers.text(rank), workers.text(rank)
            assert f"{type(method).__name__} needs it" in workers.text(rank)
    ends = [lines(workers.text(rank), "epoch 0")[0].split("loss")[1] for rank in (0, 2)]
    assert ends[0] == ends[1]


def test_a_loss_ends_the_run_for_all_if_it_should(tmp_path: Path) -> None:
    with job(tmp_path, DPSGD(), {"on_loss": "stop"}, max_epochs=100) as workers:
        for rank in range(WORKERS):
            workers.start(rank)
        workers.wait_for(0, "sees workers [0, 1, 2]")
        workers.wait_for(0, "averaged round 1")
        workers.send(1, signal.SIGKILL)
        assert workers.join() == {0: 1, 1: -signal.SIGKILL, 2: 1}
        for rank in (0, 2):
            assert "PeerLost: Worker 1 does not take part" in workers.text(rank), workers.text(rank)


def test_a_straggler_is_asked_to_end_its_round_and_averages_with_the_others(tmp_path: Path) -> None:
    with job(tmp_path, DiLoCo(every=8), {"grace": 1.0, "on_loss": "stop"}, max_epochs=4) as workers:  # nobody is lost
        for rank in range(WORKERS):
            workers.start(rank, SECONDS="0.02" if rank else "0.3")
        assert workers.join() == {0: 0, 1: 0, 2: 0}, workers.text(0)
        ends = {lines(workers.text(rank), "end")[-1] for rank in range(WORKERS)}
        assert "asked to end it" in workers.text(0)
    assert len(ends) == 1


def test_a_second_worker_of_a_rank_is_told_garbage_harms_nobody_and_all_steps_together_are_counted(
    tmp_path: Path,
) -> None:
    told = tmp_path / "told"
    strangers: list[socket.socket] = []
    with job(tmp_path, max_steps=BATCHES + 10) as workers:
        for rank in range(WORKERS):
            workers.start(rank, AWAITED=str(told))
        workers.wait_for(0, "sees workers [0, 1, 2]")
        wait_until(lambda: all(workers.ports(rank) for rank in range(WORKERS)), "each listens for the others")
        for port in (workers.port, *(port for rank in range(WORKERS) for port in workers.ports(rank))):
            for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64, bytes(4096)):
                strangers.append(socket.create_connection(("127.0.0.1", port)))  # and some say nothing
                with suppress(ConnectionError):
                    strangers[-1].sendall(garbage)
        real = workers.workers.pop(0)
        workers.start(0)
        workers.wait_for(0, "got a rank that takes part already")
        told.touch()
        assert workers.join() == {0: 1, 1: 0, 2: 0}
        real.join(60.0)
        assert real.exitcode == 0
        for stranger in strangers:
            stranger.close()
        for epoch, steps in ((0, BATCHES), (1, 10)):
            ends = [line for rank in range(WORKERS) for line in lines(workers.text(rank), f"epoch {epoch}")]
            assert sum(int(line.split()[2]) for line in ends) == steps
        assert not any(lines(workers.text(rank), "epoch 2") for rank in range(WORKERS))


def test_a_worker_with_a_mistyped_job_is_told_what_is_there_and_does_not_train_alone(tmp_path: Path) -> None:
    with job(tmp_path, max_epochs=1) as workers:
        workers.start(0, LEAST="1", TIMEOUT="1", AWAITED=str(tmp_path / "told"))  # a job of its own, on purpose
        workers.wait_for(0, "waits until 3 workers are there")
        workers.start(1, LIGHTNING_DECENTRAL_JOB="jbo", TIMEOUT="2")
        workers.start(2, LIGHTNING_DECENTRAL_JOB="third", LEAST="2", TIMEOUT="2")
        workers.wait_for(1, "founds the job 'jbo' at a rendezvous that also has the job")
        for rank, needed in ((1, 3), (2, 2)):
            workers.wait_for(rank, f"within 2 s; it needs {needed} to begin, for there is also the job")
            assert "'job' with 1 worker [0]" in workers.text(rank)
            assert not lines(workers.text(rank), "epoch 0")
        workers.start(1, LIGHTNING_DECENTRAL_JOB="jbo")
        workers.wait_for(1, "is over; it needs")
        (tmp_path / "told").touch()
        assert workers.join() == {0: 0, 1: 1, 2: 1}, workers.text(0)


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="whose workers cannot go on without one of them"):
        OpenStrategy(SyncSGD())
    for method in (ADPSGD(), DPSGD()):
        with pytest.raises(ConfigurationError, match="no rounds of local steps"):
            OpenStrategy(method, grace=3.0)
    with pytest.raises(ConfigurationError, match="without grace"):
        OpenStrategy(DiLoCo(), quorum=0.5)
    with pytest.raises(ConfigurationError, match="'continue' or 'stop'"):
        OpenStrategy(on_loss="wait")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="needs 1 or more"):
        OpenStrategy(least_workers=0)
    with pytest.raises(ConfigurationError, match=r"quorum in \(0, 1\]"):
        OpenStrategy(DiLoCo(), grace=3.0, quorum=1.5)
    for method in (GradientTracking(), D2(), DPSGD(averager=Choco())):
        with pytest.raises(ConfigurationError, match="Use DPSGD on the same topology"):
            OpenStrategy(method)
    for method in (LocalSGD(delay=2), DiLoCo(compressor=Int8()), StreamingDiLoCo()):
        with pytest.raises(ConfigurationError, match="whole models that all wait for"):
            OpenStrategy(method)
    for method in (FedBuff(compressor=Int8()), FedBuff(server="dedicated"), AsyncEASGD(compressor=Int8())):
        with pytest.raises(ConfigurationError, match="Leave out compressors and server='dedicated'"):
            OpenStrategy(method)
    for method in (APSGD(shards=2), Ringleader(compressor=Int8()), APSGD(server="dedicated")):
        with pytest.raises(ConfigurationError, match="Leave out compressors, shards and server='dedicated'"):
            OpenStrategy(method)
    with pytest.raises(ConfigurationError, match="any number"):
        OpenStrategy(DPSGD(Ring(4)))
    with pytest.raises(ConfigurationError, match="blocking=True"):
        OpenStrategy(Swarm(blocking=True))
    with pytest.raises(ConfigurationError, match="at least four heartbeats"):
        OpenStrategy(heartbeat_seconds=20.0, exchange_timeout_seconds=60.0)
    with pytest.raises(ConfigurationError, match="one by one"):
        make_trainer(tmp_path, OpenStrategy(), devices=2, max_epochs=1)  # before Lightning starts another process
    trainer = make_trainer(tmp_path, OpenStrategy(), devices=1, callbacks=[LearningRateFinder()])
    trainer.strategy.connect(Slow(0, 0.0))
    with pytest.raises(ConfigurationError, match=r"Search in one process before, with Trainer\(devices=1\)"):
        trainer.strategy.check_trainer(trainer)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"accumulate_grad_batches": 2}, "without accumulate_grad_batches and min_epochs"),
        ({"min_epochs": 2}, "without accumulate_grad_batches and min_epochs"),
        ({"min_steps": 2}, "min_steps count each worker's own steps"),
        ({"manual": True}, "any number of steps in one"),
        ({"limit_train_batches": 3}, "each worker's own batches"),
    ],
    ids=str,
)
def test_max_steps_of_all_together_is_refused_with_what_counts_otherwise(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    module = Slow(0, 0.0)
    module.automatic_optimization = not options.pop("manual", False)
    trainer = make_trainer(tmp_path, OpenStrategy(), 1, max_steps=10, **options)
    trainer.strategy.connect(module)
    assert reason in str(why_not_shared(trainer, counts_together=True))


def train_in_parts(folder: Path, rank: int) -> None:
    """Fit two epochs, and one and another one, each as a job of its own."""
    for name, ckpt_path, epochs in (("whole", None, 2), ("first", None, 1), ("second", folder / "first.ckpt", 2)):
        os.environ["LIGHTNING_DECENTRAL_JOB"] = name
        torch.manual_seed(0)
        strategy = OpenStrategy(DiLoCo(every=7), heartbeat_seconds=5.0, exchange_timeout_seconds=60.0)
        module = Slow(rank, seconds=0.0)
        trainer = make_trainer(
            folder, strategy, devices=1, max_epochs=epochs, callbacks=[Saves(folder / f"{name}.ckpt")]
        )
        trainer.fit(module, val_dataloaders=DataLoader(Samples(4), batch_size=4), ckpt_path=ckpt_path)
        print(name, module.net.weight.detach().tolist())


class Leaves(Callback):
    """Prints the steps of the epoch in which a worker gets SIGTERM."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, Slow)
        if isinstance(exception, SIGTERMException):
            print(f"epoch {trainer.current_epoch}: {pl_module.steps} steps until it left")


class Saves(Callback):
    """Writes a checkpoint at the end of an epoch, of whatever else writes none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


def test_a_run_of_local_updates_goes_on_from_its_checkpoint_with_the_outer_momentum(tmp_path: Path) -> None:
    """In rounds that are not over at the end of an epoch: 7 is no part of 48."""
    with town(tmp_path, lambda rank: train_in_parts(tmp_path, rank)) as workers:
        workers.start(0)
        assert workers.join() == {0: 0}, workers.text(0)
        whole, second = (lines(workers.text(0), name)[-1].split(maxsplit=1)[1] for name in ("whole", "second"))
    assert whole == second
    rounds = torch.load(tmp_path / "first.ckpt", weights_only=True)["lightning_decentral_rounds"]
    assert rounds["steps"] == [BATCHES]
    assert float(rounds["rounds"][0]["outer"][0][0]["momentum_buffer"].abs().sum()) > 0
