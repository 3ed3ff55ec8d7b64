"""Proved here, with forked workers on gloo: without compression training has DDP's bits; all workers always have equal
weights; the mean, the bytes and the memories are what a few lines of arithmetic say; PyTorch's own hook gives the same
in half precision, and PowerSGD of full rank the mean; memories survive DDP's new buckets, a checkpoint and another
number of workers; a bucket is exchanged while the backward pass goes on; accumulation, clipping and a loss scaler work
as without; NaN stops all workers with the parameter's
name and leaves memories alone; what cannot work is refused."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from strategies.fits import Recorder, Regression, fit_kept, gossip, make_trainer, saved, trajectories
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from lightning_decentral import PipelineStrategy
from lightning_decentral.callbacks import Communication, GradientCompression
from lightning_decentral.callbacks.gradient_compression import _require_ddp
from lightning_decentral.compression import COMPRESSORS, ErrorFeedback, PowerSGD, TopK, compressor
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.gradient_compression.scheme import Scheme
from lightning_decentral.gradient_compression.sizes import sends_more

pytestmark = pytest.mark.usefixtures("kept_forks")

SIZES = (20, 5, 5, 1)  # of the parameters of `Regression`
REQUIRED: dict[str, dict[str, Any]] = {
    "powersgd": {"rank": 1},
    "dgc": {"momentum": 0.0},  # the optimizer has it
    "threshold": {"threshold": 0.1},
    "topk": {"ratio": 0.2},
    "dct_topk": {"side": 4, "top": 2},
}


def ddp(bucket_cap_mb: float = 25) -> DDPStrategy:
    return DDPStrategy(start_method="fork", process_group_backend="gloo", bucket_cap_mb=bucket_cap_mb)


class Kept(Recorder):
    """Also the gradients that the optimizer gets, and at the end what the callback remembers."""

    def __init__(self, folder: Path, callback: GradientCompression | None = None) -> None:
        super().__init__(folder)
        self.callback = callback

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad.detach().reshape(-1).clone() for p in pl_module.parameters() if p.grad is not None]
        self.kept.setdefault("gradients", []).append(torch.cat(gradients))

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.callback is not None:
            traffic, checkpoint = self.callback.traffic, dict[str, Any]()
            self.kept["sent"] = (traffic.bytes_sent, traffic.messages)
            self.callback.on_save_checkpoint(trainer, pl_module, checkpoint)
            self.kept["memory"] = next(iter(checkpoint.values()), None)


def fit(
    folder: Path,
    callback: GradientCompression | None,
    workers: int = 2,
    module: LightningModule | None = None,
    strategy: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    callbacks = [*options.pop("callbacks", []), *([callback] if callback else []), Kept(folder, callback)]
    options = {"max_steps": 6, "callbacks": callbacks, "max_epochs": 10, **options}
    trainer = make_trainer(folder, strategy or ddp(), workers, **options)
    trainer.fit(module or Regression(size=16 * workers), ckpt_path=ckpt_path)
    return saved(folder, workers)


def fit_with_kept(
    folder: Path,
    callback: GradientCompression,
    workers: int,
    module: LightningModule,
    bucket_cap_mb: float = 25,
    steps: int = 6,
) -> list[dict[str, Any]]:
    """The same with workers that are kept."""
    strategy = DDPStrategy(process_group_backend="gloo", bucket_cap_mb=bucket_cap_mb)
    options: dict[str, Any] = {"max_steps": steps, "max_epochs": 10, "callbacks": [callback, Kept(folder, callback)]}
    fit_kept(folder, strategy, workers, module, **options)
    return saved(folder, workers)


def compression(name: str, **options: Any) -> GradientCompression:
    """Of all parameters, however small."""
    return GradientCompression(compressor(name, **REQUIRED.get(name, {})), **{"min_elements": 0, **options})


def as_vector(memory: dict[str, Tensor]) -> Tensor:
    return torch.cat([memory[name] for name, _ in Regression().named_parameters()])


@pytest.mark.parametrize("workers", [2, 4])
def test_identity_is_plain_ddp_bit_for_bit(workers: int, tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", None, workers)
    hooked = fit(tmp_path / "hooked", compression("identity"), workers)
    for one, other in zip(plain, hooked, strict=True):
        assert torch.equal(torch.stack(one["weights"]), torch.stack(other["weights"]))


@pytest.mark.parametrize("name", sorted(set(COMPRESSORS) - {"lattice", "identity"}))
def test_workers_stay_equal_and_train(name: str, tmp_path: Path) -> None:
    # With a bucket for each layer, so that DDP's new buckets after the first step differ from the first ones.
    kept = fit_with_kept(tmp_path, compression(name, every_n_steps=2), 2, Regression(), bucket_cap_mb=1e-4)
    one, other = (torch.stack(each["weights"]) for each in kept)
    assert torch.equal(one, other)
    assert bool(one.isfinite().all())
    assert not torch.equal(one[0], one[-1])


class Fixed(Regression):
    """Whose gradient does not depend on the weights: that of worker k in step t is known beforehand."""

    def __init__(self, rates: tuple[float, ...] = (0.1,), spoil: dict[tuple[int, int], float] | None = None) -> None:
        super().__init__(momentum=0.0)
        self.rates, self.spoil = rates, spoil or {}
        self.seen = 0

    def vector(self, rank: int, step: int) -> Tensor:
        return torch.randn(31, generator=torch.Generator().manual_seed(100 * rank + step), dtype=torch.float64)

    def training_step(self, batch: Any) -> Tensor:
        values = self.vector(self.global_rank, self.seen)
        if (self.global_rank, self.seen) in self.spoil:
            values[20] = self.spoil[self.global_rank, self.seen]  # network.0.bias
        self.seen += 1
        return sum((p * v.view(p.shape)).sum() for p, v in zip(self.parameters(), values.split(SIZES), strict=True))  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.rates[min(step, len(self.rates) - 1)]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Large(Fixed):
    """Whose gradients are near the largest that float32 has, so that their sum over the workers is beyond it."""

    def __init__(self, magnitude: float = 1.5e38) -> None:
        super().__init__()
        self.magnitude = magnitude

    def vector(self, rank: int, step: int) -> Tensor:
        return super().vector(0, 0).sign() * self.magnitude

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-38)


@pytest.mark.parametrize(
    ("name", "aggregation"),
    [
        *(("int8", way) for way in ("all_gather", "two_phase")),
        *(("scaled_sign", way) for way in ("all_gather", "two_phase")),
        *(("terngrad", way) for way in ("all_gather", "two_phase", "all_reduce")),
        *(("cast", "all_reduce"), ("cast", "all_gather"), ("topk", "two_phase"), ("identity", "all_reduce")),
    ],
)
def test_the_mean_of_large_gradients_is_their_mean(name: str, aggregation: Any, tmp_path: Path) -> None:
    module = Large()
    kept = fit_with_kept(tmp_path, compression(name, aggregation=aggregation), 3, module, steps=2)
    exact = 4e-3 if name == "cast" else 0.0  # bfloat16
    for each in kept:
        gradient = each["gradients"][0].double()
        share = 0.15 if name == "topk" else 1.0  # a fifth of each part
        wanted = module.vector(0, 0).double()
        near = ((gradient - wanted).abs() <= (exact + 1e-5) * 1.5e38).double().mean()
        assert float(near) >= share
        assert bool(each["weights"][-1].isfinite().all())


def test_a_gradient_that_is_too_large_to_be_compressed_is_named(tmp_path: Path) -> None:
    words = r"worker 1: network.0.weight \(finite, but up to 3e\+38, too large to be compressed"
    with pytest.raises(Exception, match=words):
        fit(tmp_path, compression("int8"), 2, Large(3e38))


@pytest.mark.parametrize("name", ["topk", "scaled_sign", "random_block", "powersgd"])
def test_sent_and_remembered_are_all_gradients_times_their_rates(name: str, tmp_path: Path) -> None:
    """The telescoping sum through a learning rate that changes and is 0 for a step, and through new buckets."""
    rates = (0.05, 0.1, 0.0, 0.02, 0.04)
    callback = GradientCompression(PowerSGD(1) if name == "powersgd" else name, min_elements=0)
    module = Fixed(rates)
    start = torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])
    kept = fit(tmp_path, callback, 2, module, ddp(bucket_cap_mb=1e-4), max_steps=5)
    state = kept[0]["memory"]
    moved = start - kept[0]["weights"][-1]
    wanted = sum(rate * (module.vector(0, t) + module.vector(1, t)) / 2 for t, rate in enumerate(rates))
    names = [name for name, _ in module.named_parameters()]
    left = [
        state["rates"][n] * sum(worker[n] for worker in state["workers"]) / 2 if n in state["rates"] else torch.zeros(s)
        for n, s in zip(names, SIZES, strict=True)
    ]
    assert sum(float(piece.norm()) for piece in left) > 0
    # The compressors of these that compute in float32 do so with values up to about 5.
    torch.testing.assert_close(moved + torch.cat(left), wanted, atol=1e-6, rtol=0)


def test_a_learning_rate_for_each_group_of_parameters(tmp_path: Path) -> None:
    """The same with biases whose rate has its own schedule, in which it is 0 for a step."""
    weights, biases = (0.05, 0.1, 0.1, 0.02), (0.2, 0.0, 0.1, 0.4)

    class Groups(Fixed):
        def configure_optimizers(self) -> Any:
            named = list(self.named_parameters())
            groups = [
                {"params": [p for name, p in named if name.endswith(kind)], "lr": 1.0} for kind in ("weight", "bias")
            ]
            optimizer = torch.optim.SGD(groups, lr=1.0)
            schedules = [lambda step: weights[min(step, 3)], lambda step: biases[min(step, 3)]]
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Groups()
    start = torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])
    kept = fit(tmp_path, compression("topk"), 2, module, max_steps=4)
    state, moved = kept[0]["memory"], start - kept[0]["weights"][-1]
    rates = {name: weights if name.endswith("weight") else biases for name, _ in module.named_parameters()}
    means = [(module.vector(0, t) + module.vector(1, t)) / 2 for t in range(4)]
    wanted = torch.cat([
        sum((rate[t] * means[t].split(SIZES)[i] for t in range(4)), torch.zeros(size))
        for i, (rate, size) in enumerate(zip(rates.values(), SIZES, strict=True))
    ])  # fmt: skip
    left = torch.cat(
        [state["rates"][name] * (state["workers"][0][name] + state["workers"][1][name]) / 2 for name in rates]
    )
    assert len(set(state["rates"].values())) == 2
    assert bool(left[20:25].any())
    torch.testing.assert_close(moved + left, wanted, atol=1e-12, rtol=0)


def test_sparse_gradients_are_refused(tmp_path: Path) -> None:
    class Words(Regression):
        def __init__(self) -> None:
            super().__init__(nn.Embedding(8, 4, sparse=True).double(), momentum=0.0)

        def training_step(self, batch: Any) -> Tensor:
            return self.network(torch.tensor([1, 2])).square().mean()

    with pytest.raises(Exception, match=r"a layer with sparse gradients \(network\), needs dense ones"):
        fit(tmp_path, compression("int8"), 2, Words())


def test_the_mean_is_that_of_the_messages(tmp_path: Path) -> None:
    """Unbiased and without memory: each worker's message, decoded, and the mean of them; threshold's sizes differ."""
    for name in ("threshold", "natural"):
        callback = compression(name, error_feedback=False)
        kept = fit(tmp_path / name, callback, 2, Fixed(), max_steps=2)
        gradients = kept[0]["gradients"]
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept[1]["gradients"], strict=True))
        if name == "threshold":
            scheme = compressor(name, threshold=0.1)
            for step, gradient in enumerate(gradients):
                own = [scheme.decompress(scheme.compress(Fixed().vector(rank, step))) for rank in range(2)]
                torch.testing.assert_close(gradient, (own[0] + own[1]) / 2, atol=1e-15, rtol=0)


def test_half_precision_is_pytorchs_hook(tmp_path: Path) -> None:
    class Theirs(Recorder):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.strategy.model.register_comm_hook(None, fp16_compress_hook)  # type: ignore[union-attr, operator]

    def module() -> Regression:
        torch.manual_seed(3)
        return Regression(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))

    theirs = fit(tmp_path / "theirs", None, 2, module(), callbacks=[Theirs(tmp_path, "theirs")])
    ours = fit(
        tmp_path / "ours",
        GradientCompression("cast", dtype="float16", error_feedback=False, min_elements=0),
        2,
        module(),
    )
    assert torch.equal(torch.stack(theirs[0]["weights"]), torch.stack(ours[0]["weights"]))


def test_powersgd_of_full_rank_is_the_mean(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", None, 2, Square())
    ours = fit(tmp_path / "ours", GradientCompression(PowerSGD(3), min_elements=0), 2, Square())
    sent = ours[0]["sent"][0]
    assert sent == 6 * 4 * 3 * (8 + 8)  # bytes of two float32 factors of rank 3, once around two workers
    # The batch of 4 samples and 1 output: gradients of rank at most 4, of which the smallest are rounding.
    torch.testing.assert_close(ours[0]["weights"][-1], plain[0]["weights"][-1], atol=1e-4, rtol=0)


def test_powersgd_is_pytorchs_hook(tmp_path: Path) -> None:
    """From the same first factor. PyTorch's memories hold the difference to the mean, ours the worker's own: the means
    agree, so the updates do."""
    seed = PowerSGDState(None, matrix_approximation_rank=2, random_seed=0).rng.randint(1_000_000_000)
    first = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))

    class Theirs(Recorder):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            state = PowerSGDState(
                None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1, random_seed=0
            )
            trainer.strategy.model.register_comm_hook(state, powerSGD_hook)  # type: ignore[union-attr, operator]

    theirs = fit(tmp_path / "theirs", None, 2, Matrix(), callbacks=[Theirs(tmp_path, "theirs")])
    callback = GradientCompression(PowerSGD(2), min_elements=0, warm_up_steps=2)
    module = Matrix()
    empty = {"world_size": 2, "step": 0, "bytes_sent": 0, "rates": {}, "workers": [{}, {}]}
    checkpoint = {"lightning_decentral_gradient_compression": {**empty, "rights": {"network.weight": first}}}
    callback.on_load_checkpoint(Trainer(logger=False, barebones=True), module, checkpoint)
    ours = fit(tmp_path / "ours", callback, 2, module)
    means = [(Matrix.gradient(0, t) + Matrix.gradient(1, t)).view(-1) / 2 for t in range(6)]
    assert torch.allclose(theirs[0]["gradients"][1], means[1])
    assert not torch.allclose(theirs[0]["gradients"][5], means[5], atol=0.1)
    for step in range(6):
        # float32 with two different ways to orthogonalize; values are of size 1.
        torch.testing.assert_close(ours[0]["gradients"][step], theirs[0]["gradients"][step], atol=1e-4, rtol=0)


class Matrix(Regression):
    """One matrix with a random gradient of full rank on every worker and in every step."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8, bias=False), momentum=0.0)
        self.seen = 0

    @staticmethod
    def gradient(rank: int, step: int) -> Tensor:
        return torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * rank + step))

    def training_step(self, batch: Any) -> Tensor:
        self.seen += 1
        return (next(self.parameters()) * self.gradient(self.global_rank, self.seen - 1)).sum()


class Square(Regression):
    """A linear map with a gradient of rank 1 on each of two workers."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        super().__init__(nn.Linear(8, 8, bias=False), momentum=0.0)

    def training_step(self, batch: Any) -> Tensor:
        inputs = batch[0].repeat(1, 2)[:1]
        return self.network(inputs).square().mean()


@pytest.mark.parametrize(("name", "workers"), [("int8", 2), ("scaled_sign", 2), ("cast", 3), ("random_block", 2)])
def test_bytes_are_those_of_the_messages(name: str, workers: int, tmp_path: Path) -> None:
    scheme = compressor(name)
    logger = CSVLogger(tmp_path, name="", version="log")
    callback = GradientCompression(scheme, min_elements=0, every_n_steps=2)
    kept = fit(
        tmp_path, callback, workers, logger=logger, log_every_n_steps=1, callbacks=[Communication(every_n_steps=2)]
    )
    handed = scheme.num_bits(31, torch.float64) // 8
    if scheme.traits.linear:
        each = 2 * (workers - 1) * handed // workers
    else:
        handed += 1  # whether the gradient was finite
        each = (workers - 1) * handed
    assert kept[0]["sent"] == (6 * each, 6)
    with open(tmp_path / "log" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    bits = [float(row["compression/bits_per_coordinate"]) for row in rows if row["compression/bits_per_coordinate"]]
    assert bits
    assert bits == pytest.approx([8 * handed / 31] * len(bits))
    for column in ("relative_error", "residual_norm", "compress_seconds", "communicate_seconds", "decompress_seconds"):
        values = [float(row[f"compression/{column}"]) for row in rows if row[f"compression/{column}"]]
        assert values
        assert all(value > 0 for value in values), column
        assert column != "relative_error" or all(value < 1 for value in values)
    megabytes = [float(row["communication/megabytes"]) for row in rows if row["communication/megabytes"]]
    assert megabytes[-1] == pytest.approx(6 * each / 1e6)


def test_messages_that_can_be_added_are_gathered_if_asked(tmp_path: Path) -> None:
    kept = fit(tmp_path, compression("cast", aggregation="all_gather"), 2)
    handed = compressor("cast").num_bits(31, torch.float64) // 8 + 1  # and whether the gradient was finite
    assert kept[0]["sent"] == (6 * handed, 6)
    assert torch.equal(kept[0]["weights"][-1], kept[1]["weights"][-1])


class WaitsForTheLastLayer(Regression):
    """Computes no gradient of the first layer before that of the last one has been exchanged."""

    def __init__(self, callback: GradientCompression) -> None:
        super().__init__(size=32)
        self.callback, self.before, self.seen = callback, 0, list[bool]()
        self.network[0].register_full_backward_pre_hook(self._wait)

    def on_before_backward(self, loss: Tensor) -> None:
        self.before = self.callback.traffic.messages

    def _wait(self, layer: nn.Module, gradients: Any) -> None:
        end = time.monotonic() + (60.0 if self.global_step else 0.0)  # in DDP's first step there is one bucket
        while self.callback.traffic.messages == self.before and time.monotonic() < end:
            time.sleep(1e-3)
        self.seen.append(self.callback.traffic.messages > self.before)


class Overlaps(Kept):
    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, WaitsForTheLastLayer)
        self.kept["seen"] = pl_module.seen


@pytest.mark.parametrize("name", ["int8", "topk", "powersgd"])
def test_a_bucket_is_exchanged_during_the_backward_pass(name: str, tmp_path: Path) -> None:
    callback = compression(name, error_feedback=True)
    callbacks = [callback, Overlaps(tmp_path)]
    trainer = make_trainer(tmp_path, ddp(bucket_cap_mb=4e-5), 2, max_steps=3, callbacks=callbacks)
    trainer.fit(WaitsForTheLastLayer(callback))
    for worker in saved(tmp_path, 2):
        assert worker["seen"] == [False, True, True]


class OnTheBar(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert {"compression/bits_per_coordinate", "compression/relative_error"} <= set(trainer.progress_bar_metrics)


def test_bits_and_error_are_in_the_progress_bar(tmp_path: Path) -> None:
    callbacks = [compression("int8", every_n_steps=1), OnTheBar()]
    make_trainer(tmp_path, ddp(), 2, max_steps=2, callbacks=callbacks).fit(Regression(size=32))


def test_small_parameters_rules_and_warm_up(tmp_path: Path) -> None:
    callback = GradientCompression("scaled_sign", rules={"network.2.*": "int8", "*.bias": "identity"}, min_elements=10)
    schemes = callback.schemes(Regression())
    assert {name: scheme.compressor for name, scheme in schemes.items()} == {
        "network.0.weight": compressor("scaled_sign"),
        "network.2.weight": compressor("int8"),  # the first rule that matches, whatever the size
        "network.2.bias": compressor("int8"),
    }
    assert list(GradientCompression("int8", min_elements=6).schemes(Regression())) == ["network.0.weight"]
    assert not GradientCompression("int8").schemes(Regression())  # 1024 elements and more
    kept = fit(tmp_path / "rules", callback, 2, Fixed(), max_steps=2)
    for step, gradient in enumerate(kept[0]["gradients"]):
        mean = (Fixed().vector(0, step) + Fixed().vector(1, step)) / 2
        assert torch.equal(gradient[20:25], mean[20:25])
        assert not torch.equal(gradient[:20], mean[:20])
    kept = fit(tmp_path / "warm", GradientCompression("topk", min_elements=0, warm_up_steps=2), 2, Fixed(), max_steps=3)
    same = [
        torch.equal(gradient, (Fixed().vector(0, step) + Fixed().vector(1, step)) / 2)
        for step, gradient in enumerate(kept[0]["gradients"])
    ]
    assert same == [True, True, False]


def test_dgc_warms_up_by_epochs(tmp_path: Path) -> None:
    """Everything in the first epoch of four steps, then one value of each worker."""
    callback = GradientCompression("dgc", ratio=0.02, warm_up=(1.0,), min_elements=0)
    kept = fit(tmp_path, callback, 2, Fixed(), max_steps=6)
    counts = [int(gradient.count_nonzero()) for gradient in kept[0]["gradients"]]
    assert counts[:4] == [31] * 4
    assert set(counts[4:]) <= {1, 2}


def test_momentum_is_applied_once(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"DGC with its own momentum and SGD with momentum, which would apply it twice"):
        fit(tmp_path, GradientCompression("dgc", min_elements=0), 2)
    with pytest.raises(ConfigurationError, match="2 settings of momentum"):
        GradientCompression("dgc", rules={"*.bias": compressor("dgc", momentum=0.5)})
    with pytest.raises(ConfigurationError, match="needs the memory of what was not sent"):
        GradientCompression("dgc", error_feedback=False)


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    """One exchange per optimizer step, of the accumulated gradient; the mean is clipped and not what is sent."""
    callback = GradientCompression(TopK(0.2), min_elements=0)
    kept = fit(
        tmp_path,
        callback,
        2,
        Fixed(),
        max_steps=2,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )
    assert kept[0]["sent"][1] == 2
    assert kept[0]["memory"]["step"] == 2
    memories = [ErrorFeedback(TopK(0.2), torch.zeros(31).double()) for _ in range(2)]
    for step in range(2):
        sent = []
        for rank, memory in enumerate(memories):
            gradient = (Fixed().vector(rank, 2 * step) + Fixed().vector(rank, 2 * step + 1)) / 2
            # DDP flattens the parameters from the last to the first; the largest values are the same ones.
            sent.append(memory.compress(gradient)[1])
            memory.commit()
        mean = (sent[0] + sent[1]) / 2
        assert mean.norm() > 0.5
        # Seen before clipping: Lightning calls the callback first.
        torch.testing.assert_close(kept[0]["gradients"][step], mean, atol=1e-14, rtol=0)
    remembered = as_vector(kept[0]["memory"]["workers"][1])
    torch.testing.assert_close(remembered, memories[1].memory, atol=1e-14, rtol=0)
    moved = kept[0]["weights"][-1] - kept[0]["weights"][1]
    assert float(moved.norm()) == pytest.approx(0.1 * 0.5, rel=1e-4)  # rate times the clipped norm


def test_a_loss_scaler_skips_the_step_and_memories_rest(tmp_path: Path) -> None:
    """An infinity on worker 1 in step 2: neither weights nor memories change, and the sum telescopes all the same."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    rates = (0.1,)
    module = Fixed(rates, spoil={(1, 2): torch.inf})
    start = torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])
    callback = GradientCompression(TopK(0.2), min_elements=0)
    kept = fit(tmp_path, callback, 2, module, max_steps=5, plugins=[precision])
    weights = kept[0]["weights"]
    assert torch.equal(weights[2], weights[1])
    assert torch.equal(torch.stack(weights), torch.stack(kept[1]["weights"]))
    state = kept[0]["memory"]
    steps = [t for t in range(5) if t != 2]
    wanted = sum(0.1 * (Fixed().vector(0, t) + Fixed().vector(1, t)) / 2 for t in steps)
    unit = next(iter(state["rates"].values()))
    assert set(state["rates"].values()) == {unit}
    assert unit != 0.1 / 1024  # the scale did change
    left = unit * (as_vector(state["workers"][0]) + as_vector(state["workers"][1])) / 2
    torch.testing.assert_close(start - weights[-1] + left, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", ["topk", "powersgd", "int8"])
def test_half_precision(name: str, precision: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = Regression(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    kept = fit(tmp_path, compression(name), 2, module, precision=precision)
    assert torch.equal(torch.stack(kept[0]["weights"]), torch.stack(kept[1]["weights"]))
    assert not torch.equal(kept[0]["weights"][0], kept[0]["weights"][-1])
    memories = kept[0]["memory"]["workers"][1]
    assert {memory.dtype for memory in memories.values()} == {torch.float32}
    assert any(bool(memory.any()) for memory in memories.values())


class Adversaries(Regression):
    """Two optimizers, stepped by hand, each for parameters that the other's loss does not use; and frozen ones."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 3).double()
        self.frozen = nn.Linear(4, 2).double().requires_grad_(False)

    def training_step(self, batch: Any) -> Tensor:
        first, second = self.optimizers()
        for optimizer, loss in ((first, self.loss(batch)), (second, self.other(batch[0]).square().mean())):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.network, self.other)]


def test_several_optimizers_by_hand(tmp_path: Path) -> None:
    """Each backward pass is an exchange; parameters that it does not use keep what DDP leaves them."""
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", find_unused_parameters=True)
    plain = fit(tmp_path / "plain", None, 2, Adversaries(), strategy, max_steps=8)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", find_unused_parameters=True)
    kept = fit(tmp_path / "int8", compression("int8"), 2, Adversaries(), strategy, max_steps=8)
    assert torch.equal(torch.stack(kept[0]["weights"]), torch.stack(kept[1]["weights"]))
    # Four steps of size 0.1 with gradients of about 1, whose values are off by at most 1/254 of the largest.
    torch.testing.assert_close(kept[0]["weights"][-1], plain[0]["weights"][-1], atol=4 * 0.1 / 254 * 3, rtol=0)
    assert not torch.equal(kept[0]["weights"][-1], plain[0]["weights"][-1])
    assert kept[0]["memory"]["step"] == 8


@pytest.mark.parametrize("name", ["topk", "cast", "powersgd", "identity"])
def test_nan_stops_all_workers_with_the_parameters_name(name: str, tmp_path: Path) -> None:
    class Watched(GradientCompression):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            try:
                super().on_after_backward(trainer, pl_module)
            except CompressionError as error:
                checkpoint: dict[str, Any] = {}
                self.on_save_checkpoint(trainer, pl_module, checkpoint)
                kept = {"error": str(error), "memory": next(iter(checkpoint.values()), None)}
                torch.save(kept, tmp_path / f"caught-{trainer.global_rank}.pt")
                trainer.strategy.barrier()  # the first worker that ends has the others killed
                raise

    callback = Watched(compressor(name, **REQUIRED.get(name, {})), min_elements=0)
    module = Fixed(spoil={(1, 2): torch.nan})
    with pytest.raises(Exception, match=r"NaN or infinity in a gradient \(.*worker 1: network.0.bias"):
        fit(tmp_path, callback, 2, module)
    caught = saved(tmp_path, 2, "caught")[0]  # worker 0, whose own gradient is finite
    assert "need finite gradients" in caught["error"]
    if name == "topk":
        memories = [ErrorFeedback(TopK(0.2), torch.zeros(31).double()) for _ in range(2)]
        for step in range(2):
            for rank, memory in enumerate(memories):
                memory.compress(module.vector(rank, step))
                memory.commit()
        torch.testing.assert_close(as_vector(caught["memory"]["workers"][0]), memories[0].memory, atol=1e-14, rtol=0)


class Resumable(Fixed):
    def training_step(self, batch: Any) -> Tensor:
        self.seen = self.global_step
        return super().training_step(batch)


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_a_resumed_run_is_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """With gradients that follow from the step, whatever Lightning's loader does after a resume."""

    whole = fit(tmp_path / "whole", compression(name), 2, Resumable(), max_steps=8)
    first = tmp_path / "first"
    fit(first, compression(name), 2, Resumable(), max_steps=4, enable_checkpointing=True)
    path = next(first.rglob("*.ckpt"))
    rest = fit(tmp_path / "rest", compression(name), 2, Resumable(), max_steps=8, ckpt_path=path)
    assert torch.equal(torch.stack(rest[1]["weights"]), torch.stack(whole[1]["weights"][4:]))
    if name == "topk":  # another number of workers: the sum is kept
        state = torch.load(path, weights_only=False)["lightning_decentral_gradient_compression"]
        before = sum(as_vector(worker) for worker in state["workers"]) / 2
        third = fit(
            tmp_path / "third",
            compression(name, warm_up_steps=100),  # memories rest, so that they can be looked at
            3,
            Resumable(),
            max_steps=5,
            ckpt_path=path,
        )
        after = sum(as_vector(worker) for worker in third[0]["memory"]["workers"]) / 3
        torch.testing.assert_close(after, before, atol=1e-15, rtol=0)


def test_the_mean_alone_can_be_saved(tmp_path: Path) -> None:
    each = fit(tmp_path / "each", compression("topk"), 2)[0]["memory"]
    mean = fit(tmp_path / "mean", compression("topk", checkpoint="mean"), 2)[0]["memory"]
    assert len(mean["workers"]) == 1
    expected = (as_vector(each["workers"][0]) + as_vector(each["workers"][1])) / 2
    torch.testing.assert_close(as_vector(mean["workers"][0]), expected, atol=1e-16, rtol=0)


def test_trajectories_with_int8_are_those_of_ddp_nearly(tmp_path: Path) -> None:
    fit(tmp_path / "plain", None, 2, max_steps=16)
    fit(tmp_path / "int8", compression("int8"), 2, max_steps=16)
    plain, ours = (trajectories(tmp_path / name, 2) for name in ("plain", "int8"))
    # Of values of about 1, with a rounding error of 1/254 of the largest that error feedback makes up for.
    assert 0 < float((plain - ours).abs().max()) < 5e-3


def test_error_feedback_is_on_where_it_helps() -> None:
    def feedback(name: str, **options: Any) -> bool:
        chosen = compression(name, **options).schemes(Regression())
        return next(iter(chosen.values())).feedback

    for name in ("topk", "scaled_sign", "onebit", "int8", "cast", "powersgd", "threshold", "bingrad"):
        assert feedback(name), name
        assert not feedback(name, error_feedback=False)
    for name in ("orq", "qsgd", "natural", "terngrad", "signsgd"):  # unbiased, or no contraction
        assert not feedback(name), name
    assert feedback("orq", error_feedback=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientCompression("topq"), "Did you mean 'topk'"),
        (lambda: GradientCompression("topk", ration=0.1), "got the option 'ration', needs one of: ratio"),
        (lambda: GradientCompression(TopK(0.1), ratio=0.1), "needs one or the other"),
        (lambda: GradientCompression(3), "needs a compressor or one of"),  # type: ignore[arg-type]
        (lambda: GradientCompression("lattice", step=0.1), "Use 'int8'"),
        (lambda: GradientCompression("signsgd", error_feedback=True), "Use 'scaled_sign'"),
        (lambda: GradientCompression("int8", min_elements=-1), "min_elements=-1, needs"),
        (lambda: GradientCompression("int8", checkpoint="all"), "needs 'each' or 'mean'"),  # type: ignore[arg-type]
        (lambda: compression("int8", rules={"*.bais": "topk"}).schemes(Regression()), "matches no parameter"),
    ],
)
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_strategies_without_ddp_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="got the strategy SingleDeviceStrategy, needs Lightning's DDPStrategy"
    ):
        fit(tmp_path, compression("int8"), 1, strategy="auto")
    with pytest.raises(Exception, match="got one worker, needs at least 2"):
        fit(tmp_path, compression("int8"), 1)
    pipeline: Any = SimpleNamespace(strategy=PipelineStrategy("dsp", stages=2))
    with pytest.raises(ConfigurationError, match="got PipelineStrategy, which does not exchange gradients through DDP"):
        _require_ddp(pipeline)
    with pytest.raises(Exception, match="got GossipStrategy, which does not exchange gradients through DDP"):
        fit(tmp_path, compression("int8"), 2, strategy=gossip())
    with pytest.raises(Exception, match="it takes one, before the first step"):
        fit(tmp_path, compression("int8"), 2, callbacks=[compression("topk")])


@pytest.mark.parametrize(
    ("name", "workers", "times"), [("natural", 4, 0.5625), ("natural", 8, 1.125), ("cast", 64, 0.5)]
)
def test_where_gathering_sends_more_than_an_all_reduce(name: str, workers: int, times: float) -> None:
    """Messages c times smaller that are gathered by n workers: n / 2c of the bytes."""
    scheme = Scheme(compressor(name), False, "auto" if name == "cast" else "all_gather")
    assert sends_more(scheme, 8_000_000, workers) == pytest.approx(times)
