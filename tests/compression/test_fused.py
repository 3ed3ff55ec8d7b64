"""Proved here: with kernels compiled for the CPU every scheme that has some gives the bits of its eager path, both
ways, whatever the size, also from several threads at once; the environment variable is read and checked; a kernel that
cannot be compiled warns and runs as it is."""

from __future__ import annotations

import shutil
import threading
import warnings

import pytest
import torch
from torch import Tensor

from lightning_decentral.callbacks import GradientCompression
from lightning_decentral.compression import QSGD, AbstractCompressor, Int8, ScaledSign, SignSGD, TernGrad
from lightning_decentral.compression.fused import VARIABLE, Kernel, is_fused
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.strategies import GossipStrategy

SCHEMES = [
    *(Int8(), Int8(stochastic=True), Int8(bucket=None)),
    *(ScaledSign(), SignSGD(), QSGD(), QSGD(levels=120), TernGrad()),
]
SIZES = [1, 8, 511, 512, 4096, 300_000, 300_001]  # one bucket, full ones, a rest; more than a tile; full planes or not


def both(scheme: AbstractCompressor, x: Tensor) -> tuple[Tensor, ...]:
    """The tensors of the message, and the vector that it stands for."""
    payload = scheme.compress(x, torch.Generator().manual_seed(1))
    return (*payload.tensors, scheme.decompress(payload))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_the_bits_are_those_of_the_eager_path(scheme: AbstractCompressor, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in SIZES]
    vectors += [torch.zeros(1000), torch.full((1000,), -1e37), torch.full((2000,), 1e-30)]
    vectors += [vectors[-4][:n].sign() * 1.6e38 for n in (4095, 4096)]
    vectors += [torch.tensor([-0.0, 0.0, 1.0] * n) for n in (9, 8)]
    monkeypatch.setenv(VARIABLE, "0")
    expected = [both(scheme, x) for x in vectors]
    monkeypatch.setenv(VARIABLE, "1")
    found: list[list[tuple[Tensor, ...]]] = [[], [], []]

    def work(results: list[tuple[Tensor, ...]]) -> None:
        results += [both(scheme, x) for x in vectors]

    threads = [threading.Thread(target=work, args=(results,)) for results in found]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not [one for one in caught if VARIABLE in str(one.message)]  # nothing fell back
    for results in found:
        for x, want, got in zip(vectors, expected, results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True)), x.numel()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("scheme", [Int8(), ScaledSign()], ids=repr)
def test_what_is_too_large_is_refused_as_by_the_eager_path(
    scheme: AbstractCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("0", "1"):
        monkeypatch.setenv(VARIABLE, mode)
        with pytest.raises(CompressionError, match="up to 3e\\+38, needs smaller ones"):
            scheme.compress(torch.tensor([3e38, -3e38] * 512))


def test_the_environment_says_whether_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not is_fused()
    for mode, on in (("0", False), ("1", True)):
        monkeypatch.setenv(VARIABLE, mode)
        assert is_fused() is on
    monkeypatch.setenv(VARIABLE, "yes")
    for refusing in (is_fused, GradientCompression, GossipStrategy, lambda: Int8().compress(torch.ones(3))):
        with pytest.raises(ConfigurationError, match=f"Got {VARIABLE}='yes' in the environment, needs '0' or '1'"):
            refusing()


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    def double(x: Tensor, out: Tensor) -> None:
        torch._dynamo.graph_break()  # refused where one kernel is asked for
        out.copy_(2 * x)

    kernel = Kernel(double)
    out = torch.zeros(3)
    with pytest.warns(UserWarning, match="torch.compile failed for compression"):
        kernel(torch.ones(3), out)
    assert out.tolist() == [2.0, 2.0, 2.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        kernel(torch.ones(3), out)
