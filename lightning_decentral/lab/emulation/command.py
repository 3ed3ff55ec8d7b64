"""``lightning-decentral emulate``: a command in every host of a cluster that is emulated on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import signal
import sys
from collections.abc import Sequence

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.lab.emulation.check import ceiling, describe, measure
from lightning_decentral.lab.emulation.hosts import (
    Event,
    check_events,
    exit_code,
    print_line,
    program_exists,
    run_in_hosts,
)
from lightning_decentral.lab.emulation.network import EmulatedNetwork, check_machine, remove_leftovers
from lightning_decentral.simulation.cluster_file import ClusterFile, Host, parse_host
from lightning_decentral.units import parse_bandwidth, parse_seconds, whole_number

_EPILOG = """\
The command runs once in every host, with the variables that torchrun would set (RANK, WORLD_SIZE, MASTER_ADDR, ...):
give the Trainer num_nodes=<hosts> and devices=1. Hosts see each other as host0, host1, ... and share the file system.

examples:
  lightning-decentral emulate --hosts 8 --rate 200mbit --host 7:rate=20mbit,cpu=25% -- python train.py
  lightning-decentral emulate --cluster clusters/two_sites.yaml --check
  lightning-decentral emulate --hosts 4 --rate 1gbit --kill 3@20s --cut '0,1|2,3@40s..50s' -- python train.py
"""
_FOR_NO_FILE = ("hosts", "rate", "delay")


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: its arguments, without its name.

    Returns:
        The exit status: of the first host that failed by itself, or 0; 130 after Ctrl-C; with ``--check`` 1 if a link
        is more than 10 % off.

    Raises:
        ConfigurationError: if an option cannot be understood, or this machine cannot emulate hosts.
        SystemExit: after ``--help`` (0), and for options without their value (2).
    """
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    options, unknown = _parser().parse_known_args(argv[:split])
    command = argv[split + 1 :]
    if unknown:
        raise ConfigurationError(
            f"emulate got {' '.join(unknown)!r}, needs options that it has (emulate --help lists them), and -- before "
            "the command. Write for example: emulate --hosts 4 -- python train.py"
        )
    if options.clean:
        return _clean()
    cluster = _cluster(options)
    events = [Event.parse(kind, text) for kind in ("kill", "restart", "stop", "cut") for text in getattr(options, kind)]
    check_events(events, len(cluster.hosts))
    timeout = None if options.timeout is None else parse_seconds("--timeout", options.timeout)
    grace = parse_seconds("--grace", options.grace)
    if not command and not options.check:
        raise ConfigurationError(
            "emulate got no command, needs one, or --check. Write it last, after --, as: emulate --hosts 4 -- python "
            "train.py"
        )
    if command and not program_exists(command[0]):
        raise ConfigurationError(f"emulate got the command {command[0]!r}, needs a program that exists. Correct it.")
    network = EmulatedNetwork(cluster, options.name)
    # What would end this process at once must leave nothing behind either; nohup's SIGHUP stays ignored.
    ending = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, _interrupt)
    try:
        return _run(network, options.check, command, events, timeout, grace)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads what is printed: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 128 + signal.SIGPIPE
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(
    network: EmulatedNetwork,
    check: bool,
    command: Sequence[str],
    events: Sequence[Event],
    timeout: float | None,
    grace: float,
) -> int:
    try:
        network.create()
        warn_if_too_fast(network)
        network.limit()
        if check:
            links = measure(network)
            print(describe(links, network), flush=True)
            if not all(link.right for link in links):
                return 1
        if not command:
            return 0
        return exit_code(run_in_hosts(network, command, events=events, timeout_seconds=timeout, grace_seconds=grace))
    finally:
        network.remove()


def warn_if_too_fast(network: EmulatedNetwork) -> float:
    """Say so if the machine's cores cannot carry what the links allow; returns what they carry, in bytes per second.

    Args:
        network: made, but not limited yet.
    """
    most = ceiling(network)
    asked = sum(host.rate_bytes_per_second for host in network.cluster.hosts)
    if math.isfinite(asked) and asked > most:
        print_line(
            None,
            f"warning: the links allow {asked * 8e-9:.3g} Gbit/s in all, the {os.cpu_count()} cores of this machine "
            f"carry {most * 8e-9:.3g} with nothing else to do: the cores will be the limit. Lower the rate, or the "
            "number of hosts.",
        )
    return most


def _clean() -> int:
    check_machine()
    names = remove_leftovers()
    for name in names:
        print_line(None, f"removed what was left of the run {name!r}")
    if not names:
        print_line(None, "nothing is left over from earlier runs")
    return 0


def _cluster(options: argparse.Namespace) -> ClusterFile:
    if options.cluster is not None:
        given = [f"--{name}" for name in _FOR_NO_FILE if getattr(options, name) is not None]
        if given:
            raise ConfigurationError(
                f"emulate got {', '.join(given)} with --cluster, needs one or the other. Change the file, or leave it "
                "out."
            )
        cluster = ClusterFile.read(options.cluster)
    else:
        if options.hosts is None:
            raise ConfigurationError(
                "emulate got neither --hosts nor --cluster, needs one. Write for example --hosts 4."
            )
        count = whole_number("--hosts", options.hosts, most=250)
        default = Host(
            rate_bytes_per_second=math.inf if options.rate is None else parse_bandwidth("--rate", options.rate),
            delay_seconds=0.0 if options.delay is None else parse_seconds("--delay", options.delay),
        )
        cluster = ClusterFile("command line", (default,) * count)
    hosts = list(cluster.hosts)
    for text in options.host:
        rank = int(text.partition(":")[0]) if re.fullmatch(r"[0-9]{1,9}", text.partition(":")[0]) else 0
        if rank >= len(hosts):
            raise ConfigurationError(
                f"--host got host {rank}, needs one of the {len(hosts)} hosts, 0 to {len(hosts) - 1}. Correct it."
            )
        rank, hosts[rank] = parse_host("--host", text, hosts[rank])
    return dataclasses.replace(cluster, hosts=tuple(hosts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-decentral emulate",
        usage="lightning-decentral emulate (--hosts N | --cluster FILE) [options] [--check] [-- command ...]",
        description="Run a command in several hosts with limited links, all on this machine. Needs Linux and root.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--cluster", metavar="FILE", help="hosts and links, as in clusters/*.yaml")
    parser.add_argument("--hosts", metavar="N", help="number of hosts")
    parser.add_argument("--rate", help="of every uplink and downlink: 200mbit or 25MB/s; default: no limit")
    parser.add_argument("--delay", help="one way, of everything that a host sends: 5ms; default: none")
    parser.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="RANK:KEY=VALUE,...",
        help="exceptions: rate, delay, cpu, slowdown",
    )
    parser.add_argument("--check", action="store_true", help="measure the links first, and compare with what was asked")
    parser.add_argument("--kill", action="append", default=[], metavar="3@20s", help="kill a host's processes")
    parser.add_argument("--restart", action="append", default=[], metavar="3@30s", help="start the command again")
    parser.add_argument("--stop", action="append", default=[], metavar="3@20s..30s", help="let a host stand still")
    parser.add_argument("--cut", action="append", default=[], metavar="0-3|4-7@30s..40s", help="part the network")
    parser.add_argument("--timeout", metavar="TIME", help="kill all hosts after this time: 10min")
    parser.add_argument("--grace", default="30s", metavar="TIME", help="for the others when a host has failed (30s)")
    parser.add_argument("--name", default="emulated", help="of the run; two at a time need two names")
    parser.add_argument("--clean", action="store_true", help="remove what crashed runs left behind, and end")
    return parser
