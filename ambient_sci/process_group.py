"""Leaving the group of processes of a launch in order. Free of torch.

Threads of a group that are still alive when Python ends abort the process about every second time.
"""

from __future__ import annotations

import atexit
import sys
from typing import Any


def leave_process_group() -> None:
    """Give the connections to the other processes up, where there are any; doing it twice does no harm."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def leave_at_exit() -> None:
    """Do so when Python ends, if nobody has by then."""
    atexit.unregister(leave_process_group)
    atexit.register(leave_process_group)
