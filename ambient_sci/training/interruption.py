"""SIGINT and SIGTERM as a request that a loop honours at the end of its step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context in which the first SIGINT or SIGTERM only sets ``signum``; a second one acts as usual.

    Python delivers signals to the main thread alone; in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._notice) for s in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
