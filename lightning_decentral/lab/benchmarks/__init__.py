"""What the figures in ``results/data`` were measured with: ``python -m lightning_decentral.lab.benchmarks.NAME``."""
