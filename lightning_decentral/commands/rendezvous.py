"""The command ``rendezvous``: a store that outlives the workers of a run."""

from __future__ import annotations

import argparse
import signal
import threading

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.transport.rendezvous import serve


def main(argv: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="lightning-decentral rendezvous",
        description="Keeps what the workers of a run with OpenStrategy agree on: who takes part. It needs no "
        "accelerator and hardly any memory or time, and has to live as long as the run.",
    )
    parser.add_argument("--host", default="0.0.0.0", help="interface to listen on (default: all; use a private one)")
    parser.add_argument("--port", type=int, default=29500, help="port; 0: a free one (default: 29500)")
    options = parser.parse_args(argv)
    if not 0 <= options.port < 1 << 16:
        raise ConfigurationError(f"rendezvous got --port {options.port}, needs one from 0 to 65535. Use 29500.")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with serve(options.host, options.port) as port:
        print(f"rendezvous at port {port}; start each worker with MASTER_ADDR and MASTER_PORT={port}", flush=True)
        ended.wait()
    return 0
