"""A linear model in Lightning, trained by dual coordinates."""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_decentral.algorithms.primal_dual import AbstractPrimalDual
from lightning_decentral.algorithms.server import require_count
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.primal_dual.compiled import require_compiler
from lightning_decentral.primal_dual.coordinates import Coordinates, compile_steps, divided
from lightning_decentral.primal_dual.data import LinearDataModule, ranks_with_rows
from lightning_decentral.primal_dual.looks import Looks
from lightning_decentral.primal_dual.losses import Loss
from lightning_decentral.primal_dual.rows import Numbers
from lightning_decentral.strategies import AbstractDecentralizedStrategy, AsyncStrategy, SimulatedStrategy

_SAVED = "primal_dual"
_PROBES = 3  # random directions in which a model is compared with that of the dual variables
_ROUNDING = 1e-10  # of its length, by which it may differ
_STEPS_TO_MEASURE, _SHORTER = 3, 5  # with a fifth of the rows of others: who is slow does not keep the others for long
_UNEQUAL = 1.2  # times as long as another worker needs one for a pass over its rows, and rows are divided anew


class PrimalDualModule(LightningModule):
    """A linear model with L2 regularization, whose training steps are steps in dual coordinates.

    With ``Trainer(strategy="acpd")``, ``"cocoa_plus"`` or ``"cocoa"`` it is that method; on one device it is stochastic
    dual coordinate ascent (SDCA). It needs a `LinearDataModule`, and numba. There is no learning rate.

    Logged at each evaluation: ``gap``, the duality gap, which is never below 0; ``primal`` and ``dual``, the two
    objectives; ``bytes``, sent by all workers so far; ``density``, the bytes of a message as a share of the model's;
    ``nonzeros``, the share of weights that are not 0; ``passes`` over all rows. Where the model is that of the dual
    variables, which a few numbers tell, only these and the numbers of each worker's rows travel for it.

    Args:
        features: as `LinearDataModule` has them.
        loss: ``"squared"``, ``"logistic"``, ``"smoothed_hinge"`` or ``"hinge"``; see `Loss`.
        regularization: ``lambda``, above 0; 1 / (rows C) for scikit-learn's C.
        smoothing: of the smoothed hinge.
        seed: of the division of the rows and their order.
        look_every: so many steps of a worker lie between two looks at the gap inside an epoch, for which nobody waits:
            of an asynchronous method in which worker 0 trains, such as `ACPD`. Each is logged as ``running_gap``: that
            of the server's model then, without what is unsent, and of the dual variables that the workers have posted
            last. It is a gap as ``gap`` is. Once it is as small as an ``EarlyStopping("gap", stopping_threshold=...)``
            asks for, the epoch ends, all meet, and ``gap`` decides. ``None``: there are none.

    With ``LinearDataModule(shares="measured")`` workers of different speeds come to have different numbers of rows. At
    each evaluation in training each tells how many rows it looks at in a second. Where one would need a fifth longer
    than another for a pass over its rows, they are divided anew, and take their dual variables along; the model stays
    as it is. The first steps are short, and where there are looks worker 0 ends the first epoch after a few of them, so
    that it is soon known.

    Attributes:
        rows_of_step: how many rows the last training step has looked at.

    Cost:
        The weights and the dual variables in float64; in each step two vectors of the size of the weights. All workers
        read all rows, and keep a copy of their own. For a look each worker sends 4 bytes for each of its rows, and
        worker 0 passes over all rows once, on a thread.

    Raises:
        ConfigurationError: before training: without numba or a `LinearDataModule`; with another strategy, another
            precision, clipping or accumulation; for more workers than rows, and for labels that are not two classes;
            with looks, for a method whose worker 0 has no steps beside which it could look.

    Example:
        >>> PrimalDualModule(features=3)(torch.eye(3)).tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        features: int,
        loss: str = "logistic",
        regularization: float = 1e-4,
        smoothing: float = 1.0,
        seed: int = 0,
        look_every: int | None = None,
    ) -> None:
        super().__init__()
        if not (np.isfinite(regularization) and regularization > 0.0):
            raise ConfigurationError(
                f"PrimalDualModule got regularization={regularization}, needs a positive number. Use 1e-4."
            )
        if look_every is not None:
            require_count("PrimalDualModule", "look_every", look_every)
        self.save_hyperparameters()
        self.loss = Loss(loss, smoothing)
        self.regularization, self.seed = regularization, seed
        self.weight = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        self.rows_of_step = 0
        self.look_every = look_every
        self._looks: Looks | None = None
        self._own: dict[int, Coordinates] = {}  # by rank: of this worker, or of all virtual ones
        self._rows_of: dict[int, Any] = {}
        self._prepared = False  # whether it is known which rows are whose
        self._duals: Numbers | None = None  # of all rows, as they are known
        self._steps: dict[int, int] = {}  # made before this run, by rank
        self._measured: list[float] | None = None  # rows that each worker looks at in a second, if it is known
        self._speeds_known, self._divisions = False, 0
        self._tried = 0  # steps that were made to measure
        self._looked, self._seconds, self._began = 0, 0.0, 0.0  # at how many since then, and how long that took

    def forward(self, rows: Tensor) -> Tensor:
        """Return the score of each row.

        Args:
            rows: ``[rows, features]``, dense or sparse.
        """
        return rows.to(self.weight.dtype) @ self.weight

    # -- the steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take local steps in dual coordinates; what they change is the gradient."""
        self._began = time.perf_counter()
        strategy = self.trainer.strategy
        own = self._own[strategy.due_rank if isinstance(strategy, SimulatedStrategy) else self.global_rank]
        method, workers = self._method, len(ranks_with_rows(self.trainer))
        damping = 1.0 if method is None else method.damping(workers)
        if self._looks is not None and (gap := self._looks.step(self.global_rank, own.duals)) is not None:
            self._take_look(gap)
        self.rows_of_step = len(own.rows) if method is None else method.steps(len(own.rows))
        if self._measures() and self._tried < _STEPS_TO_MEASURE:
            self._tried += 1
            self.rows_of_step = max(1, self.rows_of_step // _SHORTER)
        before = self.weight.detach()
        after = before.clone()
        own.ascend(after.numpy(), self.rows_of_step, safety=damping * workers, damping=damping)
        direction = before - after
        change: Tensor = _Directed.apply(self.weight, direction)  # type: ignore[no-untyped-call]
        return change

    def on_after_backward(self) -> None:
        """Note how long a step took; callbacks have been called."""
        self._looked += self.rows_of_step
        self._seconds += time.perf_counter() - self._began

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the first epoch soon where speeds are to be measured, and nobody would meet for long."""
        strategy, ends = self.trainer.strategy, self._measures() and self._tried == _STEPS_TO_MEASURE
        if ends and self._looks is not None and self.global_rank == 0 and isinstance(strategy, AsyncStrategy):
            strategy.end_epoch()

    def _measures(self) -> bool:
        """Tell whether it is to be measured how fast workers are, and not known yet."""
        distributed = isinstance(self.trainer.strategy, AbstractDecentralizedStrategy)
        return isinstance(self._data.shares, str) and distributed and not self._speeds_known

    def _take_look(self, gap: float) -> None:
        """Log the gap inside an epoch, on worker 0, and end the epoch if it is as small as was asked for."""
        value = torch.tensor(gap, dtype=torch.float64)
        self.log("running_gap", value, prog_bar=True, logger=False, batch_size=1, rank_zero_only=True)
        for logger in self.trainer.loggers:
            logger.log_metrics({"running_gap": gap}, step=self.trainer.global_step)
        wanted = [
            callback.stopping_threshold
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.monitor == "gap"
        ]
        strategy = self.trainer.strategy
        if isinstance(strategy, AsyncStrategy) and any(each is not None and gap <= each for each in wanted):
            strategy.end_epoch()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with a learning rate of 1: it applies what the steps have found."""
        return torch.optim.SGD([self.weight], lr=1.0)

    @property
    def _method(self) -> AbstractPrimalDual | None:
        """The method; none on one device."""
        strategy = self.trainer.strategy
        if isinstance(strategy, AbstractDecentralizedStrategy | SimulatedStrategy):
            if isinstance(strategy.algorithm, AbstractPrimalDual):
                return strategy.algorithm
            got = repr(strategy.algorithm)
        elif isinstance(strategy, SingleDeviceStrategy):
            return None
        else:
            got = type(strategy).__name__
        raise ConfigurationError(
            f"PrimalDualModule got {got}, needs a method that keeps the model that of its dual variables. Use "
            "strategy='acpd', 'cocoa_plus' or 'cocoa', or one device."
        )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluate nothing yet: see `on_validation_epoch_end`."""

    def on_validation_epoch_end(self) -> None:
        """Log the gap and both objectives, of the rows of all workers."""
        self._prepare()
        strategy, model = self.trainer.strategy, self.weight.detach().cpu().numpy()
        data, evaluators = self._data, 1 if isinstance(strategy, SimulatedStrategy) else self.trainer.world_size
        sums, square = np.zeros(5), np.square(model).sum()
        own_whole = np.zeros(len(model))
        for own in self._own.values():
            scores = own.rows.scores(model)
            sums[0] += own.loss.values(scores, own.rows.targets).sum()
            sums[1] += own.loss.gaps(scores, own.duals, own.rows.targets).sum()
            sums[4] += own.steps
            own_whole += own.model()
        if isinstance(strategy, AbstractDecentralizedStrategy | SimulatedStrategy):
            sums[2:4] = strategy.traffic.bytes_sent, strategy.traffic.messages
        apart = own_whole - model / evaluators  # of all workers together: w(alpha) - w
        seen = [float(apart @ np.random.default_rng(seed).standard_normal(len(model))) for seed in range(_PROBES)]
        found = self._sum([*sums, square / evaluators, *seen])
        sums, square, probed = found[:5], found[5], found[6:]
        # The mean of the squares is that of the distance. What is left of it is rounding, or all of it is asked for.
        is_rounding = np.square(probed).max() <= _ROUNDING**2 * square
        distance = 0.0 if is_rounding else np.square(self._sum(apart)).sum()
        size, half = len(data.rows), self.regularization / 2
        primal = sums[0] / size + half * square
        gap = sums[1] / size + half * distance
        values = {"gap": gap, "primal": primal, "dual": primal - gap, "bytes": sums[2]}
        values["passes"] = sums[4] / size
        values["density"] = sums[2] / max(1.0, sums[3] * model.nbytes)
        values["nonzeros"] = np.count_nonzero(model) / len(model)
        # The same at all: to agree on each again would be as many meetings as there are values, which is recommended.
        warnings.filterwarnings("ignore", rf"It is recommended to use `self\.log\('({'|'.join(values)})'")
        for name, value in values.items():
            self.log(name, torch.tensor(float(value), dtype=torch.float64), prog_bar=name == "gap", batch_size=1)
        trains = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if isinstance(data.shares, str) and trains and isinstance(strategy, AbstractDecentralizedStrategy):
            self._divide_again(strategy)

    def _divide_again(self, strategy: AbstractDecentralizedStrategy) -> None:
        """Divide the rows by how fast workers are, if they are not yet. All workers together."""
        ranks = ranks_with_rows(self.trainer)
        told = strategy.gather(np.array([self._looked, self._seconds]).tobytes())
        looked, seconds = np.array([np.frombuffer(told[rank]) for rank in ranks]).T
        if not looked.all():
            return
        self._speeds_known = True
        speeds, rows = looked / seconds, np.array([len(part) for part in self._parts().values()])
        needed = rows / speeds  # seconds of each for a pass over its rows
        if needed.max() <= _UNEQUAL * needed.min():
            return
        self._duals = self._all_duals()
        self._steps = {rank: own.steps for rank, own in self._own.items()}
        self._measured = speeds.tolist()
        self._looked, self._seconds = 0, 0.0
        self._divide()

    def _divide(self) -> None:
        """Let each worker have its rows, with the dual variables that are known, also where it had others."""
        self._own, self._rows_of, self._prepared = {}, {}, False
        self._divisions += 1
        self._prepare()
        if self._looks is not None and self.look_every is not None:
            self._looks.close()
            self._looks = self._make_looks(self.look_every)

    def _parts(self) -> dict[int, Any]:
        """Tell which rows are whose, by rank."""
        data, ranks = self._data, ranks_with_rows(self.trainer)
        shares = data.shares
        if isinstance(shares, str):  # "measured"
            shares = self._measured if self._measured is not None and len(self._measured) == len(ranks) else None
        return dict(zip(ranks, divided(len(data.rows), len(ranks), self.seed, shares), strict=True))

    def _sum(self, numbers: Any) -> Numbers:
        """Return the sum over all workers, the same bits on each."""
        reduced = self.trainer.strategy.reduce(torch.from_numpy(np.array(numbers)), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced.numpy()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the scores of rows; above 0 is the positive class."""
        return self(batch)  # type: ignore[no-any-return]

    # -- beginning, and going on --------------------------------------------------------------------------------------

    @property
    def _data(self) -> LinearDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, LinearDataModule):
            raise ConfigurationError(
                f"PrimalDualModule got {type(data).__name__} for its data, needs a LinearDataModule, whose rows stay "
                "with their dual variables. Pass trainer.fit(module, LinearDataModule(path_or_matrix, targets))."
            )
        if data.features != self.weight.numel():
            raise ConfigurationError(
                f"PrimalDualModule got {self.weight.numel()} features and data of {data.features}, needs as many. Pass "
                "features=data.features."
            )
        return data

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, and divide the rows."""
        self._own, self._rows_of, self._prepared, self._looks = {}, {}, False, None
        if stage == "fit":
            require_compiler("PrimalDualModule")
            self._refuse_other_steps()
            self._prepare()
            if self.look_every is not None:
                self._looks = self._make_looks(self.look_every)
            if self._duals is not None and not self._is_whole(self.weight, whole := self._whole()):
                self.weight.data.copy_(torch.from_numpy(whole))

    def on_validation_start(self) -> None:
        """Leave no look under way: what is evaluated now is newer."""
        if self._looks is not None:
            self._looks.close()

    def on_train_end(self) -> None:
        """Learn the dual variables of all workers, of which each has changed its own."""
        if self._looks is not None:
            self._looks.close()
            self._looks = None
        self._duals = self._all_duals()

    def _make_looks(self, every: int) -> Looks:
        strategy, data = self.trainer.strategy, self._data
        if not isinstance(strategy, AsyncStrategy) or 0 not in ranks_with_rows(self.trainer):
            got = getattr(strategy, "algorithm", strategy)
            raise ConfigurationError(
                f"PrimalDualModule got look_every={every} and {got}, needs an asynchronous method in which worker 0 "
                "trains. Use ACPD without server='dedicated', or leave look_every out: rounds of the data module say "
                "how often all evaluate."
            )
        targets = data.classes() if self.loss.classifies else data.rows.targets
        rows = dataclasses.replace(data.rows, targets=targets)
        return Looks(every, strategy, rows, self.loss, self.regularization, self._parts(), self._divisions)

    def _refuse_other_steps(self) -> None:
        trainer = self.trainer
        got = [
            f"gradient_clip_val={trainer.gradient_clip_val}" if trainer.gradient_clip_val else "",
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}" if trainer.accumulate_grad_batches > 1 else "",
            f"precision={trainer.precision!r}" if trainer.precision not in ("32-true", "64-true") else "",
        ]
        if any(got):
            raise ConfigurationError(
                f"PrimalDualModule got Trainer({', '.join(filter(None, got))}), needs each step applied as it was "
                "found, or the model is not that of its dual variables. Leave it out."
            )

    def _prepare(self) -> None:
        """Divide the rows, and take up the dual variables that are known."""
        if self._prepared:
            return
        self._prepared = True
        data = self._data
        self._method  # noqa: B018 - refuses other strategies
        rows = data.rows
        targets = data.classes() if self.loss.classifies else rows.targets
        every = isinstance(self.trainer.strategy, SimulatedStrategy)
        if isinstance(data.shares, str) and every:
            raise ConfigurationError(
                "PrimalDualModule got LinearDataModule(shares='measured') and SimulatedStrategy, needs real workers to "
                "measure. Give each virtual one its share, or leave shares out."
            )
        for rank, part in self._parts().items():
            if every or rank == self.global_rank:
                some = rows.some(part)
                some.targets[:] = targets[part]
                own = Coordinates(some, self.loss, self.regularization, len(rows), (self.seed, rank))
                self._own[rank], self._rows_of[rank] = own, part
        compile_steps()
        self._take_up()

    def _take_up(self) -> None:
        if self._duals is None:
            if bool(self.weight.detach().any()) and self.trainer.state.fn == TrainerFn.FITTING:
                raise ConfigurationError(
                    "PrimalDualModule got weights, and no dual variables that they come from; it needs both, or none. "
                    "Pass ckpt_path to fit, or make a new module."
                )
            return
        if len(self._duals) != len(self._data.rows):
            raise ConfigurationError(
                f"PrimalDualModule got dual variables of {len(self._duals)} rows and data of {len(self._data.rows)}, "
                "needs one for each row. Train on the same rows, or make a new module."
            )
        for rank, own in self._own.items():
            own.duals = self._duals[self._rows_of[rank]].copy()
            own.steps = self._steps.get(rank, 0)

    def _is_whole(self, weight: Tensor, whole: Numbers) -> bool:
        """Tell whether weights are those of the dual variables, but for rounding."""
        return np.allclose(weight.numpy(force=True), whole, rtol=0.0, atol=1e-10 * (1.0 + np.abs(whole).max()))

    def _whole(self) -> Numbers:
        """Return ``w(alpha)`` of all rows, as far as their dual variables are known."""
        assert self._duals is not None
        return self._data.rows.combined(self._duals / (self.regularization * len(self._duals)))

    def _all_duals(self) -> Numbers:
        """Return the dual variables of all rows. All workers together; one alone knows those of others as they were."""
        data, strategy = self._data, self.trainer.strategy
        duals = np.zeros(len(data.rows)) if self._duals is None else self._duals.copy()
        told: dict[int, Numbers] = {rank: own.duals for rank, own in self._own.items()}
        if isinstance(strategy, AbstractDecentralizedStrategy):
            own = self._own.get(self.global_rank)
            rows = strategy.gather(b"" if own is None else own.duals.tobytes())
            if len(rows) == self.trainer.world_size:
                told = {rank: np.frombuffer(row) for rank, row in enumerate(rows) if row}
        for rank, part in self._parts().items():
            if rank in told:
                duals[part] = told[rank]
        return duals

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the dual variables of all workers, together; one that saves alone knows those of others as they were."""
        if not self._prepared:
            return
        self._duals = self._all_duals()
        steps, workers = {rank: own.steps for rank, own in self._own.items()}, len(ranks_with_rows(self.trainer))
        checkpoint[_SAVED] = {"duals": torch.from_numpy(self._duals.copy()), "steps": steps, "workers": workers}
        checkpoint[_SAVED]["measured"] = self._measured

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the dual variables; where not each worker goes on from its own, the model becomes that of these."""
        saved = checkpoint.get(_SAVED)
        if saved is None:
            return
        self._duals, self._steps = saved["duals"].numpy().copy(), dict(saved["steps"])
        self._measured = saved.get("measured")
        self._speeds_known = self._measured is not None
        if self._trainer is None or not self._prepared:
            return
        self._divide()  # as it was then
        strategy = self.trainer.strategy
        same = saved["workers"] == len(ranks_with_rows(self.trainer))
        if same and isinstance(strategy, AbstractDecentralizedStrategy) and strategy.resume == "exact":
            return
        whole = self._whole()
        if not self._is_whole(checkpoint["state_dict"]["weight"], whole):
            checkpoint["state_dict"]["weight"] = torch.from_numpy(whole)


class _Directed(torch.autograd.Function):
    """The length of a direction, whose gradient is that direction."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, direction: Tensor) -> Tensor:
        ctx.direction = direction
        length: Tensor = torch.linalg.vector_norm(direction)
        return length

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = gradients
        return ctx.direction * scale, None
