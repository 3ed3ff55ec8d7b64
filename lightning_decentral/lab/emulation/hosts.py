"""Running a command in every host of an emulated network, with output, time-outs and failures on request."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_decentral.errors import ConfigurationError, EmulationError
from lightning_decentral.lab.emulation import cgroups
from lightning_decentral.lab.emulation.network import (
    ENDING,
    INTERFACE,
    EmulatedNetwork,
    enter,
    kill_all,
    signal_all,
    too_many_files,
)
from lightning_decentral.simulation.cluster_file import SLOWDOWN_VARIABLE
from lightning_decentral.units import parse_seconds

MASTER_PORT = 29500


@dataclass(frozen=True)
class Event:
    """Something that happens to hosts while the command runs.

    Attributes:
        kind: ``"kill"`` (SIGKILL to all processes of a host; its kernel closes their connections), ``"restart"`` (the
            command is started again), ``"stop"`` (the processes stand still, their connections stay open) or ``"cut"``
            (hosts of different groups lose every packet that they send to each other).
        at_seconds: after the command was started.
        until_seconds: when a stop or a cut ends; ``None``: never.
        groups: the hosts: one group for all kinds but ``"cut"``.
    """

    kind: Literal["kill", "restart", "stop", "cut"]
    at_seconds: float
    groups: tuple[tuple[int, ...], ...]
    until_seconds: float | None = None

    @classmethod
    def parse(cls, kind: Literal["kill", "restart", "stop", "cut"], text: str) -> Event:
        """Read ``3@20s``, ``3@20s..30s``, or ``0-3|4-7@30s..40s``.

        Args:
            kind: what happens.
            text: hosts (``3``, ``0-3``, ``0,2,5-7``), in groups separated by ``|`` for a cut; then ``@`` and when.

        Raises:
            ConfigurationError: if it cannot be understood.

        Example:
            >>> Event.parse("cut", "0-1|2,3@30s..40s")
            Event(kind='cut', at_seconds=30.0, groups=((0, 1), (2, 3)), until_seconds=40.0)
        """
        option = f"--{kind}"
        lasting = kind in ("stop", "cut")
        example = {"cut": "0-3|4-7@30s..40s", "stop": "3@20s..30s"}.get(kind, "3@20s")
        hosts, at, when = text.partition("@")
        begin, dots, end = when.partition("..")
        groups = tuple(_ranks(group) for group in hosts.split("|"))
        named = [rank for group in groups for rank in group]
        fits = at and all(groups) and len(set(named)) == len(named) and (lasting or not dots)
        if not fits or (len(groups) < 2 if kind == "cut" else len(groups) > 1):
            need = "groups of hosts separated by | and a time" if kind == "cut" else "hosts and a time"
            raise ConfigurationError(f"{option} got {text!r}, needs {need}. Write for example {option} {example}.")
        at_seconds = parse_seconds(option, begin)
        until_seconds = parse_seconds(option, end) if dots else None
        if until_seconds is not None and until_seconds <= at_seconds:
            raise ConfigurationError(f"{option} got {text!r}: it ends before it begins. Write for example {example}.")
        return cls(kind, at_seconds, groups, until_seconds)

    def __str__(self) -> str:
        hosts = " | ".join(", ".join(map(str, group)) for group in self.groups)
        return f"{self.kind} of host{'' if hosts.isdecimal() else 's'} {hosts}"


def _ranks(text: str) -> tuple[int, ...]:
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        if match is None:
            return ()
        ranks.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(ranks)


@dataclass(frozen=True)
class Outcome:
    """How the command ended in one host.

    Attributes:
        exit_code: of its last run; negative: minus the number of the signal that ended it.
        on_purpose: whether an event or an interruption ended it.
        seconds: from the start of all until it ended.
    """

    exit_code: int
    on_purpose: bool
    seconds: float


def torchrun_environment(rank: int, world_size: int, address: str, port: int, run: str) -> dict[str, str]:
    """Return the variables that torchrun sets with one process on every host.

    A user's script runs under them with ``Trainer(num_nodes=<hosts>, devices=1)``.

    Args:
        rank: of the process.
        world_size: how many there are.
        address: of rank 0.
        port: there, for the store in which all meet.
        run: its name.
    """
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": str(world_size),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(world_size),
        "NODE_RANK": str(rank),
        "TORCHELASTIC_RUN_ID": run,
    }


def worker_environment(network: EmulatedNetwork, host: int) -> dict[str, str]:
    """Tell what a process in a host finds in its environment: torchrun's variables, the interface to use, its
    slowdown."""
    return {
        **torchrun_environment(host, network.workers, network.address(0), MASTER_PORT, network.name),
        SLOWDOWN_VARIABLE: str(network.cluster.hosts[host].slowdown),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
        "TP_SOCKET_IFNAME": INTERFACE,
    }


def run_in_hosts(
    network: EmulatedNetwork,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    events: Sequence[Event] = (),
    timeout_seconds: float | None = None,
    grace_seconds: float = 30.0,
    output: Callable[[int | None, str], None] | None = None,
    substitute: Callable[[int], Mapping[str, str]] = lambda rank: {"rank": str(rank)},
    cpu_limits: bool = True,
) -> list[Outcome]:
    """Start a command in every host, and wait until it has ended in all.

    Args:
        network: the hosts.
        command: program and arguments.
        environment: variables in addition to this process's and `worker_environment`'s.
        events: what happens to hosts meanwhile.
        timeout_seconds: after which all are killed; ``None``: never.
        grace_seconds: how long the others may go on when one has failed by itself.
        output: called with the number of the host and each line that it prints; with ``None`` instead of a number for
            what the emulator itself has to say. Default: print them, with ``[host3]`` before each.
        substitute: what stands for a name in braces in an argument, by host; default: ``{rank}``, its number.
        cpu_limits: whether the limits of the hosts' processor time hold for the command.

    Returns:
        How it ended, by host.

    Raises:
        ConfigurationError: if an event names a host that there is not, or if the program cannot be started.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP; the hosts got it too, and are killed if they do not end
            within `grace_seconds`.
    """
    check_events(events, network.workers)
    commands = [[_replace(argument, substitute(host)) for argument in command] for host in range(network.workers)]
    run = _Run(network, commands, environment or {}, grace_seconds, output or print_line, cpu_limits)
    return run.all(events, timeout_seconds)


def check_events(events: Sequence[Event], workers: int) -> None:
    """Refuse events of hosts that there are not.

    Args:
        events: what is to happen.
        workers: number of hosts.

    Raises:
        ConfigurationError: names the event and the host.
    """
    for event in events:
        for rank in (rank for group in event.groups for rank in group):
            if rank >= workers:
                raise ConfigurationError(
                    f"--{event.kind} got host {rank}, needs one of the {workers} hosts, 0 to {workers - 1}. Correct it."
                )


def _replace(argument: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        argument = argument.replace(f"{{{name}}}", value)
    return argument


def print_line(host: int | None, line: str) -> None:
    """Print a line with the host that it comes from."""
    print(f"[{'emulate' if host is None else f'host{host}'}] {line}", flush=True)


class _Host:
    """The command in one host: its process and what it prints."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.unfinished = bytearray()
        self.at_end = False  # nobody can print anything more
        self.killed = False

    def lines(self) -> list[str] | None:
        """Tell what it has printed since, by line; ``None`` if there is nothing to read now.

        One read at a time: a host that prints without an end must not keep the emulator from the others.
        """
        assert self.process.stdout is not None
        try:
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if not chunk:
            self.at_end = True
            return None
        first, *others = chunk.split(b"\n")
        self.unfinished += first
        complete = []
        if others:
            complete = [bytes(self.unfinished), *others[:-1]]
            self.unfinished = bytearray(others[-1])
        if b"\r" in chunk:  # a progress bar: only its last state will be shown
            del self.unfinished[: self.unfinished.rstrip(b"\r").rfind(b"\r") + 1]
        return [_last_state(line) for line in complete]


def _last_state(line: bytes) -> str:
    """Return a line as a terminal would show it: progress bars return to its beginning."""
    return line.decode(errors="replace").rstrip("\r").rsplit("\r", 1)[-1]


class _Run:
    """One thread does everything: it reads what the hosts print, and keeps the time."""

    def __init__(
        self,
        network: EmulatedNetwork,
        commands: Sequence[Sequence[str]],
        environment: Mapping[str, str],
        grace_seconds: float,
        output: Callable[[int | None, str], None],
        cpu_limits: bool,
    ) -> None:
        self.network = network
        self.commands = commands
        self.environment = environment
        self.grace_seconds = grace_seconds
        self.output = output
        self.cpu_limits = cpu_limits
        self.outcomes: dict[int, Outcome] = {}
        self.running: dict[int, _Host] = {}
        self.standing: set[int] = set()
        self.interrupted: signal.Signals | None = None
        self.interrupted_once = False
        self.unanswered = 0
        self.deadline: float | None = None
        self.out_of_time = False
        self.selector = selectors.DefaultSelector()
        self.began = time.monotonic()

    def all(self, events: Sequence[Event], timeout_seconds: float | None) -> list[Outcome]:
        ahead = sorted(_occurrences(events), key=lambda occurrence: occurrence[0])
        if timeout_seconds is not None:
            self.deadline = self.began + timeout_seconds
        in_main_thread = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in ENDING if in_main_thread}
        if handlers.get(signal.SIGHUP) is signal.SIG_IGN:  # nohup
            del handlers[signal.SIGHUP]
        for number in handlers:
            signal.signal(number, self.interrupt)
        try:
            for host in range(self.network.workers):
                self.start(host)
            while self.running or (_restarts(ahead) and not (self.interrupted or self.out_of_time)):
                now = time.monotonic()
                if self.deadline is not None and now >= self.deadline:
                    self.output(None, f"time is up: killing hosts {', '.join(map(str, sorted(self.running)))}")
                    self.out_of_time = True
                    self.deadline = None
                    self.kill(sorted(self.running))
                while ahead and self.began + ahead[0][0] <= now:
                    _, event, begins = ahead.pop(0)
                    if not (self.interrupted or self.out_of_time):
                        self.happen(event, begins)
                if self.running and not ahead and self.standing.issuperset(self.running):
                    self.output(None, "all others have ended: killing the hosts that stand still")
                    self.kill(sorted(self.running))
                self.pass_on_interrupt()
                self.read_until(min([now + 0.2, *(self.began + occurrence[0] for occurrence in ahead[:1])]))
        except BaseException:
            self.output = lambda host, line: None  # it may be what has failed, and would fail again
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.kill(range(self.network.workers))
            for host in list(self.running):
                self.ended(host)
            self.network.heal()
            self.selector.close()
        if self.interrupted is not None:
            raise KeyboardInterrupt
        return [self.outcomes[host] for host in range(self.network.workers)]

    def start(self, host: int) -> None:
        network = self.network
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **worker_environment(network, host), **self.environment}
        group = cgroups.group(network.name, host) if self.cpu_limits else None
        try:
            process = subprocess.Popen(
                self.commands[host],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the emulator alone, which passes it on
                preexec_fn=lambda: enter(network.namespace(host), f"host{host}", str(network.folder / "hosts"), group),
            )
        except OSError as error:
            raise too_many_files(error) or ConfigurationError(
                f"The command {self.commands[host][0]!r} got the error {error.strerror!r}, needs to be a program that "
                "can be run. Correct it; a script needs a first line such as #!/bin/sh, or its interpreter before it."
            ) from error
        except subprocess.SubprocessError as error:
            raise EmulationError(
                f"A process could not enter host {host}: it needs the right to make mount and UTS namespaces, and a "
                "file /etc/hosts to put another one over. In a container, start it with --privileged."
            ) from error
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.running[host] = _Host(process)
        self.standing.discard(host)
        self.selector.register(process.stdout, selectors.EVENT_READ, host)

    def read_until(self, moment: float) -> None:
        for key, _ in self.selector.select(max(0.0, moment - time.monotonic())):
            self.show(key.data)
            if self.running[key.data].at_end:
                self.selector.unregister(key.fileobj)  # it would be ready all the time
        for host in [host for host, running in self.running.items() if running.process.poll() is not None]:
            self.ended(host)

    def show(self, host: int) -> bool:
        """Tell whether there was something to read."""
        lines = self.running[host].lines()
        for line in lines or ():
            self.output(host, line)
        return lines is not None

    def ended(self, host: int) -> None:
        running = self.running[host]
        code = running.process.wait()
        kill_all(self.network.namespace(host))  # what it has started, and did not end
        while self.show(host):
            pass
        if running.unfinished:
            self.output(host, _last_state(bytes(running.unfinished)))
        assert running.process.stdout is not None
        if running.process.stdout in self.selector.get_map():
            self.selector.unregister(running.process.stdout)
        running.process.stdout.close()
        del self.running[host]
        self.standing.discard(host)
        on_purpose = (running.killed and not self.out_of_time) or self.interrupted is not None
        self.outcomes[host] = Outcome(code, on_purpose, time.monotonic() - self.began)
        if code and not on_purpose and not self.out_of_time:
            self.output(None, f"host {host} ended with exit code {code}")
            limit = time.monotonic() + self.grace_seconds
            if self.deadline is None or limit < self.deadline:
                self.deadline = limit
                self.output(None, f"the others have {self.grace_seconds:g} s to end")

    def happen(self, event: Event, begins: bool) -> None:
        self.output(None, f"{time.monotonic() - self.began:.1f} s: {'' if begins else 'end of the '}{event}")
        hosts = event.groups[0]
        if event.kind == "kill":
            self.kill(hosts)
        elif event.kind == "restart":
            self.kill(hosts)
            for host in hosts:
                if host in self.running:
                    self.ended(host)
                self.start(host)
        elif event.kind == "stop":
            self.send(hosts, signal.SIGSTOP if begins else signal.SIGCONT)
            self.standing = self.standing | set(hosts) if begins else self.standing - set(hosts)
        elif begins:
            self.network.cut(event.groups)
        else:
            self.network.heal(event.groups)

    def kill(self, hosts: Sequence[int]) -> None:
        for host in hosts:
            if host in self.running:
                self.running[host].killed = True
            kill_all(self.network.namespace(host))

    def send(self, hosts: Sequence[int], number: signal.Signals) -> None:
        for host in hosts:
            signal_all(self.network.namespace(host), number)

    def interrupt(self, number: int, _: object) -> None:
        self.interrupted = signal.Signals(number)
        self.unanswered += 1

    def pass_on_interrupt(self) -> None:
        """End the hosts at Ctrl-C as it would end one process; a second one kills them."""
        if self.interrupted is None or not self.unanswered:
            return
        self.unanswered = 0
        if self.interrupted_once:
            self.kill(sorted(self.running))
            return
        self.interrupted_once = True
        self.output(None, f"{self.interrupted.name}: ending the hosts (again: at once)")
        self.send(sorted(self.running), self.interrupted)
        self.send(sorted(self.running), signal.SIGCONT)  # who stands still could not end
        self.standing.clear()
        self.deadline = time.monotonic() + self.grace_seconds


def _occurrences(events: Sequence[Event]) -> Iterator[tuple[float, Event, bool]]:
    """Return when something begins (true) or ends, in seconds."""
    for event in events:
        yield event.at_seconds, event, True
        if event.until_seconds is not None:
            yield event.until_seconds, event, False


def _restarts(ahead: Sequence[tuple[float, Event, bool]]) -> bool:
    return any(event.kind == "restart" for _, event, _ in ahead)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """Return that of all hosts together: of the first that failed by itself; 0 if none did."""
    failed = sorted((o for o in outcomes if o.exit_code and not o.on_purpose), key=lambda outcome: outcome.seconds)
    code = failed[0].exit_code if failed else 0
    return 128 - code if code < 0 else code


def program_exists(program: str) -> bool:
    """Tell whether a command can be found, as a shell would find it."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath)) is not None or program == sys.executable
