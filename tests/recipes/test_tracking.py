"""The W&B logger never asks: offline without a login, and only there; its run holds the configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.waiting import wait_until

from lightning_decentral.errors import ConfigurationError
from lightning_decentral.loggers import OfflineFirstWandbLogger
from lightning_decentral.loggers.offline_runs import read_offline_runs
from lightning_decentral.loggers.wandb import wandb_login_exists

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a login, in an empty folder."""
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "BASE_URL", "MODE", "PROJECT"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that monkeypatch restores what the logger sets
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-decentral"])


def is_offline(**options: object) -> bool:
    return OfflineFirstWandbLogger(**options)._offline  # type: ignore[arg-type]


def test_offline_without_a_login() -> None:
    assert not wandb_login_exists()
    assert is_offline()


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_online_with_an_environment_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert not is_offline()


@pytest.mark.parametrize(
    ("url", "host", "login"),
    [
        (None, "api.wandb.ai", True),
        (None, "example.org", False),
        ("https://wandb.example.org:8080", "wandb.example.org:8080", True),
        ("https://wandb.example.org", "api.wandb.ai", False),
    ],
)
def test_netrc(url: str | None, host: str, login: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".netrc"
    path.write_text(f"machine {host} login user password x\n")
    path.chmod(0o600)
    if url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
    assert wandb_login_exists() is login


def test_malformed_netrc_is_no_login(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine\nnonsense here")
    assert not wandb_login_exists()


@pytest.mark.parametrize(
    ("mode", "offline"), [("offline", True), ("dryrun", True), ("online", False), ("disabled", False)]
)
def test_wandb_mode_decides(mode: str, offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert is_offline() is offline


def test_argument_beats_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert is_offline(offline=True)
    monkeypatch.delenv("WANDB_API_KEY")
    assert not is_offline(offline=False)


def test_checkpoints_cannot_be_uploaded_offline() -> None:
    with pytest.raises(ConfigurationError, match=r"log_model=True needs an online run.*wandb login"):
        OfflineFirstWandbLogger(log_model=True)


def test_every_run_is_in_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the process has gone to another folder since its first run, in which W&B's own process still is; and a
    quiet one says nothing."""
    import wandb

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        logger = OfflineFirstWandbLogger(name=name, group="both", save_dir="runs", quiet=name == "two")
        logger.log_hyperparams({"workers": 4})
        logger.log_metrics({"loss": 1.0})
        wandb.finish()
        assert ("offline" in "".join(capfd.readouterr())) is (name == "one")
        assert len(list((tmp_path / name / "runs" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    # W&B's own process writes the end of a run after `finish` has returned.
    wait_until(lambda: all(run.history for run in read_offline_runs(tmp_path)), "the files of both runs")
    one, two = read_offline_runs(tmp_path)
    assert (one.name, one.group, one.project) == ("one", "both", "lightning-decentral")
    assert two.config == {"workers": 4}
    assert [point["loss"] for point in two.history] == [1.0]


def test_run_from_yaml_holds_the_configuration(tmp_path: Path) -> None:
    """One offline run through the command line: it has its group, its tags and the options of the model."""
    from lightning_decentral.commands.main import main

    recipes = Path(__file__).parents[2] / "recipes" / "images"
    (tmp_path / "wandb.yaml").write_text(
        "trainer:\n"
        "  logger:\n"
        "    class_path: lightning_decentral.loggers.OfflineFirstWandbLogger\n"
        "    init_args: {save_dir: tracked, group: images, job_type: ddp, tags: [ring], offline: null}\n"
    )
    status = main(
        [
            "fit",
            *("-c", str(recipes / "base.yaml"), "-c", str(tmp_path / "wandb.yaml")),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_epochs", "1"),
            *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
            *("--trainer.enable_progress_bar", "false", "--model.depth", "8", "--model.width", "5"),
        ]
    )
    import wandb

    assert wandb.run is not None
    try:
        assert status == 0
        assert wandb.run.settings.mode in ("offline", "dryrun")
        assert wandb.run.group == "images"
        assert wandb.run.job_type == "ddp"
        assert wandb.run.tags == ("ring",)
        assert wandb.run.config["model"]["init_args"]["width"] == 5
    finally:
        wandb.finish()
    assert list((tmp_path / "tracked" / "wandb").glob("offline-run-*/*.wandb"))
    assert (tmp_path / "tracked" / "config.yaml").is_file()
