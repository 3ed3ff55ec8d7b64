"""A whole pipeline in one process, without Lightning: what a schedule does to training, on any model.

Its trajectory is that of as many workers. It is what tests and studies of staleness use, and ten lines to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from lightning_decentral.pipeline.corrections import slower
from lightning_decentral.pipeline.runner import LocalPipes, Runner, TrainingStep, Update
from lightning_decentral.pipeline.schedules import Schedule
from lightning_decentral.pipeline.splitting import balanced_cuts, costs_of, find_chain, record_call, stages_of
from lightning_decentral.pipeline.stage import Stage
from lightning_decentral.pipeline.tracing import traced_call


class LocalPipeline:
    """Trains a model by a schedule, all stages in one process.

    Args:
        schedule: of K stages.
        model: has an ``nn.Sequential`` with all parameters that are trained, or says what can be cut; see
            `lightning_decentral.pipeline.splitting.find_chain`.
        step: gives the loss of a batch, and calls that module once.
        optimizer: makes the optimizer of one stage from its parameters.
        cuts: the first block of each stage but the first; balanced by the costs of the blocks on the first batch by
            default.
        seed: of random numbers.
        traced: whether the module that is cut names no blocks, and is traced on the first batch; see
            `lightning_decentral.pipeline.tracing`.
        on_update: is told of each update before it is made.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_decentral.pipeline.schedules import dsp
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> def step(x):
        ...     return model(x).square().mean()
        >>> pipeline = LocalPipeline(dsp(2), model, step, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        >>> for _ in range(5):
        ...     loss = pipeline.train(torch.ones(3, 4))
        >>> pipeline.under_way, pipeline.staleness
        (2, (2, 0))
        >>> pipeline.drain()
        >>> pipeline.under_way
        0
    """

    def __init__(
        self,
        schedule: Schedule,
        model: Module,
        step: TrainingStep,
        optimizer: Callable[[Iterable[Parameter]], Optimizer],
        cuts: Sequence[int] | None = None,
        seed: int = 0,
        on_update: Callable[[Update], None] = lambda update: None,
        traced: bool = False,
    ) -> None:
        self.schedule = schedule
        self._model = model
        self._chain = None if traced else find_chain(model)
        self._step = step
        self._make_optimizer = optimizer
        self._cuts = None if cuts is None else tuple(cuts)
        self._seed = seed
        self._on_update = on_update
        self._runner: Runner | None = None
        self._optimizers: list[Optimizer | None] = []  # none of a stage without parameters

    @property
    def under_way(self) -> int:
        """The number of micro-batches that stages have forwarded and not backwarded, together."""
        return 0 if self._runner is None else self._runner.under_way

    @property
    def staleness(self) -> tuple[int, ...]:
        """The updates of each stage between a forward pass and its update, counted at the last one."""
        return () if self._runner is None else tuple(stage.staleness for stage in self._runner.stages.values())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages, once there was a batch."""
        return () if self._runner is None else tuple(self._runner.stages.values())

    def train(self, batch: Any) -> Tensor:
        """Make one tick of all stages: a new batch enters, and what is due leaves.

        Returns:
            The loss of the new batch.
        """
        if self._runner is None:
            self._runner = self._begin(batch)
        self._update(self._runner.tick(batch))
        assert self._runner.loss is not None
        return self._runner.loss

    def drain(self) -> None:
        """Bring all batches that are under way to their end."""
        if self._runner is not None:
            for updates in self._runner.drain():
                self._update(updates)

    def _begin(self, batch: Any) -> Runner:
        chain, inputs = self._chain, None
        if chain is None:
            chain, inputs = traced_call(self._model, self._step, batch, self.schedule.parts)
        if self._cuts is None:
            inputs = record_call(chain.module, lambda: self._step(batch)) if inputs is None else inputs
            self._cuts = balanced_cuts(costs_of(chain, inputs), self.schedule.stages, ring=self.schedule.ring)
        blocks = stages_of(chain, self._cuts)
        stages = [Stage(index, own, self.schedule, self._seed) for index, own in enumerate(blocks)]
        owned: dict[Parameter, int] = {}
        for stage in stages:
            owned |= dict.fromkeys(stage.module.parameters(), stage.index)
        for stage in stages:
            own = [parameter for parameter in stage.module.parameters() if owned[parameter] == stage.index]
            self._optimizers.append(self._make_optimizer(own) if own else None)
        if not self.schedule.slow_start:  # with which each stage has a rate of its own
            _merge(self._optimizers)
        return Runner(stages, self.schedule, chain.module, self._step, LocalPipes(), self._seed, together=True)

    def _update(self, updates: Sequence[Update]) -> None:
        due: dict[Optimizer, float] = {}
        for update in updates:
            self._on_update(update)
            optimizer = self._optimizers[update.stage]
            if optimizer is None:
                continue
            due[optimizer] = update.rate
            for parameter, gradient in update.gradients.items():
                parameter.grad = gradient
        for optimizer, rate in due.items():
            with slower(optimizer, rate):
                optimizer.step()
        for update in updates:
            for parameter in update.gradients:
                parameter.grad = None


def _merge(optimizers: list[Optimizer | None]) -> None:
    """Let one of torch's optimizers make the updates of all stages, where all have the same settings.

    They treat each parameter apart, so that the updates are the same; but a call of `step` takes longer than the update
    of a small stage.
    """
    made = [optimizer for optimizer in optimizers if optimizer is not None]
    settings = [
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        for optimizer in made
    ]
    alike = all(type(optimizer) is type(made[0]) for optimizer in made) and all(
        each == settings[0] for each in settings
    )
    if not made or not alike or len(settings[0]) != 1 or not type(made[0]).__module__.startswith("torch.optim."):
        return
    for optimizer in made[1:]:
        made[0].param_groups[0]["params"].extend(optimizer.param_groups[0]["params"])
        made[0].state.update(optimizer.state)
    optimizers[:] = [None if optimizer is None else made[0] for optimizer in optimizers]
