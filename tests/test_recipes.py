"""Proved here: every file in ``recipes`` is accepted by the command line; a method file sets the strategy and nothing
else, but where the momentum is the method's; there is a file for every compressor, and with each the ResNet makes a
step in which all workers get the same finite weights; every method that gossips trains the ResNet and the text model,
on four workers, and every recipe with a server the ResNet on two; where workers' data are to differ they do; the models
are cut into stages."""

from __future__ import annotations

import functools
import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from strategies.fits import QUIET, Recorder, fit_kept, saved

from lightning_decentral import PipelineStrategy
from lightning_decentral.callbacks import GradientCompression
from lightning_decentral.commands.lightning_cli import DecentralCLI
from lightning_decentral.compression import COMPRESSORS
from lightning_decentral.methods import METHODS as TABLE
from lightning_decentral.pipeline.schedules import Schedule, dsp, ouroboros
from lightning_decentral.pipeline.splitting import find_chain
from lightning_decentral.recipes import EmbeddedImages, ResNetClassifier, Shakespeare, TransformerLM
from lightning_decentral.recipes.non_iid_data import classes_of

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


@functools.cache
def parser() -> Any:
    """The command line's, without its commands: to make it takes longer than to parse a file."""
    return DecentralCLI(["-c", str(RECIPES / "images" / "base.yaml"), "--trainer.logger=false"], run=False).parser


def parse(*files: Path) -> dict[str, dict[str, object]]:
    """The configuration that ``fit`` would run with."""
    config = parser().parse_args([argument for file in files for argument in ("-c", str(file))])
    parsed = yaml.safe_load(parser().dump(config))
    assert isinstance(parsed, dict)
    return parsed


def test_nothing_is_forgotten() -> None:
    for task in ("images", "text"):
        methods = {path.stem for path in METHODS if path.parts[-3] == task}
        assert methods >= {"ddp", "sync_sgd", "dpsgd", "d2", "choco_sgd", "moniqua_sgd", "adpsgd", "simulated_adpsgd"}
    assert {path.stem for path in OVERLAYS} >= {"cifar10", "imagenet", "fashion_mnist", "wikitext"}
    assert {path.stem for path in OVERLAYS} >= {"single_class", "tiny_batches", "non_iid"}
    assert {path.stem for path in NORMS} >= {"full_norm", "batch_renorm", "mabn", "group_norm"}


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_method_parses(method: Path) -> None:
    own = yaml.safe_load(method.read_text())
    base = yaml.safe_load((method.parents[1] / "base.yaml").read_text())
    if "data" in own:  # of a pipeline, whose workers go through the same batches: as many rows as others have together
        rows = base["data"]["init_args"]["batch_size"] * base["trainer"]["devices"]
        assert own.pop("data") == {"init_args": {"batch_size": rows}}
    assert own.keys() - {"model"} == {"trainer"}
    assert own["trainer"].keys() <= {"strategy", "devices"}
    without = TABLE[method.stem].load().brings_momentum if method.stem in TABLE else False
    expected = {"init_args": {"momentum": 0.0, "nesterov": False}} if without else None
    assert own.get("model") == expected  # two momenta are refused
    config = parse(method.parents[1] / "base.yaml", method)
    strategy = config["trainer"]["strategy"]
    if isinstance(own["trainer"]["strategy"], str):
        assert strategy == own["trainer"]["strategy"]
    else:
        assert isinstance(strategy, dict)
        assert strategy["class_path"].rsplit(".", 1)[1] == own["trainer"]["strategy"]["class_path"].rsplit(".", 1)[1]


@pytest.mark.parametrize("norm", NORMS, ids=name)
def test_norm_adds_its_callback(norm: Path) -> None:
    own = yaml.safe_load(norm.read_text())
    assert own.keys() == {"trainer"}
    assert own["trainer"].keys() == {"callbacks+"}  # added to those of the base, and none replaced
    folder = norm.parents[1]
    without = parse(folder / "base.yaml", folder / "single_class.yaml")
    config = parse(folder / "base.yaml", folder / "single_class.yaml", norm)
    before, after = without["trainer"]["callbacks"], config["trainer"]["callbacks"]
    assert isinstance(before, list)
    assert isinstance(after, list)
    assert after[:-1] == before
    assert after[-1]["class_path"] == "lightning_decentral.callbacks.NormalizationSwap"
    (wanted,) = own["trainer"]["callbacks+"]
    assert after[-1]["init_args"]["to"]["class_path"] == wanted["init_args"]["to"]["class_path"]


@pytest.mark.parametrize("base", BASES, ids=name)
def test_base_parses(base: Path) -> None:
    own = yaml.safe_load(base.read_text())
    config = parse(base)
    assert config["model"]["class_path"] == own["model"]["class_path"]


def test_the_worker_of_a_spot_machine_parses() -> None:
    spot = RECIPES / "images" / "spot"
    config = parse(RECIPES / "images" / "base.yaml", spot / "worker.yaml", spot / "diloco.yaml")
    trainer = config["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (1, 4)
    assert isinstance(trainer["strategy"], dict)
    assert trainer["strategy"]["class_path"] == "lightning_decentral.OpenStrategy"
    assert trainer["strategy"]["init_args"]["algorithm"]["class_path"].endswith("DiLoCo")


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=name)
def test_optimizer_parses(optimizer: Path) -> None:
    own = yaml.safe_load(optimizer.read_text())
    config = parse(optimizer.parents[1] / "base.yaml", optimizer)
    options = config["model"]["init_args"]
    assert isinstance(options, dict)
    assert options["optimizer"] == own["model"]["init_args"]["optimizer"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=name)
def test_overlay_parses(overlay: Path) -> None:
    own = yaml.safe_load(overlay.read_text())
    folder = overlay.parent
    config = parse(folder / "base.yaml", overlay, folder / "method" / "ddp.yaml")
    assert config["trainer"]["strategy"] == "ddp"
    for part in own.keys() & {"model", "data"}:
        assert config[part]["class_path"] == own[part]["class_path"]


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=name)
def test_compression_is_added_to_the_callbacks(compression: Path) -> None:
    folder = compression.parents[1]
    callbacks = parse(folder / "base.yaml", folder / "method" / "ddp.yaml", compression)["trainer"]["callbacks"]
    assert isinstance(callbacks, list)
    kinds = [callback["class_path"].rsplit(".", 1)[1] for callback in callbacks]
    assert kinds == ["ModelCheckpoint", "GradientCompression"]


def made(config: Any) -> Any:
    """The object that ``class_path`` and ``init_args`` describe, as the command line makes it."""
    if not isinstance(config, dict):
        return config
    module, _, kind = config["class_path"].rpartition(".")
    arguments = {key: made(value) for key, value in config.get("init_args", {}).items()}
    return getattr(importlib.import_module(module), kind)(**arguments)


def one_step(folder: Path, strategy: Any, callbacks: list[Any], **options: Any) -> list[torch.Tensor]:
    """The ResNet's parameters on each of two workers, after a step."""
    torch.manual_seed(0)
    model = ResNetClassifier(depth=8, in_channels=1, width=16, schedule="constant", warmup_epochs=0, **options)
    before = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    few = {"max_steps": 1, "limit_val_batches": 0, "datamodule": EmbeddedImages(batch_size=4)}
    fit_kept(folder, strategy, 2, model, callbacks=[*callbacks, Recorder(folder)], **few)
    after: list[torch.Tensor] = [worker["weights"][-1] for worker in saved(folder, 2)]
    assert all(bool(one.isfinite().all()) for one in after)
    assert not any(torch.equal(one, before) for one in after)
    return after


def test_every_compressor_has_a_recipe() -> None:
    texts = [path.read_text() for path in (*COMPRESSIONS, *METHODS)]
    for kind in {kind.__name__ for kind in COMPRESSORS.values()} - {"Identity", "Lattice"}:  # Moniqua is Lattice's
        assert any(f"lightning_decentral.compression.{kind}\n" in text for text in texts), kind


@pytest.mark.parametrize("compression", COMPRESSIONS, ids=name)
def test_compression_trains(compression: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(compression.read_text())
    callback = made(config["trainer"]["callbacks+"])
    assert isinstance(callback, GradientCompression)
    callback.warm_up_steps = 0  # which would leave the only step uncompressed
    options = config.get("model", {}).get("init_args", {})
    strategy = DDPStrategy(process_group_backend="gloo")
    one, other = one_step(tmp_path, strategy, [callback], **options)
    assert torch.equal(one, other)


GOSSIP = [method.name for method in TABLE.values() if "gossip" in method.family.lower() or method.name == "c_psgd"]


@pytest.mark.parametrize("method", GOSSIP)
def test_every_method_that_gossips_trains_both_recipes(method: str, tmp_path: Path) -> None:
    """Their optimizers and clipping are those of the bases; networks are smaller."""
    torch.manual_seed(0)
    images, text = (yaml.safe_load((RECIPES / task / "base.yaml").read_text()) for task in ("images", "text"))
    options = images["model"]["init_args"] | {"depth": 8, "width": 4}
    if TABLE[method].load().brings_momentum:  # the optimizer of the recipe may have none, so these have a file
        file = yaml.safe_load((RECIPES / "images" / "method" / f"{method}.yaml").read_text())
        options |= file["model"]["init_args"]
    resnet = ResNetClassifier(**options)
    small = {"depth": 1, "width": 16, "heads": 2, "context_length": 16}
    transformer = TransformerLM(**{**text["model"]["init_args"], **small})
    plays = Shakespeare(16, batch_size=2, samples_per_epoch=24, validation_samples=4)
    clip = {"gradient_clip_val": text["trainer"]["gradient_clip_val"]}
    for task, model, data, few in (
        ("images", resnet, EmbeddedImages(batch_size=2), {"limit_train_batches": 3}),
        ("text", transformer, plays, clip),
    ):
        folder = tmp_path / task
        folder.mkdir()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        few |= {"max_epochs": 1, "limit_val_batches": 1, "datamodule": data, "callbacks": [Recorder(folder)]}
        fit_kept(folder, StrategyRegistry.get(method), 4, model, **few)
        for worker in saved(folder, 4):
            assert worker["global_step"] == 3
            assert bool(worker["weights"][-1].isfinite().all())
            assert {"val_loss"} <= worker["metrics"].keys()
        assert not all(map(torch.equal, model.parameters(), before))


SERVED = [method.name for method in TABLE.values() if method.family == "Servers"]


@pytest.mark.parametrize("method", SERVED)
def test_every_method_with_a_server_has_a_recipe_that_trains(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = yaml.safe_load((RECIPES / "images" / "base.yaml").read_text())
    strategy = made(
        yaml.safe_load((RECIPES / "images" / "method" / f"{method}.yaml").read_text())["trainer"]["strategy"]
    )
    resnet = ResNetClassifier(**base["model"]["init_args"] | {"depth": 8, "width": 4, "warmup_epochs": 0})
    before = [parameter.detach().clone() for parameter in resnet.parameters()]
    few = {
        "max_epochs": 1,
        "limit_train_batches": 6,
        "limit_val_batches": 1,
        "datamodule": EmbeddedImages(batch_size=2),
    }
    fit_kept(tmp_path, strategy, 2, resnet, callbacks=[Recorder(tmp_path)], **few)
    for worker in saved(tmp_path, 2):
        assert worker["global_step"] == 6
        assert bool(worker["weights"][-1].isfinite().all())
    assert not all(map(torch.equal, resnet.parameters(), before))


def test_options_of_a_method_without_a_file() -> None:
    own = ["--trainer.strategy", "GossipStrategy", "--trainer.strategy.algorithm", "GradientTracking"]
    arguments = ["-c", str(RECIPES / "text" / "base.yaml"), *own, "--trainer.strategy.algorithm.order", "atc"]
    strategy = parser().parse_args(arguments).trainer.strategy
    assert strategy.init_args.algorithm.class_path.endswith(".GradientTracking")
    assert strategy.init_args.algorithm.init_args.order == "atc"


@pytest.mark.parametrize("task", ["images/one_class", "text/plays"])
def test_each_worker_has_a_class_or_plays_of_its_own(task: str) -> None:
    config = yaml.safe_load((RECIPES / f"{task}.yaml").read_text())
    base = yaml.safe_load((RECIPES / task).with_name("base.yaml").read_text())
    data = made(config["data"])
    assert data.clients == {**base["trainer"], **config.get("trainer", {})}["devices"]
    data.setup("fit")
    inner = data.data.splits["train"]
    kinds = classes_of(inner).tolist() if task.startswith("images") else inner.groups
    owned = [{kinds[index] for index in data.partition.of(client).tolist()} for client in range(data.clients)]
    assert sum(map(len, owned)) == len(set(kinds)) == len(set.union(*owned))  # each kind is somebody's alone


@pytest.mark.parametrize(
    ("module", "data", "schedule", "names"),
    [
        (
            partial(ResNetClassifier, 8, in_channels=1, width=4, schedule="constant"),
            partial(EmbeddedImages, batch_size=8),
            dsp(3),
            ["network.stem", "network.blocks.2"],
        ),
        (
            partial(TransformerLM, depth=2, width=8, heads=2, context_length=8),
            partial(Shakespeare, 8, batch_size=2),
            ouroboros(4),
            ["blocks.1", "norm"],
        ),
    ],
)
def test_models_of_the_recipes_are_cut(
    module: Any, data: Any, schedule: Schedule, names: list[str], tmp_path: Path
) -> None:
    """All stages in this process: that the blocks do what the model does is checked before training."""
    torch.manual_seed(0)
    model = module()
    trainer = Trainer(
        **{**QUIET, "devices": 1, "default_root_dir": tmp_path, "strategy": PipelineStrategy(schedule)},
        max_steps=4,
        limit_val_batches=0,
    )
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.fit(model, data())
    assert all(bool(value.isfinite().all()) for value in model.parameters())
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert set(names) <= set(find_chain(model).names)


def test_a_file_of_a_few_lines_starts_with_a_comment() -> None:
    assert [name(path) for path in METHODS + NORMS + COMPRESSIONS if not path.read_text().startswith("# ")] == []


def test_readme_names_every_file() -> None:
    for path in sorted(RECIPES.glob("*/*.yaml")) + METHODS + NORMS + OPTIMIZERS + COMPRESSIONS:
        task = RECIPES / path.relative_to(RECIPES).parts[0]
        assert path.name in (task / "README.md").read_text(), f"{task.name} does not name {name(path)}"
