r"""Work that is cut into parts: by one process or several, and from where an earlier run stopped.

A finished part is a file of its own in a folder beside the output, named after a fingerprint of everything
that decides what is in it; so a run that was interrupted continues when it is repeated, and never with
somebody else's parts. Processes of one ``torchrun`` or ``accelerate launch`` share the parts out between
them; the main one joins them into the output, which appears under its name only when it is complete.

The main process holds a lock on the output and one on the folder for as long as it lives (the system releases
them, whatever ends the process). A second run for the same output is refused; folders whose lock is free have
been given up, and are removed once an output of that name is complete.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior
from ambient_sci.process_group import leave_at_exit
from ambient_sci.whole_files import digest_of
from ambient_sci.whole_sets import only_maker

try:
    import fcntl
except ImportError:  # Windows: no locks of this kind, and folders of others are left alone
    fcntl = None

#: How long processes wait for the one with the most work.
PATIENCE = timedelta(days=14)


class Parts:
    """The parts of one output; a context in which they are made.

    Args:
        out: the output they are for.
        key: fingerprint of the work.
        count: number of parts.
        device: where this process computes.
        suffix: of the parts' files.

    Attributes:
        paths: a file for each part.
        main: whether this is the process that joins them.
    """

    def __init__(self, out: Path, key: str, count: int, device: torch.device, suffix: str = ".h5") -> None:
        self.out, self.device = out, device
        self.folder = out.parent / f".{out.name}.parts-{key}"
        self.paths = [self.folder / f"{k:08d}{suffix}" for k in range(count)]
        self.rank, self.processes = process_share(device)
        self.main = self.rank == 0
        self._lock: int | None = None
        self._held = ExitStack()

    def __enter__(self) -> Parts:
        if self.main:
            self._held.enter_context(only_maker(self.out))  # whatever the work
            try:
                self._lock = self._hold()
            except BaseException:
                self._held.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        finished = sum(path.exists() for path in self.paths)
        if kind is not None and not finished:
            # Kept only if it holds finished parts, to go on from. Files of other processes are theirs to
            # remove.
            (self.folder / "lock").unlink(missing_ok=True) if self.main else None
            with suppress(OSError):
                self.folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
        self._held.close()
        if isinstance(error, InputError) and finished:
            raise InputError(
                f"{error}; {finished} of {len(self.paths)} parts are finished and wait in {self.folder}: the "
                "same command will go on with them"
            ) from None

    def missing(self, read: Callable[[Path], Any]) -> list[int]:
        """Parts that this process has to make. One that ``read`` cannot open (cut off by a crash of the
        machine) is made again.
        """
        mine = range(self.rank, len(self.paths), self.processes)
        for k in mine:
            if self.paths[k].exists():
                try:
                    with read(self.paths[k]):
                        pass
                except (InputError, OSError, ValueError, KeyError, RuntimeError):
                    self.paths[k].unlink()
        self.folder.mkdir(exist_ok=True)
        return [k for k in mine if not self.paths[k].exists()]

    def wait(self) -> None:
        """Until every process is here."""
        if self.processes > 1:
            _processes(self.device).wait_for_everyone()

    def remove(self) -> None:
        """These parts, and those for the same output that were given up."""
        pattern = f".{glob.escape(self.out.name)}.parts-*"
        for folder in self.out.parent.glob(pattern):
            if folder == self.folder:
                shutil.rmtree(folder)
                continue
            with suppress(FileNotFoundError):  # removed by another process this moment
                handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
                if _locked(handle):
                    shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)

    def _hold(self) -> int:
        """The lock of the folder, which is made where it is missing."""
        for _ in range(10):
            self.folder.mkdir(exist_ok=True)
            with suppress(
                FileNotFoundError
            ):  # the folder was just removed by a process that took it for given up
                handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
                held = _locked(handle)
                if held is not False and _is(handle, self.folder / "lock"):
                    return handle
                os.close(handle)
            time.sleep(0.02)
        raise InputError(
            f"{self.out}: expected to be the only process that makes it, got another at work in {self.folder}"
        )


def _locked(handle: int) -> bool | None:
    """Take the lock of an open file: True if that worked, False if another process has it, None where there
    are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    return os.path.samestat(os.fstat(handle), path.stat())


def fingerprint(prior: Prior, plan: Any) -> str:
    """A short hash of what decides the samples: weights, and ``plan`` (JSON types)."""
    decided = [digest_of(prior.state_dict()), type(prior).__name__, plan]
    return hashlib.sha256(json.dumps(decided, default=str, sort_keys=True).encode()).hexdigest()[:12]


def process_share(device: torch.device) -> tuple[int, int]:
    """(rank, number) of the processes of this launch: (0, 1) unless one of torchrun or
    `accelerate launch`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    state = _processes(device)
    return state.process_index, state.num_processes


def _processes(device: torch.device) -> Any:
    from accelerate import PartialState

    leave_at_exit()
    # Unless told that it computes on the CPU, accelerate takes a launch on a machine without CUDA for one
    # process in each.
    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
