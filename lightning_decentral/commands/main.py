"""The command line: ``lightning-decentral`` and ``python -m lightning_decentral``.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's: every option of the Trainer, of a strategy, of a
model and of its data can be set from YAML files and from the command line (`commands.lightning_cli`). ``compare``,
``plan``, ``timeline`` and the others are our own. What a command needs is imported when it runs: ``--help`` does not
wait for torch.

Lightning starts the further processes of a machine by repeating the command line. So arguments are read from
``sys.argv``, and given to `main` only where nothing is launched (tests, notebooks).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import cast

from lightning_decentral import __version__
from lightning_decentral.errors import ConfigurationError, to_install
from lightning_decentral.methods import METHODS

_PROGRAM, _PACKAGE = "lightning-decentral", "lightning_decentral"
_LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
_OWN_COMMANDS = {  # to the modules of the package with a function main(argv: list[str]) -> int
    "compare": "commands.compare",
    "plan": "commands.plan",
    "timeline": "commands.timeline",
    "report": "commands.report",
    "rendezvous": "commands.rendezvous",
    "torture": "commands.torture",
    "emulate": "lab.emulation.command",
    "bench": "lab.bench.command",
    "reproduce": "lab.claims.command",
}
_HELP = f"""\
usage: {_PROGRAM} [--help] [--version] COMMAND ...

Decentralized, asynchronous and local-update data-parallel training with PyTorch Lightning.

Train (LightningCLI; configuration files are merged from left to right):
  fit        train a model
  validate   evaluate a checkpoint on the validation data
  test       evaluate a checkpoint on the test data
  predict    run a checkpoint on new data

Choose:
  compare    train one recipe with several methods and tabulate the results
  plan       what a method would cost on a given cluster: bytes and seconds, without training

Look into a run:
  timeline   who computed and who waited for whom, from the files of the callback Timeline
  report     the offline runs of W&B as one page: tables, curves, parallel coordinates

Run where workers come and go:
  rendezvous keep the store on which the workers of a run agree who takes part
  torture    simulate workers that fail, come back and join, from thousands of seeds

Try on one machine what happens on many:
  emulate    run a command in several hosts with limited links, on this machine (Linux, root)
  bench      race the methods against each other and against other packages, on such hosts
  reproduce  test what papers claim, in miniature, with several seeds and a verdict

Options of a command: {_PROGRAM} COMMAND --help
Options of a class:   {_PROGRAM} fit --trainer.strategy.help lightning_decentral.GossipStrategy

Example:
  python -m {_PACKAGE} fit -c recipes/images/base.yaml -c recipes/images/method/dpsgd.yaml --trainer.accelerator cpu
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: The command and its arguments; ``None``: those the process was started with. Give them only where
            Lightning starts no further processes: those would be started with ``sys.argv``.

    Returns:
        Exit status: 0, or 2 after an error in the configuration, of which one message says what to change.

    Raises:
        SystemExit: From the parsers, after ``--help`` of a command (0) and wrong arguments (2).
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if command == "--version":
        print(f"{_PROGRAM} {__version__}")
        return 0
    if command not in (*_LIGHTNING_COMMANDS, *_OWN_COMMANDS):
        got = f"the unknown command {command!r}" if command else "no command"
        needed = ", ".join((*_LIGHTNING_COMMANDS, *_OWN_COMMANDS))
        return _fail(f"Got {got}, need one of {needed}. Run {_PROGRAM} --help to see what they do.")
    try:
        if command in _OWN_COMMANDS:
            own = cast(Callable[[list[str]], int], import_module(f"lightning_decentral.{_OWN_COMMANDS[command]}").main)
            return own(arguments[1:])
        if not all(map(find_spec, ("jsonargparse", "docstring_parser", "typeshed_client"))):
            return _fail(
                f"The command {command!r} needs jsonargparse[signatures], which is not (completely) installed. "
                f"Install the recipes' packages: {to_install('recipes')}."
            )
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m` does: a class of the user's own may lie here
        from lightning_decentral.commands.lightning_cli import DecentralCLI

        DecentralCLI(args=None if args is None else arguments)
    except ValueError as error:
        # The parser wraps what a constructor raises in a list of everything it has tried; our message is inside.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigurationError):
            cause = cause.__cause__ or cause.__context__
        if cause is None and "invalid strategy name" in str(error):  # Lightning's: it knows no close matches
            given = next((b for a, b in pairwise(arguments) if a == "--trainer.strategy"), "")
            close = ", ".join(get_close_matches(given, [*METHODS, "ddp"])) or ", ".join(METHODS)
            return _fail(f"Unknown strategy name {given!r}. Did you mean: {close}? All names are in the documentation.")
        if cause is None:
            raise
        return _fail(str(cause))
    return 0


def _fail(message: str) -> int:
    # Every process finds the same mistake, and a mistake that only one finds must not be silent.
    worker = os.environ.get("LOCAL_RANK", "0")
    who = _PROGRAM if worker == "0" else f"{_PROGRAM} (worker {worker} of this machine)"
    print(f"{who}: error: {message}", file=sys.stderr)
    return 2
