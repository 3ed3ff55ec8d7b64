"""Proved here: CoCoA+ is its paper on a dense matrix, round by round, and its model is that of its dual variables."""

from __future__ import annotations

import numpy as np
import pytest
from reference import primal_dual as reference

from lightning_decentral.algorithms import CoCoAPlus
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector
from lightning_decentral.primal_dual.coordinates import divided
from lightning_decentral.primal_dual.losses import Loss


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_it_is_the_reference_round_by_round(gamma: float) -> None:
    rows = reference.problem()
    parts = divided(len(rows), 4, seed=1)
    fleet, wanted = (
        reference.Fleet(CoCoAPlus(gamma), rows, Loss("squared"), 4),
        reference.cocoa_plus(rows, parts, gamma),
    )
    models = [np.zeros(rows.features), *(next(wanted) for _ in range(12))]
    for count, worker in enumerate(fleet.run(12)):
        assert isinstance(worker.x, Vector)
        np.testing.assert_allclose(worker.x.buffers[0].numpy(), models[count // 4], rtol=0.0, atol=1e-13)
    np.testing.assert_allclose(fleet.whole, models[12], rtol=0.0, atol=1e-13)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"CoCoAPlus\(gamma=0\): needs a number in \(0, 1\]"):
        CoCoAPlus(0)
