"""Proved here: a worker that is there is reached, also if it refuses; one from whom nothing comes is not."""

from __future__ import annotations

import socket

import pytest

from lightning_decentral.transport import doors
from lightning_decentral.transport.doors import Door, unreached


def test_who_listens_or_refuses_is_reached_and_who_is_silent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    there, gone = Door(("127.0.0.1", 1)), Door(("127.0.0.1", 1))
    gone.close()
    assert there.address.startswith("127.0.0.1:")
    create_connection = socket.create_connection

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == "192.0.2.1":  # kept free for examples: nothing comes from there
            raise TimeoutError
        if address[0] == "192.0.2.2":
            raise OSError(113, "No route to host")
        return create_connection(address, timeout)

    monkeypatch.setattr(socket, "create_connection", connect)
    asked = {1: there.address, 2: gone.address, 3: "192.0.2.1:9", 4: "192.0.2.2:9", 5: ""}
    assert unreached(asked, dict.fromkeys(asked, 5.0)) == [3, 4]
    assert unreached({}, {}) == []
    for _ in range(300):  # more than the system keeps for it
        assert unreached({1: there.address}, {1: 5.0}) == []
        there.clear()
    there.close()


def test_the_address_is_that_of_the_interface_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    named = Door(("192.0.2.1", 1))
    assert named.address.startswith("127.0.0.1:")
    named.close()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none")
    nameless = Door(("127.0.0.1", 1))
    assert nameless.address == ""
    nameless.close()
    assert doors._address_towards(("127.0.0.1", 1)) == "127.0.0.1"
