"""Deaths and full disks at a chosen operation on files, in a child process; shared by test modules."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = {
    *("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"),
    "ctypes.dlsym",  # the exchange of two names
}


def watch(folder: Path, at: int, act: Callable[[], None], bytes_too: bool = True) -> None:
    """Have this process ``act`` before its ``at``-th operation on a file below ``folder``: whatever changes names
    and opening for writing; with ``bytes_too``, writes of HDF5 files and synchronisation."""
    left = at

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            act()

    def hear(event: str, arguments: tuple) -> None:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        if event != "open" and event not in OPERATIONS:
            return
        if event == "ctypes.dlsym" or str(folder) in str(arguments[0]):
            count()

    def counted(real: Callable) -> Callable:
        def call(*arguments):
            count()
            return real(*arguments)

        return call

    sys.addaudithook(hear)
    for name in ("pwrite", "fsync") if bytes_too else ():
        setattr(os, name, counted(getattr(os, name)))


def in_child(work: Callable[[], int | None]) -> tuple[int, str]:
    """The exit status of ``work`` in a child (99: an exception) and all that it says on standard error, HDF5 and
    Python's own complaints included."""
    ends = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(ends[1], 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        try:
            status = work() or 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(99)
        os._exit(status)
    os.close(ends[1])
    with os.fdopen(ends[0], errors="replace") as said:
        text = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def killed(folder: Path, at: int, work: Callable[[], object], bytes_too: bool = True) -> bool:
    """Do ``work`` in a child that dies before its ``at``-th operation on a file below ``folder``; did it die?"""

    def dying() -> None:
        watch(folder, at, lambda: os._exit(9), bytes_too)
        work()

    status, said = in_child(dying)
    assert status in (0, 9), said
    return status == 9


def on_a_full_disk(folder: Path, at: int, work: Callable[[], int | None]) -> tuple[int, str]:
    """Status and complaints of ``work`` in a child where no file can grow from the ``at``-th operation on."""

    def filling() -> int | None:
        watch(folder, at, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
        return work()

    return in_child(filling)


def every(tmp_path: Path, start: Path | None, stride: int = 1, first: int = 1) -> Iterator[tuple[int, Path]]:
    """Numbers of operations, each with a folder (a copy of ``start``) to work in; the caller breaks off."""
    for k in range(first, 2000, stride):
        folder = tmp_path / f"k{k}"
        folder.mkdir() if start is None else shutil.copytree(start, folder)
        yield k, folder
        shutil.rmtree(folder)
    raise AssertionError("the work never ended")


def hidden(folder: Path) -> list[str]:
    """Names that users should not find: parts, locks, debris."""
    return sorted(p.name for p in folder.rglob("*") if p.name.startswith("."))
