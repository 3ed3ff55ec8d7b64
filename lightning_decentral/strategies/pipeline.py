"""Pipelines as a Lightning strategy: one model cut into stages, each on a worker, trained with delayed gradients.

Every worker runs Lightning's loop over the same batches. In one step of the loop a worker makes one tick of its stages:
it forwards the new batch, and backwards what the schedule says. The file is long because it has a method for each hook
by which Lightning asks a strategy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Module, Parameter, Sequential
from torch.optim import Optimizer

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.flat import Vector, layers_of
from lightning_decentral.pipeline import schedules
from lightning_decentral.pipeline.corrections import slower
from lightning_decentral.pipeline.evaluation import Evaluation
from lightning_decentral.pipeline.in_flight import InFlight, pack_flight
from lightning_decentral.pipeline.random_numbers import random_numbers_of
from lightning_decentral.pipeline.residence import Residence, is_here
from lightning_decentral.pipeline.runner import AbstractPipes, LocalPipes, Runner, Update
from lightning_decentral.pipeline.schedules import Schedule
from lightning_decentral.pipeline.splitting import (
    Chain,
    balanced_cuts,
    batch_tensors,
    check_cuts,
    costs_of,
    find_chain,
    measured_costs,
    record_call,
    refuse_outside,
    stages_of,
    tied,
)
from lightning_decentral.pipeline.stage import Kept, Stage, Value
from lightning_decentral.pipeline.tracing import module_to_trace, traced_call
from lightning_decentral.protocol import AbstractAlgorithm
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.alike import described_tensors, require_equal
from lightning_decentral.strategies.clocks import ask_rarely
from lightning_decentral.strategies.epoch_metrics import EpochMetrics
from lightning_decentral.strategies.meetings import AbstractMeetingStrategy, publish_exception
from lightning_decentral.strategies.optimizer_states import pack_states, unpack_states
from lightning_decentral.strategies.pipeline_settings import (
    check_last_batch,
    check_optimizers,
    check_settings,
    is_looked_at,
)
from lightning_decentral.strategies.records import log_run, record
from lightning_decentral.strategies.replicas import Replica, check_data_parallel
from lightning_decentral.strategies.strategy import StartMethod
from lightning_decentral.strategies.two_momenta import refuse_two_momenta
from lightning_decentral.tensors import check_parameters, has_values
from lightning_decentral.transport.collectives import broadcast_from_zero
from lightning_decentral.transport.communicator import Communicator
from lightning_decentral.transport.pipes import End, Pipes
from lightning_decentral.transport.ragged import group_of
from lightning_decentral.transport.rejoining import leave_process_group

_CHECKPOINT = "lightning_decentral_pipeline"
_STEP = "lightning_decentral_step"  # beside what the optimizer remembers of a parameter
_PROBE_BYTES = 1 << 20  # that workers send each other to measure how long it takes
_BATCH = -1  # in the place of a stage that sends: what the first stage's worker tells of its batch


class PipelineStrategy(AbstractMeetingStrategy):
    """Trains one model that is cut into K stages, one on each worker, without locks between them.

    The `LightningModule` stays as it is. What is cut is an ``nn.Sequential`` that ``training_step`` calls once, or what
    ``configure_stages()`` names: see `lightning_decentral.pipeline.splitting.find_chain`. The first stage's worker runs
    ``training_step`` up to that call, the last one's from there to the loss, and ``self.log`` works there: it is worker
    0, so loggers and progress bars show it. Checkpoints are those of the ordinary whole model, and so are evaluations,
    unless they go through the stages: before them each stage's weights go to all workers, and all batches that are
    under way are brought to their end, unless ``drains=False``.

    Args:
        schedule: ``"dsp"``, ``"ddg"``, ``"features_replay"``, ``"ouroboros"``, ``"pipe_2bw"``, ``"pipedream"``,
            ``"gpipe"``, ``"one_f_one_b"``, or a `lightning_decentral.pipeline.schedules.Schedule`, such as
            ``dsp(3, forward_delays=(1, 1, 0), staleness=(4, 2, 0))``.
        stages: K; by default one for each worker (one more in the ring of Ouroboros). With more workers than stages
            need, there are several pipelines beside each other, and each has a share of the data. One worker runs all
            stages itself, and trains as K workers would.
        data_parallel: what the pipelines beside each other do: a method of this package whose workers exchange at the
            same updates, such as ``DPSGD(Ring)``, ``LocalSGD(every=8)`` or ``DiLoCo()``. It trains each stage with the
            workers that have it, as many as there are pipelines. Evaluations and checkpoints have the mean of the
            replicas; a run that is resumed begins the method anew, from the mean. ``None``: they take the mean of their
            gradients in each update.
        parts: micro-batches of a batch, with schedules that divide it.
        warm_up: batches after each of which delays grow by one, from none at first as far as the schedule's; 0: they
            are there from the beginning. Old gradients hurt most at first. Of a `Schedule`: its ``warmed_up``.
        cuts: the first block of each stage but the first. By default blocks are divided so that the worker with most to
            do has as little as can be, by what `balance` says.
        balance: ``"operations"``: the costs of blocks are floating-point operations, counted on the first batch.
            ``"measured"``: all workers measure how long the blocks take, and how long bytes between two workers; the
            cuts make the slowest stage or link as fast as can be. Another run may be cut elsewhere.
        traced: whether torch's tracer finds the blocks, of a module that names none. That takes seconds at the first
            batch; all batches need the same shape, and the module one tensor in and out.
        drains: whether batches that are under way are brought to their end before an evaluation, a checkpoint and the
            end of an epoch. Otherwise they stay under way until training ends, so that the pipeline stays full, and a
            checkpoint has what is in flight (inputs, errors, stashed weights): a run that is resumed with the same
            stages trains on to the same bits as one that was not disturbed.
        evaluate: ``"whole"``: for a validation, a test or predictions each worker gets the weights of all stages, and
            evaluates the whole model on its share of the data, as with DDP. ``"stages"``: batches go forward through
            the stages, so that no worker has more than its own while training goes on; ``validation_step`` and
            ``on_validation_epoch_end`` come to their end on the last stage's worker, which has the metrics.
        process_group_backend: ``"gloo"`` or ``"nccl"``; ``None``: what fits the device. Stages send through gloo.
        timeout: for what all workers do together at the end of an epoch.
        exchange_timeout_seconds: after which a stage that gets nothing gives up, and names who was lost.
        start_method: how worker processes are started.
        seed: of the random numbers that batches draw in the model, such as dropout's. ``None``: of a run that is
            resumed its own, else that of ``seed_everything``, else worker 0's.

    Raises:
        ConfigurationError: if the workers do not fit the stages (when the ``Trainer`` is made), or the module cannot be
            cut (before training); it says what to write.
        PeerLost: if a worker is killed or cut off: its stage is gone. Resume from the last checkpoint.
        WorkerFailed: if another worker raised an exception.

    Cost:
        While it trains, each worker has weights, gradients, optimizer state and activations of its own stages only;
        code that reads another stage's parameters gets an error that says where they are. It has all weights from the
        start to the first batch, for checkpoints, at the end of training and, with ``evaluate="whole"``, at the end of
        an epoch and in evaluations; with ``evaluate="stages"`` in the host's memory, but for the start, if ``cuts`` are
        not given. A batch sends each cut's activations once forward and their errors once back; one that is evaluated
        through the stages, activations alone. With ``data_parallel`` there is what the method needs, for each stage;
        its exchanges go on beside the passes of a batch, where it allows that; an evaluation or a checkpoint needs two
        more copies of a worker's stages.

    Example:
        >>> strategy = PipelineStrategy("dsp")
        >>> strategy = PipelineStrategy(schedules.dsp(3, forward_delays=(1, 1, 0), staleness=(4, 2, 0)))
        >>> strategy = PipelineStrategy("dsp", evaluate="stages")
        >>> from lightning_decentral.algorithms import LocalSGD
        >>> strategy = PipelineStrategy("dsp", stages=2, data_parallel=LocalSGD(every=8))
    """

    is_distributed = True  # Lightning's property warns whenever it is read

    def __init__(
        self,
        schedule: str | Schedule = "dsp",
        stages: int | None = None,
        *,
        parts: int | None = None,
        warm_up: int = 0,
        cuts: Sequence[int] | None = None,
        balance: Literal["operations", "measured"] = "operations",
        traced: bool = False,
        drains: bool = True,
        evaluate: Literal["whole", "stages"] = "whole",
        data_parallel: AbstractAlgorithm | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        exchange_timeout_seconds: float = 300.0,
        start_method: StartMethod = "popen",
        seed: int | None = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, start_method=start_method)
        if isinstance(schedule, str) and schedule not in schedules.SCHEDULES:
            raise ConfigurationError(
                f"PipelineStrategy(schedule={schedule!r}): needs one of {', '.join(schedules.SCHEDULES)}, or a "
                "Schedule."
            )
        if isinstance(schedule, Schedule) and not (
            stages in (None, schedule.stages) and parts in (None, schedule.parts)
        ):
            raise ConfigurationError(
                f"PipelineStrategy got stages={stages} and parts={parts} with a schedule of {schedule.stages} stages "
                f"and {schedule.parts} micro-batches; it needs the same. Leave both out."
            )
        if isinstance(schedule, Schedule) and warm_up:
            raise ConfigurationError(
                f"PipelineStrategy got warm_up={warm_up} with a Schedule, which has its own, {schedule.warm_up}. Leave "
                f"it out, and pass the schedule's warmed_up({warm_up})."
            )
        if traced and cuts is not None:
            raise ConfigurationError(
                f"PipelineStrategy got cuts={tuple(cuts)} with traced=True, and needs one of them: the tracer finds "
                "blocks, whose numbers nobody knows before. Leave cuts out, and it cuts where stages are balanced."
            )
        if evaluate not in ("whole", "stages"):
            raise ConfigurationError(f'PipelineStrategy(evaluate={evaluate!r}): needs "whole" or "stages".')
        if balance not in ("operations", "measured"):
            raise ConfigurationError(f'PipelineStrategy(balance={balance!r}): needs "operations" or "measured".')
        if traced and evaluate == "stages":
            raise ConfigurationError(
                'PipelineStrategy got evaluate="stages" with traced=True, and needs one of them: what the tracer '
                "writes down is the training's, dropout and shapes included. Name the blocks with configure_stages()."
            )
        if data_parallel is not None:
            check_data_parallel(data_parallel, drains)
        if not exchange_timeout_seconds > 0:
            raise ConfigurationError(
                f"PipelineStrategy(exchange_timeout_seconds={exchange_timeout_seconds}): needs a positive number."
            )
        self.exchange_timeout_seconds = exchange_timeout_seconds
        self.stages = stages
        self.parts = parts
        self.warm_up = warm_up
        self.cuts = None if cuts is None else tuple(cuts)
        self.balance = balance
        self.traced = traced
        self.drains = drains
        self.evaluate = evaluate
        self.data_parallel = data_parallel
        self.seed = seed
        self._configured = schedule
        self._schedule = schedule if isinstance(schedule, Schedule) else None
        if isinstance(schedule, str) and stages is not None:
            self._schedule = self._make(stages)
        self._seed = 0 if seed is None else seed  # which all workers agree on when training starts
        self._loaded_steps: dict[int, Tensor] = {}  # by the parameter's place in the optimizer
        self._trained: tuple[dict[str, Any], int] | None = None  # the optimizer's state, and batches, after a run
        self._clear()

    def _clear(self) -> None:
        super()._clear()
        self._chain: Chain | None = None
        self._runner: Runner | None = None
        self._pipes: Pipes | None = None
        self._evaluation: Evaluation | None = None  # once a batch goes through the stages
        self._evaluation_pipes: Pipes | None = None
        self._last_stages: Any = None  # the group of their workers, of several pipelines
        self._cuts: tuple[int, ...] = ()  # that were made
        self._stage_blocks: list[tuple[Module, ...]] = []
        self._residence: Residence | None = None  # none where this worker has all stages
        self._replicas: dict[int, Replica] = {}  # by the stages of this worker, if a method trains them
        self._updates: list[Update] = []
        self._replaced: list[private.Undo] = []
        self._metrics: EpochMetrics | None = None
        self._in_step = False  # of the user's code, of which each worker runs another part
        self._in_epoch_end = False  # of the user's code, which the last stages' workers alone run
        self._batches_before = 0  # a checkpoint that was loaded
        self._loaded_seed: int | None = None  # of the run that is resumed
        self._loaded_flight: InFlight | None = None  # of that run
        self._shared_at = -1  # batches made when all had the weights of all stages

    # -- what callbacks read ------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The schedule, once it is known how many stages there are."""
        if self._schedule is None:
            raise ConfigurationError(
                "The schedule of a PipelineStrategy has as many stages as there are workers, and these are not known "
                "yet. Pass it to a Trainer first, or pass stages=."
            )
        return self._schedule

    @property
    def staleness(self) -> tuple[int, ...]:
        """The updates of each of this worker's stages between a forward pass and its update, at the last one."""
        return () if self._runner is None else tuple(stage.staleness for stage in self._runner.stages.values())

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What each of this worker's stages has kept at the same time, at most, since training began."""
        stages = () if self._runner is None else self._runner.stages.values()
        return tuple(Kept(stage.most_inputs, stage.most_graphs, stage.most_versions) for stage in stages)

    @property
    def cuts_made(self) -> tuple[int, ...]:
        """The first block of each stage but the first, once the model is cut."""
        return self._cuts

    # -- who is where -------------------------------------------------------------------------------------------------

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if not self.parallel_devices:
            return
        size = self.num_nodes * self.num_processes  # Lightning calls this in Trainer(): refused before any process
        if self._schedule is None:
            stages = size if isinstance(self._configured, str) and self._configured != "ouroboros" else size + 1
            self._schedule = self._make(stages)
        if size > 1 and size % self._schedule.workers:
            raise ConfigurationError(
                f"PipelineStrategy got {size} workers for the {self._schedule.stages} stages of "
                f"{self._schedule.name}, and needs {self._schedule.workers}, or a multiple of that. Use "
                f"devices={self._schedule.workers}, or another number of stages."
            )
        if self.data_parallel is not None and size > self._schedule.workers:
            self.data_parallel.resolved(size // self._schedule.workers)

    def _make(self, stages: int) -> Schedule:
        assert isinstance(self._configured, str)
        options = {} if self.parts is None else {"parts": self.parts}
        made = schedules.SCHEDULES[self._configured](stages, **options)
        return made.warmed_up(self.warm_up) if self.warm_up else made

    @property
    def _training(self) -> bool:
        """Whether Lightning is in its training loop, and not in an evaluation."""
        trainer = private.trainer_of(self.lightning_module)
        return trainer is not None and trainer.state.stage == RunningStage.TRAINING

    @property
    def _local(self) -> bool:
        return self.world_size == 1

    @property
    def _through_stages(self) -> bool:
        """Whether evaluations go through the stages. A worker that has all of them has the whole model anyway."""
        return self.evaluate == "stages" and not self._local

    @property
    def _logs_apart(self) -> bool:
        """Whether what is logged now, only the last stages' workers have: worker 0, and those of pipelines beside."""
        return self._training or self._through_stages

    @property
    def _workers(self) -> int:
        """The number of workers of one pipeline."""
        return 1 if self._local else self.schedule.workers

    @property
    def _pipelines(self) -> int:
        return self.world_size // self._workers

    @property
    def _has_last_stage(self) -> bool:
        return self.global_rank % self._workers == 0

    @property
    def _own_stages(self) -> list[int]:
        return [stage for stage in range(self.schedule.stages) if self._rank_of(stage) == self.global_rank]

    def _rank_of(self, stage: int, pipeline: int | None = None) -> int:
        pipeline = self.global_rank // self._workers if pipeline is None else pipeline
        return pipeline * self._workers + (0 if self._local else self.schedule.worker_of(stage))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._logs_apart:
            # All stages of a pipeline go through the same batches.
            return {"num_replicas": self._pipelines, "rank": self.global_rank // self._workers}
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # -- setting up ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._trained = None
            assert self.lightning_module is not None
            check_settings(trainer, self.lightning_module, self, self._through_stages)
        with self._named_failures():
            super().setup(trainer)
            if fitting or self._through_stages:
                self._start(trainer, fitting)
        if fitting:
            options: dict[str, Any] = {"stages": self.schedule.stages, "parts": self.schedule.parts}
            if self.data_parallel is not None:
                options["data_parallel"] = self.data_parallel
            log_run(trainer, record(self.schedule.name, self.world_size, options))

    @property
    def _is_placed(self) -> bool:
        """Whether each worker's device has its own stages alone, from the start: the cuts are known, and no evaluation
        needs the whole model."""
        assert self.lightning_module is not None
        fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        return fitting and self._through_stages and self.cuts is not None

    def model_to_device(self) -> None:
        """Move the model to the device; where it is known that no more is needed there, this worker's stages alone."""
        assert self.model is not None
        if not self._is_placed:
            super().model_to_device()
            return
        assert self.cuts is not None
        chain = self._find_chain()
        blocks = stages_of(chain, self.cuts)
        own = {p for stage in self._own_stages for block in blocks[stage] for p in block.parameters()}
        others = {p for blocks_of_stage in blocks for block in blocks_of_stage for p in block.parameters()} - own
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor not in others:
                tensor.data = tensor.data.to(self.root_device)

    def configure_ddp(self) -> None:
        """Make no wrapper: find what is cut, and give all workers the same start."""
        model = self.model
        assert model is not None
        gone = [name for name, parameter in model.named_parameters() if not is_here(parameter)]
        if gone:
            raise ConfigurationError(
                f"PipelineStrategy got {type(model).__name__} without values of {gone[0]!r} and {len(gone) - 1} other "
                "parameters, which were on workers of a run that failed. Load a checkpoint, as with "
                "fit(ckpt_path=...), or make the module anew."
            )
        check_parameters(model)
        if self.traced:  # at the first batch
            refuse_outside(model, [module_to_trace(model)])
        else:
            self._find_chain()
        if self.world_size > 1:
            named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            named = {name: tensor for name, tensor in named.items() if has_values(tensor)}
            require_equal(described_tensors(named.items()), "parameters or buffers")
            broadcast_from_zero(list(named.values()), self.root_device if self._is_placed else None)

    def _find_chain(self) -> Chain:
        assert self.lightning_module is not None
        if self._chain is None:
            self._chain = find_chain(self.lightning_module)
            check_cuts(self.cuts or range(1, self.schedule.stages), len(self._chain.blocks), self.schedule.stages)
            if self.cuts is not None:
                self._check_tied(stages_of(self._chain, self.cuts))
        return self._chain

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers)
        if self.data_parallel is not None:
            refuse_two_momenta(self.data_parallel, self.optimizers)

    def _check_tied(self, blocks: Sequence[Sequence[Module]]) -> None:
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}  # type: ignore[union-attr]
        for parameter, users in tied(blocks).items():
            if len({self._rank_of(stage) for stage in users}) > 1:
                raise ConfigurationError(
                    f"PipelineStrategy got the parameter {names[parameter]!r} in the stages {users}, which are on "
                    "different workers, and needs it on one. Use strategy='ouroboros', in which the first and the last "
                    "stage share a worker; or do not tie the weights; or cut elsewhere (cuts=)."
                )
            if self.data_parallel is not None and self._pipelines > 1:
                raise ConfigurationError(
                    f"PipelineStrategy(data_parallel={self.data_parallel!r}) got the parameter {names[parameter]!r} in "
                    f"the stages {users} (tied weights), and needs each in one, whose replicas average it. Do not tie "
                    "them; or leave data_parallel out, and the pipelines take the mean of their gradients."
                )

    def _start(self, trainer: Trainer, fitting: bool) -> None:
        if not self.traced:
            self._find_chain()
        self._communicator = Communicator(self._connection_settings(shared_memory=False))
        self._watch = self._communicator.watch  # an evaluation alone has none before
        # The seed that a user has set is torch's first one; without one every process has another.
        seed = next(seed for seed in (self.seed, self._loaded_seed, torch.initial_seed()) if seed is not None)
        self._seed = int(self._communicator.gather(str(seed).encode())[0])
        if fitting:
            # Lightning broadcasts rank 0's SIGTERM before every batch, which would be a lock in each step.
            self._replaced.append(private.replace_sigterm_broadcast(trainer, self._check_failure))
            self._replaced.append(private.replace_epoch_end(trainer, partial(self._end_epoch, trainer)))
            self._replaced += ask_rarely(trainer, timers=True)
        if self._through_stages:
            self._start_evaluations(trainer)
        # A metric that training_step feeds is known to the last stage's worker alone.
        assert self.lightning_module is not None
        self._metrics = EpochMetrics(self.lightning_module, self._metrics_meet, self._gather_metrics)

    def _cut(self, step: Callable[[Any], object], batch: Any) -> Chain:
        """Cut the model, now that the first batch is there. All workers together."""
        chain, schedule, communicator = self._chain, self.schedule, self._communicator
        assert communicator is not None
        assert self.lightning_module is not None
        if chain is not None and self._stage_blocks:
            return chain
        loaded, inputs = self._loaded_flight, None
        cuts = loaded.cuts if self.cuts is None and loaded is not None and self._fits(loaded) else self.cuts
        if chain is None:
            with random_numbers_of(self.root_device, self._seed):
                chain, inputs = traced_call(self.lightning_module, step, batch, schedule.parts)
        if cuts is None:
            with random_numbers_of(self.root_device, self._seed):
                inputs = record_call(chain.module, lambda: step(batch)) if inputs is None else inputs
                costs, sending = costs_of(chain, inputs), None
                if self.balance == "measured":
                    costs, sending = self._measured_costs(chain, inputs)
                cuts = balanced_cuts(costs, schedule.stages, sending, schedule.ring)
            cuts = tuple(json.loads(communicator.gather(json.dumps(cuts).encode())[0]))
        self._chain, self._cuts, self._stage_blocks = chain, tuple(cuts), stages_of(chain, cuts)
        self._check_tied(self._stage_blocks)
        if not self._local:
            self._residence = self._make_residence()
        return chain

    def _measured_costs(self, chain: Chain, inputs: object) -> tuple[list[float], list[float] | None]:
        """Measure the seconds of each block, on average over the workers, and of sending what it gives.

        All workers together.
        """
        communicator = self._communicator
        assert communicator is not None
        own = measured_costs(chain, inputs)
        told = [json.loads(each) for each in communicator.gather(json.dumps([each.seconds for each in own]).encode())]
        seconds = [sum(each) / len(told) for each in zip(*told, strict=True)]
        if self._local:
            return seconds, None
        probe, taken = torch.zeros(_PROBE_BYTES, dtype=torch.uint8), []
        for _ in range(3):
            communicator.barrier("a measurement")
            began = time.perf_counter()
            communicator.take_from(0, [probe])
            taken.append(time.perf_counter() - began)
        slowest = max(json.loads(each) for each in communicator.gather(json.dumps(min(taken)).encode()))
        return seconds, [each.bytes * slowest / _PROBE_BYTES for each in own]

    def _begin(self, step: Callable[[Any], Tensor], batch: Any) -> Runner:
        """Cut the model and connect the stages. All workers together."""
        schedule, communicator = self.schedule, self._communicator
        assert communicator is not None
        assert self.lightning_module is not None
        check_last_batch(self.lightning_module.trainer, schedule.parts, alike=self.traced)
        chain = self._cut(step, batch)
        own = self._own_stages
        stages = [Stage(stage, self._stage_blocks[stage], schedule, self._seed) for stage in own]
        pipes: AbstractPipes = LocalPipes()
        if not self._local:
            self._pipes = Pipes(communicator, "stages", self._ends())
            pipes = _StagePipes(self._pipes, set(own))
        runner = Runner(stages, schedule, chain.module, step, pipes, self._seed)
        runner.batches = self._batches_before
        if runner.steps is not None and self._loaded_steps:
            parameters = [p for group in self.optimizers[0].param_groups for p in group["params"]]
            here = {p for stage in stages for p in stage.module.parameters()}
            loaded = {parameters[place]: step for place, step in self._loaded_steps.items()}
            runner.steps.remember({p: step.to(p.device) for p, step in loaded.items() if p in here})
        flight, self._loaded_flight = self._loaded_flight, None
        if flight is not None and self._fits(flight) and flight.cuts == self._cuts:
            runner.put_in_flight(flight.of(self.global_rank // self._workers, own, self.root_device))
        elif flight is not None:
            rank_zero_warn(
                f"The checkpoint has {flight.batches} batches under way, of {flight.schedule} cut at {flight.cuts} in "
                f"{flight.pipelines} pipelines beside each other; {self.schedule} cut at {self._cuts} in "
                f"{self._pipelines} goes on without them."
            )
        if self.data_parallel is not None and self._pipelines > 1:
            self._replicas = {stage.index: self._make_replica(self.data_parallel, stage) for stage in stages}
        return runner

    def _make_replica(self, algorithm: AbstractAlgorithm, stage: Stage) -> Replica:
        assert self._communicator is not None
        (optimizer,) = self.optimizers
        of_stage = set(stage.trainable().values())
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p in of_stage]
        ranks = range(self.global_rank % self._workers, self.world_size, self._workers)
        resolved = algorithm.resolved(len(ranks))
        assert self.model is not None
        layers = layers_of(self.model, parameters)
        return Replica(resolved, self._communicator, ranks, parameters, layers, optimizer, stage.index, self._seed)

    def _fits(self, flight: InFlight) -> bool:
        """Tell whether stages of this schedule can go on with what was under way."""
        return (flight.schedule, flight.pipelines) == (repr(self.schedule), self._pipelines)

    def _make_residence(self) -> Residence:
        """Find the parameters that are on other workers while this one trains."""
        assert self.lightning_module is not None
        own = {p for stage in self._own_stages for block in self._stage_blocks[stage] for p in block.parameters()}
        workers = {
            parameter: self._rank_of(stage)
            for stage, blocks in enumerate(self._stage_blocks)
            for block in blocks
            for parameter in block.parameters()
            if parameter not in own and has_values(parameter)
        }
        names = {value: name for name, value in self.lightning_module.named_parameters()}
        return Residence(workers, names, torch.device("cpu") if self._through_stages else None)

    def _ends(self) -> list[tuple[End, int, int]]:
        """List all pipes of all pipelines: the stages, and their workers."""
        last, found = self.schedule.stages - 1, []
        for pipeline in range(self._pipelines):
            pairs = [(k, k + 1) for k in range(last)] + [(k + 1, k) for k in range(last)]
            for source, target in [*pairs, (_BATCH, last)]:
                ranks = self._rank_of(max(source, 0), pipeline), self._rank_of(target, pipeline)
                if ranks[0] != ranks[1]:
                    found.append(((source, target), *ranks))
        return found

    # -- training -----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Make one tick of this worker's stages."""
        module = self.lightning_module
        assert module is not None
        if private.takes_iterator(private.data_fetcher(module.trainer)):
            raise ConfigurationError(
                "PipelineStrategy got a training_step that takes the loader's iterator, and needs one that takes a "
                "batch. Take `batch` instead of `dataloader_iter`."
            )
        self._check_failure()
        if private.only_forward(module.trainer):  # by the whole model, which each worker has since the epoch's end
            self._shared_at = -1  # whose running statistics this changes
            return super().training_step(*args, **kwargs)
        if self._updates:
            raise ConfigurationError(
                f"PipelineStrategy got an optimizer_step that left out the update of batch {self._updates[0].batch}, "
                "whose gradient is there once, some batches after it. It needs to make one in every batch. To leave "
                "out bad gradients, set them to zero in on_before_optimizer_step."
            )
        batch, *rest = args

        def step(part: Any) -> Tensor:
            self._in_step = True
            try:
                output = module.training_step(part, *rest, **kwargs)
            finally:
                self._in_step = False
            return output.get("loss") if isinstance(output, Mapping) else output  # type: ignore[return-value]

        with self.precision_plugin.train_step_context(), self._named_failures():
            if self._runner is None:
                self._runner = self._begin(step, batch)
            self._runner.step = step
            if self._residence is not None:
                self._residence.leave(self.optimizers)
            for replica in self._replicas.values():
                replica.show_own()
            for stage in self._runner.due_next() if self._replicas else ():
                self._replicas[stage].begin()
            self._compare(batch, self._pipes)
            self._updates = self._runner.tick(batch)
        loss = self._runner.loss
        # Another worker's loss is not known here, and waiting for it would be a lock.
        return torch.full((), float("nan"), device=self.root_device) if loss is None else loss.clone()

    def _compare(self, batch: Any, pipes: Pipes | None) -> None:
        """See that the first and the last stage have got the same batch: its inputs are here, its targets there."""
        end = _BATCH, self.schedule.stages - 1
        ranks = self._rank_of(0), self._rank_of(end[1])
        if pipes is None or ranks[0] == ranks[1]:
            return
        if self.global_rank == ranks[0]:
            pipes.send(end, _fingerprint(batch))
        if self.global_rank == ranks[1]:
            own, theirs = _fingerprint(batch), pipes.receive(end)
            if not isinstance(theirs, Tensor) or not torch.equal(own, theirs.cpu()):
                raise ConfigurationError(
                    f"The workers of a pipeline got different batches: after {self._batches} batches of training, that "
                    f"of worker {ranks[0]}, which has its inputs, is not that of worker {ranks[1]}, which has its "
                    "targets. All need the same, in the same order: let samplers and data sets draw from a seed that "
                    "does not depend on the rank, or leave use_distributed_sampler=True."
                )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Do nothing: the tick has made the backward passes that were due."""
        return closure_loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        assert self.lightning_module is not None
        result = closure()
        self._update(optimizer, result, model, **kwargs)
        private.count_as_updated(optimizer)  # in the first batches no update is due on some workers
        trainer = self.lightning_module.trainer
        if self.drains and private.is_last_ready(trainer):  # with the learning rate of this epoch
            self._drain()
        if not self._local and is_looked_at(trainer):
            self._tell_metrics(trainer)
        return result

    def _update(self, optimizer: Optimizer, result: Any, model: Any = None, **kwargs: Any) -> None:
        """Make the updates that are due, of each stage apart: its gradient is clipped by its own norm."""
        updates, self._updates = self._updates, []
        for update in updates:
            gradients, replica = dict(update.gradients), self._replicas.get(update.stage)
            if replica is None:
                self._average(gradients)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = gradients.get(parameter)
            apply = partial(super().optimizer_step, optimizer, lambda: result, model, **kwargs)
            with slower(optimizer, update.rate):
                if replica is None:
                    apply()
                else:
                    replica.update(gradients, apply)
            self._shared_at = -1
        for parameter in [p for update in updates for p in update.gradients]:
            parameter.grad = None

    def _average(self, gradients: dict[Parameter, Tensor]) -> None:
        """Take the mean over the pipelines beside each other."""
        if self._pipelines == 1 or not gradients:
            return
        communicator = self._communicator
        assert communicator is not None
        members = range(self.global_rank % self._workers, self.world_size, self._workers)
        by_type: dict[torch.dtype, list[Parameter]] = {}
        for parameter, gradient in gradients.items():
            by_type.setdefault(gradient.dtype, []).append(parameter)
        packed = Vector(torch.cat([gradients[p].reshape(-1) for p in group]) for group in by_type.values())
        reduce = partial(communicator.collectives.all_reduce, packed, members)
        communicator.wait(communicator.submit(reduce))
        for buffer, group in zip(packed.buffers, by_type.values(), strict=True):
            for parameter, part in zip(group, torch.split(buffer, [p.numel() for p in group]), strict=True):
                gradients[parameter] = part.view_as(parameter)

    def _drain(self) -> None:
        """Bring all batches that are under way to their end. All workers together, after the same batch."""
        if self._runner is None:
            return
        for updates in self._runner.drain():
            self._shared_at = -1  # on all workers alike, also where there is no update
            self._updates = updates
            self._update(self.optimizers[0], torch.zeros(()), self.lightning_module)

    # -- evaluation through the stages --------------------------------------------------------------------------------

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().validation_step, *args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().test_step, *args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(super().predict_step, *args, **kwargs)

    def _evaluate(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch with the whole model, or bring it through this worker's stages."""
        if not self._through_stages:
            return evaluate(*args, **kwargs)
        batch, *rest = args
        if isinstance(batch, Iterator):
            raise ConfigurationError(
                'PipelineStrategy(evaluate="stages") got a step that takes the loader\'s iterator, and needs one that '
                "takes a batch. Take `batch` instead of `dataloader_iter`."
            )
        self._check_failure()

        def step(part: Any) -> Any:
            self._in_step = True
            try:
                return evaluate(part, *rest, **kwargs)
            finally:
                self._in_step = False

        with self.precision_plugin.val_step_context(), self._named_failures():
            if self._evaluation is None:
                with torch.inference_mode(False), torch.no_grad():  # what is made here is trained later
                    self._evaluation = self._begin_evaluation(step, batch)
            assert self._residence is not None
            self._residence.leave(self.optimizers)
            self._compare(batch, self._evaluation_pipes)
            return self._evaluation.run(partial(step, batch))

    def _begin_evaluation(self, step: Callable[[Any], object], batch: Any) -> Evaluation:
        """Cut the model, if it is not, and connect the stages for evaluations. All workers together."""
        chain, own = self._cut(step, batch), self._own_stages
        assert self._communicator is not None
        self._evaluation_pipes = Pipes(self._communicator, "evaluation", self._ends())
        stages = {stage: Sequential(*self._stage_blocks[stage]) for stage in own}
        last, pipes = self.schedule.stages - 1, _StagePipes(self._evaluation_pipes, set(own))
        return Evaluation(chain.module, stages, last, pipes, self.root_device, self._seed)

    def _start_evaluations(self, trainer: Trainer) -> None:
        """Let the user's hooks at the end of an evaluation run where its steps have come to their end."""
        module = self.lightning_module
        assert module is not None
        self._replaced.append(private.replace_evaluation_metrics(trainer, partial(self._share_metrics, trainer)))
        for stage in ("validation", "test", "predict"):
            name = f"on_{stage}_epoch_end"
            self._replaced.append(private.replace(module, name, partial(self._end_evaluation, getattr(module, name))))
        if self._pipelines > 1:
            assert self._communicator is not None
            self._last_stages = group_of(range(0, self.world_size, self._workers), self._communicator)

    def _end_evaluation(self, hook: Callable[[], Any]) -> Any:
        if not self._has_last_stage:
            return None
        self._in_epoch_end = True
        try:
            return hook()
        finally:
            self._in_epoch_end = False

    def _share_metrics(self, trainer: Trainer, update: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Let all workers know the metrics of an evaluation, for callbacks and for what the Trainer returns."""
        logged = update()
        self._tell_metrics(trainer)
        told = self._told({name: float(value) for name, value in logged.items()})
        return logged if self.global_rank == 0 else {name: torch.tensor(value) for name, value in told.items()}

    def _metrics_meet(self) -> bool:
        return self._pipelines > 1 if self._through_stages and not self._training else not self._training

    def _gather_metrics(self, tensor: Tensor) -> list[Tensor]:
        return self.gather_rows(tensor, self._last_stages)

    def on_test_start(self) -> None:
        self._start_evaluation()

    def on_predict_start(self) -> None:
        self._start_evaluation()

    def _start_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.begin()

    def on_validation_end(self) -> None:
        assert self.lightning_module is not None
        if self._through_stages and self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            self._gather()

    def on_test_end(self) -> None:
        self.on_validation_end()

    def on_predict_end(self) -> None:
        self.on_validation_end()

    # -- the whole model ----------------------------------------------------------------------------------------------

    @property
    def _batches(self) -> int:
        """The number of batches since training began, over resumed runs."""
        return self._batches_before if self._runner is None else self._runner.batches

    def _gather(self) -> None:
        """Give all workers the weights and buffers of all stages. All workers together."""
        if self._interrupted:
            return
        with torch.inference_mode(False):  # in which Lightning evaluates; what is made here is trained later
            self._bring_to_end()
            self._gather_stages()

    def _bring_to_end(self, at_last: bool = False) -> None:
        """Bring what is under way to its end, if it is time for that. All workers together."""
        if not (self.drains or at_last):
            return
        with self.precision_plugin.train_step_context(), self._named_failures():
            self._drain()

    def _gather_stages(self) -> None:
        if self._residence is None or (self._shared_at == self._batches and not self._residence.is_away):
            return
        self._residence.come_back()
        self._show_means()
        self._take_stages(lambda block: [*block.parameters(), *block.buffers()])
        for replica in self._replicas.values():
            replica.note_shown()
        self._shared_at = self._batches

    def _show_means(self) -> None:
        with self._named_failures():
            for replica in self._replicas.values():
                replica.show_mean()

    def _take_stages(self, what: Callable[[Module], list[Tensor]]) -> None:
        """Give all workers tensors of all stages, as the first pipeline has them. All workers together."""
        communicator = self._communicator
        assert communicator is not None
        for stage, blocks in enumerate(self._stage_blocks):
            named = [item for block in blocks for item in what(block)]
            tensors = [tensor.data for tensor in dict.fromkeys(named) if has_values(tensor)]
            with self._named_failures(), torch.no_grad():
                communicator.take_from(self._rank_of(stage, 0), tensors)

    def on_validation_start(self) -> None:
        self._start_evaluation()
        if not self._through_stages:
            self._gather()
        elif not self._interrupted:
            with torch.inference_mode(False):
                self._bring_to_end()
                self._show_means()
                if self._pipelines > 1:  # which have seen other batches
                    self._take_stages(lambda block: list(block.buffers()))
                for replica in self._replicas.values():
                    replica.note_shown()

    def on_train_end(self) -> None:
        if not self._interrupted:
            self._bring_to_end(at_last=True)
        self._gather()
        if self._runner is not None and not self._interrupted:  # a checkpoint that is saved later needs nobody else
            self._trained = self.optimizer_state(self.optimizers[0]), self._runner.batches
        if self._communicator is not None:
            self._communicator.barrier()  # whoever is done early must not take its connections down

    def _end_epoch(self, trainer: Trainer, epoch_end_reached: Callable[[], None]) -> None:
        """Give all workers what hooks at the end of an epoch read: what was logged with the loss, and the weights, if
        they are given all of them."""
        epoch_end_reached()
        if trainer.training and not self._interrupted:
            if self._through_stages:
                self._bring_to_end()
            else:
                self._gather()
            self._tell_metrics(trainer)

    def _tell_metrics(self, trainer: Trainer) -> None:
        """Tell all workers what worker 0 knows, so that callbacks and schedulers on each of them decide alike."""
        if self._communicator is None or self._local:
            return
        known = {name: float(value) for name, value in trainer.callback_metrics.items()}  # several may reduce them here
        trainer.callback_metrics.update(
            {name: torch.tensor(value, dtype=torch.float64) for name, value in self._told(known).items()}
        )

    def _told(self, values: dict[str, float]) -> dict[str, float]:
        """Return the values of worker 0. All workers together."""
        assert self._communicator is not None
        own = json.dumps(values if self.global_rank == 0 else {}).encode()
        told: dict[str, float] = json.loads(self._communicator.gather(own)[0])
        return told

    def check_collective(self, name: str) -> None:
        """Refuse a meeting of all workers in a step, of which each runs another part, or none.

        Raises:
            ConfigurationError: there.
        """
        if self._in_epoch_end:
            raise ConfigurationError(
                f"PipelineStrategy got {name} at the end of an evaluation through the stages, where the last stages' "
                'workers alone are. Leave it out, or use evaluate="whole".'
            )
        if self._in_step and not self._training:
            raise ConfigurationError(
                f"PipelineStrategy got {name} inside a step of an evaluation through the stages, of which the first "
                "stage's worker runs the beginning, the last one's the end, and others nothing. Meet at its end, as in "
                'on_validation_epoch_end, or use evaluate="whole".'
            )
        if self._in_step and not self._local:
            raise ConfigurationError(
                f"PipelineStrategy got {name} inside training_step, of which the first stage's worker runs the "
                "beginning, the last one's the end, and others nothing. Meet at the end of the epoch, as in "
                "on_train_epoch_end; a loss of the batches of all workers needs a strategy whose workers have the "
                "whole model, such as strategy='sync_sgd'."
            )

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        if not self._in_epoch_end:
            return super().all_gather(tensor, group, sync_grads)
        if self._pipelines == 1:
            return tensor.unsqueeze(0)
        self._in_epoch_end = False
        try:
            return super().all_gather(tensor, self._last_stages, sync_grads)
        finally:
            self._in_epoch_end = True

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if not self._logs_apart:
            return super().reduce(tensor, group, reduce_op)
        communicator, pipelines = self._communicator, self._pipelines
        if pipelines == 1 or not self._has_last_stage or communicator is None or self._interrupted:
            return tensor
        value = torch.as_tensor(tensor, device=self.root_device).detach().double().reshape(-1)
        members = list(range(0, self.world_size, self._workers))
        packed = Vector([value.clone()])
        communicator.wait(communicator.submit(partial(communicator.collectives.all_reduce, packed, members)))
        total = packed.buffers[0] * (pipelines if str(reduce_op).lower().endswith("sum") else 1)
        return total.to(tensor.dtype).view_as(tensor) if isinstance(tensor, Tensor) else total

    def total(self, tensor: Tensor) -> Tensor:
        total: Tensor = AbstractMeetingStrategy.reduce(self, tensor, reduce_op="sum")
        return total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Decide as all workers, or any, do; as worker 0 does, where it alone knows what was logged."""
        if not self._logs_apart or self._interrupted or self._local:
            return super().reduce_boolean_decision(decision, all)
        return bool(self.broadcast(decision))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return that of the whole model. All workers must call it together, as in ``trainer.save_checkpoint``.

        After an exception it has what this worker has: loading it names what is missing.
        """
        self._gather()
        if self._interrupted and self._residence is not None:
            with self._residence.left_out() as names:
                state: dict[str, Any] = super().lightning_module_state_dict()
            return {name: value for name, value in state.items() if name not in names}
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return that of the whole model's optimizer: what all stages' parameters have. All workers together."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        communicator = self._communicator
        if self._runner is None and self._trained is not None:
            return self._trained[0]
        if "state" not in state:  # Lightning's, in the place of none
            return state
        if self._runner is not None and self._runner.steps is not None:
            state = {**state, "state": self._with_steps(state["state"], self._runner.steps.remembered())}
        if communicator is None or self._local or self._interrupted or self._runner is None:
            return state
        merged: dict[int, Any] = {}
        with self._named_failures():
            told = [
                json.loads(text) for text in communicator.gather(json.dumps(pack_states(state["state"])[0]).encode())
            ]
            for rank, description in enumerate(told[: self._workers]):
                own = pack_states(state["state"])[1] if rank == self.global_rank else None
                tensors, build = unpack_states(description, own)
                communicator.take_from(rank, tensors)
                merged |= build()
        return {**state, "state": dict(sorted(merged.items()))}

    def _with_steps(self, states: Mapping[int, Any], steps: Mapping[Parameter, Tensor]) -> dict[int, Any]:
        """Put the smoothed steps of parameters among what the optimizer remembers of them."""
        parameters = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        own = {place: {_STEP: steps[p]} for place, p in enumerate(parameters) if p in steps}
        return {place: {**states.get(place, {}), **own.get(place, {})} for place in sorted({*states, *own})}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = [dict(each) for each in checkpoint["optimizer_states"]]
        self._loaded_steps = {}
        for state in states:
            found = state["state"]
            self._loaded_steps |= {place: values[_STEP] for place, values in found.items() if _STEP in values}
            without = {place: {n: v for n, v in values.items() if n != _STEP} for place, values in found.items()}
            state["state"] = {place: values for place, values in without.items() if values}
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        batches = self._batches if self._runner is not None or self._trained is None else self._trained[1]
        if not self._interrupted:  # otherwise the others have stopped, and it is what this worker has
            checkpoint[_CHECKPOINT] = {"batches": batches, "method": self.schedule.name, "seed": self._seed}
            if self._runner is not None and "optimizer_states" in checkpoint:
                checkpoint[_CHECKPOINT] |= self._collect_flight(self._runner)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _collect_flight(self, runner: Runner) -> dict[str, Any]:
        """Give worker 0 what is under way in all stages; nothing, if nothing is. All workers together."""
        communicator, pipeline = self._communicator, self.global_rank // self._workers
        assert communicator is not None
        with self._named_failures():
            own_counts = {str(index): stage.under_way for index, stage in runner.stages.items()}
            told = [json.loads(each) for each in communicator.gather(json.dumps(own_counts).encode())]
            counts: dict[int, int] = {}
            for each in told[pipeline * self._workers : (pipeline + 1) * self._workers]:
                counts |= {int(index): count for index, count in each.items()}
            if not any(counts.values()):
                return {}
            own = pack_flight(pipeline, runner.in_flight(counts))
            sizes = {name: len(packed) for name, packed in own.items()}
            stages: dict[str, Tensor] = {}
            for rank, told_sizes in enumerate(communicator.gather(json.dumps(sizes).encode())):
                for name, size in json.loads(told_sizes).items():
                    packed = own[name] if rank == self.global_rank else torch.empty(size, dtype=torch.uint8)
                    communicator.take_from(rank, [packed])
                    if self.global_rank == 0:
                        stages[name] = packed
        return InFlight(repr(self.schedule), self._cuts, self._pipelines, counts[0], stages).saved()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        own = checkpoint.get(_CHECKPOINT, {})
        self._batches_before, self._loaded_seed = int(own.get("batches", 0)), own.get("seed")
        self._loaded_flight = InFlight.loaded(own)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._runner is not None:  # in the middle of a run, as at the end of a search for a learning rate
            self._runner.abandon()
            self._runner.batches = self._batches_before
        if self._residence is not None:
            self._residence.note_written()
        super().load_model_state_dict(checkpoint, strict)
        for replica in self._replicas.values():
            replica.begin_anew()

    # -- the end, good or bad -----------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        watch = self._watch
        if watch is not None:
            publish_exception(watch, exception, self.global_rank)
        self._close(failed=True)
        if watch is not None and self.root_device.type == "cpu":  # a CUDA group would wait for its peers
            leave_process_group()

    def _close(self, failed: bool) -> None:
        for pipes in (self._pipes, self._evaluation_pipes):
            if pipes is not None:
                pipes.close(failed)
        self._pipes = self._evaluation_pipes = None
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.close(failed)
        elif self._watch is not None:
            self._watch.close()
        self._watch = None

    def teardown(self) -> None:
        for undo in self._replaced:
            undo()
        if self._metrics is not None:
            self._metrics.close()
        interrupted = self._interrupted
        self._close(failed=interrupted)
        for replica in self._replicas.values():
            replica.release()
        self._clear()
        super().teardown()


class _StagePipes(AbstractPipes):
    """Pipes of a worker that has some stages: queues between those, and connections to the others."""

    def __init__(self, pipes: Pipes, own: set[int]) -> None:
        self._pipes = pipes
        self._own = own
        self._queues = LocalPipes()

    def send(self, source: int, target: int, value: Value) -> None:
        if target in self._own:
            self._queues.send(source, target, value)
        else:
            self._pipes.send((source, target), value)

    def has(self, source: int, target: int) -> bool:
        if source in self._own:
            return self._queues.has(source, target)
        return self._pipes.has((source, target))

    def receive(self, source: int, target: int) -> Value:
        if source in self._own:
            return self._queues.receive(source, target)
        return self._pipes.receive((source, target))

    def waiting(self, source: int, target: int, count: int) -> list[Value]:
        if source in self._own:
            return self._queues.waiting(source, target, count)
        return self._pipes.waiting((source, target), count)

    def put(self, source: int, target: int, values: Sequence[Value]) -> None:
        if not values:
            return
        if source in self._own:
            self._queues.put(source, target, values)
        else:
            self._pipes.put((source, target), values)

    def wait_for_any(self, ends: Sequence[tuple[int, int]]) -> None:
        self._pipes.wait_for_any([end for end in ends if end[0] not in self._own])


def _fingerprint(batch: Any) -> Tensor:
    """Compute a few numbers by which two workers see whether they have the same batch.

    Whole numbers are what targets and tokens mostly are, and nobody changes them at random, as images are: if there are
    any but bytes, these are looked at, and otherwise shapes alone.
    """
    tensors = batch_tensors(batch)
    shapes = [size for tensor in tensors for size in tensor.shape]
    whole = [t for t in tensors if t.dtype in (torch.int64, torch.int32, torch.bool)]
    sums = [float(t.double().sum()) for t in whole]
    firsts = [float(t.reshape(-1)[0]) for t in whole if t.numel()]
    return torch.tensor([float(len(tensors)), *map(float, shapes), *sums, *firsts], dtype=torch.float64)
