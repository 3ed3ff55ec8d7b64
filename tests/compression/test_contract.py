"""Proved here, for every compressor: a message has exactly the bits that were announced, also as one buffer of bytes;
the result has the vector's shape and dtype; the scheme is unbiased, or its error is within the constant that it states,
or both; equal generators give equal bits; tensors of every awkward kind (empty, one element, zeros, equal values,
strided, float64 and half precision, a length that is no multiple of anything) are compressed; NaN and infinity are
refused; finite values up to the dtype's largest give finite ones or are refused; a linear scheme's messages can be
added, those of a divisible one divided; the input is never changed.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import (
    COMPRESSORS,
    ORQ,
    AbstractCompressor,
    BinGrad,
    CountSketch,
    Lattice,
    Payload,
    SignSGD,
    compressor,
)
from lightning_decentral.errors import CompressionError, ConfigurationError, DecodingError
from lightning_decentral.gradient_compression.groups import cuts

REQUIRED = {"threshold": {"threshold": 0.5}, "lattice": {"step": 0.01}}
CASES = [
    *(compressor(name, **REQUIRED.get(name, {})) for name in COMPRESSORS),
    compressor("cast", dtype="float16"),
    compressor("int8", bucket=None),
    compressor("int8", bucket=100, stochastic=True),
    compressor("scaled_sign", bucket=64),
    compressor("onebit", bucket=None),
    compressor("qsgd", levels=127, bucket=None),
    compressor("qsgd", levels=127, bucket=64),
    compressor("qsgd", levels=1, bucket=64, norm="max"),
    compressor("terngrad", clip=None),
    compressor("terngrad", bucket=100),
    compressor("nuqsgd", levels=2, bucket=100),
    compressor("bingrad", variant="b"),
    compressor("bingrad", variant="b", bucket=None),
    compressor("bingrad", bucket=100),
    compressor("orq", levels=3, bucket=100),
    compressor("orq", levels=9, refine=True),
    compressor("fp8", format="e5m2", bucket=None),
    compressor("fp4", bucket=None),
    compressor("chunk_topk", keep=3, chunk=17),
    compressor("topk", ratio=1.0),
    compressor("randomk", ratio=0.2, scaled=True),
    compressor("random_block", ratio=0.3, scaled=True),
    compressor("powersgd", rank=1),
    compressor("lattice", step=0.5, levels=4, dither=True),
    compressor("countsketch", rows=1, ratio=0.5),
    compressor("countsketch", keep=0.01),
    compressor("dct_topk", side=8, top=5),
]
NAMES = [repr(case) for case in CASES]
each = pytest.mark.parametrize("scheme", CASES, ids=NAMES)
SLOW = (ORQ, BinGrad, CountSketch)  # of which few draws are enough: none of them is far from normal
SIZES = (1, 2, 7, 64, 100, 513, 2048, 5000)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vector(n: int, kind: str = "gauss", seed: int = 1) -> Tensor:
    draw = torch.randn(n, generator=generator(seed))
    return {
        "gauss": draw,
        "heavy": draw / torch.randn(n, generator=generator(seed + 1)).abs().clamp(min=0.05),
        "skewed": draw.exp() - 1,
        "sparse": draw * (torch.arange(n) % 50 == 0),
        "shifted": draw + 30,
    }[kind]


def restored(scheme: AbstractCompressor, payload: Payload, near: Tensor) -> Tensor:
    """The result; for what is decoded against a reference, next to the vector itself."""
    return scheme.decompress_near(payload, near) if isinstance(scheme, Lattice) else scheme.decompress(payload)


def same(one: Payload, other: Payload) -> bool:
    return one.seed == other.seed and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one.tensors, other.tensors, strict=True)
    )


@each
def test_the_message_has_the_announced_bits(scheme: AbstractCompressor) -> None:
    for n in SIZES:
        check_bits(scheme, n)


def check_bits(scheme: AbstractCompressor, n: int) -> None:
    payload = scheme.compress(vector(n), generator())
    sent = 8 * sum(tensor.numel() * tensor.element_size() for tensor in payload.tensors)
    assert payload.num_bits == sent
    if scheme.traits.fixed_size:
        assert sent == scheme.num_bits(n)
        shapes = tuple((tensor.dtype, tensor.numel()) for tensor in payload.tensors)
        assert shapes == scheme.fields((n,), torch.float32)
    else:
        assert sent <= scheme.num_bits(n)
    assert all(tensor.dim() == 1 and tensor.is_contiguous() for tensor in payload.tensors)
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in payload.tensors}
    assert sum(memory.values()) <= sent // 8 + 64 * len(payload.tensors)


@each
def test_one_buffer_of_bytes_is_the_message(scheme: AbstractCompressor) -> None:
    x = vector(5001)
    payload = scheme.compress(x, generator())
    buffer = payload.to_buffer()
    assert buffer.dtype == torch.uint8
    assert 8 * buffer.numel() == payload.num_bits
    arrived = scheme.from_buffer(buffer.clone(), payload.shape, payload.dtype, payload.seed)
    assert same(arrived, payload)
    assert torch.equal(restored(scheme, arrived, x), restored(scheme, payload, x))
    with pytest.raises(CompressionError, match="needs"):
        scheme.from_buffer(buffer[1:], payload.shape, payload.dtype, payload.seed)


@each
def test_shape_and_dtype_survive(scheme: AbstractCompressor) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        check_dtype(scheme, dtype)


def check_dtype(scheme: AbstractCompressor, dtype: torch.dtype) -> None:
    x = vector(600).view(20, 30).to(dtype)
    payload = scheme.compress(x, generator())
    assert payload.num_bits <= scheme.num_bits((20, 30), dtype)
    result = restored(scheme, payload, x)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    out = torch.full_like(x, torch.nan)
    if not isinstance(scheme, Lattice):
        assert scheme.decompress(payload, out) is out
        assert torch.equal(out, result)
    with pytest.raises(CompressionError, match="contiguous"):
        scheme.decompress(payload, torch.empty(600, dtype=torch.complex64))


@each
def test_strided_input_is_what_its_copy_is_and_nothing_is_changed(scheme: AbstractCompressor) -> None:
    wide = vector(2 * 37 * 50).view(37, 100)
    strided, before = wide[:, ::2], wide.clone()
    assert same(scheme.compress(strided, generator()), scheme.compress(strided.contiguous(), generator()))
    assert same(scheme.compress(wide.t(), generator()), scheme.compress(wide.t().contiguous(), generator()))
    assert torch.equal(wide, before)


@each
def test_the_message_is_not_a_view_of_the_vector(scheme: AbstractCompressor) -> None:
    x = vector(700)
    payload = scheme.compress(x, generator())
    near = x.clone()
    before = restored(scheme, payload, near)
    x.zero_()
    assert torch.equal(restored(scheme, payload, near), before)


@each
def test_empty_and_scalar(scheme: AbstractCompressor) -> None:
    empty = scheme.compress(torch.empty(0, 3), generator())
    assert empty.num_bits == scheme.num_bits((0, 3)) == 0
    assert scheme.decompress(empty).shape == (0, 3)
    assert scheme.from_buffer(empty.to_buffer(), (0, 3), torch.float32).num_bits == 0
    scalar = scheme.compress(torch.tensor(0.75), generator())
    assert scheme.decompress(scalar).shape == ()


@each
def test_of_a_vector_without_values_the_message_has_the_size(scheme: AbstractCompressor) -> None:
    """On torch's meta device, where the planner runs what training runs."""
    for n in (1, 7, 5001):
        for dtype in (torch.float32, torch.float16):
            x = torch.empty(n, dtype=dtype, device="meta")
            payload = scheme.compress(x)
            assert payload.num_bits == scheme.num_bits(n, dtype)
            assert [tensor.dtype for tensor in payload.tensors] == [field for field, _ in scheme.fields((n,), dtype)]
            out = scheme.decompress(payload)
            assert (out.shape, out.dtype, out.device.type) == (x.shape, dtype, "meta")


@each
def test_zeros(scheme: AbstractCompressor) -> None:
    results = [scheme.decompress(scheme.compress(torch.zeros(n), generator())) for n in SIZES]
    result = torch.cat(results)
    if isinstance(scheme, SignSGD) or (isinstance(scheme, Lattice) and scheme.dither):
        assert bool(result.isfinite().all())  # a sign has no zero, nor has a shifted lattice
    else:
        assert result.abs().max() == 0


@each
def test_equal_values_and_extreme_scales_are_finite(scheme: AbstractCompressor) -> None:
    if isinstance(scheme, Lattice):
        pytest.skip("its step has the vector's units: see test_lattice")
    for value in (1.0, -3.5, 1e-30, 1e30):
        for x in (torch.full((777,), value), value * vector(777)):
            result = scheme.decompress(scheme.compress(x, generator()))
            assert bool(result.isfinite().all()), value


def of_size(kind: str, n: int, largest: float) -> Tensor:
    """Finite values in float64 of magnitude ``largest`` at most, which is reached."""
    draw = vector(n).double()
    signs = torch.where(draw < 0, -1.0, 1.0).double()
    return {
        "equal": torch.full_like(draw, largest),
        "equal and negative": torch.full_like(draw, -largest),
        "signs": signs * largest,
        "gauss": draw * (largest / draw.abs().max()) if n else draw,
        "one": torch.where(torch.arange(n) == n // 2, largest, 1e-3 * draw),
        "two": torch.where(torch.arange(n) < 2, signs * largest, draw),
        "halves": torch.where(draw < 0, -largest, 0.9 * largest),
    }[kind]


KINDS = ("equal", "equal and negative", "signs", "gauss", "one", "two", "halves")
SHAPES = [*product(KINDS, [700]), ("equal", 1), ("two", 9)]  # of one value all kinds are alike


@each
def test_what_comes_of_finite_values_is_finite_or_they_are_refused(scheme: AbstractCompressor) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check_finite(scheme, dtype)


def check_finite(scheme: AbstractCompressor, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    may_refuse = scheme._may_overflow or scheme._shows_what_is_not_finite or isinstance(scheme, Lattice)
    in_units = isinstance(scheme, Lattice) or getattr(scheme, "scaled", False)  # a factor, or a step
    for (kind, n), share in product(SHAPES, (1.0, 0.45, 1e-3)):
        x = of_size(kind, n, share * limit).to(dtype)
        words = ""
        try:
            result = restored(scheme, scheme.compress(x, generator()), x)
        except (CompressionError, DecodingError) as refusal:
            words = str(refusal)
        if words:
            assert type(scheme).__name__ in words
            assert may_refuse
            assert share > 1e-3 or in_units
            continue
        assert bool(result.isfinite().all()), (kind, n, share, dtype)
        if scheme.traits.randomness == "none" and scheme.error_bound(n) < 1 and share < 1:
            missed = float((result.double() - x.double()).square().sum())
            rounding = 4 * torch.finfo(dtype).eps ** 2
            assert missed <= (scheme.error_bound(n) + rounding) * float(x.double().square().sum()) * 1.0001


@each
def test_tiny_values_stay_finite_and_small(scheme: AbstractCompressor) -> None:
    if isinstance(scheme, Lattice | SignSGD):
        pytest.skip("has no scale")
    for (kind, n), size in product(SHAPES, (1e-45, 1e-42, 1e-39, 1e-37)):
        x = of_size(kind, n, size).float()
        x = torch.where(x.abs() > size, 0.0, x)  # nothing beside them
        result = scheme.decompress(scheme.compress(x, generator()))
        assert bool((result.abs() <= 1e3 * size + 1e-37).all()), (kind, n, size)  # not finite would not be, either


@pytest.mark.parametrize("scheme", [compressor("qsgd"), compressor("qsgd", norm="max"), compressor("nuqsgd")], ids=repr)
@pytest.mark.parametrize("largest", [3.4e38, 1e38])
def test_values_whose_norm_is_beyond_float32_are_rounded_without_bias(
    scheme: AbstractCompressor, largest: float
) -> None:
    x = of_size("gauss", 64, largest).float()
    generators, draws = generator(3), 500
    samples = torch.stack([scheme.decompress(scheme.compress(x, generators)) for _ in range(draws)]).double() / largest
    chance = 5 * samples.std(0) / draws**0.5 + 12 * 0.5 / draws  # as below; no level is more than a half away
    assert bool(((samples.mean(0) - x.double() / largest).abs() <= chance).all())


@each
def test_not_a_number_is_refused(scheme: AbstractCompressor) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = vector(5000)
        x[4321] = bad
        with pytest.raises(CompressionError, match="among 5000") as raised:
            scheme.compress(x, generator())
        assert type(scheme).__name__ in str(raised.value)


@each
def test_other_dtypes_are_refused(scheme: AbstractCompressor) -> None:
    for dtype in (torch.int64, torch.complex64, torch.bool):
        with pytest.raises(CompressionError, match="floating-point"):
            scheme.compress(torch.zeros(4, dtype=dtype), generator())


@each
def test_equal_generators_give_equal_bits(scheme: AbstractCompressor) -> None:
    x = vector(4000, "heavy")
    one, other = (scheme.compress(x, generator(7)) for _ in range(2))
    assert same(one, other)
    assert torch.equal(restored(scheme, one, x), restored(scheme, other, x))
    if scheme.traits.randomness == "none":
        assert same(one, scheme.compress(x))
    else:
        assert not torch.equal(restored(scheme, one, x), restored(scheme, scheme.compress(x, generator(8)), x))
        with pytest.raises(CompressionError, match="generator"):
            scheme.compress(x)


@each
def test_the_global_generator_is_left_alone(scheme: AbstractCompressor) -> None:
    state = torch.get_rng_state()
    x = vector(300)
    restored(scheme, scheme.compress(x, generator()), x)
    assert torch.equal(torch.get_rng_state(), state)


@each
def test_the_error_is_within_the_stated_constant(scheme: AbstractCompressor) -> None:
    for n in (1, 7, 600):
        if scheme.error_bound(n) == torch.inf:
            pytest.skip("states none")
        for kind in ("gauss", "heavy", "skewed", "sparse", "shifted") if n > 7 else ("gauss", "shifted"):
            check_error(scheme, kind, n)


def check_error(scheme: AbstractCompressor, kind: str, n: int) -> None:
    """In expectation for what is random: the mean of some draws, and five standard errors of it for chance."""
    bound = scheme.error_bound(n)
    assert bound >= 0
    x = vector(n, kind)
    draws = 1 if scheme.traits.randomness == "none" else 16 if isinstance(scheme, SLOW) else 40
    generators = generator(3)
    errors = torch.stack([
        (restored(scheme, scheme.compress(x, generators), x) - x).double().square().sum() for _ in range(draws)
    ])  # fmt: skip
    chance = 5 * float(errors.std()) / draws**0.5 if draws > 1 else 0.0
    rounding = 1e-12 * float(x.double().square().sum())  # (2^-24)^2 per float32 operation, some of them
    assert float(errors.mean()) <= bound * float(x.double().square().sum()) * (1 + 1e-6) + chance + rounding


@pytest.mark.parametrize("scheme", [case for case in CASES if case.traits.unbiased], ids=repr)
@pytest.mark.parametrize("kind", ["heavy", "sparse", "shifted"])
def test_unbiased_over_seeds(scheme: AbstractCompressor, kind: str) -> None:
    """The mean of many draws: of every coordinate, and of three sums of all. Of 150 normal z the largest is over 5 once
    in 10^4 runs; the seeds are fixed. 3e-6 is for float32."""
    x, draws = vector(150, kind).double(), 150
    if kind == "sparse":  # of few values even the sum is not normal
        draws = 400 if isinstance(scheme, SLOW) else 800
    generators = generator(11)
    if scheme.traits.randomness == "none":
        draws = 1
    samples = torch.stack([
        restored(scheme, scheme.compress(x.float(), generators), x).double() for _ in range(draws)
    ])  # fmt: skip
    error = samples - x
    spread, jump = samples.std(0, correction=0), float((samples.amax(0) - samples.amin(0)).max())
    # A value that is rarely rounded up is far from normal: twelve hits more or fewer are allowed for.
    tolerance = 5 * spread / draws**0.5 + 12 * jump / draws + 3e-6 * float(x.abs().max())
    assert bool((error.mean(0).abs() <= tolerance).all())
    for direction in (x, x.sign(), torch.ones_like(x)):  # what all coordinates have in common shows in their sum
        along = error @ direction
        chance = 5 * float(along.std(correction=0)) / draws**0.5
        assert abs(float(along.mean())) <= chance + 3e-6 * float(direction.abs() @ x.abs())


@pytest.mark.parametrize("scheme", [case for case in CASES if case.traits.linear], ids=repr)
def test_messages_of_linear_schemes_can_be_added(scheme: AbstractCompressor) -> None:
    """The mean of the tensors is the message of the mean; half precision rounds every message and the mean."""
    xs = [vector(3000, seed=seed) for seed in (1, 2, 3, 4)]
    payloads = [scheme.compress(x, generator(5)) for x in xs]
    assert len({payload.seed for payload in payloads}) == 1
    columns = zip(*(payload.tensors for payload in payloads), strict=True)
    reduced = payloads[0].replace([torch.stack(column).float().mean(0).to(column[0].dtype) for column in columns])
    mean = scheme.decompress(scheme.compress(torch.stack(xs).mean(0), generator(5)))
    unit = torch.finfo(payloads[0].tensors[0].dtype).eps
    torch.testing.assert_close(scheme.decompress(reduced), mean, rtol=4 * unit, atol=32 * unit)


@each
def test_it_is_a_frozen_value_with_a_readable_name(scheme: AbstractCompressor) -> None:
    assert dataclasses.is_dataclass(scheme)
    assert scheme == dataclasses.replace(scheme)
    assert hash(scheme) == hash(dataclasses.replace(scheme))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.anything = 1  # type: ignore[attr-defined]


def test_names() -> None:
    assert compressor("Scaled-Sign", bucket=8) == compressor("scaled_sign", bucket=8)
    with pytest.raises(ConfigurationError, match=r"need one of identity, cast, .* Did you mean 'int8'\?"):
        compressor("int88")
    with pytest.raises(ConfigurationError, match=r"'rounding'.*bucket=512, stochastic=False"):
        compressor("int8", rounding=3)
    with pytest.raises(ConfigurationError, match="it has none"):
        compressor("identity", ratio=0.5)
    with pytest.raises(ConfigurationError, match="bucket=0"):
        compressor("int8", bucket=0)


@pytest.mark.parametrize("scheme", [case for case in CASES if not isinstance(case, Lattice)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_message_leaves_out_is_the_vector_less_what_it_stands_for(
    scheme: AbstractCompressor, dtype: torch.dtype
) -> None:
    for n in (0, *SIZES):  # workers own parts of a gradient, and of a small one some own nothing
        x = vector(n).to(dtype)
        x[::5] = torch.tensor([0.0, -0.0], dtype=dtype).repeat(n)[: len(x[::5])]
        payload = scheme.compress(x, generator())
        expected = x - scheme.decompress(payload)
        given, scratch = x.clone(), torch.full_like(x, 7.0)
        assert scheme.subtract_(payload, given, scratch) is given
        assert torch.equal(given, expected), f"of {n} elements"
        assert torch.equal(scheme.subtract_(payload, x.clone()), expected), f"of {n} elements"


DIVISIBLE = [case for case in CASES if case.traits.divisible]


@pytest.mark.parametrize("scheme", DIVISIBLE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_message_is_divided_into_those_of_parts(scheme: AbstractCompressor, dtype: torch.dtype) -> None:
    for n, workers in product(SIZES, (1, 3, 8)):  # of which some own nothing of a small vector
        check_division(scheme, vector(n).to(dtype), cuts(n, workers, scheme.traits.unit))


def check_division(scheme: AbstractCompressor, x: Tensor, borders: list[int]) -> None:
    whole = scheme.compress(x, generator())
    parts = scheme.split(whole, [stop - start for start, stop in pairwise(borders)])
    for part, (start, stop) in zip(parts, pairwise(borders), strict=True):
        assert part.num_bits == scheme.num_bits(stop - start, x.dtype)
        arrived = scheme.from_buffer(part.to_buffer(), part.shape, x.dtype)
        assert torch.equal(scheme.decompress(arrived), scheme.decompress(whole)[start:stop])
        if scheme.traits.randomness == "none":
            assert same(part, scheme.compress(x[start:stop]))


def test_schemes_that_can_be_divided() -> None:
    kinds = {type(case).__name__ for case in DIVISIBLE}
    assert kinds == {"Identity", "Cast", "Int8", "FP8", "QSGD"}
    assert not compressor("int8", bucket=None).traits.divisible  # one range for all
    assert not compressor("qsgd", levels=7).traits.divisible  # two values in a byte, which belong to two parts
