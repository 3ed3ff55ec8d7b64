"""Refusing a gradient scaler under methods that it would change."""

from __future__ import annotations

from typing import Any

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.protocol import AbstractAlgorithm


def refuse_gradient_scaler(algorithm: AbstractAlgorithm, precision: Any) -> None:
    """Refuse the scaler of float16 where a method remembers gradients, or makes one of what workers have moved.

    Args:
        algorithm: of the run.
        precision: the plugin of Lightning for it.

    Raises:
        ConfigurationError: if there is such a scaler, and the method does so.
    """
    if getattr(precision, "scaler", None) is None:
        return
    name = type(algorithm).__name__
    if algorithm.remembers_gradients:
        raise ConfigurationError(
            f"{name} got a gradient scaler (precision='16-mixed'), which changes the unit of the gradients that it "
            "remembers. Use 'bf16-mixed' or '32-true'."
        )
    if algorithm.has_outer_gradient:
        raise ConfigurationError(
            f"{name} got a gradient scaler (precision='16-mixed'), and has an outer gradient: the mean of what the "
            "workers have moved. A scaler leaves updates out, each worker's at steps of its own, most of them in the "
            "first rounds; they would count as steps that move nothing, and the outer momentum would keep that. It "
            "needs workers that make all their steps. Use 'bf16-mixed' or '32-true', or LocalSGD, whose average is the "
            "model."
        )
