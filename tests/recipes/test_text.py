"""The language model looks only backwards, learns, logs what the recipes monitor and checks that it fits its data."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_decentral import PipelineStrategy
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes import Shakespeare, TransformerLM

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def small(**options: object) -> TransformerLM:
    return TransformerLM(**{"depth": 2, "width": 32, "heads": 2, "context_length": 32} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_length", [0, 16])
def test_a_prediction_depends_only_on_what_comes_before(memory_length: int) -> None:
    model = small(memory_length=memory_length).eval()
    tokens = torch.randint(0, 256, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :20], after[0, :20])
    assert not torch.allclose(before[0, 20:], after[0, 20:])


def test_starts_at_chance() -> None:
    loss = torch.nn.functional.cross_entropy(
        small()(torch.randint(0, 256, (8, 32))).flatten(0, 1), torch.randint(0, 256, (256,))
    )
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)  # small initial weights: nearly equal scores


@pytest.mark.parametrize(("optimizer", "learning_rate"), [("adamw", 3e-3), ("sgd", 0.3)])
def test_learns_and_logs(optimizer: str, learning_rate: float) -> None:
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    model = small(optimizer=optimizer, learning_rate=learning_rate, warmup_steps=5)
    data = Shakespeare(context_length=32, batch_size=16, samples_per_epoch=16 * 60, validation_samples=64)
    trainer = Trainer(max_epochs=1, gradient_clip_val=1.0, **QUIET)  # type: ignore[arg-type]
    trainer.fit(model, data)
    metrics = trainer.callback_metrics
    assert metrics["val_loss"] < 4.5  # ln 256 = 5.5 at the start
    assert metrics["val_bits_per_character"].item() == pytest.approx(metrics["val_loss"].item() / math.log(2))
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_loss"] < 4.5


@pytest.mark.parametrize(("schedule", "expected"), [("constant", [1, 1]), ("inverse_sqrt", [0.5, 0.25])])
def test_learning_rate_by_step(schedule: str, expected: list[float]) -> None:
    optimizers = small(warmup_steps=4, schedule=schedule, learning_rate=1.0).configure_optimizers()
    scheduler = optimizers["lr_scheduler"]["scheduler"]  # type: ignore[index, call-overload]
    factor = scheduler.lr_lambdas[0]
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert [factor(step - 1) for step in (16, 64)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 128}, "model has vocabulary_size=128, the data need at least 256"),
        ({"context_length": 16}, "model has context_length=16, the data need at least 32"),
    ],
)
def test_model_too_small_for_the_data(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Trainer(fast_dev_run=1, **QUIET).fit(small(**options), Shakespeare(context_length=32))  # type: ignore[arg-type]


def test_wrong_settings() -> None:
    with pytest.raises(ConfigurationError, match="got 32, 3 and 0"):
        small(heads=3)
    with pytest.raises(ConfigurationError, match="'adam'"):
        small(optimizer="adam")


def test_pickles() -> None:
    model = small().eval()
    tokens = torch.randint(0, 256, (2, 8))
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), model(tokens))


# -- with a memory ----------------------------------------------------------------------------------------------------


def streaming(**options: object) -> Shakespeare:
    sizes = {"context_length": 16, "batch_size": 4, "samples_per_epoch": 24, "validation_samples": 8, "streams": 4}
    return Shakespeare(**(sizes | options))  # type: ignore[arg-type]


def test_with_a_memory_parts_of_a_text_are_read_as_the_whole() -> None:
    """Of one block: what a block of many remembers was itself computed with a shorter memory."""
    torch.manual_seed(0)
    model = small(depth=1, memory_length=24).eval()
    text = torch.randint(0, 256, (3, 32))
    whole = model(text)
    with model.remembering():
        parts = [model(part) for part in text.split([8, 16, 8], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert not torch.allclose(model(text[:, 8:]), whole[:, 8:], atol=1e-4)


def test_a_memory_has_no_gradient_and_is_as_long_as_was_asked() -> None:
    model = small(memory_length=10)
    for _ in range(3):
        model(torch.randint(0, 256, (2, 8))).sum().backward()
    assert [tuple(block.memory.shape) for block in model.blocks] == [(2, 10, 32)] * 2
    assert not any(block.memory.requires_grad for block in model.blocks)
    assert model.positions is None


@pytest.mark.parametrize("strategy", ["auto", PipelineStrategy("ouroboros", stages=3, seed=0)])
def test_it_trains_on_texts_that_go_on(strategy: str | PipelineStrategy) -> None:
    torch.manual_seed(0)
    model = small(memory_length=16, warmup_steps=1)
    trainer = Trainer(max_epochs=2, devices=1, strategy=strategy, **QUIET)  # type: ignore[arg-type]
    trainer.fit(model, streaming())
    assert trainer.global_step == 12
    assert trainer.callback_metrics["val_loss"] < 5.5
    assert all(block.memory.shape == (4, 16, 32) for block in model.blocks)  # evaluation has left it


@pytest.mark.parametrize(
    ("words", "strategy", "options"),
    [
        ("do not go on", "auto", {"streams": 8}),
        ("do not go on", "auto", {"streams": None}),
        ("2 of the 4 rows", PipelineStrategy("gpipe", stages=2, parts=2, cuts=[2]), {}),
        ("keeps graphs", PipelineStrategy("dsp", stages=2, cuts=[2]), {}),
    ],
)
def test_what_a_memory_would_mistake_is_refused(
    words: str, strategy: str | PipelineStrategy, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Trainer(max_epochs=1, devices=1, strategy=strategy, **QUIET).fit(small(memory_length=16), streaming(**options))  # type: ignore[arg-type]
