"""Proved here: next to a reference within reach the error is at most half a step, however long the vectors are;
beyond it decoding is refused and not silently wrong, also if two coordinates are wrong in opposite directions;
Moniqua's bound holds; a random shift makes it unbiased with the error `s^2 / 12`. A difference taken from two messages
is that of the decoded vectors, the same on both ends, also where it is exactly half of the levels, and is refused where
decoding is."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.compression import Lattice, Payload
from lightning_decentral.errors import CompressionError, ConfigurationError, DecodingError


def draw(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def difference(lattice: Lattice, theirs: Payload, own: Payload, near: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    return lattice.add_steps_(torch.zeros(near.shape), [(lattice.steps_between(theirs, own, near), alpha)])


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
    """500 shifts of the whole lattice: the error of a coordinate is uniform in a step."""
    lattice, x, generator = Lattice(step=0.5, levels=16, dither=True), 10 * draw(200), torch.Generator().manual_seed(0)
    errors = torch.stack([lattice.decompress_near(lattice.compress(x, generator), x) - x for _ in range(500)])
    sigma = 0.5 / 12**0.5
    assert float(errors.mean(0).abs().max()) <= 4.5 * sigma / 500**0.5
    assert float(errors.square().mean()) == pytest.approx(0.25 / 12, rel=0.05)


def test_decoding_into_the_reference() -> None:
    x, lattice = draw(5000).view(50, 100), Lattice(step=0.01)
    mine = x + 0.3
    assert lattice.decompress_near(lattice.compress(x), mine, out=mine) is mine
    assert (mine - x).abs().max() <= 0.005001


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
@pytest.mark.parametrize("dither", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 5000, 300_001])
def test_a_difference_is_that_of_the_decoded_vectors(levels: int, dither: bool, dtype: torch.dtype, n: int) -> None:
    lattice = Lattice(step=0.5, levels=levels, dither=dither)
    away = lattice.reach * (2 * torch.rand(n, generator=torch.Generator().manual_seed(1)) - 1)
    theirs = (3 * draw(n)).to(dtype)
    mine = (theirs.float() + 0.7 * away).to(dtype)  # which half precision puts up to 0.04 elsewhere
    message, own = (lattice.compress(x, torch.Generator().manual_seed(2)) for x in (theirs, mine))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    start = draw(n, seed=3).to(wide)
    points = [lattice.decompress_near(payload, mine).double() for payload in (message, own)]
    if dtype in (torch.float16, torch.bfloat16):  # which rounds what is decoded
        wider = [lattice.compress(x.float(), torch.Generator().manual_seed(2)) for x in (theirs, mine)]
        points = [lattice.decompress_near(payload, mine.float()).double() for payload in wider]
    steps = lattice.steps_between(message, own, mine)
    assert steps.dtype == torch.int8
    result = lattice.add_steps_(start.clone(), [(steps, 0.25)])
    # Decoded vectors below 150 are rounded to 2^-17 where they are float32, twice.
    torch.testing.assert_close(result.double(), start + 0.25 * (points[0] - points[1]), rtol=0.0, atol=2e-5)
    assert torch.equal(steps, -lattice.steps_between(own, message, theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_steps_of_several_neighbours_are_added_and_rounded_once(dtype: torch.dtype) -> None:
    n, lattice = 300_001, Lattice(step=2**-8)
    start = draw(n).to(dtype)
    steps = [torch.randint(-128, 128, (n,), generator=torch.Generator().manual_seed(k)).to(torch.int8) for k in (1, 2)]
    # With weights that are powers of two every sum is exact but the last.
    expected = (start.double() + 2**-8 * (0.5 * steps[0].double() + 0.25 * steps[1].double())).to(dtype)
    result = lattice.add_steps_(start.clone(), [(steps[0], 0.5), (steps[1].short(), 0.25)])
    assert torch.equal(result, expected)
    expected = (start.double() + 2**-8 * 0.5 * steps[0].double()).to(dtype)
    assert torch.equal(lattice.add_steps_(start.clone(), [(steps[0], 0.5)]), expected)
    assert torch.equal(lattice.add_steps_(start.clone(), []), start)


@pytest.mark.parametrize("levels", [2, 4, 16, 256])
def test_a_difference_of_half_the_levels_has_the_right_sign(levels: int) -> None:
    lattice, n = Lattice(step=1.0, levels=levels), 300_001
    theirs, mine = torch.zeros(n), torch.zeros(n)
    for where in (0, 4095, 4096, 150_000, n - 1):
        theirs[where], mine[where] = levels / 2 - 0.25, 0.25  # exactly as far apart as they may be
    for where in (1, 4097, 150_001, n - 2):
        theirs[where], mine[where] = 0.25 - levels / 2, -0.25
    message, own = lattice.compress(theirs), lattice.compress(mine)
    result = difference(lattice, message, own, mine)
    expected = theirs.sign() * (levels / 2)
    assert torch.equal(result, expected)
    assert torch.equal(lattice.decompress_near(message, mine), expected)  # one's own points are zero
    assert torch.equal(difference(lattice, own, message, theirs), -expected)


def test_differences_of_what_is_out_of_reach_are_refused() -> None:
    n = 200_000
    theirs = 100 * draw(n)
    for levels in (2, 4, 16, 256):
        lattice = Lattice(step=0.01, levels=levels)
        message = lattice.compress(theirs)
        far = 0.01 * (levels + 4)
        for places in ((0,), (4095,), (4096,), (n - 1,), (0, 1), (5, 5 + 4096), (5, 5 + 8192), (100, 150_000)):
            mine = theirs.clone()
            for number, where in enumerate(places):
                mine[where] += far if number % 2 else -far  # which cancel in a sum without weights
            with pytest.raises(DecodingError, match=f"within {lattice.reach:g} in every"):
                lattice.steps_between(message, lattice.compress(mine), mine)


def test_a_difference_from_a_damaged_message_is_refused() -> None:
    lattice, x = Lattice(step=0.01, levels=16), draw(10_000)
    own = lattice.compress(x)
    for tensor in own.tensors:
        for where in (0, tensor.numel() - 1):
            damaged = [part.clone() for part in own.tensors]
            damaged[0 if tensor is own.tensors[0] else 1][where] ^= 1
            with pytest.raises(DecodingError):
                lattice.steps_between(own.replace(damaged), own, x)


def test_differences_of_any_memory_and_of_nothing() -> None:
    lattice = Lattice(step=0.01)
    x = draw(6000).view(100, 60)
    mine = x.clone().add_(0.3).t().contiguous().t()  # not contiguous
    message, own = lattice.compress(x), lattice.compress(mine)
    out = difference(lattice, message, own, mine)
    torch.testing.assert_close(out, torch.full((100, 60), -0.3), rtol=0.0, atol=0.010001)
    mine[3, 7] = x[3, 7] + lattice.reach - 0.004  # the points are looked at
    out = difference(lattice, message, lattice.compress(mine), mine)
    assert float(out[3, 7]) == pytest.approx(-lattice.reach, abs=0.011)
    nothing = lattice.compress(torch.empty(0))
    assert difference(lattice, nothing, nothing, torch.empty(0)).numel() == 0


def test_differences_need_messages_of_one_kind() -> None:
    lattice, x = Lattice(step=0.01, dither=True), draw(10)
    one, other = (lattice.compress(x, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    shorter = lattice.compress(x[:9], torch.Generator().manual_seed(1))
    for message, near in ((other, x), (shorter, x), (one, x[:9])):
        with pytest.raises(CompressionError, match="needs the same shape and dither everywhere"):
            lattice.steps_between(message, one, near)


def test_values_that_cannot_be_rounded_are_refused_wherever_they_are() -> None:
    lattice = Lattice(step=0.5)
    x = draw(300_001)
    for where in (0, 131_072, 300_000):
        for value in (4_200_000.0, -4_200_000.0, 1e9, 1e10, -1e10, 3e38, -3e38):
            bad = x.clone()
            bad[where] = value
            with pytest.raises(CompressionError, match=r"needs less than 2\^23 steps.*larger step"):
                lattice.compress(bad)
        for value, name in ((torch.nan, "1 NaN"), (torch.inf, "1 infinite"), (-torch.inf, "1 infinite")):
            bad = x.clone()
            bad[where] = value
            with pytest.raises(CompressionError, match=name):
                lattice.compress(bad)
        good = x.clone()
        good[where] = 4_194_302.0
        assert lattice.decompress_near(lattice.compress(good), good)[where] == 4_194_302.0


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(CompressionError, match="larger step"):
        Lattice(step=1e-6).compress(100 * draw(10))
    with pytest.raises(CompressionError, match="shape"):
        Lattice(step=0.1).decompress_near(Lattice(step=0.1).compress(draw(10)), draw(11))
    with pytest.raises(ConfigurationError, match="levels=3"):
        Lattice(step=0.1, levels=3)


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_large_values_are_rounded_another_way_to_the_same_points(levels: int) -> None:
    """Whether all are below 2^22 steps decides how a stretch of the vector is rounded, on each worker for itself."""
    lattice, n = Lattice(step=1.0, levels=levels), 300_001
    theirs = (100 * draw(n)).round()
    mine = theirs.clone()
    for where in (5, 280_000, n - 1):
        theirs[where], mine[where] = 2.0**22, 2.0**22 - levels // 4
    message, own = lattice.compress(theirs), lattice.compress(mine)
    assert torch.equal(difference(lattice, message, own, mine), theirs - mine)
    assert torch.equal(lattice.decompress_near(message, mine), theirs)
    assert torch.equal(lattice.decompress_near(own, theirs), mine)


def test_a_difference_that_a_byte_cannot_hold_is_kept_whole() -> None:
    """At millions of steps float32 rounds by so much that two workers at the reach may be 129 steps apart."""
    lattice, near, away = Lattice(step=0.1), torch.tensor([728593.9375]), torch.tensor([728581.125])
    theirs, own = lattice.compress(away), lattice.compress(near)
    steps = lattice.steps_between(theirs, own, near)
    assert steps.dtype == torch.int16
    assert steps.tolist() == [-129]


@pytest.mark.parametrize("out", [torch.zeros(4, 2).T, torch.zeros(3)])
def test_steps_are_added_to_a_vector_of_their_shape(out: torch.Tensor) -> None:
    with pytest.raises(CompressionError, match="needs a contiguous one of the same shape"):
        Lattice(step=0.1).add_steps_(out, [(torch.zeros(2, 4, dtype=torch.int8), 1.0)])


def test_a_step_without_a_reciprocal_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"needs at least 1\.2e-38"):
        Lattice(step=2e-39)
