"""The command line: it trains with two processes, lists its commands, and answers a typo with the name of the key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_decentral
from lightning_decentral.commands import main as cli

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "recipes" / "images"


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when pytest has arguments and it is given some as well."""
    monkeypatch.setattr(sys, "argv", ["lightning-decentral"])


def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Runs ``python -m lightning_decentral``; kills it and all processes it has started after two minutes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_decentral", *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def test_fit_with_two_processes(tmp_path: Path, warm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm)
    status, output = run(
        "fit",
        *("-c", str(IMAGES / "base.yaml"), "-c", str(IMAGES / "method" / "ddp.yaml")),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.fast_dev_run", "2"),
        *("--trainer.enable_progress_bar", "false", "--model.depth", "8", "--model.width", "4"),
        cwd=tmp_path,
    )
    assert status == 0, output
    assert "MEMBER: 2/2" in output
    assert "`max_steps=2` reached" in output


def test_a_method_of_the_users_own_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed command, unlike ``python -m``, has the folder of the program on Python's path, and not this one."""
    (tmp_path / "own_method.py").write_text(
        "from dataclasses import dataclass\n"
        "from lightning_decentral import Complete, TopologyLike\n"
        "from lightning_decentral.algorithms.base import AbstractGossip\n"
        "@dataclass(frozen=True)\n"
        "class Own(AbstractGossip):\n"
        "    topology: TopologyLike = Complete\n"
        "    every: int = 4\n"
        "    def check(self, graph): pass\n"
        "    def init(self, worker): pass\n"
        "    async def step(self, worker): pass\n"
    )
    (tmp_path / "own.yaml").write_text(
        "trainer: {strategy: {class_path: Strategy, "
        "init_args: {algorithm: {class_path: own_method.Own, init_args: {every: 2}}}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "-c", str(IMAGES / "base.yaml"), "-c", "own.yaml", "--print_config"])
    assert end.value.code == 0
    assert "every: 2" in capsys.readouterr().out


def test_error_in_the_data_is_a_message_not_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status = cli.main(
        [
            "fit",
            *("-c", str(IMAGES / "base.yaml"), "-c", str(IMAGES / "cifar10.yaml")),
            *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.default_root_dir", str(tmp_path)),
            *("--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"),
            *("--trainer.enable_progress_bar", "false", "--data.data_dir", str(tmp_path / "nowhere")),
        ]
    )
    assert status == 2
    error = capfd.readouterr().err
    assert "error: CIFAR10 needs the files" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--trainer.max_epoks", "3"], "max_epoks"),
        (["--data.init_args.batchsize", "3"], "batchsize"),
        (["--model.init_args.dept", "8"], "dept"),
        (["--model.schedule", "cosin"], "cosin"),
        (["--trainer.devices", "4", "--sed_everything", "3"], "sed_everything"),
    ],
)
def test_typo_on_the_command_line(arguments: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["fit", "-c", str(IMAGES / "base.yaml"), *arguments, "--print_config"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert key in message
    assert len(message.splitlines()) < 20


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("trainer: {max_epochz: 3}", "max_epochz"),
        ("modle: {class_path: x}", "modle"),
        ("data: {class_path: lightning_decentral.recipes.EmbeddedImages, init_args: {nam: mnist5k}}", "nam"),
        ("data: {class_path: lightning_decentral.recipes.EmbededImages}", "EmbededImages"),
        ("data: {init_args: {name: mnist}}", "mnist"),
    ],
)
def test_typo_in_a_file(text: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "typo.yaml").write_text(text)
    with pytest.raises(SystemExit) as error:
        cli.main(["fit", "-c", str(IMAGES / "base.yaml"), "-c", str(tmp_path / "typo.yaml"), "--print_config"])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert key in message
    assert len(message.splitlines()) < 20


def test_impossible_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "-c", str(IMAGES / "base.yaml"), "--model.depth", "21"]) == 2
    message = "A CIFAR ResNet has depth 6n + 2, got 21. Use one of 8, 14, 20, 32, 44, 56, 110."
    assert capsys.readouterr().err.endswith(f"lightning-decentral: error: {message}\n")


def test_help_lists_every_command_without_loading_torch(tmp_path: Path) -> None:
    status, output = run("--help", cwd=tmp_path)
    assert status == 0
    for command in ("fit", "validate", "test", "predict", "compare", "plan"):
        assert f"\n  {command} " in output
    code = "import sys; from lightning_decentral.commands.main import main; main(['--help'])"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60, stdout=subprocess.DEVNULL)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightning-decentral {lightning_decentral.__version__}\n"


@pytest.mark.parametrize(("arguments", "got"), [([], "no command"), (["trian"], "'trian'")])
def test_unknown_command(arguments: list[str], got: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert got in message
    assert "need one of fit, validate" in message
    assert "--help" in message


def test_jsonargparse_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["fit"]) == 2
    message = capsys.readouterr().err
    assert "'fit' needs jsonargparse[signatures], which is not" in message
    assert 'pip install "lightning-decentral[recipes]"' in message
