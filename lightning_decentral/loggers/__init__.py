"""Experiment tracking. Weights & Biases is optional and imported only when a run begins."""

from lightning_decentral.loggers.wandb import OfflineFirstWandbLogger

__all__ = ["OfflineFirstWandbLogger"]
