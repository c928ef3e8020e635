"""What a person hears while something runs: status and notes by ``logging.getLogger("ambient_sci")``, and the
progress of anything long.

On a terminal progress is a bar on standard error. Elsewhere (a log, a notebook, a batch job) it is a line
every half minute, by the clock and not by what has been done, so that a single long step is not silent
either. Lines go to the logger where somebody has set it up, and else to standard error: a call with
``progress=True`` is never silent for want of a handler. All of it, bars as well, is silenced by

    logging.getLogger("ambient_sci").setLevel("WARNING")
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

#: Of the whole package.
LOGGER = logging.getLogger("ambient_sci")
LOGGER.addHandler(logging.NullHandler())
#: Between two lines, where there is no terminal.
SECONDS_BETWEEN_LINES = 30.0
#: Consoles with a bar on them, above which lines have to be written; the last one is in use.
_consoles: list[Any] = []


def say(text: str, level: int = logging.INFO) -> None:
    """One line of status: to the logger where it is set up, and else, from INFO on, to standard error."""
    if LOGGER.level != logging.NOTSET or (LOGGER.isEnabledFor(level) and _handled()):
        LOGGER.log(level, text)
    elif level >= logging.INFO:
        write_line(text)


def _handled() -> bool:
    """Whether anybody hears the logger."""
    logger: logging.Logger | None = LOGGER
    while logger is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def write_line(text: str) -> None:
    """One line on standard error, above a bar if there is one."""
    if _consoles:
        _consoles[-1].print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def is_wanted() -> bool:
    """Whether progress is to be shown: not where the logger's own level is above INFO."""
    return LOGGER.level == logging.NOTSET or LOGGER.isEnabledFor(logging.INFO)


@contextmanager
def beneath_lines(console: Any) -> Iterator[None]:
    """While a bar is on ``console``, lines are written above it."""
    _consoles.append(console)
    try:
        yield
    finally:
        _consoles.remove(console)


class LineHandler(logging.Handler):
    """Writes records as plain lines on standard error, above a bar if there is one: what the command line
    attaches."""

    def emit(self, record: logging.LogRecord) -> None:
        """The message alone; from WARNING on with the level in front."""
        try:
            text = record.getMessage()
            write_line(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}")
        except Exception:
            self.handleError(record)


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Iterable[T]:
    """Iterate over ``items`` and show how many are done and how long the rest may take."""
    if not enabled or not is_wanted() or not len(items):
        return items
    return _with_bar(items, description) if sys.stderr.isatty() else _with_lines(items, description)


def _with_bar(items: Sequence[T], description: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    with beneath_lines(console):
        yield from rich_track(items, description, console=console, transient=True)


def _with_lines(items: Sequence[T], description: str) -> Iterator[T]:
    done, begun, over = 0, time.monotonic(), threading.Event()

    def speak() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            say(status(description, done, len(items), time.monotonic() - begun))

    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        for item in items:
            yield item
            done += 1
    finally:
        over.set()
        speaker.join()


def status(description: str, done: int, count: int, seconds: float) -> str:
    """A line of progress: what, how much of it, for how long, how long the rest will take at that pace."""
    left = f", {duration(seconds * (count - done) / done)} left" if done else ""
    return f"{description}: {done} of {count} after {duration(seconds)}{left}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; "?" for what is no number."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
