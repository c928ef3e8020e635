"""An HDF5 file in the making that a full disk cannot upset.

HDF5 holds much of a file in caches of its own, and where it cannot write them it cannot be closed either:
every handle that is still open then complains on standard error. So it is given a file object that never
fails. From the first write that the system refuses on, everything written is held in memory instead, where
HDF5 finds it again; the refusal is kept, and raised at the end of the `Output.at_work` that it happened in.
What is held is what that one block and the closing write: no more than the samples that did not fit, and the
caches. Signals wait for the end of the block, too: what their handlers raise must not go through HDF5.
"""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

from ambient_sci.errors import InputError


class Output:
    """An HDF5 file open for writing.

    Args:
        path: an empty file.
        name: what errors call it.

    Attributes:
        file: the HDF5 file.

    Raises:
        InputError: the disk is full, or refuses for another reason.
    """

    def __init__(self, path: Path, name: Path) -> None:
        self._name = name
        try:
            self._disk = _Disk(path)
        except OSError as error:
            raise self._error(error) from None
        try:
            with self.at_work():
                # Version 1.10 of the format stores attributes of more than 64 kB (the subjects of a large
                # data set), and protects its own structures by checksums.
                self.file = h5py.File(self._disk, "w", libver="v110")
        except BaseException:
            self.close()
            raise

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Whatever HDF5 does to the file is done in here.

        Raises:
            InputError: on leaving, if the disk has refused a write; in one line.
        """
        try:
            with _signals_wait():
                yield
                if self._disk.refusal is not None:
                    raise self._disk.refusal
        except (OSError, RuntimeError) as error:
            raise self._error(error) from None

    def _error(self, error: Exception) -> InputError:
        return InputError(f"{self._name}: cannot be written ({' '.join(str(error).split())})")

    def finish(self) -> None:
        """Write what HDF5 has in its caches, and close the file.

        Raises:
            InputError: as of `at_work`.
        """
        with self.at_work():
            self.file.close()
        self._disk.release()

    def close(self) -> None:
        """Let go of the file, whatever its state; doing it twice does no harm."""
        with _signals_wait(), suppress(OSError, RuntimeError):
            if hasattr(self, "file"):
                self.file.close()
        self._disk.release()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """What ends a process, SIGINT and SIGTERM, is heard after this."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main one
        yield
        return
    heard: list[tuple[int, Any]] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in before.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda *arguments: heard.append(arguments))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        for number, frame in heard[:1]:
            ours[signal.Signals(number)](number, frame)


class _Disk(io.RawIOBase):
    """What HDF5 asks of a file object: reads and writes at a place, size, truncation."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR)
        self._place = self._size = 0
        self._held: list[tuple[int, bytes]] = []
        self.refusal: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new place, from the beginning, the place at hand or the end."""
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        """The place at hand."""
        return self._place

    def write(self, data: Any) -> int:
        """Write at the place at hand; into memory once the system has refused a write."""
        view = memoryview(data).cast("B")
        if self.refusal is None:
            try:
                self._to_system(view)
            except OSError as error:
                self.refusal = error
        if self.refusal is not None:
            self._held.append((self._place, bytes(view)))
        self._place += len(view)
        self._size = max(self._size, self._place)
        return len(view)

    def _to_system(self, view: memoryview) -> None:
        done = 0
        while done < len(view):  # a disk takes what still fits
            done += os.pwrite(self._descriptor, view[done:], self._place + done)

    def readinto(self, target: Any) -> int:
        """Read from the place at hand: what was written last, zeros where nothing was."""
        view = memoryview(target).cast("B")
        found = os.pread(self._descriptor, len(view), self._place) if self._descriptor >= 0 else b""
        view[: len(found)] = found
        view[len(found) :] = bytes(len(view) - len(found))
        for start, data in self._held:
            low, high = max(start, self._place), min(start + len(data), self._place + len(view))
            if low < high:
                view[low - self._place : high - self._place] = data[low - start : high - start]
        self._place += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Set the size, of the place at hand where none is given."""
        self._size = self._place if size is None else size
        if self.refusal is None:
            try:
                os.ftruncate(self._descriptor, self._size)
            except OSError as error:
                self.refusal = error
        return self._size

    def release(self) -> None:
        """Let go of the descriptor. What HDF5 still wants to write, if it could not be closed, is held."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self.refusal = self.refusal or OSError("the file was let go of")
