"""Proved here: Hogwild is its event-ordered reference update by update in the simulator."""

from __future__ import annotations

from itertools import islice

import torch
from reference import servers
from reference.runs import equal_start
from reference.served import SECONDS, served, updates

from lightning_decentral.algorithms import Hogwild


def test_it_is_the_reference_update_by_update() -> None:
    problem = equal_start(6)
    reference = servers.hogwild(problem.start[0], problem.gradient, 0.1, SECONDS)
    for mine, theirs in islice(zip(updates(served(Hogwild(), problem), problem, 0.1), reference, strict=False), 120):
        torch.testing.assert_close(mine, theirs, rtol=0.0, atol=1e-13)  # 120 updates of values around 1
