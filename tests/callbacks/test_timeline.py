"""Proved here: a timeline has all waits of a run and for whom they were; a wait is divided between the worker that came
last and the network; the page needs nothing else; and what cannot be drawn is refused with words."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule, Trainer
from strategies.fits import Recorder, Regression, asynchronous, gossip, loader, make_trainer, saved

from lightning_decentral import Cluster, SimulatedStrategy
from lightning_decentral.algorithms import DPSGD, LocalSGD, SyncSGD
from lightning_decentral.callbacks import Timeline
from lightning_decentral.commands.main import main
from lightning_decentral.engine.waits import PEERS
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.plots.timeline import NETWORK, Waiting, WorkerTimeline, read_timelines, who_waited_for_whom
from lightning_decentral.protocol import VOCABULARY, Gradient, LocalStep, Start, Ticket
from lightning_decentral.topology import OnePeerExponential

pytestmark = pytest.mark.usefixtures("kept_forks")


def test_who_is_waited_for_is_known_for_every_word() -> None:
    assert {*PEERS, Gradient, LocalStep, Start, Ticket} == set(VOCABULARY)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def worker(rank: int, *waits: tuple[float, float, float, tuple[int, ...] | None]) -> WorkerTimeline:
    made = [Waiting(b, e, a, (0, step, 0), "NeighborAverage", peers) for step, (b, e, a, peers) in enumerate(waits)]
    spans = (("gradient", 0.0, 5.0), ("update", 5.0, 6.0), ("gradient", 6.5, 8.0))
    return WorkerTimeline(rank, "here", 3, "DPSGD", spans, tuple(made))


def test_a_wait_is_that_of_who_came_last_and_of_the_network() -> None:
    """Worker 0 waits from 1 to 5; worker 1 came at 0.5, worker 2 at 4: three seconds for it, and one for the bytes."""
    timelines = [
        worker(0, (1.0, 5.0, 0.2, (1, 2))),
        worker(1, (1.5, 2.0, 0.5, (0,))),  # nobody was late
        worker(2, (4.0, 5.0, 4.0, None)),  # the last one waits for the network alone
    ]
    assert who_waited_for_whom(timelines) == {
        (0, 2): 3.0, (0, NETWORK): 1.0, (1, NETWORK): 0.5, (2, NETWORK): 1.0
    }  # fmt: skip


def test_who_comes_after_the_end_is_not_waited_for_longer() -> None:
    """A clock that is a little late; and a peer without such a place, as one that answers calls."""
    timelines = [worker(0, (1.0, 2.0, 1.0, (1,)), (3.0, 3.5, 3.0, (2,))), worker(1, (2.1, 2.2, 2.1, (0,)))]
    assert who_waited_for_whom(timelines) == {(0, 1): 1.0, (0, NETWORK): 0.5, (1, NETWORK): pytest.approx(0.1)}


def test_where_the_time_went() -> None:
    """Waits are not counted as what they are inside of; what is left is the loop's."""
    seconds = worker(0, (4.0, 5.5, 4.0, (1,))).seconds()
    assert seconds == {"gradient": 4.0 + 1.5, "update": 0.5, "waiting": 1.5, "other": 0.5}


# -- runs --------------------------------------------------------------------------------------------------------------


class Exposed(Recorder):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept["exposed"] = trainer.strategy.traffic.exposed_seconds  # type: ignore[attr-defined]
        super().on_train_end(trainer, pl_module)


@pytest.mark.parametrize(
    ("strategy", "peers"),
    [
        (lambda: gossip(DPSGD(OnePeerExponential(3))), lambda rank, step: [(rank + 2 ** (step % 2)) % 3]),
        (lambda: gossip(SyncSGD()), lambda rank, step: None),
    ],
    ids=["dpsgd", "sync_sgd"],
)
def test_every_wait_is_there_with_those_it_was_for(strategy: Any, peers: Any, tmp_path: Path) -> None:
    timeline = Timeline(folder="who", first_step=0, steps=6)
    trainer = make_trainer(tmp_path, strategy(), 3, max_epochs=1, callbacks=[timeline, Exposed(tmp_path)])
    trainer.fit(Regression(size=3 * 4 * 8))
    timelines = read_timelines(tmp_path / "who")
    for one, kept in zip(timelines, saved(tmp_path, 3), strict=True):
        assert [kind for kind, _, _ in one.spans] == ["gradient", "update"] * 6
        assert [wait.place[:2] for wait in one.waits] == [(0, step) for step in range(6)]
        for step, wait in enumerate(one.waits):
            assert wait.word == ("AllReduce" if peers(one.rank, step) is None else "NeighborAverage")
            wanted = peers(one.rank, step)
            assert wait.peers == (None if wanted is None else tuple(wanted))
            assert wait.asked <= wait.began <= wait.ended
        assert sum(wait.ended - wait.began for wait in one.waits) <= kept["exposed"]
    page = (tmp_path / "who" / "timeline.html").read_text()
    assert "Timeline of 3 workers" in page
    assert not re.search(r"https?://|src=|href=|@[A-Z]+@", page), "one file that needs no other"
    assert (tmp_path / "who" / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_methods_that_do_not_wait_in_each_step(tmp_path: Path) -> None:
    """Answered calls, rounds of local steps and Lightning's own ddp are drawn as well."""
    for name, strategy in (("calls", asynchronous()), ("rounds", gossip(LocalSGD(4))), ("ddp", "ddp_fork")):
        trainer = make_trainer(tmp_path / name, strategy, 2, max_epochs=1, callbacks=[Timeline(steps=5)])
        trainer.fit(Regression(size=2 * 4 * 8))
        folder = tmp_path / name / "timeline"
        kinds = {kind for one in read_timelines(folder) for kind, _, _ in one.spans}
        assert kinds == {"gradient and waiting" if name == "ddp" else "gradient", "update"}
        total = who_waited_for_whom(read_timelines(folder))
        assert name != "calls" or {peer for _, peer in total} == {NETWORK}, "nobody meets at the same place"
        recorded = [len(one.spans) for one in read_timelines(folder)]
        assert recorded == [10, 10] or (name == "calls" and max(recorded) == 10)  # who is slower takes fewer batches
        assert (folder / "timeline.png").exists()


class Validated(Regression):
    def val_dataloader(self) -> Any:
        return loader(8)


def test_meeting_for_a_validation_is_no_validation(tmp_path: Path) -> None:
    """And the files of an earlier run with more workers, in the same folder, are not taken for those of this one."""
    timeline = Timeline(first_step=0, steps=50)
    (tmp_path / "timeline").mkdir()
    (tmp_path / "timeline" / "worker-2.json").write_text("{}")
    make_trainer(tmp_path, asynchronous(), 2, max_epochs=2, callbacks=[timeline]).fit(Validated(size=2 * 4 * 4))
    for one in read_timelines(tmp_path / "timeline"):
        kinds = [kind for kind, _, _ in one.spans if kind not in ("gradient", "update")]
        assert kinds == ["meeting", "validation"] * 2
        for (_, _, ended), (_, begun, _) in pairwise(one.spans):
            assert ended <= begun


def test_the_command_draws_files_that_were_brought_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["timeline", str(tmp_path)]) == 2
    assert "without a file worker-0.json, needs those that the callback `Timeline` writes" in capsys.readouterr().err
    record = '{"rank": 1, "host": "b", "workers": 4, "method": "DPSGD", "spans": [["gradient", 0.0, 1.0]], "waits": []}'
    (tmp_path / "worker-1.json").write_text(record)
    assert main(["timeline", str(tmp_path)]) == 0
    assert "1 of 4 workers" in capsys.readouterr().out
    assert "Timeline of 1 workers (of 4)" in (tmp_path / "timeline.html").read_text()
    (tmp_path / "worker-0.json").write_text(record.replace('"workers": 4', '"workers": 2'))
    assert main(["timeline", str(tmp_path)]) == 2
    assert "different numbers of workers" in capsys.readouterr().err


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Timeline\(first_step=0, steps=0\): needs"):
        Timeline(first_step=0, steps=0)
    with pytest.raises(ConfigurationError, match=r"default_root_dir='s3://x', needs a folder of a disk\. Give"):
        make_trainer(tmp_path, "dpsgd", 1, default_root_dir="s3://x", callbacks=[Timeline()]).fit(Regression(size=8))
    strategy = SimulatedStrategy(DPSGD(), workers=2, cluster=Cluster())
    with pytest.warns(UserWarning, match="Timeline got SimulatedStrategy, whose workers compute one after"):
        make_trainer(tmp_path, strategy, 1, max_epochs=1, callbacks=[Timeline()]).fit(Regression(size=8))
    assert not (tmp_path / "timeline").exists()
