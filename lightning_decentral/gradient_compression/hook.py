"""The communication hook of `DistributedDataParallel`: buckets are exchanged beside the backward pass.

Each bucket becomes coroutines (`aggregation`), which a relay of three lanes carries (`transport.lanes`), in the order
in which the buckets become ready, which is the same on all workers. So schemes of several rounds are safe with every
back end: nothing is started from a callback of the back end's threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_decentral.compression import DGC
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.gradient_compression.aggregation import AnyWay, exchanged
from lightning_decentral.gradient_compression.buckets import Bucket, Buckets
from lightning_decentral.gradient_compression.checkpoint import collected, share_of
from lightning_decentral.gradient_compression.collectives import LANES, Collectives
from lightning_decentral.gradient_compression.measuring import Measured, Measuring
from lightning_decentral.gradient_compression.momentum import Velocities
from lightning_decentral.gradient_compression.residuals import Residuals, norm_of
from lightning_decentral.gradient_compression.scheme import Scheme, ways
from lightning_decentral.gradient_compression.step import Exchange, Step
from lightning_decentral.traffic import Traffic
from lightning_decentral.transport.lanes import Lane, Relay
from lightning_decentral.transport.liveness import Watch, meet

_WATCH_SECONDS = 60.0  # for reaching worker 0's store, if there is no time-out


class GradientExchange:
    """Exchanges the gradients of a `DistributedDataParallel` model in compressed form.

    `begin` before a backward pass and `finish` after it; in between DDP calls the hook for every bucket. What is
    remembered changes in `finish` only, and only if every gradient was finite on every worker.

    Args:
        parameters: of the model, by name; those that are trained.
        schemes: how each is exchanged; those without an entry as they are.
        seed: of the random numbers; the same on all workers.
        timeout: of an exchange; ``None``: the back end's own.
        main_address: where worker 0 can be reached, for heartbeats that tell who was lost; ``None``: nobody watches.

    Attributes:
        step: exchanges finished.

    Must be made by all workers together, after `torch.distributed` has been initialized.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        schemes: Mapping[str, Scheme],
        seed: int = 0,
        timeout: timedelta | None = None,
        main_address: str | None = None,
    ) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self._schemes = dict(schemes)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._order = list(parameters)
        self._seed = seed
        self._device = device = next(iter(parameters.values())).device
        in_two_phases = any("two_phase" in ways(scheme) for scheme in schemes.values())
        self._collectives = Collectives(device, timeout, spreads=in_two_phases)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lanes = [Lane(f"gradient-exchange-{number}", self._stream) for number in range(LANES)]
        seconds = _WATCH_SECONDS if timeout is None else timeout.total_seconds()
        self._watch: Watch | None = None
        if main_address is not None:
            self._watch = meet(main_address, self.rank, self.world_size, seconds, "DDPStrategy(timeout=...)")
        self._residuals = Residuals(self.rank, self.world_size, device)
        self._buckets = Buckets(parameters, schemes, self.rank, self.world_size, self._residuals.move_into)
        dgcs = {scheme.compressor for scheme in schemes.values() if isinstance(scheme.compressor, DGC)}
        self._velocities = Velocities(next((dgc for dgc in dgcs if dgc.momentum or dgc.clip), None), self.world_size)
        self._rights: dict[str, Tensor] = {}  # PowerSGD's last result, where the next step starts
        self._current: Step | None = None  # none: nobody who drives this expects a backward pass

    def register(self, model: DistributedDataParallel) -> None:
        """Become the model's communication hook.

        Raises:
            ConfigurationError: if it has one already.
        """
        try:
            model.register_comm_hook(None, lambda _, bucket: self._on_bucket(bucket))
        except RuntimeError as error:
            raise ConfigurationError(
                f"DistributedDataParallel refused the communication hook ({error}); it takes one, before the first "
                "step. Remove the strategy's ddp_comm_hook and all but one GradientCompression."
            ) from error

    def begin(
        self,
        rates: Mapping[str, float],
        dense: bool = False,
        measure: bool = False,
        epoch: int = 0,
        scale: float = 1.0,
    ) -> None:
        """Say what the next backward pass needs.

        Args:
            rates: for each parameter what a gradient is multiplied by before it changes the parameter: the learning
                rate over the loss scale.
            dense: exchange all gradients as they are; memories wait.
            measure: fill in all of `Measured`, which takes a few passes over the gradients.
            epoch: for compressors that warm up.
            scale: of the loss; `DGC` keeps velocities in the unit of gradients.
        """
        measuring = Measuring(measure, on_gpu=self._stream is not None)
        self._current = Step(
            self.rank, self.world_size, self.step, self._seed, epoch, scale, rates, dense, measuring, self._rights
        )

    def finish(self, may_skip: bool = False) -> Measured | None:
        """Remember after a backward pass what was not sent, or refuse the step.

        Args:
            may_skip: whether somebody else skips a step with gradients that are not finite; all workers have them then.

        Returns:
            What it was like; nothing if no gradients were exchanged (while they are accumulated), or if the step is
            skipped.

        Raises:
            CompressionError: on all workers, if a gradient on any of them was not finite.
            PeerLost: if another worker was lost in this exchange.
            WorkerFailed: if another worker raised.
        """
        step, self._current = self._current, None
        if step is None:
            return None
        if step.failures:
            raise self._diagnosed(step.failures[0])
        if not step.groups:
            return None
        self.step += 1
        if step.refused:
            self._residuals.discard(step.groups)
            if may_skip:
                return None
            raise CompressionError(self._refusal(step.names))
        frozen = {name for name, rate in step.rates.items() if rate == 0.0}
        if not step.dense:
            self._residuals.commit(step.groups, step.rates, frozen)
        self._rights.update(step.new_rights)
        self._velocities.commit(step.velocities, frozen, step.scale)
        return step.measuring.result(self.residual_norm() if step.measuring.everything else 0.0)

    def residual_norm(self) -> float:
        """Compute the norm of all that this worker has not sent yet."""
        return norm_of(self._buckets.groups)

    @property
    def traffic(self) -> Traffic:
        """The bytes and messages that this worker sent."""
        return self._collectives.traffic

    @property
    def is_open(self) -> bool:
        """Whether gradients can still be exchanged."""
        return self._collectives.is_open

    def close(self, error: BaseException | None = None) -> None:
        """End the lanes, and the process groups.

        Args:
            error: with which this worker ends; the others are told, who would find it gone.
        """
        if not self.is_open:
            return
        if self._watch is not None:
            if error is not None:
                self._watch.publish(error)
            self._watch.close()
        for lane in self._lanes:
            lane.close()
        self._collectives.close()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self, every_worker: bool) -> dict[str, Any] | None:
        """Collect what has to be saved, on worker 0; nothing on the others. All workers call this together.

        What owners remember of the mean is saved once, for all parts together.

        Args:
            every_worker: each worker's memory; otherwise their mean, with that of the owners, one for all.
        """
        names = [name for name in self._order if name in self._residuals]
        workers = collected({name: self._residuals.own(name) for name in names}, every_worker)
        velocities = collected(self._velocities.values, every_worker)
        owners = collected({name: self._residuals.owned(name) for name in names}, every_worker=False)[0]
        if self.rank:
            return None
        owners = {name: owned.mul_(self.world_size) for name, owned in owners.items()}  # a sum: each has its own part
        if not every_worker:
            for name in owners:
                workers[0][name].add_(owners[name])
            owners = {}
        return {
            "world_size": self.world_size,
            "step": self.step,
            "bytes_sent": self.traffic.bytes_sent,
            "rates": dict(self._residuals.rates),
            "rights": {name: right.cpu() for name, right in self._rights.items()},
            "workers": workers,
            "owners": owners,
            "velocities": velocities,
            "velocity_scale": self._velocities.scale,
        }

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Take what `state` gave; as many workers get their own memory, any other number the mean of all.

        What is remembered so far is forgotten: a search for a learning rate goes back to where it began.

        Returns:
            The parameters whose memory is of no use now, because they are not compressed with error feedback.
        """
        workers: list[dict[str, Tensor]] = state["workers"]
        owners: dict[str, Tensor] = state.get("owners", {})  # older checkpoints have none
        same = len(workers) == self.world_size == state["world_size"]
        remembering = {name for name, scheme in self._schemes.items() if scheme.feedback}
        names = [name for name in workers[0] if name in remembering]
        own = {name: share_of(workers, name, self.rank, same) for name in names}
        velocities: list[dict[str, Tensor]] = state.get("velocities", [{}])
        self._current = None
        self._buckets.forget()
        self._residuals.load(names, state, own, owners)
        self._rights = {name: right.to(self._device) for name, right in state["rights"].items()}
        self._velocities.values = {
            name: share_of(velocities, name, self.rank, same).to(self._device) for name in velocities[0]
        }
        self._velocities.scale = state.get("velocity_scale", 1.0)
        self.step = state["step"]
        self.traffic.bytes_sent = state["bytes_sent"]
        return [name for name in workers[0] if name not in remembering]

    # -- one bucket ----------------------------------------------------------------------------------------------------

    def _on_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        step = self._current
        if step is None:  # a search for a learning rate takes all callbacks away for a while
            return allreduce_hook(self._collectives.group, bucket)
        devices: list[Any] = [] if self._stream is None else [self._device]
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        names = [self._names[id(parameter)] for parameter in bucket.parameters()]
        own = Bucket(names, bucket.buffer(), bucket.gradients())

        def done() -> None:
            try:
                if not step.failures:
                    own.close()
            except BaseException as error:  # `finish` raises it; DDP would hide what it is
                step.failures.append(error)
            future.set_result(own.buffer)

        relay = Relay(self._lanes, partial(self._collectives.begin, step))
        relay.start(lambda: self._exchanged(step, own), step.failures, done)
        return future

    def _exchanged(self, step: Step, bucket: Bucket) -> Iterator[AnyWay]:
        """Make the coroutines that put the mean in the place of a bucket's gradients."""
        bucket.open()
        step.measuring.count(elements=bucket.buffer.numel())
        step.velocities.update(self._velocities.accelerate(bucket.names, bucket.flat, step.scale))
        groups = self._buckets.whole(bucket) if step.dense else self._buckets.groups_of(bucket)
        step.groups += groups
        exchanges = []
        for group in groups:
            gradients = [bucket.gradients[place] for place in group.places]
            factor = self._residuals.factor(group, step.rates)
            exchanges.append(Exchange(step, group, bucket.vector_of(group), gradients, factor))
        return exchanged(exchanges)

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _diagnosed(self, error: BaseException) -> BaseException:
        """Find out who was lost, if that is why an exchange has failed."""
        known = isinstance(error, ConfigurationError | CompressionError)
        if self._watch is None or known or not isinstance(error, RuntimeError):
            return error
        lost = self._watch.diagnose(error)  # what gloo says names nobody
        lost.__cause__ = error
        return lost

    def _refusal(self, names: Sequence[str]) -> str:
        """Say who has which gradient that is not finite. All workers come here together."""
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, list(dict.fromkeys(names)), group=self._collectives.group)
        found = "; ".join(f"worker {rank}: {', '.join(named[:5])}" for rank, named in enumerate(every) if named)
        return (
            f"Got NaN or infinity in a gradient ({found}), need finite gradients: compressed, one of them would spoil "
            "all that share its scale. Lower the learning rate, find the operation with "
            "Trainer(detect_anomaly=True), or with float16 use precision='16-mixed', which skips such steps."
        )
