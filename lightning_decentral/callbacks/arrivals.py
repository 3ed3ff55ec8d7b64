"""What became of the gradients that a server has received."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_decentral.strategies import AsyncStrategy, SimulatedStrategy

_BARS = 10  # rows of the histogram
_WIDTH = 40  # of its longest bar


class Arrivals(Callback):
    """Logs how many gradients a server has used and dropped and how stale they were, and tells whose at the end.

    Dropping favours fast workers, and so their data: the table at the end says whose gradients were used. Logged are
    ``server/version``, ``server/accepted``, ``server/dropped`` and ``server/staleness`` (the mean), on worker 0, as
    totals of the run; and once, at its end, ``server/accepted/RANK`` and ``server/dropped/RANK`` of each worker, and
    the histogram of the staleness, as ``server/staleness/FROM-TO`` in updates. Of a method that gives gradients up
    between micro-batches (`Ringmaster`) there are ``server/cancelled``, and ``server/cancelled/RANK``, too. Each
    server of a model in shards decides for itself: at the end the second one tells the same as ``server1/...``, the
    third one as ``server2/...``. With a method without a server it does nothing.

    Example:
        >>> callback = Arrivals()
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        reports = _reports_of(trainer)
        if not reports or not trainer.is_global_zero or not any(reports[0]["staleness"].values()):
            return
        report = reports[0]
        stale, number = report["staleness"], sum(report["staleness"].values())
        self.log("server/version", float(report["version"]), rank_zero_only=True)
        self.log("server/accepted", float(sum(report["accepted"].values())), rank_zero_only=True)
        self.log("server/dropped", float(sum(report["dropped"].values())), rank_zero_only=True)
        if "cancelled" in report:
            self.log("server/cancelled", float(sum(report["cancelled"].values())), rank_zero_only=True)
        mean = sum(staleness * count for staleness, count in stale.items()) / number
        self.log("server/staleness", mean, rank_zero_only=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reports = _reports_of(trainer)
        for number, report in enumerate(reports):
            rank_zero_info(summary(report, "The server" if len(reports) == 1 else f"Server {number}"))
            for logger in trainer.loggers:
                logger.log_metrics(totals(report, f"server{number or ''}"), step=trainer.global_step)


def _reports_of(trainer: Trainer) -> list[Mapping[str, Any]]:
    strategy = trainer.strategy
    reports = strategy.reports if isinstance(strategy, (AsyncStrategy, SimulatedStrategy)) else []
    return [report for report in reports if "staleness" in report]


def summary(report: Mapping[str, Any], name: str = "The server") -> str:
    """Put what a server reports into a table and a histogram.

    Args:
        report: of `AbstractServer.report`.
        name: of the server, with which the text begins.

    Example:
        >>> report = {"version": 3, "accepted": {0: 2, 1: 1}, "dropped": {0: 0, 1: 1}, "staleness": {0: 3, 2: 1}}
        >>> print(summary(report))
        The server has made 3 updates of 3 gradients, and dropped 1.
          worker 0: 2 used (67 %), 0 dropped
          worker 1: 1 used (33 %), 1 dropped
        Staleness, in updates:
                0 ######################################## 3
                2 ############# 1
    """
    accepted, dropped, stale = report["accepted"], report["dropped"], report["staleness"]
    cancelled: Mapping[int, int] = report.get("cancelled", {})
    used, given_up = sum(accepted.values()), sum(cancelled.values())
    lines = [f"{name} has made {report['version']} updates of {used} gradients, and dropped {sum(dropped.values())}."]
    if given_up:
        lines.append(f"Cancelled between micro-batches, while they were computed: {given_up}.")
    for rank, count in accepted.items():
        share = f" ({count / used:.0%})".replace("%", " %") if used else ""
        also = f", {cancelled[rank]} cancelled" if given_up else ""
        lines.append(f"  worker {rank}: {count} used{share}, {dropped[rank]} dropped{also}")
    if not stale:
        return "\n".join(lines)
    lines.append("Staleness, in updates:")
    bars = histogram(stale)
    for name, count in bars.items():
        lines.append(f"  {name:>7} {'#' * max(1, _WIDTH * count // max(bars.values()))} {count}")
    return "\n".join(lines)


def histogram(stale: Mapping[int, int], largest: int = 0) -> dict[str, int]:
    """Count how many gradients were how stale, in bars of equal width.

    Args:
        stale: how many were of each staleness.
        largest: staleness that there is elsewhere, so that the bars are as wide as there.

    Example:
        >>> histogram({0: 3, 2: 1, 11: 5})
        {'0-1': 3, '2-3': 1, '10-11': 5}
    """
    width = -(-(max(largest, *stale) + 1) // _BARS) if stale else 1
    bars: dict[int, int] = {}
    for staleness, count in stale.items():
        bars[staleness // width] = bars.get(staleness // width, 0) + count
    firsts = {bar * width: count for bar, count in sorted(bars.items())}
    return {f"{first}" if width == 1 else f"{first}-{first + width - 1}": count for first, count in firsts.items()}


def totals(report: Mapping[str, Any], name: str = "server") -> dict[str, float]:
    """Put what a server reports into numbers for a logger.

    Args:
        report: of `AbstractServer.report`.
        name: of the server, with which the names of the numbers begin.

    Example:
        >>> totals({"accepted": {0: 2, 1: 1}, "dropped": {0: 0, 1: 1}, "staleness": {0: 3, 2: 1}})["server/dropped/1"]
        1.0
    """
    kinds: dict[str, Mapping[Any, int]] = {
        "accepted": report["accepted"],
        "dropped": report["dropped"],
        "cancelled": report.get("cancelled", {}),
        "staleness": histogram(report["staleness"]),
    }
    return {f"{name}/{kind}/{key}": float(count) for kind, counts in kinds.items() for key, count in counts.items()}
