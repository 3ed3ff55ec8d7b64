"""One `Strategy` is what its algorithm needs, with options that are spelled out, in scripts and on command lines."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_decentral import AsyncStrategy, GossipStrategy, Strategy
from lightning_decentral.algorithms import ADPSGD, D2, DPSGD
from lightning_decentral.errors import ConfigurationError
from lightning_decentral.methods import METHODS as NAMES
from lightning_decentral.protocol import AbstractAlgorithm, AbstractAsynchronousAlgorithm
from strategies.fits import QUIET, Recorder, Regression, make_trainer, saved

METHODS = [method.load()() for method in NAMES.values()]


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda each: type(each).__name__)
def test_the_algorithm_decides(algorithm: AbstractAlgorithm) -> None:
    strategy = Strategy(algorithm, seed=5)
    assert type(strategy) is (AsyncStrategy if isinstance(algorithm, AbstractAsynchronousAlgorithm) else GossipStrategy)
    assert isinstance(strategy, Strategy)
    assert strategy.algorithm is algorithm
    assert strategy.seed == 5


def test_the_default_algorithms() -> None:
    assert [type(kind().algorithm) for kind in (Strategy, GossipStrategy, AsyncStrategy)] == [DPSGD, DPSGD, ADPSGD]


def test_it_is_the_same_object_that_the_kinds_make() -> None:
    def options(strategy: Any) -> dict[str, Any]:
        plain = (bool, int, float, str, AbstractAlgorithm, type(None))
        return {name: value for name, value in vars(strategy).items() if isinstance(value, plain)}

    for one, other in (
        (Strategy(D2(), uneven="stop", resume="consensus"), GossipStrategy(D2(), uneven="stop", resume="consensus")),
        (Strategy(ADPSGD(), share_epoch=False), AsyncStrategy(ADPSGD(), share_epoch=False)),
    ):
        assert type(one) is type(other)
        assert options(one) == options(other)


@pytest.mark.parametrize("strategy", [Strategy(D2(), uneven="stop"), Strategy(ADPSGD(), share_epoch=False)])
def test_it_goes_to_another_process_and_stays_what_it_is(strategy: Any) -> None:
    for again in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert type(again) is type(strategy)
        assert (again.algorithm, again.uneven, again.share_epoch) == (
            strategy.algorithm,
            strategy.uneven,
            strategy.share_epoch,
        )


@pytest.mark.parametrize("kind", [Strategy, GossipStrategy, AsyncStrategy])
def test_the_options_are_spelled_out(kind: type) -> None:
    parameters = inspect.signature(kind).parameters
    assert [p.name for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)] == []
    assert {"algorithm", "timeout", "resume", "uneven", "share_epoch"} <= set(parameters)
    for name in parameters:
        assert f"{name}: " in (Strategy.__doc__ or ""), f"{name} is not documented"


@pytest.mark.parametrize(
    ("kind", "algorithm", "options", "message"),
    [
        (Strategy, ADPSGD(), {"uneven": "stop"}, r"Strategy got uneven='stop' with ADPSGD.*needs a synchronous.*Leave"),
        (AsyncStrategy, None, {"uneven": "continue"}, r"AsyncStrategy got uneven='continue' with ADPSGD"),
        (Strategy, D2(), {"share_epoch": True}, r"got share_epoch=True with D2.*needs an asynchronous.*Leave it out"),
        (GossipStrategy, None, {"share_epoch": False}, r"GossipStrategy got share_epoch=False with DPSGD"),
        (Strategy, None, {"uneven": "never"}, r"Strategy\(uneven='never'\): needs 'continue' or 'stop'"),
        (Strategy, None, {"poisoned": "no"}, r"Strategy\(poisoned='no'\): needs 'warn', 'refuse' or 'raise'"),
        (Strategy, None, {"resume": "no"}, r"Strategy\(resume='no'\): needs 'exact' or 'consensus'"),
        (Strategy, "d2", {}, r"Strategy\(algorithm='d2'\): needs an algorithm object"),
        (GossipStrategy, ADPSGD(), {}, r"GossipStrategy needs a synchronous algorithm.*Use AsyncStrategy.*or Strategy"),
    ],
)
def test_what_does_not_fit_is_refused(kind: Any, algorithm: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kind(algorithm, **options)


def test_a_class_of_the_user_needs_a_base_that_trains() -> None:
    class Mine(GossipStrategy):
        pass

    class Nothing(Strategy):
        pass

    assert type(Mine(D2())) is Mine
    with pytest.raises(ConfigurationError, match=r"Nothing is derived from Strategy.*Derive it from AsyncStrategy"):
        Nothing(ADPSGD())


def test_an_unknown_option_is_not_swallowed() -> None:
    with pytest.raises(TypeError, match="find_unused_parameters"):
        Strategy(find_unused_parameters=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("algorithm", [DPSGD(), ADPSGD()], ids=lambda each: type(each).__name__)
def test_it_trains(algorithm: AbstractAlgorithm, tmp_path: Path) -> None:
    """With two real workers."""
    strategy = Strategy(algorithm, start_method="fork", exchange_timeout_seconds=60.0)
    trainer = make_trainer(tmp_path, strategy, max_epochs=2, callbacks=[Recorder(tmp_path)])
    trainer.fit(Regression())
    assert [each["global_step"] > 0 for each in saved(tmp_path, 2)] == [True, True]


def on_a_command_line(*arguments: str) -> Any:
    """The strategy that LightningCLI makes."""
    quiet = [f"--trainer.{name}={value}" for name, value in QUIET.items()]
    cli = LightningCLI(
        BoringModel,
        run=False,
        save_config_callback=None,
        args=[*quiet, "--trainer.devices=2", *arguments],
    )
    return cli.trainer.strategy


def test_a_command_line_takes_the_class_by_name() -> None:
    assert type(on_a_command_line("--trainer.strategy=Strategy")) is GossipStrategy
    strategy = on_a_command_line(
        "--trainer.strategy=Strategy", "--trainer.strategy.algorithm=ADPSGD", "--trainer.strategy.share_epoch=false"
    )
    assert type(strategy) is AsyncStrategy
    assert not strategy.share_epoch


@pytest.mark.parametrize("name", ["Strategy", "lightning_decentral.Strategy", "lightning_decentral.GossipStrategy"])
def test_a_file_takes_the_class_and_its_options(name: str, tmp_path: Path) -> None:
    file = tmp_path / "trainer.yaml"
    file.write_text(
        f"strategy: {{class_path: {name}, init_args: {{algorithm: {{class_path: D2}}, uneven: stop, seed: 3}}}}\n"
    )
    strategy = on_a_command_line("--trainer", str(file))
    assert type(strategy) is GossipStrategy
    assert (type(strategy.algorithm), strategy.uneven, strategy.seed) == (D2, "stop", 3)


def test_a_command_line_refuses_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="got share_epoch=True with DPSGD"):
        on_a_command_line("--trainer.strategy=Strategy", "--trainer.strategy.share_epoch=true")
    with pytest.raises(SystemExit):
        on_a_command_line("--trainer.strategy=Strategy", "--trainer.strategy.swallowed=1")
    assert "swallowed" in capsys.readouterr().err


def test_a_command_line_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_a_command_line("--trainer.strategy.help=Strategy")
    shown = capsys.readouterr().out
    for name in inspect.signature(Strategy).parameters:
        assert f"--trainer.strategy.{name}" in shown


def test_the_names_of_methods_make_it() -> None:
    for name in NAMES:
        strategy = Trainer(**QUIET, strategy=f"{name}_fork", devices=4).strategy
        assert isinstance(strategy, Strategy)
