"""Proved here: the explorer of RSGD is torch's momentum SGD bit for bit, whatever the residual; the exploited iterate
is its moving average, block by block, or by the largest differences; the callback validates and saves the exploited
iterate and resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from strategies.fits import Regression, flat, gossip, loader, make_trainer
from torch import Tensor, nn

from lightning_decentral.callbacks import EvaluateExploited
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.optimizers import RSGD

RESIDUALS = pytest.mark.parametrize("residual", ["ema", "block", "topk"])


def problem() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(9, 6)


def run(optimizer: torch.optim.Optimizer, network: nn.Module, inputs: Tensor, steps: int = 12) -> list[Tensor]:
    trajectory = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + step)  # a schedule
        optimizer.zero_grad()
        network(inputs).square().sum().backward()
        optimizer.step()
        trajectory.append(flat(network))
    return trajectory


@RESIDUALS
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.01), (0.0, 0.0)])
def test_the_explorer_is_momentum_sgd(residual: Any, momentum: float, decay: float) -> None:
    network, inputs = problem()
    wanted = run(torch.optim.SGD(network.parameters(), 0.3, momentum, weight_decay=decay), network, inputs)
    network, inputs = problem()
    found = run(RSGD(network.parameters(), 0.3, momentum, decay, residual, fraction=0.3), network, inputs)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def exploited(residual: Any, fraction: float) -> tuple[list[Tensor], list[Tensor]]:
    """The start and the exploited iterates, and the start and the explorers."""
    network, inputs = problem()
    optimizer = RSGD(network.parameters(), 0.1, residual=residual, fraction=fraction)
    x, y = [flat(network)], [flat(network)]
    for _ in range(12):
        y += run(optimizer, network, inputs, 1)
        optimizer.eval()
        x.append(flat(network))
        optimizer.train()
        assert torch.equal(flat(network), y[-1])
    return x, y


def test_ema_is_the_moving_average() -> None:
    x, y = exploited("ema", 0.3)
    for before, now, leader in zip(x, x[1:], y[1:], strict=False):
        torch.testing.assert_close(now, 0.7 * before + 0.3 * leader, rtol=1e-6, atol=1e-7)  # rounding of float32


@RESIDUALS
def test_the_whole_residual_is_momentum_sgd(residual: Any) -> None:
    for one, other in zip(*exploited(residual, 1.0), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("residual", ["block", "topk"])
def test_part_of_the_numbers_is_taken_over_and_the_rest_waits(residual: Any) -> None:
    x, y = exploited(residual, 0.25)
    sizes = [30, 5, 5, 1]
    for before, now, leader in zip(x, x[1:], y[1:], strict=False):
        for old, new, target in zip(before.split(sizes), now.split(sizes), leader.split(sizes), strict=True):
            taken, count = new == target, max(1, round(0.25 * len(new)))
            assert torch.equal(new[~taken], old[~taken])
            assert taken.sum() >= count  # more, where the two were equal before
            if residual == "topk":
                assert (
                    (target - old)[taken].abs().min() >= (target - old)[~taken].abs().max() if (~taken).any() else True
                )


@RESIDUALS
def test_what_was_left_out_stays_bounded(residual: Any) -> None:
    """At a constant explorer the residual goes to zero: nothing is lost for good."""
    y = nn.Parameter(torch.ones(40))
    optimizer = RSGD([y], lr=1.0, momentum=0.0, residual=residual, fraction=0.2)
    y.grad = torch.ones(40)
    optimizer.step()
    y.grad = torch.zeros(40)
    for _ in range(150):
        optimizer.step()
    optimizer.eval()
    # ema: 0.8^150 is 3e-15; a block misses a number 150 times with probability 3e-15
    torch.testing.assert_close(y.detach(), torch.zeros(40), rtol=0, atol=1e-12)


def test_a_step_at_the_exploited_iterate_is_refused() -> None:
    y = nn.Parameter(torch.ones(2))
    optimizer = RSGD([y], lr=0.1)
    optimizer.eval()
    with pytest.raises(ConfigurationError, match=r"optimizer.train\(\) .* EvaluateExploited"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.1}, {"residual": "mean"}, {"lr": -1.0}])
def test_impossible_settings(options: Any) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        RSGD([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **options})


def test_nan_stays_in_its_layer() -> None:
    sick, well = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = RSGD([sick, well], lr=0.1)
    (sick.sum() * torch.nan + well.sum()).backward()
    optimizer.step()
    optimizer.eval()
    assert torch.isnan(sick).all()
    assert torch.isfinite(well).all()


# -- the callback -----------------------------------------------------------------------------------------------------


class Exploiting(Regression):
    def configure_optimizers(self) -> Any:
        return RSGD(self.parameters(), lr=0.05, fraction=0.2)

    def val_dataloader(self) -> Any:
        return loader(12)


class Seen(Callback):
    """The weights that are trained and those that are validated."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trained.append(flat(pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(flat(pl_module))


def fit(folder: Path, epochs: int, start: str | None = None) -> tuple[Exploiting, Seen, Trainer]:
    module, seen = Exploiting(), Seen()
    trainer = make_trainer(folder, "auto", 1, max_epochs=epochs, callbacks=[EvaluateExploited(), seen])
    trainer.fit(module, ckpt_path=start)
    return module, seen, trainer


def test_the_callback_validates_saves_and_resumes(tmp_path: Path) -> None:
    module, whole, trainer = fit(tmp_path, 4)
    average = flat(Exploiting())
    steps = len(whole.trained) // 4
    for number, leader in enumerate(whole.trained):
        average = 0.8 * average + 0.2 * leader
        if (number + 1) % steps == 0:
            validated = whole.validated[number // steps]
            torch.testing.assert_close(validated, average, rtol=1e-12, atol=1e-12)  # rounding of float64
            assert not torch.equal(validated, leader)
    assert torch.equal(flat(module), whole.validated[-1])

    _, first, trainer = fit(tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    file = torch.load(tmp_path / "two.ckpt", weights_only=False)
    weights = torch.cat([file["state_dict"][name].flatten() for name, _ in module.named_parameters()])
    assert torch.equal(weights, first.validated[-1])
    _, second, _ = fit(tmp_path, 4, str(tmp_path / "two.ckpt"))
    assert torch.equal(torch.stack(first.trained + second.trained), torch.stack(whole.trained))


class SaveInTheMiddle(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/five.ckpt")


def test_a_checkpoint_in_the_middle_has_the_exploited_iterate(tmp_path: Path) -> None:
    module, seen = Exploiting(), Seen()
    callbacks = [EvaluateExploited(), seen, SaveInTheMiddle()]
    make_trainer(tmp_path, "auto", 1, max_epochs=1, callbacks=callbacks).fit(module)
    average = flat(Exploiting())
    for leader in seen.trained[:5]:
        average = 0.8 * average + 0.2 * leader
    file = torch.load(tmp_path / "five.ckpt", weights_only=False)
    weights = torch.cat([file["state_dict"][name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(weights, average, rtol=1e-12, atol=1e-12)  # rounding of float64


def test_another_optimizer_and_gossip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="type RSGD, got SGD"):
        make_trainer(tmp_path, "auto", 1, max_epochs=1, callbacks=[EvaluateExploited()]).fit(Regression())
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="got GossipStrategy, which evaluates"):
        make_trainer(tmp_path, gossip(), 1, max_epochs=1, callbacks=[EvaluateExploited()]).fit(Exploiting())
