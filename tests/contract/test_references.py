"""Proved here: a stacked reference is short enough to be checked against its paper by reading, and needs only torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REFERENCES = Path(__file__).parents[1] / "reference"
MODULES = sorted(
    path
    for path in REFERENCES.glob("*.py")
    if path.name not in ("__init__.py", "populations.py", "primal_dual.py", "runs.py", "served.py")
)
ALLOWED = {"__future__", "collections", "functools", "heapq", "random", "torch"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_reference_has_at_most_30_lines(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 30, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_reference_needs_only_torch(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= ALLOWED
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert node.module.split(".")[0] in ALLOWED
