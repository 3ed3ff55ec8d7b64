"""Compressed gradients under Lightning's `ddp`."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module
from torch.nn.parallel import DistributedDataParallel

from lightning_decentral.compression import (
    COMPRESSORS,
    DGC,
    AbstractCompressor,
    Identity,
    Lattice,
    PowerSGD,
    SignSGD,
    compressor,
)
from lightning_decentral.compression.fused import is_fused
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.gradient_compression.hook import GradientExchange
from lightning_decentral.gradient_compression.measuring import Measured
from lightning_decentral.gradient_compression.scheme import Scheme, Way, helps_feedback
from lightning_decentral.gradient_compression.sizes import sends_more
from lightning_decentral.strategies import SimulatedStrategy
from lightning_decentral.strategies.lightning_private import timeout_of
from lightning_decentral.strategies.meetings import AbstractMeetingStrategy
from lightning_decentral.strategies.records import log_run, record
from lightning_decentral.traffic import Traffic

_KEY = "lightning_decentral_gradient_compression"


class GradientCompression(Callback):
    r"""Compresses the gradients that `strategy="ddp"` exchanges, on any device and back end.

    Each worker sends `C(g + m)` in place of its gradient `g`, with what earlier messages left out in its memory `m`
    (*error feedback*), and all use the mean of what the messages stand for. Buckets and their overlap with the backward
    pass stay DDP's. The mean takes the gradient's place, so accumulation, clipping and the optimizer see what they
    always do: clipping clips the mean.

    *Aggregation.* Messages that can be added are all-reduced (`cast`, `randomk`, `random_block`, `countsketch`,
    `powersgd`). Others are gathered by two workers; more of them average in two phases: every worker owns a part, gets
    all messages of it, and sends their mean, compressed once more, with a memory of its own. Compressors without error
    feedback and with a large error (`orq`, `qsgd`, `terngrad`, `signsgd`) are gathered, or added as whole numbers on a
    scale that all workers share, whichever sends less. A warning says so where it is more than without compression.

    *Momentum.* With `DGC` the callback accumulates the momentum of all parameters before sparsification, and the
    optimizer must have none: `SGD(momentum=0.0)`.

    *Learning rate.* The memory is kept in units of gradient times learning rate: when the rate changes, it is rescaled.
    While a rate is 0 the memory rests.

    *Mixed precision.* With `precision="16-mixed"` an infinity anywhere makes all workers skip the step, as ever, and no
    memory changes. Without a loss scaler NaN and infinity stop all workers with an error that names the parameter.

    *Checkpoints* have the memories of all workers, collected at worker 0. As many workers resume exactly; any other
    number of workers gets the mean of the memories, which keeps the sum of what was and will be sent.

    Logged every so many steps, of worker 0 and of that step: `compression/bits_per_coordinate` (handed to the
    collectives, per element of all gradients), `compression/relative_error` (the norm of what compression leaves out,
    relative to what was compressed), `compression/residual_norm`, `compression/compress_seconds`,
    `compression/communicate_seconds` (waiting for others included) and `compression/decompress_seconds`.
    `Communication` counts the compressed bytes.

    Memory: with error feedback two copies of the compressed gradients, in float32 at least; while messages are
    gathered, those of all workers for one bucket.

    Args:
        compressor: a compressor or its name, as in `lightning_decentral.compression.COMPRESSORS`.
        rules: compressors for parameters whose name matches a pattern (`fnmatch`, as ``"*.bias"``); the first match
            counts, whatever the parameter's size. ``"identity"`` sends them as they are.
        min_elements: parameters with fewer elements are sent as they are; 1024.
        error_feedback: ``None``: where the compressor is biased and a contraction (`error_bound` at most 1). ``True``:
            always; ``False``: never.
        aggregation: how messages of `compressor` become their mean: ``"all_gather"``, ``"two_phase"``, ``"all_reduce"``
            (linear compressors, and `TernGrad` and `QSGD` with a shared scale), or ``"auto"``: what sends least and
            does not compress twice what should not be. Those of `rules` are always ``"auto"``.
        warm_up_steps: exchanges at the beginning of training without compression.
        follow_learning_rate: rescale memories when the learning rate changes. Turn it off for optimizers whose steps do
            not grow with the gradient, such as Adam.
        checkpoint: ``"each"`` worker's memory, or their ``"mean"``: one copy of the gradients in place of one for each
            worker, from which any number of workers resumes with the sum kept, but not bit for bit.
        seed: of the random numbers of compressors that draw some.
        every_n_steps: how often to log; the norms cost a few passes over the gradients.
        options: hyper-parameters of the compressor, if it is given by name.

    Raises:
        ConfigurationError: for unknown names, options and patterns, and an aggregation that is not possible; when
            training starts, for another strategy than DDP, for one worker, and for `DGC` with an optimizer that has
            momentum.

    Example:
        >>> callback = GradientCompression("orq", levels=5, rules={"*.bias": "identity"})
        >>> callback.compressor
        ORQ(levels=5, bucket=2048, refine=False)
    """

    def __init__(
        self,
        compressor: str | AbstractCompressor = "int8",
        *,
        rules: Mapping[str, str | AbstractCompressor] | None = None,
        min_elements: int = 1024,
        error_feedback: bool | None = None,
        aggregation: Literal["auto"] | Way = "auto",
        warm_up_steps: int = 0,
        follow_learning_rate: bool = True,
        checkpoint: Literal["each", "mean"] = "each",
        seed: int = 0,
        every_n_steps: int = 50,
        **options: object,
    ) -> None:
        is_fused()  # refuses a wrong value of its environment variable before any process starts
        self.compressor = _made(compressor, options)
        self.rules = {pattern: _made(rule, {}) for pattern, rule in (rules or {}).items()}
        for name, value in (("min_elements", min_elements), ("warm_up_steps", warm_up_steps)):
            if not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"GradientCompression got {name}={value!r}, needs a number from 0 on. Use 0.")
        if checkpoint not in ("each", "mean"):
            raise ConfigurationError(
                f"GradientCompression got checkpoint={checkpoint!r}, needs 'each' or 'mean'. Use 'each' to resume "
                "exactly."
            )
        self.min_elements = min_elements
        self.error_feedback = error_feedback
        self.aggregation = aggregation
        self.warm_up_steps = warm_up_steps
        self.follow_learning_rate = follow_learning_rate
        self.checkpoint = checkpoint
        self.seed = seed
        self.every_n_steps = max(1, every_n_steps)
        self._scheme = self._scheme_of(self.compressor, aggregation)
        self._rule_schemes = {pattern: self._scheme_of(rule, "auto") for pattern, rule in self.rules.items()}
        self._check_momentum()
        self._exchange: GradientExchange | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._rates: dict[str, float] = {}
        self._measured: Measured | None = None

    @property
    def traffic(self) -> Traffic:
        """What this worker sent since training began."""
        return Traffic() if self._exchange is None else self._exchange.traffic

    def schemes(self, module: torch.nn.Module) -> dict[str, Scheme]:
        """Tell how each trained parameter of a module is exchanged; those that are sent as they are have no entry.

        Raises:
            ConfigurationError: for a rule that matches no parameter.
        """
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        for pattern in self.rules:
            if not fnmatch.filter(names, pattern):
                raise ConfigurationError(
                    f"The rule {pattern!r} of GradientCompression matches no parameter that is trained. The names are "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}. Correct or remove it."
                )
        schemes = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            rule = next((s for pattern, s in self._rule_schemes.items() if fnmatch.fnmatchcase(name, pattern)), None)
            scheme = self._scheme if rule is None else rule
            if rule is None and parameter.numel() < self.min_elements:
                continue
            if isinstance(scheme.compressor, PowerSGD) and not _low_rank_is_smaller(scheme.compressor, parameter):
                continue
            if not isinstance(scheme.compressor, Identity):
                schemes[name] = scheme
        return schemes

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _require_ddp(trainer)
            options = {"compressor": self.compressor, "aggregation": self.aggregation}
            log_run(trainer, record("DistributedDataParallel", trainer.world_size, options))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(_KEY)
        if self._exchange is not None and self._exchange.is_open:  # in the middle of a run: a search is over
            self._load()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._exchange is not None:
            state = self._exchange.state(every_worker=self.checkpoint == "each")
            if state is not None:
                checkpoint[_KEY] = state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise ConfigurationError(
                f"GradientCompression found a {type(model).__name__} where DistributedDataParallel should be. Use "
                "strategy='ddp' with a model that has parameters to train."
            )
        parameters = {name: each for name, each in pl_module.named_parameters() if each.requires_grad}
        _require_dense_and_real(pl_module, parameters)
        schemes = self.schemes(pl_module)
        if any(isinstance(scheme.compressor, DGC) and scheme.compressor.momentum for scheme in schemes.values()):
            _require_one_momentum(trainer)
        self._warn(schemes, parameters, trainer.world_size)
        strategy = trainer.strategy
        assert isinstance(strategy, DDPStrategy)
        assert strategy.cluster_environment is not None
        address = strategy.cluster_environment.main_address
        self._exchange = GradientExchange(parameters, schemes, self.seed, timeout_of(strategy), address)
        self._load()
        self._exchange.register(model)
        self._rates = {}

    def _load(self) -> None:
        """Give the exchange what a checkpoint has for it."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or self._exchange is None:
            return
        dropped = self._exchange.load_state(loaded)
        self._rates = {}
        if dropped:
            rank_zero_warn(
                f"The checkpoint has memories of parameters that are not compressed with error feedback now "
                f"({', '.join(dropped[:3])}{', ...' if len(dropped) > 3 else ''}); what they hold is lost. Resume "
                "with the same GradientCompression to keep it."
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._exchange is None:
            return
        self._update_rates(trainer, pl_module)
        self._exchange.begin(
            self._rates,
            dense=self._exchange.step < self.warm_up_steps,
            measure=(self._exchange.step + 1) % self.every_n_steps == 0,
            epoch=trainer.current_epoch,
            scale=_loss_scale(trainer),
        )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._exchange is None:
            return
        measured = self._exchange.finish(may_skip=_scaler(trainer) is not None)
        if measured is not None and self._exchange.step % self.every_n_steps == 0:
            self._measured = measured

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        measured, self._measured = self._measured, None
        if measured is None:
            return
        error = measured.error_norm / measured.input_norm if measured.input_norm else 0.0
        self.log("compression/bits_per_coordinate", 8 * measured.bytes / measured.elements, prog_bar=True)
        self.log("compression/relative_error", error, prog_bar=True)
        self.log("compression/residual_norm", measured.residual_norm)
        self.log("compression/compress_seconds", measured.compress_seconds)
        self.log("compression/communicate_seconds", measured.communicate_seconds)
        self.log("compression/decompress_seconds", measured.decompress_seconds)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._exchange is not None:
            self._exchange.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._exchange is not None:
            self._exchange.close(exception)

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _scheme_of(self, each: AbstractCompressor, aggregation: Literal["auto"] | Way) -> Scheme:
        return Scheme(each, self._feedback(each), aggregation)

    def _check_momentum(self) -> None:
        """Check DGC's momentum: it is for all parameters, and needs the memory to be masked."""
        schemes = (self._scheme, *self._rule_schemes.values())
        found = [scheme for scheme in schemes if isinstance(scheme.compressor, DGC)]
        dgcs = [scheme.compressor for scheme in schemes if isinstance(scheme.compressor, DGC)]
        settings = {(dgc.momentum, dgc.nesterov, dgc.clip) for dgc in dgcs}
        if len(settings) > 1:
            raise ConfigurationError(
                f"GradientCompression got DGC with {len(settings)} settings of momentum and clipping, needs one: they "
                "are for all parameters. Use the same in all rules."
            )
        if any(momentum for momentum, _, _ in settings) and not all(scheme.feedback for scheme in found):
            raise ConfigurationError(
                "GradientCompression got DGC with momentum and error_feedback=False, needs the memory of what was not "
                "sent. Leave error_feedback out, or use DGC(momentum=0.0)."
            )

    def _feedback(self, each: AbstractCompressor) -> bool:
        """Tell whether this compressor gets error feedback."""
        if isinstance(each, Identity):
            return False
        if self.error_feedback and isinstance(each, SignSGD):
            raise ConfigurationError(
                "GradientCompression got error_feedback=True with SignSGD, whose messages have no scale: memories "
                "would grow without end. Use 'scaled_sign'."
            )
        return helps_feedback(each) if self.error_feedback is None else self.error_feedback

    def _update_rates(self, trainer: Trainer, module: LightningModule) -> None:
        """Tell what each gradient is multiplied by before it changes its parameter; the same object unless it
        changes."""
        scale = _loss_scale(trainer)
        rates = {name: 1.0 / scale for name, each in module.named_parameters() if each.requires_grad}
        if self.follow_learning_rate:
            names = {id(parameter): name for name, parameter in module.named_parameters()}
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    rate = float(group["lr"]) / scale
                    rates.update({names[id(each)]: rate for each in group["params"] if id(each) in names})
        if rates != self._rates:
            self._rates = rates

    def _warn(self, schemes: Mapping[str, Scheme], parameters: Mapping[str, Tensor], workers: int) -> None:
        """Say so if compression makes the exchange larger."""
        for scheme in set(schemes.values()):
            elements = sum(parameters[name].numel() for name, other in schemes.items() if other == scheme)
            factor = sends_more(scheme, elements, workers)
            if factor >= 1 and not isinstance(scheme.compressor, PowerSGD):
                rank_zero_warn(
                    f"{scheme.compressor} with {workers} workers sends {factor:.1f} times the bytes of uncompressed "
                    "float32 gradients, because all workers receive all messages. Use a compressor that is averaged in "
                    "two phases or all-reduced ('int8', 'scaled_sign', 'topk', 'cast'), or aggregation='two_phase'."
                )


def _require_dense_and_real(module: Module, parameters: Mapping[str, Tensor]) -> None:
    """Refuse before training what no compressor takes."""
    complex_ones = [name for name, parameter in parameters.items() if parameter.is_complex()]
    if complex_ones:
        raise ConfigurationError(
            f"GradientCompression got complex parameters ({', '.join(complex_ones[:3])}), needs real ones. Keep them "
            "as real tensors and use torch.view_as_complex in the forward pass, or compress with a gossip method, "
            "which takes complex parameters."
        )
    for name, layer in module.named_modules():
        if isinstance(layer, Embedding | EmbeddingBag) and layer.sparse and layer.weight.requires_grad:
            raise ConfigurationError(
                f"GradientCompression got a layer with sparse gradients ({name}), needs dense ones. Make it with "
                "sparse=False, or remove the callback."
            )


def _made(given: str | AbstractCompressor, options: Mapping[str, object]) -> AbstractCompressor:
    if isinstance(given, str):
        made = compressor(given, **options)
    elif isinstance(given, AbstractCompressor):
        if options:
            raise ConfigurationError(
                f"GradientCompression got {given} and the option {next(iter(options))!r}, needs one or the other. Give "
                "the option to the compressor."
            )
        made = given
    else:
        raise ConfigurationError(
            f"GradientCompression got the compressor {given!r}, needs a compressor or one of {', '.join(COMPRESSORS)}. "
            "Use 'int8'."
        )
    if isinstance(made, Lattice):
        raise ConfigurationError(
            "GradientCompression got Lattice, which is decoded next to a vector that is already near; gradients are "
            "not near each other. Use 'int8'."
        )
    return made


def _low_rank_is_smaller(powersgd: PowerSGD, parameter: Tensor) -> bool:
    """Tell whether the two factors of a matrix are smaller than it; vectors are no matrices."""
    return parameter.dim() >= 2 and powersgd.num_bits(parameter.shape) < 8 * parameter.nbytes


def _scaler(trainer: Trainer) -> Any:
    """Return the loss scaler of mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _loss_scale(trainer: Trainer) -> float:
    scaler = _scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _require_one_momentum(trainer: Trainer) -> None:
    """Refuse an optimizer with momentum: DGC's is in what it gets already."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            if group.get("momentum") or "betas" in group:
                raise ConfigurationError(
                    f"GradientCompression got DGC with its own momentum and {type(optimizer).__name__} with "
                    f"{'momentum' if group.get('momentum') else 'betas'}, which would apply it twice. Use "
                    "torch.optim.SGD(..., momentum=0.0), or DGC(momentum=0.0)."
                )


def _require_ddp(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, (AbstractMeetingStrategy, SimulatedStrategy)):
        raise ConfigurationError(
            f"GradientCompression got {type(strategy).__name__}, which does not exchange gradients through DDP. Use "
            "strategy='ddp', or for compressed gossip strategy='choco_sgd' or 'moniqua_sgd' without the callback."
        )
    if not isinstance(strategy, DDPStrategy):
        raise ConfigurationError(
            f"GradientCompression got the strategy {type(strategy).__name__}, needs Lightning's DDPStrategy, whose "
            "communication hook it is. Use strategy='ddp' with several devices, or remove the callback."
        )
    if trainer.world_size < 2:
        raise ConfigurationError(
            "GradientCompression got one worker, needs at least 2: there is nothing to exchange. Use devices=2 or "
            "more, or remove the callback."
        )
