"""Every file in ``recipes`` is accepted by the command line, and a method file sets the strategy and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from lightning_decentral.cli import main

RECIPES = Path(__file__).parents[1] / "recipes"
METHODS = sorted(RECIPES.glob("*/method/*.yaml"))
NORMS = sorted(RECIPES.glob("*/norm/*.yaml"))
OPTIMIZERS = sorted(RECIPES.glob("*/optimizer/*.yaml"))
BASES = sorted(RECIPES.glob("*/base.yaml"))
COMPRESSIONS = sorted(RECIPES.glob("*/compression/*.yaml"))
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
    assert {path.stem for path in OVERLAYS} >= {"single_class", "tiny_batches", "non_iid"}
    assert {path.stem for path in NORMS} >= {"full_norm", "batch_renorm", "mabn", "group_norm"}


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


@pytest.mark.parametrize("norm", NORMS, ids=name)
def test_norm_adds_its_callback(norm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(norm.read_text())
    assert own.keys() == {"trainer"}
    assert own["trainer"].keys() == {"callbacks+"}  # added to those of the base, and none replaced
    folder = norm.parents[1]
    without = parse(folder / "base.yaml", folder / "single_class.yaml", capsys=capsys)
    config = parse(folder / "base.yaml", folder / "single_class.yaml", norm, capsys=capsys)
    before, after = without["trainer"]["callbacks"], config["trainer"]["callbacks"]
    assert isinstance(before, list)
    assert isinstance(after, list)
    assert after[:-1] == before
    assert after[-1]["class_path"] == "lightning_decentral.callbacks.NormalizationSwap"
    (wanted,) = own["trainer"]["callbacks+"]
    assert after[-1]["init_args"]["to"]["class_path"] == wanted["init_args"]["to"]["class_path"]


@pytest.mark.parametrize("base", BASES, ids=name)
def test_base_parses(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(base.read_text())
    config = parse(base, capsys=capsys)
    assert config["model"]["class_path"] == own["model"]["class_path"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=name)
def test_optimizer_parses(optimizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(optimizer.read_text())
    config = parse(optimizer.parents[1] / "base.yaml", optimizer, capsys=capsys)
    options = config["model"]["init_args"]
    assert isinstance(options, dict)
    assert options["optimizer"] == own["model"]["init_args"]["optimizer"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay_parses(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = yaml.safe_load(overlay.read_text())
    folder = overlay.parent
    config = parse(folder / "base.yaml", overlay, folder / "method" / "ddp.yaml", capsys=capsys)
    assert config["trainer"]["strategy"] == "ddp"
    for part in own.keys() & {"model", "data"}:
        assert config[part]["class_path"] == own[part]["class_path"]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=name)
def test_compression_is_added_to_the_callbacks(compression: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compression.parents[1]
    callbacks = parse(folder / "base.yaml", folder / "method" / "ddp.yaml", compression, capsys=capsys)["trainer"][
        "callbacks"
    ]
    assert isinstance(callbacks, list)
    kinds = [callback["class_path"].rsplit(".", 1)[1] for callback in callbacks]
    assert kinds == ["ModelCheckpoint", "GradientCompression"]


@pytest.mark.parametrize("path", METHODS + NORMS + COMPRESSIONS, ids=name)
def test_a_file_of_a_few_lines_starts_with_a_comment(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("*/*.yaml")) + METHODS + NORMS + OPTIMIZERS + COMPRESSIONS, ids=name
)
def test_readme_names_every_file(path: Path) -> None:
    task = RECIPES / path.relative_to(RECIPES).parts[0]
    assert path.name in (task / "README.md").read_text()
