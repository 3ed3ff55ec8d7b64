"""Pipelines: one model cut into stages, each on a worker of its own, that do not wait for each other's gradients."""
