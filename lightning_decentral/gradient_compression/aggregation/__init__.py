"""The ways in which messages become their mean: each a coroutine that asks (`requests`) and reads from top to bottom.

A way makes at most two requests beside those that are made `alone`, so that three lanes carry it (`transport.lanes`).
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from lightning_decentral.compression import PowerSGD
from lightning_decentral.compression.grid import AbstractGrid
from lightning_decentral.gradient_compression.aggregation.all_gather import all_gather
from lightning_decentral.gradient_compression.aggregation.all_reduce import as_it_is, of_messages
from lightning_decentral.gradient_compression.aggregation.powersgd import power_iteration
from lightning_decentral.gradient_compression.aggregation.shared_grid import shared_grid
from lightning_decentral.gradient_compression.aggregation.two_phase import parcels, two_phase
from lightning_decentral.gradient_compression.step import Exchange

AnyWay = Coroutine[Any, Any, None]


def exchanged(exchanges: Sequence[Exchange]) -> Iterator[AnyWay]:
    """Make the coroutines that exchange a bucket's groups, in the order in which all workers start them.

    An all-reduce takes as many latencies in sequence as there are workers, twice: what is not compressed goes first.
    """
    for exchange in exchanges:
        if exchange.group.scheme is None:
            yield as_it_is(exchange)
    for parcel in parcels([exchange for exchange in exchanges if exchange.group.way == "two_phase"]):
        yield two_phase(parcel)
    for exchange in exchanges:
        if exchange.group.scheme is not None and exchange.group.way != "two_phase":
            yield _way_of(exchange)


def _way_of(exchange: Exchange) -> AnyWay:
    compressor = exchange.compressor
    if isinstance(compressor, PowerSGD):
        return power_iteration(exchange, compressor)
    if exchange.group.way == "all_gather":
        return all_gather(exchange)
    if isinstance(compressor, AbstractGrid):
        return shared_grid(exchange, compressor)
    return of_messages(exchange)
