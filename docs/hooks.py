"""What the site takes from outside of ``docs/``: the measurements in ``results/data``, as pages and files of their own.

Links in pages are those of the repository, so that they work where the repository is read; here they become the site's.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_DATA = "results/data"
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the reports, plots and figures of all measurements."""
    root = Path(config.docs_dir).parent
    for path in sorted((root / _DATA).glob("*/*/*")):
        if path.suffix in (".md", ".csv", ".png", ".svg"):
            files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links into ``results/data``, and those of the reports there, into links of the site."""
    here = page.file.src_uri
    in_repository = here if here.startswith(_DATA + "/") else f"docs/{here}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), match[1]))
        if in_repository == f"docs/{here}" and not target.startswith(_DATA + "/"):
            return match[0]
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here))

    return _LINK.sub(link, markdown)
