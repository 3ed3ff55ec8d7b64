"""The digits that benchmarks and claims train on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lightning_decentral.recipes import EmbeddedImages


@functools.cache
def digits(split: str) -> tuple[Tensor, Tensor]:
    """Read normalized images and labels, once in a process; nobody changes them.

    Args:
        split: ``"train"``, 4,000 of them, or ``"val"``, 500 others.

    Returns:
        Images ``[n, 1, 28, 28]`` and labels ``[n]``.
    """
    data = EmbeddedImages()
    data.setup("fit")
    every: Any = data.splits[split]
    images, labels = zip(*every.__getitems__(list(range(len(every)))), strict=True)
    return torch.stack(images), torch.stack(labels)
