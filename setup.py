"""What ``pyproject.toml`` cannot say: how README.md reads outside of the repository, on PyPI for example."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PICTURE = re.compile(r"!\[([^\]]*)\]\((?![a-z]+:)([^)]*)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)]*)\)")


def description(readme: str, repository: str | None) -> str:
    """Return the README with absolute links; where the repository has no address, with the links' words alone.

    Args:
        readme: its text, with links relative to the root of the repository.
        repository: its address, ``Repository`` of ``[project.urls]``.
    """
    picture = rf"![\1]({repository}/raw/main/\2)" if repository else ""
    link = rf"[\1]({repository}/blob/main/\2)" if repository else r"\1"
    return LINK.sub(link, PICTURE.sub(picture, readme))


urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
setup(
    long_description=description((ROOT / "README.md").read_text(), urls.get("Repository")),
    long_description_content_type="text/markdown",
)
