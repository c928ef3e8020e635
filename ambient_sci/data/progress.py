"""A progress bar for work that turns out to take longer than two seconds; silence for everything shorter."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(iterable: Iterable[T], total: int, description: str, after: float = 2.0) -> Iterator[T]:
    """Yield from ``iterable``; after ``after`` seconds a bar on standard error shows progress and time
    left."""
    started, bar, task = time.monotonic(), None, None
    try:
        for done, item in enumerate(iterable):
            if bar is None and time.monotonic() - started > after:
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(description, total=total)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
