"""What a worker that starts takes from one that trains: model, optimizers, and where the loop is."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ConfigurationError, PeerLost
from lightning_decentral.flat import pack, unpack
from lightning_decentral.membership import Hearts, Member, Members
from lightning_decentral.protocol import AbstractAsynchronousAlgorithm
from lightning_decentral.strategies import lightning_private as private
from lightning_decentral.strategies.files import copied
from lightning_decentral.strategies.log import log
from lightning_decentral.tensors import give as put
from lightning_decentral.tensors import has_values
from lightning_decentral.transport.copies import give, take, to_text
from lightning_decentral.transport.lanes import beside
from lightning_decentral.transport.membership import Membership

_PATIENCE_SECONDS = 60.0  # for a copy to begin, and for each piece of it
_MOST_BYTES = 1 << 40
_LISTENING = timedelta(days=365)
_LOOK_SECONDS = 0.5
_GUEST_SECONDS = 5.0  # from having a copy to taking part


class Newcomers:
    """Gives copies of this worker to those that start, between two steps; and takes one when this worker starts.

    Args:
        trainer: in training.
        steppers: of its optimizers.
        membership: knows who takes part.
    """

    def __init__(self, trainer: Trainer, steppers: list[Stepper], membership: Membership) -> None:
        self._trainer, self._steppers, self._membership = trainer, steppers, membership
        self._asked: deque[tuple[int, int]] = deque()  # of whose life, and the number of its question
        self._heard = 0
        self._expected: list[int] = []  # numbers of questions whose life has not come: who asks may have died
        self._shadow: dict[str, Any] = {}
        self._guests: dict[int, float] = {}  # whose copy is under way, or was given: until when they are waited for
        self._hearing = threading.Lock()
        self._closed = False
        threading.Thread(target=self._hear, name="decentral-newcomers", daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._closed = True
        if self._membership.failure is not None:
            return
        with suppress(RuntimeError):  # the rendezvous has ended, and the listening with it
            _ask(self._membership.store, self._membership.life, 0)  # which wakes who listens

    # -- giving -------------------------------------------------------------------------------------------------------

    def listen(self, store: Any) -> None:
        """Hear of those that ask this worker for a copy; at each heartbeat, and as soon as one asks."""
        mine = self._membership.life
        with self._hearing:
            asked = int(store.add(f"ask/{mine}", 0))
            self._expected += range(self._heard + 1, asked + 1)
            self._heard = asked
            there = [number for number in self._expected if store.check([f"ask/{mine}/{number}"])]
            self._expected = [number for number in self._expected if number not in there]
            for number in there:
                if life := int(store.get(f"ask/{mine}/{number}")):
                    self._asked.append((life, number))

    def _hear(self) -> None:
        """Listen until this is closed, without a question before somebody asks; at most until a connection breaks."""
        try:
            store = self._membership.connect()
            while not self._closed:
                store.wait([f"ask/{self._membership.life}/{self._heard + 1}"], _LISTENING)
                self.listen(store)
        except RuntimeError as error:  # heartbeats tell why, and go on listening if they can
            log.debug("newcomers are heard of at heartbeats only: %s", error)

    def begin_epoch(self) -> None:
        """Keep where the loop is: a worker that joins begins this epoch from there."""
        trainer = self._trainer
        self._shadow = copied(
            {
                "loops": private.loops_state(trainer),
                "callbacks": _plain(private.callbacks_state(trainer)),
                "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
                "groups": [_without_parameters(optimizer) for optimizer in trainer.optimizers],
            }
        )

    def serve(self) -> None:
        """Make a copy for each that has asked, and send it in the background; between two steps."""
        while self._asked and self._shadow and not self._membership.averages:  # where the module may be the consensus
            life, number = self._asked.popleft()
            tree = self._copy()
            work = (life, number, tree)
            self._guests[life] = math.inf
            threading.Thread(target=self._give, args=work, name="decentral-copy", daemon=True).start()

    def await_guests(self) -> None:
        """Wait until those that have had a copy take part, before the round ends of which it is: for a while only."""
        membership = self._membership

        def are_there() -> bool:
            now, lives = time.monotonic(), membership.members.lives
            return all(life in lives or until < now for life, until in tuple(self._guests.items()))

        membership.wait_in_training(are_there)
        self._guests = {life: until for life, until in tuple(self._guests.items()) if until == math.inf}

    def _copy(self) -> dict[str, Any]:
        trainer = self._trainer
        models, rounds = [], []
        for stepper in self._steppers:
            stepper.settle()
            with stepper.monitor:  # which a server's answers may change in the next moment
                models.append([buffer.detach().cpu().clone() for buffer in stepper.x.buffers])
                rounds.append(handed_over(stepper))
        return {
            **self._shadow,
            "models": models,
            "steps": [stepper.worker.step for stepper in self._steppers],
            "rounds": rounds,
            "beside": {name: tensor.detach().cpu().clone() for name, tensor in self._beside().items()},
            "optimizers": [_on_cpu(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers],
            "members": self._membership.members.to_json(),
        }

    def _give(self, life: int, number: int, tree: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            store = self._membership.connect(f"copy/{self._membership.life}/{number}")
            sent = beside(
                partial(give, store, tree, _PATIENCE_SECONDS), "decentral-giving", _LOOK_SECONDS, self._heart_of(life)
            )
        except RuntimeError as error:
            log.info("a copy for life %d was not taken: %s", life, str(error).splitlines()[0][:200])
            del self._guests[life]
            return
        self._guests[life] = time.monotonic() + _GUEST_SECONDS
        log.info(
            "worker %d gave a copy of %.1f MB in %.2f s", self._membership.rank, sent / 1e6, time.monotonic() - began
        )

    def _heart_of(self, life: int) -> Callable[[], None]:
        """Return what raises once the heart of a life is silent: gloo may not tell that it was lost."""
        store, hearts = self._membership.connect(), Hearts(self._membership.heartbeat_seconds)

        def look() -> None:
            now = time.monotonic()
            hearts.hear(life, int(store.add(f"beat/{life}", 0)), now)
            if hearts.silent([life], now):
                raise RuntimeError("its heart is silent")

        return look

    # -- taking -------------------------------------------------------------------------------------------------------

    def take(self, members: Members, tell: Callable[[str], None]) -> Members | None:
        """Take a copy of one of the members; return the entry of which it is, if that came to its end.

        Args:
            members: who takes part.
            tell: called with what was done, for the log.
        """
        membership = self._membership
        for donor in _by_turns(members.living, membership.life):
            began = time.monotonic()
            try:
                tree = self._received(donor, _ask(membership.store, donor.life, membership.life))
            except (RuntimeError, PeerLost) as error:
                log.info("no copy came of worker %d: %s", donor.rank, str(error).splitlines()[0][:200])
                membership.check()
                return None
            seconds = time.monotonic() - began
            size = sum(each.numel() * each.element_size() for model in tree["models"] for each in model)
            tell(f"took a model of {size / 1e6:.1f} MB from worker {donor.rank} in {seconds:.2f} s")
            self._put(tree)
            return Members.from_json(tree["members"])
        return None

    def _received(self, donor: Member, number: int) -> dict[str, Any]:
        """Wait for the copy; on a thread of its own, so that a donor that is lost is noticed."""
        membership = self._membership
        found: list[dict[str, Any]] = []
        errors: list[Exception] = []

        def receive() -> None:
            try:
                store = membership.connect(f"copy/{donor.life}/{number}")
                found.append(take(store, _PATIENCE_SECONDS, _check_size))
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=receive, name="decentral-copy", daemon=True)
        thread.start()
        membership.wait_in_training(lambda: not thread.is_alive() or donor.life not in membership.members.lives)
        if found:
            return found[0]
        if errors:
            raise errors[0]
        raise PeerLost(f"Worker {donor.rank} was lost while it gave a copy.", (donor.rank,))

    def _put(self, tree: dict[str, Any]) -> None:
        """Let this worker be what the copy is."""
        trainer = self._trainer
        for stepper, model, step, given in zip(
            self._steppers, tree["models"], tree["steps"], tree["rounds"], strict=True
        ):
            stepper.abandon()
            with stepper.monitor:
                for buffer, value in zip(stepper.x.buffers, model, strict=True):
                    buffer.copy_(value)
            stepper.begin_anew()
            take_over(stepper, step, given)
        beside = self._beside()
        for name, value in tree["beside"].items():
            if name in beside and beside[name].shape == value.shape:
                put(beside[name], value.to(beside[name].device))
        for optimizer, state, groups in zip(trainer.optimizers, tree["optimizers"], tree["groups"], strict=True):
            own = optimizer.state_dict()
            merged = [{**group, **saved} for group, saved in zip(own["param_groups"], groups, strict=True)]
            optimizer.load_state_dict({"state": state, "param_groups": merged})
        for config, state in zip(trainer.lr_scheduler_configs, tree["schedulers"], strict=True):
            config.scheduler.load_state_dict(state)
        for callback in trainer.checkpoint_callbacks:
            # What it has kept counts for its folder only, which Lightning gives all workers at the start.
            if isinstance(callback, ModelCheckpoint) and callback.state_key in tree["callbacks"]:
                callback.dirpath = tree["callbacks"][callback.state_key]["dirpath"]
        private.restore_callbacks(trainer, tree["callbacks"])
        private.restore_loops(trainer, tree["loops"])

    def _beside(self) -> dict[str, Tensor]:
        """Buffers and parameters that no stepper has."""
        module = self._trainer.lightning_module
        known = {id(parameter) for stepper in self._steppers for parameter in stepper.flat.parameters}
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {name: tensor for name, tensor in named.items() if id(tensor) not in known and has_values(tensor)}


def _ask(store: Any, donor: int, life: int) -> int:
    """Ask for a copy, as a life; return the number of the question."""
    number = int(store.add(f"ask/{donor}", 1))
    store.set(f"ask/{donor}/{number}", str(life))
    return number


def handed_over(stepper: Stepper) -> Any:
    """Return what belongs to a worker's model, for one that joins with a copy of it, as plain values and tensors."""
    algorithm = stepper.algorithm
    assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
    with stepper.monitor:
        return _on_cpu(pack(algorithm.handed_over(stepper.worker)))


def take_over(stepper: Stepper, step: int, given: Any) -> None:
    """Let a worker that has another one's model begin where that is.

    Args:
        stepper: of the worker.
        step: of the other one.
        given: what that has handed over.
    """
    stepper.worker.step = step
    algorithm = stepper.algorithm
    assert isinstance(algorithm, AbstractAsynchronousAlgorithm)
    with stepper.monitor:
        handed: Any = unpack(given, stepper.x.buffers[0].device)
        algorithm.join(stepper.worker, handed)


def _by_turns(living: tuple[Member, ...], life: int) -> tuple[Member, ...]:
    """Return the members in an order that differs between those who ask."""
    shift = life % max(1, len(living))
    return living[shift:] + living[:shift]


def _check_size(num_bytes: int) -> None:
    if num_bytes > _MOST_BYTES:
        raise ConfigurationError(f"A worker got a copy of {num_bytes} bytes, needs at most {_MOST_BYTES}. Start anew.")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value


def _without_parameters(optimizer: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.state_dict()["param_groups"]
    ]


def _plain(states: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what callbacks keep that cannot be sent: theirs begin anew on a worker that joins."""
    kept = {}
    for name, state in states.items():
        try:
            to_text(state, [])
        except ConfigurationError:
            log.info("a worker that joins will not have the state of %s, which has more than plain values", name)
        else:
            kept[name] = state
    return kept
