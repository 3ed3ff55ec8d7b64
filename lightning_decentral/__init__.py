"""Decentralized, asynchronous and local-update data-parallel training as PyTorch Lightning strategies."""

__version__ = "0.1.0"
