"""Lets the reference show our docstrings as they are meant: examples as code, and the few marks of reStructuredText."""

from __future__ import annotations

import re
from typing import Any

import griffe

_TABLE = re.compile(r"^(=+ [= ]+\n.*?^=+ [= ]+\n.*?^=+ [= ]+)$", re.DOTALL | re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes what is displayed; the source stays as it is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for every module, class, function and attribute."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # only the plural is a section to griffe
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
        text = text.replace("`\\\\ s", "`s").replace("`\\ s", "`s")
        text = re.sub(r"\$\$(.+?)\$\$", r"`\1`", text)  # formulas would need a script from another server
        obj.docstring.value = _TABLE.sub(r"```text\n\1\n```", text)
