"""What all tests share: one thread per process (results do not depend on the machine), and `reference` importable."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
