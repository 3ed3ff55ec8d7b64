"""Proved here, with the CPU as the oracle: what is compressed on a CUDA device stays there, and a message made on
either device stands for the same vector on the other; schemes that draw nothing make as large an error as on the CPU,
and the others one of the same size; long vectors cross the device's tiles; random numbers come from the device's
generator. The same checks run between two CPU tensors, so that they are tested without a GPU too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_decentral.compression import COMPRESSORS, AbstractCompressor, Lattice, Payload, compressor
from lightning_decentral.errors import CompressionError, DecodingError

REQUIRED = {"threshold": {"threshold": 0.5}, "lattice": {"step": 0.01}}
CASES = [
    *(compressor(name, **REQUIRED.get(name, {})) for name in COMPRESSORS),
    compressor("int8", stochastic=True),
    compressor("bingrad", variant="b"),
    compressor("orq", levels=9, refine=True),
    compressor("topk", ratio=1.0),
    compressor("lattice", step=0.5, levels=4, dither=True),
]
SHAPE = (301, 499)  # more than a CPU's tile, and no multiple of anything
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
devices = pytest.mark.parametrize("device", DEVICES)
each = pytest.mark.parametrize("scheme", CASES, ids=repr)


def gauss(shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> Tensor:
    """The same values on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def decoded(scheme: AbstractCompressor, payload: Payload, near: Tensor) -> Tensor:
    return scheme.decompress_near(payload, near) if isinstance(scheme, Lattice) else scheme.decompress(payload)


def moved(payload: Payload, device: str) -> Payload:
    return payload.replace([tensor.to(device) for tensor in payload.tensors])


@devices
@each
def test_a_message_stands_for_the_same_vector_on_both_devices(scheme: AbstractCompressor, device: str) -> None:
    x = gauss(SHAPE, device)
    payload = scheme.compress(x, generator(device))
    result = decoded(scheme, payload, x)
    assert {tensor.device.type for tensor in (*payload.tensors, result)} == {device}
    assert payload.num_bits <= scheme.num_bits(SHAPE)
    # A few float32 operations on values up to 5, in another order on another device.
    torch.testing.assert_close(decoded(scheme, moved(payload, "cpu"), x.cpu()), result.cpu(), rtol=1e-5, atol=1e-5)


@devices
@each
def test_the_error_is_that_of_the_cpu(scheme: AbstractCompressor, device: str) -> None:
    def error(where: str) -> float:
        x = gauss(SHAPE, where)
        return float((decoded(scheme, scheme.compress(x, generator(where)), x) - x).double().square().sum())

    # Without random numbers but for ties and the last digit; with other numbers 150,000 values differ by some per cent.
    drawn = scheme.traits.randomness != "none"
    assert error(device) == pytest.approx(error("cpu"), rel=0.1 if drawn else 1e-3, abs=1e-6)


@devices
@pytest.mark.parametrize("name", ["int8", "scaled_sign", "bingrad", "orq", "topk", "terngrad", "lattice"])
def test_long_vectors_cross_the_tiles_of_the_device(name: str, device: str) -> None:
    scheme = compressor(name, **REQUIRED.get(name, {}))
    n = 300_001 if device == "cpu" else (1 << 24) + 5001
    x = gauss((n,), device)
    result = decoded(scheme, scheme.compress(x, generator(device)), x)
    tail = slice(n - 5001, n)  # as good an approximation where the last tile is
    parts = [float((result[part] - x[part]).square().mean()) for part in (tail, slice(0, n))]
    assert parts[0] == pytest.approx(parts[1], rel=0.2, abs=1e-6)


@devices
def test_it_refuses_on_the_device_too(device: str) -> None:
    x = gauss((1000,), device)
    x[7] = torch.nan
    with pytest.raises(CompressionError, match="1 NaN and 0 infinite values among 1000"):
        compressor("int8").compress(x)
    lattice, x = Lattice(0.01, 16), gauss((100_000,), device)
    away = x.clone()
    away[54_321] += 0.2
    with pytest.raises(DecodingError):
        lattice.decompress_near(lattice.compress(x), away)
    with pytest.raises(DecodingError):
        lattice.steps_between(lattice.compress(x), lattice.compress(away), away)


@devices
@pytest.mark.parametrize("levels", [2, 16, 256])
def test_a_difference_is_that_of_the_decoded_vectors(device: str, levels: int) -> None:
    lattice, theirs = Lattice(0.5, levels), gauss((100_000,), device)
    mine = theirs + lattice.reach * 0.99 * gauss((100_000,), device).flip(0).clamp(-1, 1)
    message, own = lattice.compress(theirs), lattice.compress(mine)
    expected = lattice.decompress_near(message, mine) - lattice.decompress_near(own, mine)
    result = lattice.add_steps_(torch.zeros_like(mine), [(lattice.steps_between(message, own, mine), 1.0)])
    assert torch.equal(result, expected)  # multiples of 0.5
