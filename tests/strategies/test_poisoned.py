"""Proved here: a model that is not finite is noticed by whoever receives it, with worker, step and parameter. It is
left out where that is asked for, so that the others and their consensus stay finite, or it ends the run. Large finite
models are left alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_decentral import AsyncStrategy, GossipStrategy
from lightning_decentral.algorithms import D2, DPSGD, ChocoSGD
from lightning_decentral.errors import PoisonedMessage
from lightning_decentral.flat import Vector
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.topology import Ring
from lightning_decentral.transport.poison import Inspector, is_finite
from strategies.fits import Abreast, Recorder, Regression, asynchronous, fit_kept, gossip, make_trainer, saved

pytestmark = pytest.mark.usefixtures("kept_forks")

METHODS: dict[str, Callable[[], AbstractAlgorithm] | None] = {
    "dpsgd": lambda: DPSGD(Ring(3)),
    "d2": D2,
    "adpsgd": None,
}


class Poisoned(Regression):
    """Worker 1's gradient of the last layer's weight is NaN in its fourth batch, and no other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if self.global_rank == 1 and batch_idx == 3:
            weight: Tensor = self.network[2].weight  # type: ignore[index, assignment]
            loss = loss + (weight * float("nan")).sum()
        return loss


class Said(Recorder):
    """What this worker was warned of, and whether its own model is finite, before it becomes the consensus."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.warnings = self.caught.__enter__()
        warnings.simplefilter("always")

    def keep(self, trainer: Any, pl_module: Any) -> None:
        self.caught.__exit__(None, None, None)
        self.kept["said"] = [str(each.message) for each in self.warnings or [] if "is not finite" in str(each.message)]
        self.kept["finite"] = all(bool(parameter.isfinite().all()) for parameter in pl_module.parameters())


def fit(folder: Path, method: str, poisoned: Any, hosts: int = 0) -> tuple[list[dict[str, Any]], Regression]:
    algorithm = METHODS[method]
    options: dict[str, Any] = {"poisoned": poisoned, "exchange_timeout_seconds": 60.0}
    strategy: Any = (
        AsyncStrategy(share_epoch=False, **options) if algorithm is None else GossipStrategy(algorithm(), **options)
    )
    module = Poisoned(size=96)
    callbacks = [Abreast(1), Said(folder)]
    fit_kept(folder, strategy, 3, module, hosts, max_epochs=1, callbacks=callbacks, limit_val_batches=0)
    return saved(folder, 3), module


@pytest.mark.parametrize("method", METHODS)
def test_it_is_named_and_spreads(method: str, tmp_path: Path) -> None:
    workers, module = fit(tmp_path, method, "warn")
    first = [said for worker in workers for said in worker["said"] if "from worker 1 a model" in said]
    assert first
    assert any("'network.2.weight'" in said for said in first), first
    assert any(f"in step {step}" in said for said in first for step in (3, 4, 5)), first
    assert not any(worker["finite"] for worker in workers)
    assert not all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_it_is_left_out(method: str, tmp_path: Path) -> None:
    workers, module = fit(tmp_path, method, "refuse")
    assert [worker["finite"] for worker in workers] == [True, False, True]
    if method != "adpsgd":  # who calls through shared memory does it for the other one, too
        assert workers[1]["said"] == []
    assert any("from worker 1" in said and "left out" in said for worker in workers for said in worker["said"])
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())  # the consensus


@pytest.mark.parametrize("method", ["dpsgd", "adpsgd"])
def test_it_is_left_out_by_workers_that_share_no_memory(method: str, tmp_path: Path) -> None:
    workers, _ = fit(tmp_path, method, "refuse", hosts=3)
    assert [worker["finite"] for worker in workers] == [True, False, True]


@pytest.mark.parametrize("method", ["dpsgd", "adpsgd"])
def test_it_ends_the_run(method: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"from worker 1 a model that is not finite in step \d+, in 'network"):
        fit(tmp_path, method, "raise")


class Looks(Poisoned):
    """Worker 1, which calls, keeps the model of worker 0, which it has mapped, as it is when worker 1 raises."""

    def __init__(self, file: Path) -> None:
        super().__init__(size=96)
        self.file = file

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().optimizer_step(*args, **kwargs)
        except PoisonedMessage:
            strategy = self.trainer.strategy
            assert isinstance(strategy, AsyncStrategy)
            assert strategy._communicator is not None
            shared = strategy._communicator.calls._shared
            assert shared is not None
            torch.save(shared._theirs[0, 0].vector.buffers, self.file)
            raise


def test_it_has_got_nowhere_when_it_ends_the_run(tmp_path: Path) -> None:
    """Or who meets the model next, before it hears of the failure, blames a worker that is well."""
    strategy = asynchronous(poisoned="raise", share_epoch=False)
    with pytest.raises(Exception, match="Worker 0 got from worker 1 a model that is not finite"):
        make_trainer(tmp_path, strategy, 2, limit_val_batches=0).fit(Looks(tmp_path / "other.pt"))
    assert all(bool(buffer.isfinite().all()) for buffer in torch.load(tmp_path / "other.pt"))


def test_a_method_that_compresses_does_not_send_it(tmp_path: Path) -> None:
    strategy = gossip(ChocoSGD())
    with pytest.raises(Exception, match=r"Worker 1 in step 4: Int8 got 5 NaN"):
        make_trainer(tmp_path, strategy, 3, max_epochs=1, limit_val_batches=0).fit(Poisoned(size=96))


def test_a_wrong_option_is_refused() -> None:
    for make in (gossip, asynchronous):
        with pytest.raises(ValueError, match="needs 'warn', 'refuse' or 'raise'"):
            make(poisoned="ignore")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_models_are_finite(dtype: torch.dtype) -> None:
    """Their sums are not."""
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(Vector([largest, -largest]))
    for value in (float("nan"), float("inf"), -float("inf")):
        poisoned = largest.clone()
        poisoned[500] = value
        assert not is_finite(Vector([largest, poisoned]))


def test_every_element_is_read_within_some_messages() -> None:
    for numel in (1 << 16, (1 << 16) + 1, 100_003):
        for place in (0, 1, 4092, 4093, numel // 2, numel - 1):
            values = torch.zeros(numel)
            values[place] = float("nan")
            found = [not is_finite(Vector([values]), turn) for turn in range(16)]
            assert any(found)
            assert all(found) or (numel > 1 << 16 and place % 4093 != 0)


def test_what_is_refused_is_looked_for_in_all_of_a_message() -> None:
    values = torch.zeros(100_003)
    values[1] = float("nan")
    for policy in ("refuse", "raise"):
        assert Inspector(policy, 0, lambda index, message: "").next_turn() is None  # type: ignore[arg-type]
    inspector = Inspector("refuse", 0, lambda index, message: "in step 3")
    with pytest.warns(UserWarning, match="left out"):
        assert not any(inspector.admits(Vector([values]), 2, 0) for _ in range(16))


def test_compressed_messages_are_bytes_and_left_alone() -> None:
    assert is_finite(Vector([torch.full((9,), 255, dtype=torch.uint8)]))


def test_a_worker_is_named_once() -> None:
    bad = Vector([torch.tensor([1.0, float("nan")])])
    inspector = Inspector("warn", 0, lambda index, message: f"in model {index}")
    with pytest.warns(UserWarning, match="Worker 0 got from worker 2 a model that is not finite in model 1"):
        assert inspector.admits(bad, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspector.admits(bad, 2, 1)
    with pytest.raises(PoisonedMessage, match="from worker 2"):
        Inspector("raise", 0, lambda index, message: "").admits(bad, 2, 0)
