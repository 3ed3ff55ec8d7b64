"""Proved here: under error feedback what is sent and the new memory are together the input and the old memory, with any
compressor; over many steps the sum of what was sent is the sum of the vectors, less one memory, also while the learning
rate changes; a step that is discarded, or whose vector is not finite, leaves no trace; with error feedback biased
compressors reach the optimum that they miss without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import AbstractCompressor, ErrorFeedback, Lattice, RandomK, ScaledSign, TopK
from lightning_decentral.errors import CompressionError

from .test_contract import CASES, generator, vector

SCHEMES = [case for case in CASES if not isinstance(case, Lattice)]  # which is decoded near a reference only


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_nothing_is_lost(scheme: AbstractCompressor) -> None:
    feedback = ErrorFeedback(scheme, vector(1000, seed=9))
    for step in range(3):
        x, before = vector(1000, seed=step), feedback.memory.clone()
        payload, sent = feedback.compress(x, generator(step), factor=0.5)
        assert torch.equal(feedback.memory, before)
        assert torch.equal(sent, scheme.decompress(payload))
        feedback.commit()
        # One rounding of a float32 for each of the three operations, relative to the largest number that takes part.
        largest = max(float(each.abs().max()) for each in (x, before, sent, feedback.memory))
        torch.testing.assert_close(sent + feedback.memory, x + 0.5 * before, atol=4e-7 * largest, rtol=0)


@pytest.mark.parametrize("scheme", [TopK(0.05), ScaledSign(), RandomK(0.1)], ids=repr)
def test_the_sum_of_updates_telescopes_while_the_learning_rate_changes(scheme: AbstractCompressor) -> None:
    feedback, draw = ErrorFeedback(scheme, torch.zeros(300, dtype=torch.float64)), generator()
    wanted, done, last = torch.zeros(300).double(), torch.zeros(300).double(), None
    for step in range(40):
        rate = 0.1 * 0.8**step
        x = vector(300, seed=step).double()
        _, sent = feedback.compress(x, draw, 1.0 if last is None else last / rate)
        feedback.commit()
        wanted, done, last = wanted + rate * x, done + rate * sent, rate
    assert last is not None
    # float64 throughout, but for ScaledSign's scale, whose rounding is part of what was sent.
    torch.testing.assert_close(done + last * feedback.memory, wanted, atol=1e-12, rtol=0)
    if isinstance(scheme, TopK):
        assert float((wanted - done).norm() / wanted.norm()) > 1e-3  # the memory is part of it


def test_one_factor_for_each_element() -> None:
    feedback = ErrorFeedback(TopK(0.01), torch.ones(4))
    assert feedback.add(torch.zeros(4), torch.tensor([1.0, 2.0, 0.0, -1.0])).tolist() == [1.0, 2.0, 0.0, -1.0]


def test_a_step_that_is_not_used_leaves_no_trace() -> None:
    feedback = ErrorFeedback(TopK(0.1), vector(50))
    before = feedback.memory.clone()
    feedback.compress(vector(50, seed=2))
    feedback.discard()
    feedback.commit()  # nothing is open
    with pytest.raises(CompressionError, match="1 NaN"):
        feedback.compress(vector(50).index_fill(0, torch.tensor([3]), torch.nan))
    feedback.discard()
    assert torch.equal(feedback.memory, before)


def test_half_precision_is_remembered_in_float32() -> None:
    """Steps of 2^-10 add up next to 1, where half precision (8 bits) would round every one of them away."""
    assert ErrorFeedback.dtype_of(torch.bfloat16) == torch.float32
    assert ErrorFeedback.dtype_of(torch.float64) == torch.float64
    feedback = ErrorFeedback(TopK(0.5), torch.tensor([0.0, 1.0]))
    for _ in range(4):
        feedback.compress(torch.tensor([2.0, 2.0**-10], dtype=torch.bfloat16))
        feedback.commit()
    assert feedback.memory.tolist() == [0.0, 1.0 + 4 * 2.0**-10]


def test_it_finds_the_optimum_that_is_missed_without() -> None:
    """The counterexample of Karimireddy et al.: with top-1 of gradients whose largest coordinate only cancels out."""

    def distance(feedback: bool) -> float:
        a = torch.tensor([[5.0, 1.0], [-5.0, 1.0]]).double()  # worker k: |a_k x|^2 / 2, descent along coordinate 1
        x = torch.tensor([0.0, 1.0]).double()
        memories = [ErrorFeedback(TopK(0.5), torch.zeros(2).double()) for _ in a]
        for _ in range(400):
            sent = []
            for row, memory in zip(a, memories, strict=True):
                gradient: Tensor = row * (row @ x)
                sent.append(memory.compress(gradient)[1])
                if feedback:
                    memory.commit()
            x = x - 0.01 * torch.stack(sent).mean(0)
        return float(x.norm())

    assert distance(False) == pytest.approx(1.0)  # the first coordinates cancel, the second is never sent
    assert distance(True) < 0.1


def test_a_memory_is_a_vector() -> None:
    with pytest.raises(CompressionError, match=r"shape \(2, 2\), needs one dimension"):
        ErrorFeedback(TopK(0.1), torch.zeros(2, 2))
