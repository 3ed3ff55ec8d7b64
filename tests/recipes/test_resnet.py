"""The residual network is the one of the paper: its parameter counts, the image sizes it takes, the depths it has."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.recipes.resnet import CIFARResNet, Shortcut


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters"),
    [
        (20, "A", 269_722),  # the paper's table 6 says 0.27 M, and 0.46, 0.66, 0.85 M for the deeper ones
        (20, "B", 272_474),
        (32, "A", 464_154),
        (44, "A", 658_586),
        (56, "A", 853_018),
    ],
)
def test_parameter_count(depth: int, shortcut: Shortcut, parameters: int) -> None:
    network = CIFARResNet(depth, in_channels=3, num_classes=10, shortcut=shortcut)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 29, 31), (1, 4, 4)])
def test_image_sizes(shape: tuple[int, int, int], shortcut: Shortcut) -> None:
    network = CIFARResNet(8, in_channels=shape[0], num_classes=7, width=4, shortcut=shortcut)
    assert network(torch.randn(2, *shape)).shape == (2, 7)


def test_zero_padding_keeps_the_identity() -> None:
    """With the convolutions of a block silenced, shortcut A passes the subsampled input on and adds zero channels."""
    block = CIFARResNet(8, width=4).blocks[1].eval()
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, :4], x[:, :, ::2, ::2])
    assert not y[:, 4:].any()


@pytest.mark.parametrize("depth", [2, 7, 18, 21])
def test_wrong_depth(depth: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"6n \+ 2, got {depth}. Use one of 8, 14, 20"):
        CIFARResNet(depth)
