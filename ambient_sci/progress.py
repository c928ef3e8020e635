"""Progress on the terminal for anything over two seconds, on standard error; nothing when there is no
terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Iterable[T]:
    """Iterate over ``items`` with a progress bar that shows the share done and the time left."""
    if not enabled or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description, console=Console(stderr=True), transient=True)
