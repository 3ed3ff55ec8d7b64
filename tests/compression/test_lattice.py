"""Proved here: next to a reference within reach the error is at most half a step, however long the vectors are;
beyond it decoding is refused and not silently wrong, also if two coordinates are wrong in opposite directions;
Moniqua's bound holds; a random shift makes it unbiased with the error `s^2 / 12`."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import Lattice
from lightning_decentral.errors import CompressionError, ConfigurationError, DecodingError


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("n", [1, 100, 150_000])
def test_half_a_step_next_to_a_reference_within_reach(levels: int, dither: bool, n: int) -> None:
    lattice = Lattice(step=0.01, levels=levels, dither=dither)
    x = 100 * draw(n)
    away = lattice.reach * (2 * torch.rand(n, generator=torch.Generator().manual_seed(1)) - 1) * 0.999
    payload = lattice.compress(x, torch.Generator().manual_seed(2))
    result = lattice.decompress_near(payload, x + away)
    assert (result - x).abs().max() <= 0.005 + 5e-5  # float32 has 3e-5 at 400
    assert lattice.reach == pytest.approx(0.005 * (levels - 1))


def test_moniquas_bound() -> None:
    """Within theta in every coordinate, the error is at most delta B = 2 delta theta / (1 - 2 delta), delta = 1 / (2
    q)."""
    for levels in (2, 16, 256):
        lattice, x, theta, delta = Lattice.within(2.0, levels), 10 * draw(10_000), 2.0, 0.5 / levels
        reference = x + theta * (1 - 2 * (torch.arange(10_000) % 2)) * 0.999
        error = (lattice.decompress_near(lattice.compress(x), reference) - x).abs().max()
        assert error <= 2 * delta * theta / (1 - 2 * delta) + 1e-5
        assert lattice.step * levels == pytest.approx(2 * theta / (1 - 2 * delta))


def test_one_coordinate_out_of_reach_is_noticed() -> None:
    x = 100 * draw(200_000)
    lattice = Lattice(step=0.01, levels=16)
    payload = lattice.compress(x)
    for where in (0, 4095, 4096, 199_999):
        reference = x.clone()
        reference[where] += 0.2
        with pytest.raises(DecodingError, match=r"within 0\.075"):
            lattice.decompress_near(payload, reference)


def test_two_in_opposite_directions_are_noticed() -> None:
    x = 100 * draw(20_000)
    lattice = Lattice(step=0.01, levels=16)
    payload = lattice.compress(x)
    for first, second in ((0, 1), (5, 5 + 4096), (5, 5 + 8192), (100, 15_000)):
        reference = x.clone()
        reference[first] += 0.2
        reference[second] -= 0.2
        with pytest.raises(DecodingError):
            lattice.decompress_near(payload, reference)


def test_without_a_reference_it_is_zero() -> None:
    lattice = Lattice(step=0.01, levels=256)
    x = draw(1000).clamp(-1.2, 1.2)
    assert (lattice.decompress(lattice.compress(x)) - x).abs().max() <= 0.005001
    with pytest.raises(DecodingError):
        lattice.decompress(lattice.compress(draw(1000) + 5))


def test_a_random_shift_is_unbiased_with_the_known_error() -> None:
    """2000 shifts of the whole lattice: the error of a coordinate is uniform in a step."""
    lattice, x, generator = Lattice(step=0.5, levels=16, dither=True), 10 * draw(200), torch.Generator().manual_seed(0)
    errors = torch.stack([lattice.decompress_near(lattice.compress(x, generator), x) - x for _ in range(2000)])
    sigma = 0.5 / 12**0.5
    assert float(errors.mean(0).abs().max()) <= 4.5 * sigma / 2000**0.5
    assert float(errors.square().mean()) == pytest.approx(0.25 / 12, rel=0.05)


def test_decoding_into_the_reference() -> None:
    x, lattice = draw(5000).view(50, 100), Lattice(step=0.01)
    mine = x + 0.3
    assert lattice.decompress_near(lattice.compress(x), mine, out=mine) is mine
    assert (mine - x).abs().max() <= 0.005001


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(CompressionError, match="larger step"):
        Lattice(step=1e-6).compress(100 * draw(10))
    with pytest.raises(CompressionError, match="shape"):
        Lattice(step=0.1).decompress_near(Lattice(step=0.1).compress(draw(10)), draw(11))
    with pytest.raises(ConfigurationError, match="levels=3"):
        Lattice(step=0.1, levels=3)
