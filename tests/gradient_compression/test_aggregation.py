"""Proved here, with forked workers on gloo and arithmetic: every way of aggregation gives all workers the same bits;
two phases without compression are the mean to rounding, and with it what a stacked version of the two compressions
gives; what was sent and both memories, the workers' and the owners', are all gradients, through DDP's new buckets, a
checkpoint and another number of workers; whole numbers on a shared scale are unbiased; bytes are as claimed; NaN stops
everybody; the way is chosen by bytes, and impossible ones are refused."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DistributedDataParallel imports it: here once, and not in every forked worker
import torch.distributed as dist
from helpers.workers import kept_workers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_decentral.callbacks import GradientCompression
from lightning_decentral.compression import (
    DGC,
    ORQ,
    QSGD,
    Identity,
    Int8,
    ScaledSign,
    SignSGD,
    TernGrad,
    Threshold,
    TopK,
)
from lightning_decentral.compression.packing import packed_bytes
from lightning_decentral.errors import CompressionError, ConfigurationError, PeerLost
from lightning_decentral.gradient_compression import collectives, groups
from lightning_decentral.gradient_compression.groups import cuts, pieces_of
from lightning_decentral.gradient_compression.hook import GradientExchange
from lightning_decentral.gradient_compression.scheme import Scheme, scheme_of
from lightning_decentral.gradient_compression.sizes import bytes_sent, chosen, sends_more

SIZES = {"a": 2001, "small": 17, "b": 900}  # the small one is not compressed
STEPS = 4


def gradient(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


class Fixed(nn.Module):
    """Whose gradient is given."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum(((p * gradients[name]).sum() for name, p in self.named_parameters()), torch.zeros(()))


def worker(rank: int, workers: int, folder: Path, scheme: Scheme, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=workers)
    model = Fixed()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=options.get("bucket_cap_mb", 25))
    parameters = dict(model.named_parameters())
    exchange = GradientExchange(parameters, {"a": scheme, "b": scheme}, main_address=options.get("main_address"))
    if "state" in options:
        exchange.load_state(options["state"])
    exchange.register(wrapped)
    result: dict[str, Any] = {"means": [], "error": ""}
    rates = dict.fromkeys(parameters, 1.0)
    first = options.get("first", 0)
    for step in range(first, options.get("last", STEPS)):
        gradients = gradient(rank, step)
        if (rank, step) == options.get("lost"):
            os._exit(1)
        if (rank, step) == options.get("nan"):
            gradients["a"][5] = torch.nan
        model.zero_grad()
        exchange.begin(rates)
        wrapped(gradients).backward()
        try:
            exchange.finish()
        except PeerLost as error:
            torch.save({"error": str(error), "ranks": error.ranks}, folder / f"{rank}.pt")
            os._exit(0)
        except CompressionError as error:
            result["error"] = str(error)
            break
        result["means"].append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
    result["sent"] = (exchange.traffic.bytes_sent, exchange.traffic.messages)
    result["state"] = exchange.state(options.get("every_worker", True))
    torch.save(result, folder / f"{rank}.pt")
    exchange.close()
    # Were it the last owner of the default group, that would be destroyed with the interpreter's lock held, for which
    # gloo's thread waits that still has to release the tensors of the last all-reduce: one run in 200 hung.
    del wrapped
    dist.destroy_process_group()


PIECES = (
    (groups, "_SMALLEST_PIECE"),
    (groups, "_MOST_PIECES"),
    (collectives, "_RING_BYTES"),
    (collectives, "_NEAR_SECONDS"),
)


def with_pieces(rank: int, sizes: dict[tuple[str, str], float], *arguments: Any) -> None:
    """As a kept worker: what a fixture has changed here counts there."""
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in sizes.items():
            patch.setattr(sys.modules[module], name, value)
        worker(rank, *arguments)


def run(folder: Path, workers: int, scheme: Scheme, **options: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    sizes = {(module, name): getattr(module, name) for module, name in PIECES}
    named = {(module.__name__, name): value for (module, name), value in sizes.items()}
    kept_workers(workers).run(with_pieces, named, workers, folder, scheme, options, seconds=60.0)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(workers)]
    for other in results[1:]:
        for mine, theirs in zip(results[0]["means"], other["means"], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in SIZES)
    return results


def mean(workers: int, step: int, name: str) -> Tensor:
    return torch.stack([gradient(rank, step)[name] for rank in range(workers)]).mean(0)


@pytest.fixture(params=[(1, True), (3, False), (3, True)], ids=["one piece, ring", "pieces", "pieces, ring"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into how many pieces a vector goes at most, and how means are spread; workers get it, too. Vectors and messages
    here are short."""
    most, ring = request.param
    monkeypatch.setattr(groups, "_SMALLEST_PIECE", 100)
    monkeypatch.setattr(groups, "_MOST_PIECES", most)
    monkeypatch.setattr(collectives, "_RING_BYTES", 0)
    monkeypatch.setattr(collectives, "_NEAR_SECONDS", math.inf if ring else 0.0)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("workers", [2, 3])
def test_two_phases_without_loss_are_the_mean(workers: int, tmp_path: Path) -> None:
    results = run(tmp_path / "run", workers, Scheme(TopK(1.0), feedback=False, aggregation="two_phase"))
    for step, means in enumerate(results[0]["means"]):
        for name in SIZES:
            # The order of float32 sums of values up to 4.
            torch.testing.assert_close(means[name], mean(workers, step, name), atol=1e-6, rtol=0)


def stacked(vectors: list[list[Tensor]], scheme: Scheme) -> list[Tensor]:
    """Two compressions with their memories, of stacked vectors [step][worker], in exact order of the parts."""
    workers, size = len(vectors[0]), vectors[0][0].numel()
    cut = pieces_of(scheme.compressor, size, workers, torch.float32)
    memories = torch.zeros(workers + 1, size)  # the last one is the owners'
    means = []
    for step in vectors:
        out = torch.empty(size)
        for low, high in chain.from_iterable(map(pairwise, cut)):
            part, total = slice(low, high), torch.zeros(high - low)
            for rank, vector in enumerate(step):
                wanted = vector[part] + memories[rank, part]
                sent = scheme.compressor.decompress(scheme.compressor.compress(wanted))
                memories[rank, part] = (wanted - sent) * scheme.feedback
                total += sent
            wanted = total / workers + memories[workers, part]
            out[part] = scheme.compressor.decompress(scheme.compressor.compress(wanted))
            memories[workers, part] = (wanted - out[part]) * scheme.feedback
        means.append(out)
    return means


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("compressor", [Int8(bucket=64), ScaledSign(), TopK(0.1), ScaledSign(bucket=100)])
def test_two_phases_are_the_stacked_reference(compressor: Any, tmp_path: Path) -> None:
    """In the first step, where there is one bucket, with the parameters in one order or the other. What follows is in
    the sums of the next test: memories would have to be followed through DDP's new order."""
    scheme = Scheme(compressor, feedback=True, aggregation="two_phase")
    results = run(tmp_path / "run", 3, scheme, last=1)
    got = results[0]["means"][0]
    for order in (("a", "b"), ("b", "a")):
        vectors = [[torch.cat([gradient(rank, 0)[name] for name in order]) for rank in range(3)]]
        want = dict(zip(order, stacked(vectors, scheme)[0].split([SIZES[name] for name in order]), strict=True))
        if all(torch.allclose(got[name], want[name], atol=1e-5) for name in order):
            return
    pytest.fail("neither order of the parameters gives the mean")


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(
    ("workers", "bucket_cap_mb", "compressor"),  # one bucket, and one for each parameter; each two of them together
    [
        *((2, 25, Int8(bucket=64)), (3, 1e-3, Int8(bucket=64)), (2, 1e-3, ScaledSign()), (3, 25, ScaledSign())),
        *((2, 25, TopK(0.1)), (3, 1e-3, TopK(0.1))),
    ],
)
def test_sent_and_both_memories_are_all_gradients(
    compressor: Any, bucket_cap_mb: float, workers: int, tmp_path: Path
) -> None:
    scheme = Scheme(compressor, feedback=True, aggregation="two_phase")
    results = run(tmp_path / "run", workers, scheme, bucket_cap_mb=bucket_cap_mb)
    state = results[0]["state"]
    assert sum(float(owned.norm()) for owned in state["owners"].values()) > 0
    for name in ("a", "b"):
        left = sum(memories[name] for memories in state["workers"]) / workers + state["owners"][name]
        got = sum(means[name] for means in results[0]["means"]) + left
        # Four steps of values up to about 10 in float32.
        torch.testing.assert_close(got, sum(mean(workers, t, name) for t in range(STEPS)), atol=1e-5, rtol=0)
    for step, means in enumerate(results[0]["means"]):  # goes along in the same messages
        torch.testing.assert_close(means["small"], mean(workers, step, "small"), atol=1e-6, rtol=0)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("workers", [2, 3])
def test_memories_resume_with_as_many_workers_and_with_others(workers: int, tmp_path: Path) -> None:
    scheme = Scheme(TopK(0.1), feedback=True, aggregation="two_phase")
    begun = run(tmp_path / "begun", 2, scheme, last=3)
    for every_worker in (True, False):
        folder = tmp_path / f"rest{every_worker}"
        state = run(tmp_path / f"again{every_worker}", 2, scheme, last=3, every_worker=every_worker)[0]["state"]
        assert len(state["workers"]) == (2 if every_worker else 1)
        rest = run(folder, workers, scheme, first=3, last=5, state=state)
        after = rest[0]["state"]
        for name in ("a", "b"):
            got = sum(means[name] for results in (begun, rest) for means in results[0]["means"])
            left = sum(memories[name] for memories in after["workers"]) / workers + after["owners"][name]
            want = sum(mean(2, t, name) for t in range(3)) + sum(mean(workers, t, name) for t in (3, 4))
            torch.testing.assert_close(got + left, want, atol=1e-5, rtol=0)  # as above


@pytest.mark.usefixtures("pieces")
def test_a_checkpoint_is_what_was_saved(tmp_path: Path) -> None:
    """Bit for bit, of workers and owners, before and after the first step of the new run has taken it over."""
    scheme = Scheme(TopK(0.1), feedback=True, aggregation="two_phase")
    saved = run(tmp_path / "first", 2, scheme, last=3)[0]["state"]
    again = run(tmp_path / "again", 2, scheme, first=3, last=3, state=saved)[0]["state"]
    third = run(tmp_path / "third", 2, scheme, first=3, last=5, state=saved, nan=(0, 3))[0]["state"]
    for other in (again, third):  # no step at all, and one that is refused
        for name in ("a", "b"):
            assert torch.equal(other["owners"][name], saved["owners"][name])
            for mine, theirs in zip(other["workers"], saved["workers"], strict=True):
                assert torch.equal(mine[name], theirs[name])


def test_whole_numbers_on_a_shared_scale_are_unbiased(tmp_path: Path) -> None:
    """The mean over independent draws: each standard error is at most the step over twice the root of their number."""
    grid, workers, draws = QSGD(levels=3, bucket=100, norm="max"), 3, 400
    vectors = [gradient(rank, 0)["b"] for rank in range(workers)]
    scale = torch.stack([grid.scales(vector) for vector in vectors]).amax(0)
    generator = torch.Generator().manual_seed(5)
    total, out = torch.zeros(900, dtype=torch.float64), torch.empty(900)
    for _ in range(draws):
        packed = sum(
            (grid.encode_shared(vector, scale, workers, generator) for vector in vectors),
            torch.zeros(packed_bytes(900, 19), dtype=torch.uint8),
        )
        grid.decode_sum(packed, scale, workers, out)
        total += out
    step = float(scale.max()) / 3
    tolerance = 5 * step / 2 / (draws * workers) ** 0.5  # five standard errors
    torch.testing.assert_close(total / draws, torch.stack(vectors).mean(0).double(), atol=tolerance, rtol=0)
    results = run(tmp_path / "run", 3, Scheme(grid, feedback=False, aggregation="all_reduce"))
    for name in ("a", "b"):  # one draw: off by less than a step on each worker
        worst = (results[0]["means"][0][name] - mean(3, 0, name)).abs().max()
        assert 0 < float(worst) < 5 / 3


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(Int8(), True, "two_phase"),
        Scheme(ScaledSign(), True, "two_phase"),
        Scheme(Int8(), True, "all_gather"),
        Scheme(TernGrad(), False, "all_reduce"),
    ],
)
def test_bytes_are_as_claimed(scheme: Scheme, tmp_path: Path) -> None:
    """Of one bucket with one compressed vector, beside the 17 values that are not compressed."""
    workers = 3
    results = run(tmp_path / "run", workers, scheme)
    sent = sum(result["sent"][0] for result in results) / workers / STEPS
    claimed = bytes_sent(scheme, chosen(scheme, 2901, workers), 2901, workers) + 2 * 2 / 3 * 4 * 17
    # Parts begin at multiples of 8 bytes, whole bytes in an all-reduce.
    assert abs(sent - claimed) <= 2 * 2 * 8
    payload = scheme.compressor.num_bits(2901) / 8
    if scheme.aggregation == "two_phase":
        # Status and borders: up to 16 bytes for each part and phase; a scale for each part.
        assert abs(sent - 2 * 2 / 3 * (payload + 4 * 17)) <= 2 * 2 * (8 + 16 + 16)


def test_bytes_of_a_large_vector_are_those_of_the_messages() -> None:
    for name in ("int8", "scaled_sign", "topk", "natural"):
        scheme, elements = scheme_of(name), 10_000_000
        payload = scheme.compressor.num_bits(elements) / 8
        for workers in (2, 8, 64):
            sent = bytes_sent(scheme, "two_phase", elements, workers)
            assert sent == pytest.approx(2 * (workers - 1) / workers * payload, rel=0.01)


@pytest.mark.parametrize(
    "scheme",
    [Scheme(Int8(), True, "two_phase"), Scheme(TernGrad(), False, "all_reduce"), Scheme(Int8(), False, "two_phase")],
)
def test_nan_stops_all_workers_and_memories_rest(scheme: Scheme, tmp_path: Path) -> None:
    results = run(tmp_path / "run", 2, scheme, nan=(1, 2))
    before = run(tmp_path / "before", 2, scheme, last=2)
    for result in results:
        assert "worker 1: a)" in result["error"]
        assert len(result["means"]) == 2
    for name, owned in before[0]["state"]["owners"].items():
        assert torch.equal(results[0]["state"]["owners"][name], owned)
        assert torch.equal(results[0]["state"]["workers"][1][name], before[0]["state"]["workers"][1][name])


@pytest.mark.parametrize(
    ("scheme", "workers", "way"),
    [
        (scheme_of("int8"), 2, "all_gather"),
        (scheme_of("int8"), 3, "two_phase"),
        (scheme_of("scaled_sign"), 64, "two_phase"),
        (scheme_of("natural"), 8, "two_phase"),  # unbiased, with a small error
        (scheme_of("terngrad"), 4, "all_gather"),  # its error is too large for a second time
        (scheme_of("terngrad"), 6, "all_reduce"),
        (scheme_of("terngrad"), 8, "all_gather"),
        (scheme_of("terngrad"), 127, "all_reduce"),
        (scheme_of("terngrad"), 128, "all_gather"),  # the sum does not fit into a byte
        (scheme_of("cast"), 8, "all_reduce"),
        (Scheme(Threshold(0.1), True), 8, "all_gather"),
        (Scheme(SignSGD(), False), 8, "all_gather"),
    ],
)
def test_the_way_is_the_one_with_the_fewest_bytes(scheme: Scheme, workers: int, way: str) -> None:
    assert chosen(scheme, 8_000_000, workers) == way


@pytest.mark.parametrize(
    ("name", "workers", "times"),
    # 9 bits of 32 at all n; five levels, three to a byte and five float32 for each of 2048, to all of 8 workers
    [("natural", 2, 0.28125), ("natural", 8, 0.28125), ("orq", 8, 8 / 2 * (8 / 3 + 5 * 32 / 2048) / 32)],
)
def test_how_much_is_sent(name: str, workers: int, times: float) -> None:
    assert sends_more(scheme_of(name), 8_000_000, workers) == pytest.approx(times, rel=1e-3)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [None, 20.0])
def test_momentum_correction_is_the_stacked_reference(nesterov: bool, clip: float | None, tmp_path: Path) -> None:
    """u <- m u + g; v <- v + u; 0 where they were sent. What is not compressed gets the momentum of the mean."""
    dgc = DGC(ratio=0.1, warm_up=(), momentum=0.9, nesterov=nesterov, clip=clip)
    results = run(tmp_path / "run", 2, Scheme(dgc, feedback=True, aggregation="all_gather"))
    velocities = [{name: torch.zeros(size) for name, size in SIZES.items()} for _ in range(2)]
    residuals = torch.zeros(2, 2901)
    for step, means in enumerate(results[0]["means"]):
        sent, small = [], []
        for rank, velocity in enumerate(velocities):
            pushed = {}
            for name, g in gradient(rank, step).items():
                if clip is not None:
                    g = g * min(1.0, clip / 2**0.5 / float(g.norm()))
                velocity[name] = 0.9 * velocity[name] + g
                pushed[name] = g + 0.9 * velocity[name] if nesterov else velocity[name]
            small.append(pushed["small"])
            residuals[rank] += torch.cat([pushed["a"], pushed["b"]])
            largest = residuals[rank].abs().topk(290).indices
            sent.append(torch.zeros(2901).index_copy(0, largest, residuals[rank][largest]))
            residuals[rank][largest] = 0.0
            both = torch.cat([velocity["a"], velocity["b"]])
            both[largest] = 0.0
            velocity["a"], velocity["b"] = both.split([2001, 900])
        got = torch.cat([means["a"], means["b"]])
        torch.testing.assert_close(got, (sent[0] + sent[1]) / 2, atol=1e-5, rtol=0)  # float32 in another order
        torch.testing.assert_close(means["small"], (small[0] + small[1]) / 2, atol=1e-5, rtol=0)


def test_a_lost_worker_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    scheme = Scheme(Int8(), feedback=True, aggregation="two_phase")
    options = {"lost": (1, 2), "main_address": "127.0.0.1"}
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=worker, args=(r, 2, folder, scheme, options)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    told = torch.load(folder / "0.pt", weights_only=False)
    assert told["ranks"] == (1,)
    assert "Lost worker 1 on " in told["error"]


def test_pieces_are_by_the_bytes_of_their_messages() -> None:
    def ends(compressor: Any, elements: int) -> list[int]:
        found = pieces_of(compressor, elements, 8, torch.float32)
        assert all(len(borders) == 9 for borders in found)
        assert all(one[-1] == other[0] for one, other in pairwise(found))
        return [borders[-1] for borders in found]

    assert len(ends(Int8(), 1_250_000)) == 1  # 5 MB in float32
    assert len(ends(Int8(), 6_000_000)) == 2
    assert len(ends(Int8(), 100_000_000)) == 3
    assert len(ends(ScaledSign(), 10_000_000)) == 1  # 1.25 MB
    for last in ends(Int8(), 6_000_001)[:-1]:
        assert last % 512 == 0


def test_parts_end_between_units() -> None:
    assert cuts(10, 4, 1) == [0, 2, 5, 7, 10]
    assert cuts(1000, 3, 512) == [0, 0, 512, 1000]
    assert cuts(0, 2, 8) == [0, 0, 0]
    for elements, workers, unit in ((5000, 7, 512), (100, 8, 64), (1, 3, 1)):
        borders = cuts(elements, workers, unit)
        assert (len(borders), borders[0], borders[-1]) == (workers + 1, 0, elements)
        assert all(border % unit == 0 for border in borders[:-1])
        assert borders == sorted(borders)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientCompression("int8", aggregation="three_phase"), "Got aggregation='three_phase'"),  # type: ignore[arg-type]
        (lambda: GradientCompression("int8", aggregation="all_reduce"), "its messages cannot be added"),
        (lambda: GradientCompression("cast", aggregation="two_phase"), "its messages are added on their way"),
        (lambda: GradientCompression(Threshold(0.1), aggregation="two_phase"), "size of its messages is not known"),
        (lambda: chosen(Scheme(QSGD(127), False, "all_reduce"), 100, 2), "need 2 x levels x workers below 256"),
    ],
)
def test_impossible_ways_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_sum_must_fit_into_a_byte() -> None:
    with pytest.raises(CompressionError, match="needs at most 127"):
        TernGrad().encode_shared(torch.zeros(3), torch.zeros(1), 128, torch.Generator())
    assert isinstance(ORQ(), type(scheme_of("orq").compressor))
    assert not scheme_of("orq").feedback
    assert Scheme(Identity(), False).aggregation == "auto"
