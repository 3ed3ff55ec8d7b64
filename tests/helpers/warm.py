"""A Python that starts warm: a program of its own that imports nothing, as it is forked from one that has.

A fresh Python needs five seconds of a core until Lightning is imported, which is most of what many tests of programs
cost. Here `sys.executable` is replaced by one that hands its arguments, environment, folder, output and namespaces to a
fork of this process. What Python itself does at its start is not tested so: that a plain script runs as a user starts
it, is, in `test_launchers` and `test_docs`.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import random
import runpy
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.workers import processor_seconds

_USED = multiprocessing.get_context("fork").Value("d", 0.0)


@contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """The path of such a Python, while this lasts: it knows ``python FILE ...``, ``-m MODULE ...`` and ``-c CODE ...``.

    Args:
        folder: for it; a short path, as of all sockets.
    """
    import lightning.pytorch.cli
    import lightning.pytorch.loggers  # noqa: F401

    import lightning_decentral.commands.main
    import lightning_decentral.recipes
    import lightning_decentral.strategies
    from lightning_decentral.errors import ConfigurationError
    from lightning_decentral.lab.bench import prefork, prefork_client

    with suppress(ConfigurationError):  # where the package with them is not installed
        lightning_decentral.recipes.EmbeddedImages().setup()  # reads the images, which each program would do again

    python, path = folder / "python", folder / "socket"
    python.write_text(
        f"#!{sys.executable} -SE\nimport runpy, sys\nsys.argv[1:1] = [{str(path)!r}]\n"
        f"runpy.run_path({prefork_client.__file__!r}, run_name='__main__')\n"
    )
    python.chmod(0o755)

    def work(arguments: list[str]) -> int:
        sys.executable = str(python)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
        random.seed()
        atexit._clear()  # what the tests have to do at their end
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        try:
            if arguments[0] == "-u":  # as torchrun starts it; lines come at once anyway
                arguments = arguments[1:]
            if arguments[0] == "-c":
                sys.argv = ["-c", *arguments[2:]]
                exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
            elif arguments[0] == "-m":
                sys.argv = arguments[1:]
                sys.path.insert(0, os.getcwd())
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = arguments
                sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
                runpy.run_path(arguments[0], run_name="__main__")
        finally:
            atexit._run_exitfuncs()
            with _USED.get_lock():
                _USED.value += processor_seconds()
        return 0

    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        if (child := os.fork()) == 0:
            os.setsid()
            if os.fork() == 0:  # nobody's child: who ends all that a test has started must not end this
                ours.close()
                prefork.serve(listener, theirs, work)
            os._exit(0)
        os.waitpid(child, 0)
        theirs.close()
        try:
            yield str(python)
        finally:
            ours.sendall(b"!")


def warm_seconds() -> float:
    """Of the processor, used by programs that were started so: nobody waits for them."""
    return float(_USED.value)
