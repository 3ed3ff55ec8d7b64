"""The loop of a worker that does not train."""

from __future__ import annotations

from collections.abc import Callable

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ProtocolError

_IDLE_STEPS = 1000  # while nothing happens


def serve(stepper: Stepper, update: Callable[[], bool], follow: Callable[[], None] = lambda: None) -> None:
    """Make the steps of a worker that does not train, until those that train have come to their end.

    Args:
        stepper: of its model.
        update: makes an update inside `Stepper.updating`, and tells whether it was made.
        follow: is called after each step.

    Raises:
        ProtocolError: if the algorithm makes step after step although nothing happens.
    """
    standstill, worker = stepper.communicator.standstill, stepper.worker
    idle, before = 0, -1
    standstill.over = False
    while not standstill.over:
        stepper.begin()
        while stepper.awaits_update:
            stepper.made(update())
        stepper.end()
        follow()
        now = stepper.communicator.traffic.messages + worker.version
        idle, before = idle + 1 if now == before else 0, now
        if idle > _IDLE_STEPS:
            raise ProtocolError(
                f"{type(stepper.algorithm).__name__} got, by step {worker.step} of worker {worker.rank}, {_IDLE_STEPS} "
                "steps in which nothing happened, and a condition that always holds; it needs one that becomes false "
                "when what has come was used. Take it out of `worker.state` in the step."
            )
