"""Proved here: every BatchNorm of a model is replaced, with its weights, estimates, dtype and mode; a trained model
evaluates to the same before and after, there and back; what cannot be converted is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.normalization import (
    AbstractNormalization,
    BatchRenorm,
    BatchRenormalization,
    FullNorm1d,
    FullNorm2d,
    FullNormalization,
    GhostBatchNorm,
    GhostNormalization,
    GroupNormalization,
    MovingAverageBatchNorm,
    MovingAverageNormalization,
    PowerDecay,
    SyncNormalization,
    convert_full_norm,
    convert_full_norm_to_batch_norm,
    full_norm_layers,
    replace_batch_norm,
)


class Block(nn.Module):
    """A norm in an attribute, one in a container, and one at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
        self.shared = nn.BatchNorm1d(4)
        self.list = nn.ModuleList([self.shared, nn.BatchNorm1d(4, affine=False)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.convolution(x)).mean((2, 3))
        for norm in self.list:
            x = norm(self.shared(x))
        return x


def trained(dtype: torch.dtype = torch.float64) -> Block:
    torch.manual_seed(0)
    block = Block().to(dtype)
    for _ in range(5):
        block(torch.randn(6, 3, 4, 4, dtype=dtype))
    for parameter in block.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return block


def test_weights_estimates_and_sharing_are_taken_over() -> None:
    block = trained()
    parameters = dict(block.named_parameters())
    full = convert_full_norm(copy.deepcopy(block).eval())
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(full(x), block.eval()(x), rtol=1e-12, atol=1e-12)  # float64
    assert isinstance(full, Block)
    assert full.shared is full.list[0]
    assert [type(layer) for layer in full_norm_layers(full)] == [FullNorm2d, FullNorm1d, FullNorm1d]
    assert dict(full.named_parameters()).keys() == parameters.keys()
    assert not any(layer.training for layer in full.modules())
    assert isinstance(full.norm, FullNorm2d)
    assert (full.norm.eps, full.norm.forward_momentum, full.norm.backward_momentum) == (1e-3, 0.3, 0.3)
    assert full.list[1].weight is None


def test_parameters_stay_the_same_objects_so_optimizers_go_on() -> None:
    block = trained()
    before = list(block.parameters())
    after = list(convert_full_norm(block).parameters())
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_there_and_back_is_the_same_in_evaluation_mode() -> None:
    block = trained()
    full = convert_full_norm(copy.deepcopy(block))
    for _ in range(3):
        full(torch.randn(6, 3, 4, 4, dtype=torch.float64)).sum().backward()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    expected = full.eval()(x)
    back = convert_full_norm_to_batch_norm(full)
    assert not full_norm_layers(back)
    torch.testing.assert_close(back(x), expected, rtol=1e-12, atol=1e-12)  # float64
    block.load_state_dict(back.state_dict(), strict=True)


def test_a_norm_by_itself_and_half_precision() -> None:
    converted = convert_full_norm(nn.BatchNorm1d(3, momentum=None).bfloat16(), backward_momentum=0.5)
    assert isinstance(converted, FullNorm1d)
    assert converted.weight is not None
    assert (converted.weight.dtype, converted.running_mean.dtype) == (torch.bfloat16, torch.float32)
    assert (converted.forward_momentum, converted.backward_momentum) == (PowerDecay(), 0.5)
    assert isinstance(convert_full_norm_to_batch_norm(converted), nn.BatchNorm1d)


def test_a_norm_without_running_statistics_starts_anew() -> None:
    converted = convert_full_norm(nn.BatchNorm2d(3, track_running_stats=False))
    assert isinstance(converted, FullNorm2d)
    assert int(converted.num_batches_tracked) == 0
    assert converted(torch.randn(4, 3, 5, 5)).shape == (4, 3, 5, 5)


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        (FullNormalization(0.1, 0.2), FullNorm2d),
        (GroupNormalization(2), nn.GroupNorm),
        (BatchRenormalization(), BatchRenorm),
        (GhostNormalization(2), GhostBatchNorm),
        (MovingAverageNormalization(), MovingAverageBatchNorm),
        (SyncNormalization(), nn.SyncBatchNorm),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AbstractNormalization) else "",
)
def test_every_setting_replaces_every_batch_norm_and_trains(to: AbstractNormalization, kind: type) -> None:
    block = to.convert(trained(torch.float32))
    assert isinstance(block, Block)
    assert isinstance(block.norm, kind)
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in block.modules())
    if not isinstance(to, SyncNormalization):  # on the CPU there is none
        block(torch.randn(6, 3, 4, 4)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("to", [FullNormalization(), BatchRenormalization(), GhostNormalization()])
def test_those_with_running_moments_evaluate_as_the_trained_batch_norm(to: AbstractNormalization) -> None:
    block = trained().eval()
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    expected = block(x)
    torch.testing.assert_close(to.convert(block)(x), expected, rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.parametrize(("groups", "channels", "got"), [(32, 48, 24), (8, 16, 8), (8, 4, 4), (4, 7, 1)])
def test_groups_divide_the_channels(groups: int, channels: int, got: int) -> None:
    layer = GroupNormalization(groups).convert(nn.BatchNorm2d(channels))
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == got


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Linear contains no BatchNorm1d, BatchNorm2d or BatchNorm3d"):
        convert_full_norm(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="contains no BatchNorm"):
        SyncNormalization().convert(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="contains no FullNorm1d"):
        convert_full_norm_to_batch_norm(nn.BatchNorm1d(2))
    with pytest.raises(ConfigurationError, match="LazyBatchNorm2d, whose number of channels is not known yet"):
        convert_full_norm(nn.Sequential(nn.LazyBatchNorm2d()))
    with pytest.raises(ConfigurationError, match="SyncBatchNorm"):
        replace_batch_norm(nn.SyncBatchNorm(2), lambda norm: nn.Identity())
    with pytest.raises(ConfigurationError, match="at least one group"):
        GroupNormalization(0)
