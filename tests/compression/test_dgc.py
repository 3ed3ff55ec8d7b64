"""Proved here: momentum is accumulated and cleared as in the paper; what was sent and what is left add up to everything
that was accumulated; ratio 1 is SGD with momentum (and not without, as with masking); the warm-up is the paper's."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import DGC
from lightning_decentral.errors import ConfigurationError


def gradients(steps: int, n: int) -> torch.Tensor:
    return torch.randn(steps, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_recursion_of_the_paper(nesterov: bool) -> None:
    dgc, u, v = DGC(ratio=0.1), *torch.zeros(2, 50, dtype=torch.float64)
    their_u, their_v = u.clone(), v.clone()
    for g in gradients(30, 50):
        dgc.accumulate(u, v, g, 0.9, nesterov)
        their_u = 0.9 * (their_u + g) if nesterov else 0.9 * their_u + g
        their_v = their_v + their_u + g if nesterov else their_v + their_u
        torch.testing.assert_close((u, v), (their_u, their_v))
        payload = dgc.compress(v)
        sent = dgc.decompress(payload)
        assert int(sent.count_nonzero()) == 5
        dgc.clear_sent(payload, u, v)
        keep = sent == 0
        their_u, their_v = their_u * keep, their_v * keep
        torch.testing.assert_close((u, v), (their_u, their_v))
        torch.testing.assert_close(sent + v, torch.where(keep, their_v, sent))


def test_ratio_one_is_momentum_sgd() -> None:
    dgc, u, v, buffer = DGC(ratio=1.0), *torch.zeros(3, 20, dtype=torch.float64)
    for g in gradients(20, 20):
        dgc.accumulate(u, v, g, 0.9)
        payload = dgc.compress(v)
        dgc.clear_sent(payload, u, v)
        buffer = 0.9 * buffer + g
        torch.testing.assert_close(dgc.decompress(payload), buffer)
        assert v.count_nonzero() == 0


def test_the_warm_up() -> None:
    assert [DGC().at_epoch(epoch).ratio for epoch in range(6)] == [0.25, 0.0625, 0.015625, 0.004, 0.001, 0.001]
    assert DGC().at_epoch(0).num_bits(1000) == 64 * 250
    with pytest.raises(ConfigurationError, match="ratio=2"):
        DGC(warm_up=(2,))
