"""Proved here: where there is no GPU, what needs one refuses with one line, and a dry run measures the same tables."""

from __future__ import annotations

import pytest
import torch

from lightning_decentral.lab import results
from lightning_decentral.lab.benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_it_refuses_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "--dry-run" in said.err
    assert not said.out


def test_a_dry_run_measures_the_same_tables() -> None:
    compressors, layers = results.tables(gpu.compressors(small=True)), results.tables(gpu.layers(small=True))
    assert [row[0].strip("`") for row in compressors[0].rows] == list(gpu.SCHEMES)
    assert layers[0].cell("BatchNorm2d", "ResNet-20").startswith("1.00")
