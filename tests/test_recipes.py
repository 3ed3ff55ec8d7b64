"""Every file in ``recipes`` is accepted by the command line, and a method file sets the strategy and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_decentral.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = sorted(RECIPES.glob("*/method/*.yaml"))
OVERLAYS = sorted(path for path in RECIPES.glob("*/*.yaml") if path.name != "base.yaml")


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when pytest has arguments and it is given some as well."""
    monkeypatch.setattr(sys, "argv", ["lightning-decentral"])


def parse(*files: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    """The configuration that ``fit`` would run with."""
    arguments = [argument for file in files for argument in ("-c", str(file))]
    with pytest.raises(SystemExit) as done:
        main(["fit", *arguments, "--print_config"])
    captured = capsys.readouterr()
    assert done.value.code == 0, captured.err
    config = yaml.safe_load(captured.out)
    assert isinstance(config, dict)
    return config


def test_nothing_is_forgotten() -> None:
    for task in ("images", "text"):
        methods = {path.stem for path in METHODS if path.parts[-3] == task}
        assert methods >= {"ddp", "sync_sgd", "dpsgd", "d2", "choco_sgd", "moniqua_sgd", "adpsgd", "simulated_adpsgd"}
    assert {path.stem for path in OVERLAYS} >= {"cifar10", "imagenet", "fashion_mnist", "wikitext"}


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_method_parses(method: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(method.read_text())
    assert own.keys() == {"trainer"}
    assert own["trainer"].keys() <= {"strategy", "devices"}
    config = parse(method.parents[1] / "base.yaml", method, capsys=capsys)
    strategy = config["trainer"]["strategy"]
    if isinstance(own["trainer"]["strategy"], str):
        assert strategy == own["trainer"]["strategy"]
    else:
        assert isinstance(strategy, dict)
        assert strategy["class_path"].rsplit(".", 1)[1] == own["trainer"]["strategy"]["class_path"].rsplit(".", 1)[1]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay_parses(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(overlay.read_text())
    folder = overlay.parent
    config = parse(folder / "base.yaml", overlay, folder / "method" / "ddp.yaml", capsys=capsys)
    assert config["trainer"]["strategy"] == "ddp"
    for part in own.keys() & {"model", "data"}:
        assert config[part]["class_path"] == own[part]["class_path"]


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_method_starts_with_a_comment(method: Path) -> None:
    assert method.read_text().startswith("# ")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")) + METHODS, ids=name)
def test_readme_names_every_file(path: Path) -> None:
    task = RECIPES / path.relative_to(RECIPES).parts[0]
    assert path.name in (task / "README.md").read_text()
