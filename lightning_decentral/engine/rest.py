"""Coming to rest: all workers between two steps, and nothing under way; before whatever needs that."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_decentral.engine.stepper import Stepper
from lightning_decentral.errors import ProtocolError
from lightning_decentral.transport.communicator import Communicator

_LEAVING_SECONDS = 2.0  # for what was received to be known as sent


def come_to_rest(communicator: Communicator, steppers: Sequence[Stepper], what: str) -> None:
    """Wait until no worker is in a step, and let the algorithm bring to an end what it keeps under way.

    Whoever waits in `Until` for what cannot come any more is told so. All workers together, for the same thing. If no
    worker has made a step since they last rested, nothing is under way, and they only meet.

    Args:
        communicator: of this worker.
        steppers: all of them.
        what: the workers do then, as it is named in messages.

    Raises:
        ProtocolError: if something was sent that nobody has received.
    """
    went_on = any(stepper.went_on for stepper in steppers)
    with communicator.standstill.at_the_end():
        told = communicator.meet(what, went_on)
    if not any(row[0] for row in told):
        return
    for stepper in steppers:
        stepper.rest()
    if steppers and (unread := communicator.mail.unread(_LEAVING_SECONDS)) is not None:
        to, tag = unread
        raise ProtocolError(
            f"{type(steppers[0].algorithm).__name__} got, in step {steppers[0].worker.step} of worker "
            f"{communicator.rank}, a vector sent with tag {tag} that worker {to} has not received, at {what}; it needs "
            "every `Send` to be received before. Receive it in the method's `rest`."
        )
