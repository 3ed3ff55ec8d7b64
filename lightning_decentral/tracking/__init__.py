"""Experiment tracking. Weights & Biases is optional and imported only when a run begins."""

from lightning_decentral.tracking.wandb import OfflineFirstWandbLogger

__all__ = ["OfflineFirstWandbLogger"]
