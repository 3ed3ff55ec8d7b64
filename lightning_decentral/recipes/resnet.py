"""Residual networks for small images (28x28, 32x32): the CIFAR family of He et al., section 4.2."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_decentral.errors import ConfigurationError

Shortcut = Literal["A", "B"]
"""How a block that changes the shape passes its input on: A pads with zeros (no parameters), B projects (1x1)."""


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalization, added to the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.projection: nn.Module | None = None
        if shortcut == "B" and (stride != 1 or self.new_channels):
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.projection is not None:
            identity = self.projection(x)
        elif self.stride != 1 or self.new_channels:
            identity = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        else:
            identity = x
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + identity)


class CIFARResNet(nn.Module):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks at full, half and quarter resolution.

    Not the ImageNet ResNet of ``torchvision`` (7x7 stem, four stages, 11 M parameters and more): ResNet-20 with width
    16 has 0.27 M parameters (269,722 with shortcut A and 10 classes of RGB images, 272,474 with B).

    Args:
        depth: Number of layers with weights on the longest path, 6n + 2: 8, 14, 20, 32, 44, 56, 110. Paper: 20 to 110.
        in_channels: Channels of an image: 1 for grey, 3 for RGB.
        num_classes: Outputs of the last layer.
        width: Channels of the first stage; the second and third have 2x and 4x as many. Paper: 16.
        shortcut: ``"A"`` (paper, CIFAR): zero padding, no parameters; ``"B"``: 1x1 convolution where the shape changes.

    Raises:
        ConfigurationError: The depth is not 6n + 2 with n >= 1.

    Example:
        >>> import torch
        >>> CIFARResNet(depth=8, in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition. CVPR 2016, arXiv:1512.03385.
    """

    def __init__(
        self, depth: int = 20, in_channels: int = 3, num_classes: int = 10, width: int = 16, shortcut: Shortcut = "A"
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ConfigurationError(
                f"A CIFAR ResNet has depth 6n + 2, got {depth}. Use one of 8, 14, 20, 32, 44, 56, 110."
            )
        blocks_per_stage = (depth - 2) // 6
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage in range(3):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(channels, width * 2**stage, stride, shortcut))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of a batch.

        Args:
            images: Normalized images, ``[batch, in_channels, height, width]``; height and width of at least 4.

        Returns:
            Logits, ``[batch, num_classes]``.
        """
        x = F.relu(self.norm(self.stem(images)))  # [batch, width, height, width]
        x = self.blocks(x)  # [batch, 4 * width, height / 4, width / 4]
        logits: Tensor = self.head(torch.mean(x, dim=(2, 3)))
        return logits

    def configure_stages(self) -> tuple[nn.Module, list[nn.Module]]:
        """Name the blocks that a pipeline may cut between: one after the other they do what `forward` does."""
        return self, [self.stem, self.norm, nn.ReLU(), *self.blocks, _Mean(), self.head]


class _Mean(nn.Module):
    """The mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.mean(x, dim=(2, 3))
