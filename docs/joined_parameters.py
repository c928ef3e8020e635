"""For the documentation's build: ``a, b: text`` in a docstring documents two parameters.

Griffe, which reads docstrings for mkdocstrings, takes ``a, b`` for the name of one parameter that does not
exist, and a strict build stops. This extension hands it one entry for each name: the text under the first,
"See `a`." under the others. A name that the signature lacks still stops the build.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

JOINED = re.compile(r"^(?P<indent> *)(?P<names>[A-Za-z_]\w*(?:, [A-Za-z_]\w*)+): ")
SECTION = re.compile(r"^(?P<indent> *)(Args|Attributes):$")


def separated(text: str) -> str:
    """The docstring with an entry for each name of its Args and Attributes sections."""
    found: list[str] = []
    entry = -1  # indentation of entries in the section at hand; -1 outside of one
    waiting: list[str] = []  # entries that follow when the one at hand ends
    for line in text.splitlines():
        depth = len(line) - len(line.lstrip())
        if waiting and (depth <= entry or not line.strip()):
            found += waiting
            waiting = []
        if section := SECTION.match(line):
            entry = len(section["indent"]) + 4
        elif line.strip() and depth < entry:
            entry = -1
        joined = JOINED.match(line)
        if joined and depth == entry:
            first, *others = joined["names"].split(", ")
            waiting = [f"{joined['indent']}{name}: See `{first}`." for name in others]
            line = f"{joined['indent']}{first}: {line[joined.end() :]}"
        found.append(line)
    return "\n".join(found + waiting)


class JoinedParameters(griffe.Extension):
    """Rewrites the docstrings of a package before anything parses them."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called once, when the package is loaded."""
        self._rewrite(pkg)

    def _rewrite(self, obj: griffe.Object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = separated(obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member)  # pyright: ignore[reportArgumentType]
