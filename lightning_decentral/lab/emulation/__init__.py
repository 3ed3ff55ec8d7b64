"""Several hosts with limited links on one Linux machine: network namespaces, real processes, real TCP.

`EmulatedNetwork` makes the hosts of a `ClusterFile`, `run_in_hosts` runs a command in them, `measure` tells whether the
links do what was asked. The command line is ``lightning-decentral emulate``.
"""

from lightning_decentral.lab.emulation.check import Measured, ceiling, measure
from lightning_decentral.lab.emulation.hosts import Event, Outcome, exit_code, run_in_hosts
from lightning_decentral.lab.emulation.network import EmulatedNetwork, check_machine

__all__ = [
    "EmulatedNetwork",
    "Event",
    "Measured",
    "Outcome",
    "ceiling",
    "check_machine",
    "exit_code",
    "measure",
    "run_in_hosts",
]
