"""Who is alive, and what went wrong: a store on worker 0 and one thread per worker.

Every worker counts up its heartbeat in the store. When an exchange fails, the heartbeats that stand still name the lost
worker; when a worker raises, it publishes its exception, and the others raise that one instead of a closed connection.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lightning_decentral.errors import PeerLost, WorkerFailed
from lightning_decentral.transport.processes import is_near, is_there, own_process

_INTERVAL_SECONDS = 0.25
_SILENCE_SECONDS = 2.0  # a heart that does not beat for so long is lost; a running process beats every quarter second


@dataclass(frozen=True)
class _Report:
    kind: str  # "failed" or "lost"
    message: str
    ranks: tuple[int, ...]

    def error(self) -> Exception:
        return PeerLost(self.message, self.ranks) if self.kind == "lost" else WorkerFailed(self.message)


_MEETING_SECONDS = 30.0  # for all to be there, once their process group is
_STILL_SECONDS = 10.0  # a heart that stands still for so long while all connect is lost, though nobody waits for it


def meet(
    host: str, rank: int, world_size: int, timeout_seconds: float, option: str = "exchange_timeout_seconds"
) -> Watch:
    """Begin to watch over the workers of a process group. All workers together, and first of all.

    Args:
        host: where worker 0 can be reached.
        rank: this worker.
        world_size: how many there are.
        timeout_seconds: for reaching each other; 30 at most.
        option: that gives exchanges more time, for messages.

    Raises:
        PeerLost: if a worker does not come.
    """
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    # Several runs may follow each other in one process group.
    key = f"lightning_decentral/{store.add(f'lightning_decentral/runs of {rank}', 1)}"
    seconds = min(timeout_seconds, _MEETING_SECONDS)
    own = socket.gethostname()
    try:
        if rank == 0:
            watch = Watch(host, 0, 0, [own] * world_size, timeout_seconds, option)
            store.set(key, str(watch.port))
        else:
            store.wait([key], timedelta(seconds=seconds))
            watch = Watch(host, int(store.get(key)), rank, [""] * world_size, timeout_seconds, option)
    except RuntimeError as error:
        raise PeerLost(
            f"Worker {rank} on {own} found no worker 0 at {host} within {seconds:g} seconds: it has ended or cannot be "
            f"reached. Look at its output, and start the run again. ({_first_line(error)})",
            (0,),
        ) from error
    watch.gather_hosts(own, seconds)
    return watch


class Watch:
    """Watches over the other workers of a run.

    Args:
        host: where worker 0 can be reached.
        port: of worker 0's store; worker 0 itself passes 0 and reads `port` afterwards.
        rank: this worker.
        hosts: the host name of each worker, for messages.
        timeout_seconds: for reaching the store.
        option: that gives exchanges more time, for messages.

    Attributes:
        store: a connection to the store, for other uses than this class's own.
        port: the store's port.
        on_beat: called several times a second as long as this worker's heart beats.
        listener: called at each heartbeat, on the thread that makes it, with a connection to the store.
        standstill: called likewise; may tell after how many seconds the next heartbeat should come.
    """

    def __init__(
        self,
        host: str,
        port: int,
        rank: int,
        hosts: list[str],
        timeout_seconds: float,
        option: str = "exchange_timeout_seconds",
    ) -> None:
        self._rank = rank
        self._option = option
        self._hosts = hosts
        self._timeout = timedelta(seconds=min(timeout_seconds, 60.0))
        self.store = dist.TCPStore(
            host, port, is_master=rank == 0, timeout=self._timeout, wait_for_workers=False, multi_tenant=False
        )
        self.port = self.store.port
        self._beats = dist.TCPStore(host, self.port, is_master=False, timeout=self._timeout, wait_for_workers=False)
        self.on_beat: Callable[[], None] = lambda: None
        self._report: _Report | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        self.listener: Callable[[Any], None] | None = None
        self.standstill: Callable[[Any], float | None] | None = None
        self._processes: dict[int, str] | None = None  # of others, once they were seen to be there; "": not yet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"decentral-watch-{rank}", daemon=True)
        self._thread.start()

    def gather_hosts(self, own: str, seconds: float) -> None:
        """Learn on which hosts all workers are, and so that all are there.

        Raises:
            PeerLost: if one does not come within so many seconds.
        """
        self._hosts[self._rank] = own
        deadline = time.monotonic() + seconds
        missing = list(range(len(self._hosts)))
        try:
            self.store.set(f"host/{self._rank}", own)
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not self.store.check([f"host/{rank}"])]
                time.sleep(0.005 if missing else 0.0)
            for rank in set(range(len(self._hosts))).difference(missing):
                self._hosts[rank] = self.store.get(f"host/{rank}").decode()
        except RuntimeError as error:
            failure: Exception = self.diagnose(error, (0,))
            self.close()
            raise failure from error
        if missing:
            names = ", ".join(f"worker {rank}" for rank in missing)
            failure = PeerLost(
                f"Lost {names}: not there {seconds:g} seconds after the process group was. Noticed by worker "
                f"{self._rank} on {own}. Look at what it has printed, and start the run again.",
                tuple(missing),
            )
            self.publish(failure)
            self.close()
            raise self.failure or failure

    def standing_still(self, seconds: float | None = None) -> tuple[int, ...]:
        """Return the workers whose heart has not beaten for some seconds, by default 10, as far as this was asked
        before."""
        limit = _STILL_SECONDS if seconds is None else seconds
        now, beats = time.monotonic(), self._read_beats()
        if beats is None:
            return (0,)
        for rank, beat in enumerate(beats):
            if self._seen.get(rank, (-1, now))[0] != beat:
                self._seen[rank] = (beat, now)
        still = (rank for rank, (_, since) in self._seen.items() if now - since > limit)
        return tuple(rank for rank in still if rank != self._rank)

    @property
    def failure(self) -> Exception | None:
        """What ended the run elsewhere, if anything did."""
        return None if self._report is None else self._report.error()

    @property
    def failed_rank(self) -> int | None:
        """The first worker that raised or was lost, if any."""
        return self._report.ranks[0] if self._report is not None and self._report.ranks else None

    def publish(self, exception: BaseException) -> None:
        """Tell everybody that this worker raised, unless a failure is known already."""
        if self._report is not None:
            return
        if isinstance(exception, PeerLost):
            report = _Report("lost", str(exception), exception.ranks)
        else:
            text = "".join(traceback.format_exception(exception)).rstrip()
            where = f"Worker {self._rank} on {self._hosts[self._rank]}"
            report = _Report(
                "failed", f"{where} raised {type(exception).__name__}: {exception}\n\n{text}", (self._rank,)
            )
        self._report = report
        try:
            first = self._beats.compare_set("report", "", json.dumps([report.kind, report.message, report.ranks]))
        except Exception:  # the store went down with worker 0: there is nobody to tell
            return
        self._report = _parse(first)

    def diagnose(self, error: Exception, waiting_for: tuple[int, ...] = ()) -> Exception:
        """Return the reason behind a failed exchange: another worker's exception, or who was lost.

        Takes up to a few seconds, in which the heartbeats are watched.
        """
        deadline = time.monotonic() + _SILENCE_SECONDS
        before = self._read_beats()
        while time.monotonic() < deadline:
            if self._report is not None:
                return self._report.error()
            time.sleep(_INTERVAL_SECONDS)
        after = self._read_beats()
        if self._report is not None:
            return self._report.error()
        if before is None or after is None:
            lost: tuple[int, ...] = (0,)
        else:
            lost = tuple(
                rank
                for rank, (old, new) in enumerate(zip(before, after, strict=True))
                if old == new and rank != self._rank
            )
        if lost:
            names = ", ".join(f"worker {rank} on {self._hosts[rank]}" for rank in lost)
            verb = "is" if len(lost) == 1 else "are"
            failure = PeerLost(
                f"Lost {names}: no heartbeat, {verb} killed, stopped or cut off. Noticed by worker {self._rank} on "
                f"{self._hosts[self._rank]}. Start the run again from its last checkpoint. ({_first_line(error)})",
                lost,
            )
        else:
            names = ", ".join(f"worker {rank} on {self._hosts[rank]}" for rank in waiting_for) or "another worker"
            failure = PeerLost(
                f"An exchange of worker {self._rank} on {self._hosts[self._rank]} with {names} failed, though "
                "everybody is alive: they are too slow for the time-out, or do not take the same steps. Raise "
                f"`{self._option}`, or make all workers take the same number of steps. "
                f"({_first_line(error)})",
                waiting_for,
            )
        return failure

    def watch_processes(self) -> None:
        """Notice a worker whose process has ended, though nobody waits for it. All workers together, of one machine."""
        self.store.set(f"process/{self._rank}", own_process())
        self._processes = {rank: "" for rank in range(len(self._hosts)) if rank != self._rank}

    def _look_at_processes(self, processes: dict[int, str]) -> None:
        """Publish the loss of a worker whose process was there and is not, and which has not said that it leaves."""
        for rank, known in list(processes.items()):
            if known and is_there(known):
                continue
            key = f"process/{rank}"
            said = self._beats.get(key).decode() if self._beats.check([key]) else ""
            if not known and said and is_there(said):
                processes[rank] = said
            elif not known and not is_near(said):  # it has said nothing yet, or nobody knows of it here
                continue
            elif not said:
                del processes[rank]  # it has left
            else:
                failure = PeerLost(
                    f"Lost worker {rank} on {self._hosts[rank]}: its process has ended. Noticed by worker {self._rank} "
                    f"on {self._hosts[self._rank]}. Start the run again from its last checkpoint.",
                    (rank,),
                )
                self.publish(failure)
                return

    def close(self) -> None:
        """Stop watching; worker 0 keeps the store until the others have left it."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=10.0)
        try:
            # Whoever leaves knows how the run ended; the lost ones never leave. The store lives on worker 0.
            if self._processes is not None:
                self._beats.set(f"process/{self._rank}", "")
            left = self._beats.add("left", 1)
            deadline = time.monotonic() + _SILENCE_SECONDS
            while self._rank == 0 and left < len(self._hosts) and time.monotonic() < deadline:
                time.sleep(0.01)
                left = self._beats.add("left", 0)
        except Exception:  # the store went down first: nothing is left to close
            pass
        del self._beats, self.store

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            self.on_beat()
            pause = _INTERVAL_SECONDS
            try:
                self._beats.add(f"beat/{self._rank}", 1)
                if self._report is None and self._beats.check(["report"]):
                    self._report = _parse(self._beats.get("report"))
                if self._processes is not None and self._report is None:
                    self._look_at_processes(self._processes)
                if self.listener is not None:
                    self.listener(self._beats)
                if self.standstill is not None:
                    pause = self.standstill(self._beats) or pause
            except Exception:
                if self._report is None:
                    message = (
                        f"Lost worker 0 on {self._hosts[0]}: its store does not answer worker {self._rank} on "
                        f"{self._hosts[self._rank]}. Start the run again from its last checkpoint."
                    )
                    self._report = _Report("lost", message, (0,))
                return
            self._stop.wait(pause)

    def _read_beats(self) -> list[int] | None:
        try:
            return [self._beats.add(f"beat/{rank}", 0) for rank in range(len(self._hosts))]
        except Exception:
            return None


def _parse(text: bytes) -> _Report:
    kind, message, ranks = json.loads(text)
    return _Report(kind, message, tuple(ranks))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
