"""A step of D-PSGD goes from Lightning's loop to the socket in at most eight Python frames."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import CoroutineType
from typing import Any

import lightning
from lightning.pytorch import Callback, Trainer

from lightning_decentral.algorithms import DPSGD
from strategies.fits import Regression, gossip, make_trainer

FRAMES = 8
LIGHTNING = str(Path(lightning.__file__).parent)


class WaysToTheSocket(Callback):
    """Notes which functions of ours are being executed whenever bytes are handed to gloo on the loop's thread."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ways = folder, list[list[str]]()

    def on_train_epoch_start(self, *_: Any) -> None:
        sys.setprofile(self.note)

    def note(self, frame: Any, event: str, function: Any) -> None:
        asks = isinstance(getattr(function, "__self__", None), CoroutineType)  # a coroutine's `send`
        if event == "c_call" and function.__name__ in ("send", "recv") and not asks:
            way = []
            while frame is not None and not frame.f_code.co_filename.startswith(LIGHTNING):
                if frame.f_code.co_name != "<listcomp>":  # from Python 3.12 on no frame of its own
                    way.insert(0, frame.f_code.co_qualname)
                frame = frame.f_back
            self.ways.append(way)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        sys.setprofile(None)
        (self.folder / f"ways-{trainer.global_rank}.json").write_text(json.dumps(self.ways))


def test_the_way_to_the_socket_is_short(tmp_path: Path) -> None:
    """Through TCP: what workers of one host have in memory that they share has another way."""
    strategy = gossip(DPSGD(), shared_memory=False)
    make_trainer(tmp_path, strategy, max_epochs=1, callbacks=[WaysToTheSocket(tmp_path)]).fit(Regression())
    for rank in range(2):
        ways = json.loads((tmp_path / f"ways-{rank}.json").read_text())
        assert len(ways) >= 2, "no message was sent and received by the loop's thread"
        longest = max(ways, key=len)
        assert len(longest) <= FRAMES, " -> ".join(longest)
