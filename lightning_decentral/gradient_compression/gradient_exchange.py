"""Compressed gradients under `DistributedDataParallel`: a communication hook that compresses, exchanges and averages.

Each bucket is handled on a background thread (the *lane*) and a process group of its own while the backward pass goes
on, in the order in which the buckets become ready, which is the same on all workers. So schemes of several rounds
(PowerSGD) are safe with every back end: nothing is started from a callback of the back end's threads.

Sums are begun there and waited for on a second lane, so that the next bucket's is on its way.

What is aggregated in two phases is cut into pieces, which pass three lanes: the first one compresses and sends, the
second one averages and sends the mean when a piece's messages have arrived, the third one decodes. So one piece is on
its way while others are worked on, whatever the sizes of the layers, and what is worked on stays in the processor's
cache. What such a bucket has of uncompressed parameters travels in the same messages: an all-reduce of a few kilobytes
would cost as many latencies in sequence as there are workers, twice.

What is remembered belongs to parameters and not to buckets, because DDP forms its buckets anew after the first step.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import accumulate, pairwise, zip_longest
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_decentral.compression import DGC, AbstractCompressor, ErrorFeedback, Payload, PowerSGD, orthogonalize
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.compression.tiles import norms, tiles
from lightning_decentral.errors import CompressionError, ConfigurationError
from lightning_decentral.gradient_compression.aggregation import (
    UNCOMPRESSED,
    Scheme,
    Way,
    aligned,
    chosen,
    pieces_of,
    ways,
)
from lightning_decentral.simulation.cluster import Traffic, all_reduce_bytes
from lightning_decentral.transport.liveness import Watch

_Submit = Callable[[int, Callable[[], None]], None]
"""Has a lane do something after all that it was given before."""

_RING_BYTES = 1 << 18  # means of at least this size go around the ring of workers, if these are near
_NEAR_SECONDS = 3e-3  # that is, if an empty message takes less from one worker to the next
_STATUS = 8  # bytes at the end of a message of the two phases; the first says whether the gradient was not finite


@dataclass(slots=True)
class Measured:
    """What one step's exchange was like on this worker.

    Attributes:
        elements: of all gradients.
        bytes: handed to the collectives.
        input_norm: of what was compressed.
        error_norm: of what compression left out of it.
        residual_norm: of what is remembered; 0 without error feedback.
        compress_seconds: in compressors; with error feedback including the decoding of the own message.
        communicate_seconds: in collectives, waiting for others included.
        decompress_seconds: in decoding and averaging.
    """

    elements: int = 0
    bytes: int = 0
    input_norm: float = 0.0
    error_norm: float = 0.0
    residual_norm: float = 0.0
    compress_seconds: float = 0.0
    communicate_seconds: float = 0.0
    decompress_seconds: float = 0.0


@dataclass(slots=True)
class _Piece:
    """Neighbouring elements of a group that travel together in two phases."""

    borders: list[int]  # of the workers' parts of it, in the group's vector
    owned: slice  # where this worker's part is in the owner's memory

    @property
    def whole(self) -> slice:
        """Where it is in the group's vector."""
        return slice(self.borders[0], self.borders[-1])

    def part(self, owner: int) -> slice:
        """Where a worker's part is in the group's vector."""
        return slice(self.borders[owner], self.borders[owner + 1])

    @property
    def elements(self) -> list[int]:
        """Of each worker's part."""
        return [stop - start for start, stop in pairwise(self.borders)]


@dataclass(slots=True)
class _Group:
    """The parameters of one bucket that are compressed as one vector."""

    scheme: Scheme | None  # none: an all-reduce of the gradients as they are
    names: list[str]
    pieces: list[int]  # their numbers in the bucket
    sizes: list[int]
    neighbours: bool  # whether nothing else of the bucket lies between these
    stream: int  # of random numbers: the first parameter's number in the model
    way: Way = "all_reduce"
    cut: list[_Piece] = field(default_factory=list)  # in two phases
    memory: ErrorFeedback | None = None
    owner: ErrorFeedback | None = None  # of what the second compression leaves out of this worker's parts of the mean

    @property
    def memories(self) -> list[ErrorFeedback]:
        """Those that there are."""
        return [memory for memory in (self.memory, self.owner) if memory is not None]


@dataclass(slots=True)
class _Sent:
    """A piece of one group on its way through the two phases."""

    group: _Group
    piece: _Piece
    x: Tensor  # the group's vector
    compressor: AbstractCompressor
    generator: torch.Generator | None
    factor: float | Tensor  # what brings the group's memories into the unit of this step's gradients
    sizes: list[int]  # of the messages of the owners' parts, in bytes

    def factor_of(self, where: slice) -> float | Tensor:
        """That of a part of the group's vector."""
        return self.factor[where] if isinstance(self.factor, Tensor) else self.factor


@dataclass(slots=True)
class _Step:
    """What happened since `begin`: buckets that were exchanged, and what must be remembered if all went well."""

    groups: list[_Group] = field(default_factory=list)
    rights: dict[str, Tensor] = field(default_factory=dict)
    velocities: dict[str, Tensor] = field(default_factory=dict)
    refused: bool = False
    names: list[str] = field(default_factory=list)  # of this worker's gradients that are not finite
    error: BaseException | None = None
    measured: Measured = field(default_factory=Measured)
    squares: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of the input and the error
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)


class GradientExchange:
    """Exchanges the gradients of a `DistributedDataParallel` model in compressed form.

    `begin` before a backward pass and `finish` after it; in between DDP calls the hook for every bucket. Memories
    change in `finish` only, and only if every gradient was finite on every worker.

    Args:
        parameters: of the model, by name; those that are trained.
        schemes: how each is exchanged; those without an entry as they are.
        seed: of the random numbers; the same on all workers.
        timeout: of an exchange; ``None``: the back end's own.
        main_address: where worker 0 can be reached, for heartbeats that tell who was lost; ``None``: nobody watches.

    Attributes:
        traffic: what this worker sent.
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
        self.traffic = Traffic()
        self.step = 0
        self._schemes = dict(schemes)
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._numbers = {name: number for number, name in enumerate(parameters)}
        self._seed = seed
        self._groups = [dist.new_group(timeout=timeout) for _ in range(2)]
        self._group, self._second_group = self._groups
        self._device = device = next(iter(parameters.values())).device
        self._near = any("two_phase" in ways(scheme) for scheme in schemes.values()) and self._is_near()
        self._lanes = [ThreadPoolExecutor(1, thread_name_prefix=f"gradient-exchange-{lane}") for lane in range(3)]
        self._watch: Watch | None = None
        if main_address is not None:
            hosts: list[Any] = [None] * self.world_size
            dist.all_gather_object(hosts, socket.gethostname())
            seconds = 60.0 if timeout is None else timeout.total_seconds()
            port = [0]
            if self.rank == 0:
                self._watch = Watch(main_address, 0, 0, hosts, seconds, "DDPStrategy(timeout=...)")
                port = [self._watch.port]
            dist.broadcast_object_list(port, 0)
            if self._watch is None:
                self._watch = Watch(main_address, port[0], self.rank, hosts, seconds, "DDPStrategy(timeout=...)")
        self._counting = threading.Lock()  # all lanes count
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._plans: dict[tuple[int, ...], list[_Group]] = {}
        self._homes: dict[str, tuple[_Group, int]] = {}  # where each parameter's memory is
        self._loaded: dict[str, Tensor] = {}  # memories out of a checkpoint, for buckets that are still to come
        self._loaded_owned: dict[str, Tensor] = {}  # those of the owners, whole: every worker takes its part
        self._rates: dict[str, float] = {}  # the unit of each memory
        found = {scheme.compressor for scheme in schemes.values() if isinstance(scheme.compressor, DGC)}
        self._momentum = next((one for one in found if one.momentum or one.clip), None)
        self._velocities: dict[str, Tensor] = {}  # with momentum correction: of all parameters
        self._velocity_scale = 1.0  # their unit
        self._rights: dict[str, Tensor] = {}  # PowerSGD's last result, where the next step starts
        self._now: Mapping[str, float] = {}
        self._settled: Mapping[str, float] | None = None  # the rates, if every memory is in their unit
        self._dense, self._measure, self._epoch, self._scale = False, False, 0, 1.0
        self._current = _Step()
        self._begun = False  # whether whoever drives this expects a backward pass

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
                rate over the loss scale. Pass the same object as long as nothing changes.
            dense: exchange all gradients as they are; memories wait.
            measure: fill in all of `Measured`, which takes a few passes over the gradients.
            epoch: for compressors that warm up.
            scale: of the loss; `DGC` keeps velocities in the unit of gradients.
        """
        self._now, self._dense, self._measure, self._epoch, self._scale = rates, dense, measure, epoch, scale
        self._current = _Step()
        self._begun = True

    def finish(self, may_skip: bool = False) -> Measured | None:
        """After a backward pass: remember what was not sent, or refuse the step.

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
        step, self._current = self._current, _Step()
        self._begun = False
        if step.error is not None:
            known = isinstance(step.error, ConfigurationError | CompressionError)
            if self._watch is None or known or not isinstance(step.error, RuntimeError):
                raise step.error
            raise self._watch.diagnose(step.error) from step.error  # what gloo says names nobody
        if not step.groups:
            return None
        self.step += 1
        if step.refused:
            for group in step.groups:
                for memory in group.memories:
                    memory.discard()
            if may_skip:
                return None
            raise CompressionError(self._refusal(step.names))
        frozen = {name for name, rate in self._now.items() if rate == 0.0}
        for group in step.groups:
            if not self._dense:
                self._commit(group, frozen)
        if not self._dense:
            self._settled = None if frozen else self._now
        self._rights.update(step.rights)
        self._velocities.update({name: each for name, each in step.velocities.items() if name not in frozen})
        self._velocity_scale = self._scale
        return self._measured(step)

    def residual_norm(self) -> float:
        """Of all that this worker has not sent yet."""
        groups = [group for plan in self._plans.values() for group in plan]
        squares = (_sum_of_squares(each.memory) for group in groups for each in group.memories)
        return sqrt(sum(float(square) for square in squares))

    @property
    def is_open(self) -> bool:
        """Whether gradients can still be exchanged."""
        return bool(self._groups)

    def close(self, error: BaseException | None = None) -> None:
        """End the lanes, and the process groups.

        Args:
            error: with which this worker ends; the others are told, who would find it gone.
        """
        if not self._groups:
            return
        if self._watch is not None:
            if error is not None:
                self._watch.publish(error)
            self._watch.close()
        for lane in self._lanes:
            lane.shutdown(wait=True)
        if dist.is_initialized():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups = []

    def _is_near(self) -> bool:
        """Whether means should go around the ring of workers; the same answer on all of them.

        Around a ring every worker sends to one other, whose link it has for itself. An all-to-all shares it between
        connections that do not take up what another one leaves, and needs a third more time for the same bytes over
        TCP; but a ring waits for as many latencies in sequence as there are workers.
        """
        if self.world_size == 2 or self._device.type != "cpu" or dist.get_backend(self._second_group) != "gloo":
            return False
        own, every = torch.zeros(1), torch.zeros(self.world_size)
        seconds = []
        for _ in range(5):  # the first makes the connections
            start = time.perf_counter()
            dist.all_gather_into_tensor(every, own, group=self._second_group)
            seconds.append(time.perf_counter() - start)
        slowest = torch.tensor([min(seconds)])
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group=self._second_group)
        return slowest.item() < _NEAR_SECONDS * (self.world_size - 1)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state(self, every_worker: bool) -> dict[str, Any] | None:
        """What has to be saved, on worker 0; nothing on the others. All workers call this together.

        What owners remember of the mean is saved once, for all parts together.

        Args:
            every_worker: each worker's memory; otherwise their mean, with that of the owners, one for all.
        """
        memories = {name: self._memory_of(name) for name in self._numbers if name in {*self._homes, *self._loaded}}
        workers = self._collected(memories, every_worker)
        velocities = self._collected(self._velocities, every_worker)
        owners = self._collected({name: self._owned(name) for name in memories}, every_worker=False)[0]
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
            "rates": dict(self._rates),
            "rights": {name: right.cpu() for name, right in self._rights.items()},
            "workers": workers,
            "owners": owners,
            "velocities": velocities,
            "velocity_scale": self._velocity_scale,
        }

    def _collected(self, own: Mapping[str, Tensor], every_worker: bool) -> list[dict[str, Tensor]]:
        """All workers' vectors, or their mean alone, on worker 0; on the others the dictionaries are empty."""
        workers: list[dict[str, Tensor]] = [{} for _ in range(self.world_size if every_worker else 1)]
        for dtype in sorted({vector.dtype for vector in own.values()}, key=str):
            chosen_names = [name for name, vector in own.items() if vector.dtype == dtype]
            sizes = [own[name].numel() for name in chosen_names]
            flat = torch.cat([own[name].reshape(-1) for name in chosen_names])
            if not every_worker:
                dist.all_reduce(flat)
                flat /= self.world_size
            for rank, worker in enumerate(workers):
                if rank and self.rank == rank:
                    dist.send(flat, 0)
                elif rank and self.rank == 0:
                    dist.recv(flat, rank)
                if self.rank == 0:
                    parts = torch.split(flat.to("cpu", copy=True), sizes)
                    worker.update((name, part.clone()) for name, part in zip(chosen_names, parts, strict=True))
        return workers

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Take what `state` gave; as many workers get their own memory, any other number the mean of all.

        What is remembered so far is forgotten: a search for a learning rate goes back to where it began.

        Returns:
            The parameters whose memory is of no use now, because they are not compressed with error feedback.
        """
        workers: list[dict[str, Tensor]] = state["workers"]
        owners: dict[str, Tensor] = state.get("owners", {})  # older checkpoints have none
        same = len(workers) == self.world_size == state["world_size"]
        dropped = []
        self._plans, self._homes, self._loaded, self._loaded_owned, self._velocities = {}, {}, {}, {}, {}
        self._current = _Step()
        for name in workers[0]:
            scheme = self._schemes.get(name)
            if scheme is None or not scheme.feedback:
                dropped.append(name)
                continue
            piece = workers[self.rank][name] if same else torch.stack([each[name] for each in workers]).mean(0)
            self._loaded[name] = piece.to(self._device)
            if name in owners:
                self._loaded_owned[name] = owners[name].to(self._device)
        self._rates = {name: rate for name, rate in state["rates"].items() if name in self._loaded}
        self._rights = {name: right.to(self._device) for name, right in state["rights"].items()}
        velocities: list[dict[str, Tensor]] = state.get("velocities", [{}])
        for name in velocities[0]:
            each = velocities[self.rank][name] if same else torch.stack([one[name] for one in velocities]).mean(0)
            self._velocities[name] = each.to(self._device)
        self._velocity_scale = state.get("velocity_scale", 1.0)
        self.step = state["step"]
        self.traffic.bytes_sent = state["bytes_sent"]
        self._settled = None
        return dropped

    # -- one bucket ----------------------------------------------------------------------------------------------------

    def _on_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        if not self._begun:  # a search for a learning rate takes all callbacks away for a while
            return allreduce_hook(self._group, bucket)
        buffer, parameters, gradients = bucket.buffer(), bucket.parameters(), bucket.gradients()
        if self._stream is None:
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            ready = None
        else:
            future = torch.futures.Future(devices=[self._device])
            ready = torch.cuda.current_stream(self._device).record_event()
        step = self._current
        used = 1  # lanes

        def submit(lane: int, task: Callable[[], None]) -> None:
            """Do it after all that was submitted to this lane before, unless something failed."""
            nonlocal used
            used = max(used, lane + 1)

            def run() -> None:
                with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                    try:
                        if step.error is None:
                            if ready is not None and self._stream is not None:
                                self._stream.wait_event(ready)
                            task()
                    except BaseException as error:  # `finish` raises it; DDP would hide what it is
                        step.error = error

            self._lanes[lane].submit(run)

        def end(lane: int) -> None:
            """Once all lanes have done what they have of this bucket, it is exchanged."""
            if lane == used:
                future.set_result(buffer)
            else:
                self._lanes[lane].submit(end, lane + 1)

        submit(0, lambda: self._exchange(step, submit, buffer, parameters, gradients))
        end(0)
        return future

    def _exchange(
        self,
        step: _Step,
        submit: _Submit,
        buffer: Tensor,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> None:
        """All of a bucket's exchange that the first lane does; it submits the rest to the others."""
        names = [self._names[id(parameter)] for parameter in parameters]
        if buffer.is_sparse:
            raise ConfigurationError(
                f"GradientCompression got a sparse gradient of {', '.join(names)}, needs dense ones. Make the layer "
                "with sparse=False, or remove the callback."
            )
        pieces = torch.split(buffer, [gradient.numel() for gradient in gradients])
        step.measured.elements += buffer.numel()
        if self._momentum is not None:
            self._accelerate(step, self._momentum, names, pieces)
        if self._dense:
            everything = _Group(None, names, list(range(len(names))), [piece.numel() for piece in pieces], True, 0)
            groups = [everything]
        else:
            groups = self._plan(names, [id(parameter) for parameter in parameters], gradients)
        step.groups += groups
        vectors = []
        for group in groups:
            if group.neighbours:
                start = pieces[group.pieces[0]].storage_offset() - buffer.storage_offset()
                vectors.append(buffer[start : start + sum(group.sizes)])
            else:
                vectors.append(torch.cat([pieces[piece] for piece in group.pieces]))

        def copy_back(group: _Group, x: Tensor) -> None:
            if not group.neighbours:
                torch._foreach_copy_([pieces[piece] for piece in group.pieces], list(torch.split(x, group.sizes)))

        def end(group: _Group, x: Tensor, go_on: Callable[[], None]) -> None:
            go_on()
            copy_back(group, x)

        # All-reduces take as many latencies in sequence as there are workers, twice: the second lane waits for them.
        for group, x in zip(groups, vectors, strict=True):
            if group.scheme is None:
                submit(1, partial(end, group, x, self._all_reduce(step, group, x)))
        together = [(group, x) for group, x in zip(groups, vectors, strict=True) if group.way == "two_phase"]
        prepared = [self._prepared(group, x) for group, x in together]
        for of_groups in zip_longest(*prepared):  # under way while others are exchanged
            self._first_phase(step, submit, [sent for sent in of_groups if sent is not None])
        for group, x in zip(groups, vectors, strict=True):
            if group.way == "two_phase" or group.scheme is None:
                continue
            if group.scheme.compressor.traits.linear and group.way == "all_reduce":
                submit(1, partial(end, group, x, self._compressed_sum(step, group, self._compressor(group), x)))
                continue
            if isinstance(group.scheme.compressor, PowerSGD):
                self._powersgd(step, group, group.scheme.compressor, x, [gradients[piece] for piece in group.pieces])
            elif group.way == "all_reduce" and isinstance(group.scheme.compressor, AbstractGrid):
                self._add_whole_numbers(step, group, group.scheme.compressor, x)
            else:
                self._compressed(step, group, self._compressor(group), x)
            copy_back(group, x)

        def last() -> None:
            for group, x in together:
                copy_back(group, x)

        if together:
            submit(1, lambda: submit(2, last))  # behind all pieces

    def _accelerate(self, step: _Step, dgc: DGC, names: Sequence[str], pieces: Sequence[Tensor]) -> None:
        """Clip every gradient, and put in its place the velocity that this worker accumulates.

        The mean of the workers' velocities is the velocity of their mean, so what is not compressed gets ordinary
        momentum. Velocities change in `finish`, as memories do.
        """
        gradients = list(pieces)
        if dgc.clip is not None:
            limit = dgc.clip * self._scale / sqrt(self.world_size)
            for gradient in gradients:
                gradient.mul_((limit / torch.linalg.vector_norm(gradient)).clamp_(max=1.0))
        if not dgc.momentum:
            return
        factor = dgc.momentum * self._scale / self._velocity_scale
        for name, gradient in zip(names, gradients, strict=True):
            old = self._velocities.get(name)
            velocity = gradient.clone() if old is None else torch.add(gradient, old.view_as(gradient), alpha=factor)
            if dgc.nesterov:  # m (m u + g) + g, by torch's convention
                gradient.add_(velocity, alpha=dgc.momentum)
            else:
                gradient.copy_(velocity)
            step.velocities[name] = velocity

    def _mask(self, step: _Step, group: _Group, compressor: AbstractCompressor, sent: Tensor, start: int = 0) -> None:
        """Momentum factor masking: nothing goes on from what was sent, which are the group's elements from ``start``
        on; at ratio 1 there would be no momentum at all."""
        if not isinstance(compressor, DGC) or compressor.ratio == 1 or not step.velocities:
            return
        stop = start + sent.numel()
        for name, (first, last) in zip(group.names, pairwise(accumulate(group.sizes, initial=0)), strict=True):
            low, high = max(first, start), min(last, stop)
            if low < high:
                velocity = step.velocities[name][low - first : high - first]
                velocity.masked_fill_(sent[low - start : high - start] != 0, 0.0)

    def _plan(self, names: list[str], key: Sequence[int], gradients: Sequence[Tensor]) -> list[_Group]:
        """The groups of a bucket; a new bucket takes over what was remembered of its parameters."""
        plan = self._plans.get(tuple(key))
        if plan is not None:
            return plan
        members: dict[Scheme | None, list[int]] = {}
        for piece, name in enumerate(names):
            scheme = self._schemes.get(name) if gradients[piece].is_floating_point() else None
            members.setdefault(scheme, []).append(piece)
        plan = []
        for scheme, of_group in members.items():
            sizes = [gradients[piece].numel() for piece in of_group]
            called = [names[piece] for piece in of_group]
            number = min(self._numbers[name] for name in called)
            neighbours = of_group[-1] - of_group[0] == len(of_group) - 1
            group = _Group(scheme, called, of_group, sizes, neighbours, number)
            dtype = gradients[of_group[0]].dtype
            if scheme is not None:
                group.way = chosen(scheme, sum(sizes), self.world_size, dtype)
                if group.way == "two_phase":
                    self._cut(group, scheme, dtype)
                if scheme.feedback:
                    self._remember(group, scheme.compressor, ErrorFeedback.dtype_of(dtype))
            plan.append(group)
        if any(group.way == "two_phase" for group in plan):  # what is not compressed goes along
            for group in plan:
                if group.scheme is None and gradients[group.pieces[0]].is_floating_point():
                    group.scheme, group.way = UNCOMPRESSED, "two_phase"
                    self._cut(group, UNCOMPRESSED, gradients[group.pieces[0]].dtype)
        mine = set(key)
        self._plans = {other: groups for other, groups in self._plans.items() if mine.isdisjoint(other)}
        self._plans[tuple(key)] = plan
        return plan

    def _cut(self, group: _Group, scheme: Scheme, dtype: torch.dtype) -> None:
        """Into pieces, and these into the workers' parts."""
        owned = 0
        for borders in pieces_of(scheme.compressor, sum(group.sizes), self.world_size, dtype):
            own = borders[self.rank + 1] - borders[self.rank]
            group.cut.append(_Piece(borders, slice(owned, owned + own)))
            owned += own

    def _remember(self, group: _Group, compressor: AbstractCompressor, dtype: torch.dtype) -> None:
        """Memories for a new group, with what was remembered of its parameters.

        DDP forms new buckets after the first step, and with them the owners' parts change. What an owner remembers of
        the mean is then that many times as much in its own memory as there are workers: no message is needed, and the
        mean of all memories is what it was.
        """
        memory = torch.zeros(sum(group.sizes), dtype=dtype, device=self._device)
        group.memory = ErrorFeedback(compressor, memory)
        if group.way == "two_phase":
            owned_elements = group.cut[-1].owned.stop
            group.owner = ErrorFeedback(compressor, torch.zeros(owned_elements, dtype=dtype, device=self._device))
        first = 0
        for name, part in zip(group.names, torch.split(memory, group.sizes), strict=True):
            if name in self._homes or name in self._loaded:
                part.copy_(self._memory_of(name))
                self._loaded.pop(name, None)
            loaded = self._loaded_owned.pop(name, None)
            if loaded is None and name in self._homes:
                for where, owned in self._owned_of(name):
                    part[where].add_(owned, alpha=self.world_size)
            self._homes[name] = (group, first)
            if loaded is not None and group.owner is None:
                part.add_(loaded)
            elif loaded is not None:
                for where, owned in self._owned_of(name):
                    owned.copy_(loaded[where])
            first += part.numel()

    def _all_reduce(self, step: _Step, group: _Group, x: Tensor) -> Callable[[], None]:
        """The mean of the gradients as they are, by DDP's arithmetic: a whole bucket has the bits DDP would give.
        Begins the sum and returns what waits for it."""
        work = self._begin_sum(step, x.mul_(1.0 / self.world_size))

        def go_on() -> None:
            with self._timed(step, "communicate"):
                work.wait()
            if not _is_finite(x):
                step.refused = True
                step.names += _not_finite(group, x)

        return go_on

    def _compressed_sum(
        self, step: _Step, group: _Group, compressor: AbstractCompressor, x: Tensor
    ) -> Callable[[], None]:
        """The mean of all workers' messages, which can be added, decoded in place of ``x``. Begins the sums and returns
        what waits for them."""
        with self._timed(step, "compress"):
            payload, _, bad = self._message(step, group, compressor, x)
        for tensor in payload.tensors:
            tensor.fill_(torch.nan) if bad else tensor.div_(self.world_size)  # before the sum: half precision
        works = [self._begin_sum(step, tensor) for tensor in payload.tensors]

        def go_on() -> None:
            with self._timed(step, "communicate"):
                for work in works:
                    work.wait()
            with self._timed(step, "decompress"):
                if all(_is_finite(tensor) for tensor in payload.tensors):
                    compressor.decompress(payload, out=x)
                else:
                    step.refused = True
                    x.fill_(torch.nan)  # a loss scaler skips the step, on all workers

        return go_on

    def _compressed(self, step: _Step, group: _Group, compressor: AbstractCompressor, x: Tensor) -> None:
        """The mean of what all workers' messages stand for, in place of ``x``."""
        with self._timed(step, "compress"):
            payload, sent, bad = self._message(step, group, compressor, x)
        with self._timed(step, "communicate"):
            messages, refused = self._gather(step, compressor, payload, bad)
        with self._timed(step, "decompress"):
            if not refused:
                self._mean(compressor, payload, sent, messages, x)
        if refused:
            step.refused = True
            x.fill_(torch.nan)  # a loss scaler skips the step, on all workers

    def _message(
        self, step: _Step, group: _Group, compressor: AbstractCompressor, x: Tensor
    ) -> tuple[Payload, Tensor | None, bool]:
        """This worker's message, what it stands for if that was asked, and whether the gradient is not finite: then it
        is one of the right size, so that the others need not wait."""
        encoded = self._encode(step, group, compressor, x)
        if encoded is None:
            return compressor.compress(torch.zeros_like(x), self._generator(compressor, group)), None, True
        return *encoded, False

    def _encode(
        self, step: _Step, group: _Group, compressor: AbstractCompressor, x: Tensor
    ) -> tuple[Payload, Tensor | None] | None:
        """This worker's message, and what it stands for if that was asked; none if the gradient is not finite."""
        generator = self._generator(compressor, group)
        sent = None
        try:
            if group.memory is None:
                payload = compressor.compress(x, generator)
                sent = compressor.decompress(payload) if self._measure else None
            else:
                payload = compressor.compress(group.memory.add(x, self._factor(group)).to(x.dtype), generator)
                sent = compressor.decompress(payload)
                group.memory.remove(sent)
                self._mask(step, group, compressor, sent)
        except CompressionError:
            step.names += _refused(group, x)
            return None
        if sent is not None:
            self._compare(step, group, x, sent)
        return payload, sent

    def _gather(
        self, step: _Step, compressor: AbstractCompressor, payload: Payload, bad: bool
    ) -> tuple[list[Tensor], bool]:
        """All workers' messages, and whether one of them has none because its gradient is not finite."""
        status = torch.tensor([bad], dtype=torch.uint8, device=self._device)
        message = torch.cat([*(tensor.view(torch.uint8) for tensor in payload.tensors), status])
        sizes = [message.numel()] * self.world_size
        if not compressor.traits.fixed_size:
            own = torch.tensor([message.numel()], device=self._device)
            every = [torch.empty_like(own) for _ in sizes]
            dist.all_gather(every, own, group=self._group)
            self._count(step, own.nbytes, (self.world_size - 1) * own.nbytes)
            sizes = [int(size) for size in every]
            message = torch.cat([message, message.new_zeros(max(sizes) - message.numel())])
        rows = [torch.empty_like(message) for _ in sizes]  # each its own memory: views of wider types must be aligned
        dist.all_gather(rows, message, group=self._group)
        self._count(step, message.nbytes, (self.world_size - 1) * message.nbytes)
        refused = bool(torch.stack([row[size - 1] for row, size in zip(rows, sizes, strict=True)]).any())
        return [row[: size - 1] for row, size in zip(rows, sizes, strict=True)], refused

    def _mean(
        self, compressor: AbstractCompressor, own: Payload, sent: Tensor | None, messages: Sequence[Tensor], x: Tensor
    ) -> None:
        """Decode all messages in the order of the ranks, so that all workers get the same bits."""
        total = torch.zeros(x.shape, dtype=ErrorFeedback.dtype_of(x.dtype), device=x.device)
        share = self._share
        for rank, message in enumerate(messages):
            if rank == self.rank and sent is not None:
                total.add_(sent, alpha=share)
            else:
                payload = compressor.from_buffer(message, own.shape, own.dtype, own.seed)
                total.add_(compressor.decompress(payload, out=x), alpha=share)
        x.copy_(total.div_(self.world_size * share))

    @property
    def _share(self) -> float:
        """A power of two with which a sum over the workers cannot overflow, and has the same digits."""
        return float(0.5 ** (self.world_size - 1).bit_length())

    # -- two phases ----------------------------------------------------------------------------------------------------

    def _prepared(self, group: _Group, x: Tensor) -> list[_Sent]:
        """The group's pieces."""
        compressor = self._compressor(group)
        factor = 1.0 if group.memory is None else self._factor(group)
        pieces = []
        for piece in group.cut:
            sizes = [compressor.num_bits(elements, x.dtype) // 8 for elements in piece.elements]
            generator = self._generator(compressor, group, piece.borders[0])
            pieces.append(_Sent(group, piece, x, compressor, generator, factor, sizes))
        return pieces

    def _first_phase(self, step: _Step, submit: _Submit, sent: Sequence[_Sent]) -> None:
        """Send every worker the messages of its parts; the second lane waits for those that come in, and goes on."""
        workers, rank = range(self.world_size), self.rank
        with self._timed(step, "compress"):
            # By owner; an owner's messages follow each other, and its status.
            totals = [sum(aligned(each.sizes[owner]) for each in sent) + _STATUS for owner in workers]
            buffer = torch.empty(self.world_size * max(totals), dtype=torch.uint8, device=self._device)
            outgoing = buffer[: sum(totals)]
            slots = torch.split(outgoing, totals)
            bad, first = False, [0] * self.world_size
            for each in sent:
                places = [slots[owner][first[owner] : first[owner] + each.sizes[owner]] for owner in workers]
                bad |= not self._encode_parts(step, each, places)
                first = [start + aligned(length) for start, length in zip(first, each.sizes, strict=True)]
            for slot in slots:
                slot[-_STATUS] = bad
        everybody = [totals[rank]] * self.world_size
        incoming = torch.empty(sum(everybody), dtype=torch.uint8, device=self._device)
        work: Any = dist.all_to_all_single(incoming, outgoing, everybody, totals, group=self._group, async_op=True)
        self._count(step, outgoing.numel(), outgoing.numel() - totals[rank])

        def go_on() -> None:
            with self._timed(step, "communicate"):
                work.wait()
            self._second_phase(step, submit, sent, totals, incoming, buffer)

        submit(1, go_on)

    def _encode_parts(self, step: _Step, sent: _Sent, places: Sequence[Tensor]) -> bool:
        """Write the messages of all parts; whether the gradient is finite.

        Afterwards this worker's own part of ``x`` is what its message stands for; with error feedback the other parts
        have no meaning.
        """
        piece, compressor = sent.piece, sent.compressor
        try:
            if compressor.traits.divisible:  # at once: of a small part, calling the operations is most of the work
                whole = self._encode_part(step, sent, piece.whole)
                payloads = compressor.split(whole, piece.elements)
            else:
                payloads = [self._encode_part(step, sent, piece.part(owner)) for owner in range(self.world_size)]
        except CompressionError:
            step.names += _refused(sent.group, sent.x)
            return False
        for payload, place in zip(payloads, places, strict=True):
            _write(payload, place)
        compressor.decompress(payloads[self.rank], out=sent.x[piece.part(self.rank)])
        return True

    def _encode_part(self, step: _Step, sent: _Sent, where: slice) -> Payload:
        """The message of some of the group's elements; with error feedback these have no meaning afterwards."""
        group, compressor, x = sent.group, sent.compressor, sent.x[where]
        if group.memory is None:
            payload = compressor.compress(x, sent.generator)
            if self._measure:
                self._compare(step, group, x, compressor.decompress(payload))
            return payload
        values = group.memory.add(x, sent.factor_of(where), where)
        payload = compressor.compress(values.to(x.dtype), sent.generator)
        if self._measure or isinstance(compressor, DGC):
            compressor.decompress(payload, out=x)
            group.memory.remove(x, where)
            self._mask(step, group, compressor, x, where.start)
            self._compare(step, group, x, x, where)
        else:
            group.memory.leave(payload, x, where)  # nobody looks at what the message stands for
        return payload

    def _second_phase(
        self,
        step: _Step,
        submit: _Submit,
        sent: Sequence[_Sent],
        totals: list[int],
        came: Tensor,
        left: Tensor,
    ) -> None:
        """Average this worker's parts, compress the mean and send it; the third lane gets the others' means.

        What comes in now takes the place of what was sent before (``left``), and what is sent to each that of what came
        in (``came``): new memory would have to be cleared by the system first.
        """
        rank, rows = self.rank, came.view(self.world_size, -1)
        if bool(rows[:, -_STATUS].any()):  # the same on all workers: everybody is told by everybody
            submit(2, lambda: self._refuse(step, sent))
            return
        with self._timed(step, "decompress"):
            message = torch.empty(max(totals), dtype=torch.uint8, device=self._device)
            bad, first = False, 0
            for each in sent:
                place = slice(first, first + each.sizes[rank])
                bad |= not self._reduce(each, rows[:, place], message[place])
                first += aligned(each.sizes[rank])
            message[totals[rank] - _STATUS] = bad  # the mean is too large, though no gradient was
        work: Any
        if self._near and len(message) >= _RING_BYTES:
            work = dist.all_gather_into_tensor(left, message, group=self._second_group, async_op=True)
            slots = [slot[:total] for slot, total in zip(left.view(self.world_size, -1), totals, strict=True)]
        else:
            message, left = message[: totals[rank]], left[: sum(totals)]
            rows.copy_(message)
            everybody = [len(message)] * self.world_size
            work = dist.all_to_all_single(left, came, totals, everybody, group=self._second_group, async_op=True)
            slots = list(torch.split(left, totals))
        self._count(step, len(message), (self.world_size - 1) * len(message))

        def go_on() -> None:
            with self._timed(step, "communicate"):
                work.wait()
            with self._timed(step, "decompress"):
                self._decode_parts(step, sent, slots)

        submit(2, go_on)

    def _decode_parts(self, step: _Step, sent: Sequence[_Sent], slots: Sequence[Tensor]) -> None:
        """Put every owner's mean into its place."""
        if any(bool(slot[-_STATUS]) for slot in slots):
            self._refuse(step, sent)
            return
        starts = [0] * self.world_size
        for each in sent:
            for owner, slot in enumerate(slots):
                part = each.x[each.piece.part(owner)]
                message = slot[starts[owner] : starts[owner] + each.sizes[owner]]
                each.compressor.decompress(each.compressor.from_buffer(message, part.shape, part.dtype), out=part)
                starts[owner] += aligned(each.sizes[owner])

    def _refuse(self, step: _Step, sent: Sequence[_Sent]) -> None:
        step.refused = True
        for each in sent:
            each.x[each.piece.whole] = torch.nan  # a loss scaler skips, on all workers

    def _reduce(self, sent: _Sent, messages: Tensor, place: Tensor) -> bool:
        """Write the message of the mean of this worker's part; whether it is finite."""
        group, compressor = sent.group, sent.compressor
        own = sent.x[sent.piece.part(self.rank)]  # what this worker's message stands for
        total = own.to(ErrorFeedback.dtype_of(own.dtype)).mul_(self._share)
        scratch = torch.empty_like(own)
        for rank, message in enumerate(messages):
            if rank != self.rank:
                total.add_(
                    compressor.decompress(compressor.from_buffer(message, own.shape, own.dtype), out=scratch),
                    alpha=self._share,
                )
        total.div_(self.world_size * self._share)
        try:
            if group.owner is None:
                _write(compressor.compress(total.to(own.dtype), sent.generator), place)
            else:
                owned = sent.piece.owned
                values = group.owner.add(total, sent.factor_of(sent.piece.part(self.rank)), owned)
                payload = compressor.compress(values.to(own.dtype), sent.generator)
                _write(payload, place)
                group.owner.leave(payload, scratch, owned)
        except CompressionError:
            return False
        return True

    def _powersgd(self, step: _Step, group: _Group, powersgd: PowerSGD, x: Tensor, gradients: Sequence[Tensor]) -> None:
        """One step of power iteration on the mean of the matrices: two all-reduces."""
        with self._timed(step, "compress"):
            values = x if group.memory is None else group.memory.add(x, self._factor(group))
            # The shape and strides of the gradients: channels-last ones are not in the order of their dimensions.
            matrices = [_like(g, piece) for g, piece in zip(gradients, torch.split(values, group.sizes), strict=True)]
            starts = [self._start(powersgd, name, g.shape) for name, g in zip(group.names, gradients, strict=True)]
            lefts = [powersgd.left(matrix, start) for matrix, start in zip(matrices, starts, strict=True)]
        lefts, refused = self._mean_of(step, lefts)
        if refused:  # on all workers, so that nobody waits for the second half
            step.refused = True
            step.names += _not_finite(group, x)
            x.fill_(torch.nan)
            return
        with self._timed(step, "compress"):
            lefts = [orthogonalize(left) for left in lefts]
            rights = [powersgd.right(matrix, left) for matrix, left in zip(matrices, lefts, strict=True)]
            if group.memory is not None or self._measure:
                # A worker's own part, not the mean: that would make memories grow with the workers' differences.
                sent = torch.empty_like(x)
                self._products(powersgd, lefts, rights, gradients, torch.split(sent, group.sizes))
                if group.memory is not None:
                    group.memory.remove(sent)
                self._compare(step, group, x, sent)
        rights, refused = self._mean_of(step, rights)
        if refused:
            step.refused = True
        with self._timed(step, "decompress"):
            self._products(powersgd, lefts, rights, gradients, torch.split(x, group.sizes))
        step.rights.update(zip(group.names, rights, strict=True))

    def _products(
        self,
        powersgd: PowerSGD,
        lefts: Sequence[Tensor],
        rights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        pieces: Sequence[Tensor],
    ) -> None:
        for left, right, gradient, piece in zip(lefts, rights, gradients, pieces, strict=True):
            _like(gradient, piece).copy_(powersgd.product(left, right, gradient.shape))

    def _start(self, powersgd: PowerSGD, name: str, shape: Sequence[int]) -> Tensor:
        right = self._rights.get(name)
        if right is None:
            generator = torch.Generator().manual_seed(_mix(self._seed, self._numbers[name]))
            right = powersgd.start(shape, generator).to(self._device)
        return right

    def _mean_of(self, step: _Step, tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """The workers' mean of each, by one all-reduce, and whether it is not finite."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).div_(self.world_size)
        with self._timed(step, "communicate"):
            self._sum(step, flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)], not _is_finite(flat)

    def _compressor(self, group: _Group) -> AbstractCompressor:
        """That of this epoch."""
        assert group.scheme is not None
        compressor = group.scheme.compressor
        return compressor.at_epoch(self._epoch) if isinstance(compressor, DGC) else compressor

    def _add_whole_numbers(self, step: _Step, group: _Group, grid: AbstractGrid, x: Tensor) -> None:
        """The mean of what all workers round to whole multiples of one scale, the largest of theirs."""
        workers, wide = self.world_size, x.float()
        generator = self._generator(grid, group)
        assert generator is not None
        with self._timed(step, "compress"):
            scale = grid.scales(wide)
            if not _is_finite(wide):
                step.names += _not_finite(group, x)
                scale.fill_(torch.inf)  # so that all workers know
        with self._timed(step, "communicate"):
            dist.all_reduce(scale, dist.ReduceOp.MAX, group=self._group)
            self._count(step, scale.nbytes, all_reduce_bytes(scale.nbytes, workers))
        if bool(scale.isinf().any()):
            step.refused = True
            x.fill_(torch.nan)
            return
        with self._timed(step, "compress"):
            packed = grid.encode_shared(wide, scale, workers, generator)
            if self._measure:
                own = torch.empty_like(wide)
                grid.decode_own(packed, scale, workers, own)
                self._compare(step, group, wide, own)
        with self._timed(step, "communicate"):
            self._sum(step, packed)
        with self._timed(step, "decompress"):
            grid.decode_sum(packed, scale, workers, wide)
            x.copy_(wide)

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _sum(self, step: _Step, tensor: Tensor) -> None:
        self._begin_sum(step, tensor).wait()

    def _begin_sum(self, step: _Step, tensor: Tensor) -> Any:
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        self._count(step, tensor.nbytes, all_reduce_bytes(tensor.nbytes, self.world_size))
        return work

    def _count(self, step: _Step, handed: int, sent: int) -> None:
        with self._counting:
            step.measured.bytes += handed
            self.traffic.bytes_sent += sent
            self.traffic.messages += 1
            self.traffic.exchanges += 1

    def _generator(self, compressor: AbstractCompressor, group: _Group, start: int = 0) -> torch.Generator | None:
        """Random numbers that depend on the step and the elements (the group's from ``start`` on) alone, and on the
        worker unless they are shared."""
        randomness = compressor.traits.randomness
        if randomness == "none":
            return None
        generator = torch.Generator(self._device)
        own = 0 if randomness == "shared" else self.rank + 1
        return generator.manual_seed(_mix(self._seed, self.step, group.stream, own, start))

    def _factor(self, group: _Group) -> float | Tensor:
        """What brings the group's memory into the unit of this step's gradients."""
        if self._now is self._settled:
            return 1.0
        factors = []
        for name in group.names:
            now = self._now[name]
            factors.append(self._rates.get(name, now) / now if now else 0.0)
        if len(set(factors)) == 1:
            return factors[0]
        each = torch.tensor(factors, dtype=torch.float64).repeat_interleave(torch.tensor(group.sizes))
        assert group.memory is not None
        return each.to(group.memory.memory.dtype).to(self._device)

    def _commit(self, group: _Group, frozen: set[str]) -> None:
        """Replace the group's memories, except for parameters that the step does not change: their message is lost."""
        if group.memory is None:
            return
        kept = {name: self._memory_of(name).clone() for name in frozen.intersection(group.names)}
        owned = {name: [each.clone() for _, each in self._owned_of(name)] for name in kept}
        for memory in group.memories:
            memory.commit()
        for name, piece in kept.items():
            self._memory_of(name).copy_(piece)
            for (_, now), before in zip(self._owned_of(name), owned[name], strict=True):
                now.copy_(before)
        if self._now is not self._settled:
            self._rates.update({name: self._now[name] for name in group.names if name not in kept})

    def _memory_of(self, name: str) -> Tensor:
        if name in self._loaded:
            return self._loaded[name]
        group, start = self._homes[name]
        assert group.memory is not None
        return group.memory.memory[start : start + group.sizes[group.names.index(name)]]

    def _owned(self, name: str) -> Tensor:
        """What this worker remembers of a parameter's mean as an owner, and 0 for the parts of others."""
        whole = torch.zeros_like(self._memory_of(name))
        if name in self._loaded_owned:  # on all workers
            return whole if self.rank else whole.copy_(self._loaded_owned[name])
        if name in self._homes:
            for where, owned in self._owned_of(name):
                whole[where].copy_(owned)
        return whole

    def _owned_of(self, name: str) -> list[tuple[slice, Tensor]]:
        """Which parts of a parameter's mean this worker remembers as their owner, and what."""
        group, start = self._homes[name]
        stop = start + group.sizes[group.names.index(name)]
        found: list[tuple[slice, Tensor]] = []
        if group.owner is None:
            return found
        for piece in group.cut:
            part, memory = piece.part(self.rank), group.owner.memory[piece.owned]
            low, high = max(part.start, start), min(part.stop, stop)
            if low < high:
                found.append((slice(low - start, high - start), memory[low - part.start : high - part.start]))
        return found

    def _compare(self, step: _Step, group: _Group, x: Tensor, sent: Tensor, where: slice = slice(None)) -> None:
        """Note how much the message of these elements of the group left out."""
        if not self._measure:
            return
        for tile in tiles(x):
            here = slice(tile.start, tile.stop)
            left = x[here] - sent[here] if group.memory is None else group.memory.left[where][here]
            total = x[here] if group.memory is None else left + sent[here]
            step.squares.append((_sum_of_squares(total), _sum_of_squares(left)))

    def _measured(self, step: _Step) -> Measured:
        measured = step.measured
        if self._measure:
            measured.input_norm = sqrt(sum(float(square) for square, _ in step.squares))
            measured.error_norm = sqrt(sum(float(square) for _, square in step.squares))
            measured.residual_norm = self.residual_norm()
            for part, start, end in step.events:
                end.synchronize()
                self._add_seconds(measured, part, start.elapsed_time(end) / 1e3)
        return measured

    @contextmanager
    def _timed(self, step: _Step, part: str) -> Iterator[None]:
        if not self._measure:
            yield
        elif self._stream is None:
            start = time.perf_counter()
            yield
            self._add_seconds(step.measured, part, time.perf_counter() - start)
        else:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            yield
            after.record()
            step.events.append((part, before, after))

    def _add_seconds(self, measured: Measured, part: str, seconds: float) -> None:
        if part == "compress":
            measured.compress_seconds += seconds
        elif part == "communicate":
            measured.communicate_seconds += seconds
        else:
            measured.decompress_seconds += seconds

    def _refusal(self, names: Sequence[str]) -> str:
        """Who has which gradient that is not finite. All workers come here together."""
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, list(dict.fromkeys(names)), group=self._group)
        found = "; ".join(f"worker {rank}: {', '.join(named[:5])}" for rank, named in enumerate(every) if named)
        return (
            f"Got NaN or infinity in a gradient ({found}), need finite gradients: compressed, one of them would spoil "
            "all that share its scale. Lower the learning rate, find the operation with "
            "Trainer(detect_anomaly=True), or with float16 use precision='16-mixed', which skips such steps."
        )


def _write(payload: Payload, place: Tensor) -> None:
    """Put what travels of a message into its place among others."""
    torch.cat([tensor.view(torch.uint8) for tensor in payload.tensors], out=place)


def _like(gradient: Tensor, piece: Tensor) -> Tensor:
    """A part of the flat buffer, seen as the gradient is."""
    return piece.as_strided(gradient.shape, gradient.stride())


def _sum_of_squares(x: Tensor) -> Tensor:
    """In float64, of which there is never more than a tile."""
    return norms(x, None).double().square().sum()


def _is_finite(x: Tensor) -> bool:
    """The sum tells, in one pass; large values whose sum overflows are looked at one by one."""
    if not x.numel():
        return True
    wide = ErrorFeedback.dtype_of(x.dtype)
    return bool(x.sum(dtype=wide).isfinite()) or bool(x.isfinite().all())


def _not_finite(group: _Group, x: Tensor) -> list[str]:
    """Names of the parameters whose gradient is not finite, or too large for float32 where it is computed in that."""
    wide = x.float() if x.is_floating_point() else x
    return [
        name
        for name, piece in zip(group.names, torch.split(wide, group.sizes), strict=True)
        if not bool(piece.isfinite().all())
    ]


def _refused(group: _Group, x: Tensor) -> list[str]:
    """Names of the parameters because of which a compressor refused a vector."""
    found = _not_finite(group, x)
    if found:
        return found
    pieces = zip(group.names, torch.split(x, group.sizes), strict=True)
    largest = {name: float(piece.abs().max()) for name, piece in pieces if piece.numel()}
    name = max(largest, key=largest.__getitem__)
    return [f"{name} (finite, but up to {largest[name]:.3g}, too large to be compressed)"]


def _mix(*numbers: int) -> int:
    """One seed from several numbers; neighbours give unrelated seeds."""
    seed = 0
    for number in numbers:
        seed = (seed ^ (number + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        seed ^= seed >> 31
    return seed % 2**63
