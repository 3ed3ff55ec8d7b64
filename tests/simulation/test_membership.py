"""Proved here: the rules by which workers that come and go agree, and that no schedule of failures hangs them, loses an
update or counts one twice; and that the bookkeeping which says so notices both."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_decentral import agreement
from lightning_decentral.algorithms import (
    ADPSGD,
    APSGD,
    DPSGD,
    ACiD,
    AsyncEASGD,
    BackupWorkers,
    DelayAdaptive,
    DelayedNesterov,
    DiLoCo,
    FedBuff,
    LocalSGD,
    Malenia,
    Rennala,
    Ringleader,
    Ringmaster,
    StalenessAware,
    StaleSynchronous,
    Swarm,
)
from lightning_decentral.algorithms.open_easgd import OpenEASGD
from lightning_decentral.algorithms.open_server import OpenServer
from lightning_decentral.commands.torture import main
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.membership import Hearts, Member, Members, Patience
from lightning_decentral.simulation import torture as tortures
from lightning_decentral.simulation.torture import Schedule, Torture, TortureFailed, torture
from lightning_decentral.topology import Among, OnePeerExponential, Ring


def test_an_entry_is_read_as_it_was_written_and_garbage_is_refused() -> None:
    members = Members.founded(Member(2, 5), "{}", 3).joined(Member(0, 7)).training(3).without([5])
    assert Members.from_json(members.to_json()) == members
    assert (members.living, members.gone, members.dealt, members.phase) == ((Member(0, 7),), (5,), (7, 5), "training")
    assert members.without([7]).phase == "over"
    for garbage in ("", "{}", "[1]", members.to_json().replace("training", "sleeping")):
        with pytest.raises(ConfigurationError, match="no entry"):
            Members.from_json(garbage)
    with pytest.raises(ConfigurationError, match="free"):
        members.joined(Member(0, 9))


def test_a_heart_is_silent_after_one_and_a_half_heartbeats_and_not_while_nobody_looked() -> None:
    hearts = Hearts(2.0)
    hearts.hear(1, 4, now=10.0)
    hearts.hear(1, 4, now=12.9)
    assert hearts.silent([1, 2], now=12.9) == ()
    assert hearts.silent([1, 2], now=13.1) == (1,)
    hearts.forget(now=20.0)
    assert hearts.silent([1], now=22.9) == ()


def test_the_graph_of_those_that_are_there_is_connected_whoever_is_lost() -> None:
    for lost in range(5):
        ranks = tuple(rank for rank in range(5) if rank != lost)
        graph = ADPSGD(Ring).among(ranks, 5).graph
        assert graph.is_connected
        assert [len(graph.peers(rank)) for rank in range(5)] == [0 if rank == lost else 2 for rank in range(5)]
    assert ADPSGD().among((3,), 5).peers(3) == ()
    assert isinstance(ADPSGD().among((0, 2), 5).graph, Among)
    assert DPSGD(Ring).among((1, 4), 5).graph.graph == DPSGD().resolved(2).graph  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "seeds"), [(ADPSGD(), 70), (ACiD(), 30), (Swarm(every=1, levels=16), 25)], ids=str)
def test_many_schedules_of_failures_end_well(method: ADPSGD | ACiD | Swarm, seeds: int) -> None:
    outcomes, failures = torture(method, range(seeds), Schedule(workers=3, batches=9))
    assert not failures
    assert sum(each.crashes for each in outcomes) > seeds / 2
    assert sum(each.joins for each in outcomes) > seeds / 10


@pytest.mark.parametrize("method", [DiLoCo(every=2), LocalSGD(every=2)], ids=repr)
def test_those_that_are_there_average_at_the_end_of_a_round_and_begin_the_next_one_alike(method: Any) -> None:
    outcomes, failures = torture(method.opened(), range(15), Schedule(workers=3, batches=12))
    assert not failures
    assert sum(each.averages for each in outcomes) > 3 * 15
    assert sum(each.crashes for each in outcomes) > 10
    assert any(each.joins for each in outcomes)


def test_a_straggler_that_lives_holds_up_a_round_by_a_step_of_its_own_and_not_by_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this schedule one of three workers is a hundred times slower."""
    method, seconds = DiLoCo(every=4).opened(), []
    for grace in (None, 3.0):
        outcome = Torture(method, 29, Schedule(workers=3, batches=36, crashes=0, grace=grace)).run()
        seconds.append(outcome.seconds)
    assert seconds[1] < 0.9 * seconds[0]
    monkeypatch.setattr(tortures, "Patience", lambda grace, quorum, most_seconds: Patience(grace, quorum, 2.0))
    told: list[str] = []
    Torture(method, 29, Schedule(workers=3, batches=36, crashes=0, pauses=0, grace=3.0), told.append).run()
    assert any("was left out" in line for line in told)
    _, failures = torture(method, range(1, 6, 2), Schedule(workers=3, batches=24, grace=3.0))
    assert not failures


@pytest.mark.parametrize("method", [DPSGD(), DPSGD(Ring, order="atc")], ids=repr)
def test_a_step_of_synchronous_gossip_is_made_by_all_that_are_there_or_by_nobody(method: Any) -> None:
    outcomes, failures = torture(method.opened(), range(7), Schedule(workers=3, batches=12))
    assert not failures
    assert sum(each.averages for each in outcomes) > 10 * 7
    assert sum(each.crashes for each in outcomes) > 5
    assert any(each.joins for each in outcomes)
    assert any(each.interrupted for each in outcomes)


@pytest.mark.parametrize("order", ["awc", "atc"])
def test_synchronous_gossip_is_what_it_is_where_nobody_is_lost(order: Any) -> None:
    """In four workers' shared epochs: against the stacked rule, on a graph that changes with the step."""
    told: list[str] = []
    schedule = Schedule(batches=16, crashes=0, pauses=0, breaks=0)
    calm = Torture(DPSGD(order=order).opened(), 3, schedule, told.append)
    calm.run()
    founder = next(int(line.split()[2]) for line in told if "writes entry 0" in line)  # whose model all take over
    graph = OnePeerExponential(4)
    ranks = torch.arange(4.0, dtype=torch.float64)[:, None]
    x, goal = torch.full((4, 3), founder + 1.0, dtype=torch.float64), ranks + torch.arange(3.0, dtype=torch.float64)
    for step in range(2 * 16 // 4):
        update = 0.1 * (1.0 + 0.5 * ranks) * (x - goal)
        mixing = graph.mixing_matrix(step)
        x = mixing @ x - update if order == "awc" else mixing @ (x - update)
    torch.testing.assert_close(torch.stack(calm.models), x, rtol=0.0, atol=1e-12)


def end_well(methods: Sequence[Any], seeds: int) -> None:
    """All schedules of methods with a server do, among which are crashes, joins and broken calls."""
    outcomes: list[Any] = []
    for number, method in enumerate(methods):
        own = range(seeds * number, seeds * number + seeds)
        well, failures = torture(method.opened(), own, Schedule(workers=3, batches=12))
        assert not failures, method
        outcomes += well
    assert sum(each.crashes for each in outcomes) > 20
    assert any(each.joins for each in outcomes)
    assert any(each.interrupted for each in outcomes)


def test_servers_apply_each_gradient_that_counts_once_and_count_all() -> None:
    """Their workers are lost and come back; where a server is lost itself, they end."""
    end_well((APSGD(), APSGD(2), StalenessAware(1), DelayAdaptive(), Ringmaster(1), Rennala()), 5)
    Torture(DelayAdaptive().opened(), 302).run()  # a call comes before the server's first step


def test_servers_that_wait_for_others_or_keep_something_of_each_worker_do_so_of_those_that_are_there() -> None:
    end_well((BackupWorkers(3), BackupWorkers(2), StaleSynchronous(0), Malenia(9), Ringleader()), 12)


@pytest.mark.parametrize(
    ("place", "name", "wrong", "method", "seed", "said"),
    [
        (BackupWorkers, "is_due", lambda self, state: False, BackupWorkers(3), 15, "hangs"),
        (StaleSynchronous, "regroup", lambda self, worker: worker.state.setdefault("clocks", {}), None, 15, "hangs"),
        (Malenia, "regroup", lambda self, worker: None, Malenia(), 3, r"an update has .* of which \[0, 2\] are there"),
        (Ringleader, "regroup", lambda self, worker: None, Ringleader(), 3, r"an update has .* of which \[0, 2\] are"),
        (
            *(OpenServer, "join", lambda self, worker, given: worker.state.update(version=given["version"] + 1)),
            *(Malenia(), 15, "a gradient of worker 2 differs by .* at version 2"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_who_waits_for_a_lost_worker_or_counts_it_is_found(
    place: Any, name: str, wrong: Any, method: Any, seed: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, wrong)
    algorithm = (method or StaleSynchronous(0)).opened()
    with pytest.raises(TortureFailed, match=f"seed {seed}: {said}"):
        Torture(algorithm, seed, Schedule(workers=3, batches=30, leavers=0, most_seconds=60.0)).run()


def test_replicas_and_their_centre_are_conserved(monkeypatch: pytest.MonkeyPatch) -> None:
    end_well((AsyncEASGD(every=1), AsyncEASGD(every=2)), 20)

    async def twice(self: Any, worker: Any, source: int, theirs: Any) -> Any:
        return self._pulled(worker, source, theirs).mul_(2.0)

    monkeypatch.setattr(OpenEASGD, "on_call", twice)
    _, failures = torture(AsyncEASGD(every=1).opened(), range(1), Schedule(workers=3, batches=12))
    assert "has lost" in str(failures)


def test_centres_take_each_round_of_local_steps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = (
        FedBuff(every=2),
        FedBuff(every=1, buffer=1),
        FedBuff(every=3, buffer=2, by_speed=True),
        DelayedNesterov(every=2, outer_momentum=0.0),
    )
    end_well(methods, 20)

    def twice(self: Any, worker: Any, difference: Any, staleness: int) -> None:
        worker.state["centre"].add_(difference, alpha=2.0 * self.weight(staleness))

    monkeypatch.setattr(FedBuff, "receive", twice)
    _, failures = torture(FedBuff(every=1).opened(), range(1), Schedule(workers=3, batches=12))
    assert "from what was done to it" in str(failures)


def test_a_server_that_counts_nothing_or_applies_something_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name, wrong, said in (
        (
            OpenServer,
            "_taken",
            lambda self, worker, source, gradient, version: gradient,
            "the server counts {} gradients",
        ),
        (APSGD, "direction", lambda self, worker, source, gradient, weight: gradient.mul_(2.0), "1 gradients wrong by"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, wrong)
            _, failures = torture(APSGD().opened(), range(1), Schedule(workers=3, batches=12))
        assert said in str(failures)


def test_an_exchange_that_only_one_end_makes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def made_here(life: int, place: str, members: Any, made: bool) -> bool:
        await agreement.gather(life, place, "the end of an average", b"")
        return made

    monkeypatch.setattr(agreement, "all_made", made_here)
    schedule = Schedule(workers=3, batches=24, crashes=0, breaks=12, most_seconds=60.0)
    _, failures = torture(DPSGD().opened(), range(4), schedule)
    assert len(failures) > 1


def test_a_worker_that_joins_with_the_model_of_an_earlier_round_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_place", lambda members: (members.phase, members.epoch, 0))
    _, failures = torture(DiLoCo(every=1).opened(), range(8), Schedule(workers=3, batches=24))
    assert any("began another round" in str(each) for each in failures)


def test_both_ends_of_an_exchange_move_the_companions_alike_though_they_see_other_members() -> None:
    """In these schedules two workers averaged just when only one of them knew of a loss."""
    _, failures = torture(ACiD(), (0, 21))
    assert not failures


@pytest.mark.parametrize(("method", "seed"), [(DPSGD(), 105), (DiLoCo(every=2), 3014)])
def test_nobody_joins_with_the_copy_of_one_that_has_not_averaged_yet_where_others_have(method: Any, seed: int) -> None:
    """In these schedules the donor knew that the round was over before it had come to its end."""
    Torture(method.opened(), seed, Schedule(4, batches=16, grace=3.0 if isinstance(method, DiLoCo) else None)).run()


def test_a_worker_that_is_left_out_before_its_first_step_starts_again() -> None:
    Torture(ADPSGD(), 6500, Schedule(4, batches=16)).run()  # raised an error once


def test_a_seed_is_replayed_to_the_event(capsys: pytest.CaptureFixture[str]) -> None:
    assert Torture(ADPSGD(), 7).run() == Torture(ADPSGD(), 7).run()
    assert main(["--seed", "7", "--trace"]) == 0
    assert "writes entry 0: gathering" in capsys.readouterr().out


def test_a_worker_has_an_algorithm_of_its_own_which_is_made_once_for_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    steps: list[tuple[int, int]] = []
    among, step = ADPSGD.among, ADPSGD.step

    def makes(self: Any, ranks: Any, size: int) -> Any:
        made.append(among(self, ranks, size))
        return made[-1]

    def steps_once(self: Any, worker: Any) -> Any:
        steps.append((id(self), id(worker)))
        return step(self, worker)

    monkeypatch.setattr(ADPSGD, "among", makes)
    monkeypatch.setattr(ADPSGD, "step", steps_once)
    one = Torture(ADPSGD(), 10)
    assert one.run().crashes
    assert len(dict(steps)) == len(set(steps))
    assert 4 < len(made) < len(steps) / 2


def test_a_schedule_is_shrunk_to_what_does_harm_in_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that stood still at the beginning of a beat made whoever was heard first leave out the others."""
    shrink = ["--method", "adpsgd", "--seed", "209", "--shrink"]
    with pytest.raises(ConfigurationError, match="ends well"):
        main(shrink)
    with pytest.raises(ConfigurationError, match="without a seed"):
        main(shrink[-1:])
    beat = agreement.beat

    async def beat_late(life: int, hearts: Hearts, began: float) -> Members:
        return await beat(life, hearts, await agreement.Now())

    monkeypatch.setattr(agreement, "beat", beat_late)
    assert main(shrink) == 1
    text = capsys.readouterr().out
    assert "needs of what disturbs it: worker 2 stands still at 1.39 s; the store stands still at 1.49 s\n" in text
    assert "was left out, and it has never stood still" in text


def test_many_seeds_may_be_run_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for parts in ((3,), (2, 1)):
        for seeds in parts:
            assert main(["--seeds", str(seeds), "--tally", str(tmp_path / f"{len(parts)}.json")]) == 0
        rows.append(capsys.readouterr().out.splitlines()[-1].split("|")[:-2])  # but for the seconds
    assert rows[0] == rows[1]
    assert rows[0][3].strip() == "3"
    tally = json.loads((tmp_path / "1.json").read_text())
    tally["adpsgd"] |= {"ended_well": 2, "failures": ["seed 1: hung once, and is mended"]}
    (tmp_path / "again.json").write_text(json.dumps(tally))
    assert main(["--seeds", "1", "--tally", str(tmp_path / "again.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split("|")[3:5] == [" 4 ", " 4 "]
    with pytest.raises(ConfigurationError, match="of 4 workers of adpsgd, and --workers 3"):
        main(["--workers", "3", "--tally", str(tmp_path / "1.json")])
    assert main(["--method", "adpsgd,diloco", "--seeds", "1", "--tally", str(tmp_path / "1.json")]) == 0
    assert [line.split("|")[1:4:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        [" adpsgd ", " 4 "],
        [" diloco ", " 1 "],
    ]
    with pytest.raises(ConfigurationError, match="needs one of"):
        main(["--method", "adpsgd,nobody"])


@dataclasses.dataclass(frozen=True, repr=False)
class Forgets(ADPSGD):
    """AD-PSGD whose caller does not move: what it gives is counted twice."""

    def _approach(self, worker, difference):  # type: ignore[no-untyped-def]
        return None


@dataclasses.dataclass(frozen=True, repr=False)
class Spoils(ADPSGD):
    """AD-PSGD that changes its model past everybody."""

    def _call(self, worker, peer):  # type: ignore[no-untyped-def]
        worker.x.mul_(0.5)
        return super()._call(worker, peer)


@dataclasses.dataclass(frozen=True, repr=False)
class Rounds(Swarm):
    """SwarmSGD whose caller moves by its own vector, where the other end has moved by the rounded one."""

    def _close(self, opened, worker, reply):  # type: ignore[no-untyped-def]
        (shared,) = worker.state["shared"].buffers
        rounded = opened.lattice.decompress_near(opened.message.payloads[0], shared)
        before = shared.clone()
        super()._close(opened, worker, reply)
        shared.add_(rounded - before, alpha=0.5)


@pytest.mark.parametrize(
    ("method", "message"), [(Forgets(), "has lost"), (Spoils(), "differs by"), (Rounds(every=1), "has lost")], ids=str
)
def test_the_bookkeeping_notices_what_is_lost(method: ADPSGD | Swarm, message: str) -> None:
    with pytest.raises(TortureFailed, match=f"seed 1: .*{message}"):
        Torture(method, 1).run()


def test_the_bookkeeping_notices_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heart that is never silent: who waits for a dead worker waits for ever."""
    monkeypatch.setattr(Hearts, "silent", lambda *_: ())
    _, failures = torture(ADPSGD(), range(3), Schedule(most_seconds=60.0))
    assert failures
    assert all("hangs" in str(failure) for failure in failures)


def test_who_gets_sigterm_leaves_and_what_it_does_before_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, told = Schedule(workers=3, batches=12, crashes=0, pauses=0, breaks=0), list[str]()
    for seed in range(8):
        Torture(Swarm(every=4), seed, schedule, told.append).run()
    assert any(line.endswith("left") for line in told)

    async def wrong(self: Any, worker: Any, neighbors: Any) -> None:
        worker.x.mul_(2.0)

    monkeypatch.setattr(Swarm, "depart", wrong)
    _, failures = torture(Swarm(every=4), range(8), schedule)
    assert "from what was done to it" in str(failures)


def test_who_leaves_at_the_end_of_an_epoch_gives_its_batches_back_in_time_or_makes_them() -> None:
    """Of four batches two were dealt, and the worker that leaves has claimed one."""
    members = Members.founded(Member(0, 1), "{}", 0).joined(Member(1, 2)).training(0)

    async def leave() -> list[int]:
        if not await agreement.gives_back(1, 4):
            await _ends(1)
            return [2]
        await agreement.leave(1)
        return []

    left_with = set()
    for seed in range(400):
        store = {"claims/0": b"1", "claimed/0/1": b"[2]"}
        one, other = _interleaved(random.Random(seed), members, store, {1: leave(), 2: _takes_the_rest(2)})
        assert sorted(one + other) == [2, 3]
        left_with.add(not one)
    assert left_with == {True, False}


def test_who_joins_at_the_end_of_an_epoch_makes_a_batch_of_it_or_leaves_all_to_others() -> None:
    """Of four batches one was dealt. A round ends meanwhile, after which whoever joins needs another copy."""
    members = Members.founded(Member(0, 1), "{}", 0).training(0)

    async def train() -> list[int]:
        claimed = await agreement.claim(1, 4, "before", 1, 0)
        if await agreement.end_round(1):
            await agreement.go_on(1, Members.averaged, lambda now: now.round == 1)
        return claimed + await _takes_the_rest(1)

    async def join() -> list[int]:
        founded, batch = await agreement.enter(Member(1, 2), "{}", 0, "a test", lambda epoch: 4 if epoch == 0 else 0)
        assert not founded
        if batch is None:
            return []
        await agreement.close_rounds(2)  # it is in none, so that no round waits for it
        return [batch, *await _takes_the_rest(2)]

    joined_with = set()
    for seed in range(400):
        one, other = _interleaved(random.Random(seed), members, {}, {1: train(), 2: join()})
        assert sorted(one + other) == [1, 2, 3]
        joined_with.add(bool(other))
    assert joined_with == {True, False}


async def _takes_the_rest(life: int) -> list[int]:
    """Take batches of the first epoch, of four, until nothing is left."""
    taken: list[int] = []
    while claimed := await agreement.claim(life, 4, str(len(taken)), 1, 0):
        taken += claimed
    await _ends(life)
    return taken


async def _ends(life: int) -> None:
    """Come to the end of the first epoch, and let the next one begin."""
    await agreement.advance(life, "end/0", Members.meeting, lambda now: now.phase == "meeting" or now.epoch == 1)
    await agreement.go_on(life, lambda now: now.training(1), lambda now: now.epoch == 1)


def _interleaved(rng: random.Random, members: Members, store: dict[str, bytes], scripts: dict[int, Any]) -> list[Any]:
    """Run what lives do, one operation of one of them after the other."""
    one, answers, ended = Torture(ADPSGD(), 0), dict[int, Any](), dict[int, Any]()
    one._log, one._store = [members] * (members.number + 1), store
    lives = {life: tortures._Life(life - 1, life, None, Hearts(1.0)) for life in scripts}
    while len(ended) < len(scripts):
        life = rng.choice([each for each in scripts if each not in ended])
        try:
            operation = scripts[life].send(answers.get(life))
        except StopIteration as finished:
            ended[life] = finished.value
            continue
        match operation:
            case agreement.Prepare():
                answers[life] = one._log[-1]
            case agreement.Known():
                answers[life] = lives[life].members
            case agreement.Now():
                answers[life] = 0.0
            case _:
                answers[life] = one._do(lives[life], operation)
    return [ended[life] for life in sorted(ended)]
