"""Proved here: ChunkTopK keeps the largest values of each chunk, also of a last one that is shorter; what it says of
each is the mean of its bin of 1.5 standard deviations; two sizes of values arrive as they are; and its default takes
14 bits for 64 of 4096."""

from __future__ import annotations

import torch

from lightning_decentral.compression import ChunkTopK


def test_it_keeps_the_largest_of_each_chunk() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    scheme = ChunkTopK(keep=3, chunk=16)
    made = scheme.decompress(scheme.compress(x))
    for begin in range(0, 100, 16):
        part = x[begin : begin + 16]
        kept = part.abs().topk(min(3, len(part))).indices.sort().values
        assert made[begin : begin + 16].nonzero().view(-1).tolist() == kept.tolist()


def test_values_are_the_means_of_their_bins() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(1))
    scheme = ChunkTopK(keep=64, chunk=64)
    bins = ((x - x.mean()) / (1.5 * x.std(correction=0)) + 2).round().clamp(0, 3)
    expected = torch.stack([x[bins == each].mean() for each in bins])
    torch.testing.assert_close(scheme.decompress(scheme.compress(x)), expected)


def test_two_sizes_of_values_arrive_as_they_are() -> None:
    x = torch.zeros(10_000)
    x[::500] = -2.0
    x[250::500] = 3.0
    scheme = ChunkTopK(keep=5, chunk=500)
    made = scheme.decompress(scheme.compress(x))
    assert int((made == -2.0).sum()) + int((made == 3.0).sum()) + int((made == 0.0).sum()) == 10_000


def test_its_default_takes_14_bits_for_64_of_4096() -> None:
    assert ChunkTopK().num_bits(4096 * 100) == 4 * 32 + 100 * 64 * 14
