"""What the figures in ``docs/results`` were measured with: ``python -m lightning_decentral.lab.benchmarks.NAME``."""
