"""Bases for Lightning modules whose training step is not forward and backward."""

from lightning_decentral.modules.zeroth_order import AbstractZerothOrderModule

__all__ = ["AbstractZerothOrderModule"]
