"""Proved here: what is received one after the other is asked for together, all headers before any bytes: far away that
takes two ways there and back and not two for each message; and each is checked against its own request."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_decentral.flat import Vector
from lightning_decentral.protocol import Receive
from lightning_decentral.transport.headers import header_of
from lightning_decentral.transport.leases import Leases
from lightning_decentral.transport.mail import Mail


class Group:
    """Messages that have come, by source; and what is done with them, in order."""

    def __init__(self, messages: dict[int, Vector]) -> None:
        self.messages, self.log = messages, list[tuple[str, str, int]]()

    def recv(self, buffers: list[torch.Tensor], source: int, tag: int) -> Any:
        message = self.messages[source]
        if buffers[0].dtype == torch.int64:
            kind = "header"
            buffers[0].copy_(header_of(message, 3))
        else:
            kind = "bytes"
            buffers[0].copy_(message.buffers[0].view(torch.uint8))
        self.log.append(("ask", kind, source))
        return SimpleNamespace(wait=lambda _: self.log.append(("wait", kind, source)))


def mail_of(group: Group) -> Mail:
    links: Any = SimpleNamespace(
        rank=0,
        device=torch.device("cpu"),
        native=False,
        timeout=timedelta(seconds=1),
        leases=Leases(torch.device("cpu")),
        groups=[group, group],
        failures=lambda sources: contextlib.nullcontext(),
    )
    return Mail(links)


def test_what_is_received_next_is_asked_for_together() -> None:
    messages = {source: Vector([torch.full((2,), float(source))]) for source in (1, 2)}
    group = Group(messages)
    mail = mail_of(group)
    checked: list[int] = []

    def check(request: Receive, message: Any) -> None:
        checked.append(request.source)

    first, second = (Receive(source, messages[source].clone(), 3) for source in (1, 2))
    for request in (Receive(1, first.like, 3, before=(second,)), second):
        assert mail.receive(request, check).buffers[0].tolist() == 2 * [float(request.source)]
    both = {kind: [("ask", kind, 1), ("ask", kind, 2)] for kind in ("header", "bytes")}
    waits = [("wait", "header", 1), ("wait", "header", 2)]
    assert group.log == [*both["header"], *waits, *both["bytes"], ("wait", "bytes", 1), ("wait", "bytes", 2)]
    assert mail.receive(second, check).buffers[0].tolist() == [2.0, 2.0]  # the next one of that mailbox, asked for now
    assert len(group.log) == 12
    assert not checked


def test_each_message_is_checked_against_its_own_request() -> None:
    group = Group({1: Vector([torch.zeros(2)]), 2: Vector([torch.zeros(5)])})
    wrong: list[tuple[int, Any]] = []

    def check(request: Receive, message: Any) -> None:
        wrong.append((request.source, message.form))
        raise ValueError("another form")

    like = Vector([torch.zeros(2)])
    with pytest.raises(ValueError, match="another form"):
        mail_of(group).receive(Receive(1, like, 3, before=(Receive(2, like, 3),)), check)
    assert wrong == [(2, group.messages[2].form)]
    assert all(kind == "header" for _, kind, _ in group.log)
