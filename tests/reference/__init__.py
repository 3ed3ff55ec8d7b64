"""Stacked references: each method on ``[workers, parameters]`` tensors, torch only, at most 30 lines."""
