"""Proved here: what can be checked of the English in docstrings. A function's begins with a verb, a property's with an
article or with *Whether*, a number or *How*; so that a reader sees at once what is done, and what is told."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_decentral"
NO_VERB = {
    "A", "After", "All", "Also", "An", "Any", "As", "At", "Because", "Before", "Beside", "Both", "By", "Each",
    "Every", "For", "From", "How", "In", "Into", "Its", "It", "Likewise", "No", "Not", "Nothing", "Of", "On",
    "One", "Only", "Other", "Over", "Per", "Same", "Several", "Some", "That", "The", "Their", "These", "They",
    "This", "Those", "To", "Two", "Under", "Until", "Up", "What", "When", "Where", "Whether", "Which", "Who",
    "Whom", "Whose", "Why", "With", "Without",
}  # fmt: skip
NOUN = {"A", "All", "An", "Each", "Every", "How", "The", "What", "Where", "Whether", "Which", "Who"}


def functions(tree: ast.AST, name: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name + child.name, child
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions(child, f"{name}{child.name}.")


def stiff(source: str) -> list[str]:
    """Docstrings of functions that begin with no verb, and of properties that begin with no article."""
    found = []
    for name, function in functions(ast.parse(source)):
        text = ast.get_docstring(function)
        if not text:
            continue
        first = text.split()[0].strip(".,:;")
        decorators = [ast.unparse(each) for each in function.decorator_list]
        if any(each.endswith(("property", ".setter")) for each in decorators):
            good = first in NOUN
        else:
            good = first.isalpha() and first[0].isupper() and first not in NO_VERB
        if not good:
            found.append(f"{name}: {text.splitlines()[0]}")
    return found


FILES = [str(path.relative_to(ROOT)) for path in sorted(PACKAGE.rglob("*.py"))]


def test_functions_begin_with_a_verb_and_properties_with_an_article() -> None:
    bad = {file: found for file in FILES if (found := stiff((ROOT / file).read_text()))}
    assert not bad, (
        f"Got {bad}, need a verb at the beginning of a function's docstring (Return, Tell whether, Make), and an "
        "article at that of a property's (The ...)."
    )


@pytest.mark.parametrize(
    ("docstring", "decorator", "good"),
    [
        ("Return the mean.", "", True),
        ("The mean.", "", False),
        ("Of both.", "", False),
        ("`x + 1`.", "", False),
        ("Whether it is there.", "", False),
        ("The mean.", "@property", True),
        ("Return the mean.", "@property", False),
    ],
)
def test_the_check_finds_what_it_should(docstring: str, decorator: str, good: bool) -> None:
    source = f'{decorator}\ndef f(self):\n    """{docstring}"""'
    assert (stiff(source) == []) is good
