"""Files and folders that appear whole or not at all, whatever moment the process or the machine stops at.

    with whole_file(path) as part:      # write the file `part`
    with whole_folder(path) as part:    # fill the folder `part`

What is written lies beside its goal under another name, .NAME.PID.COUNT.part. It is brought to the disk
(fsync), moved to its name in one step and the folder is brought to the disk, too: after a loss of power
either the old content is there or the new one, complete. A failure removes the part.

A process that is killed leaves its part behind. `sweep` removes it. It knows debris from work in progress by
a lock (flock) that a writer holds on its part and that the system releases with the process; process numbers,
which are used again, decide only where a file system has no locks.

A folder takes the place of another one by exchanging the two names (Linux: renameat2), which is one step.
Where the system cannot do that the old folder steps aside first, as .NAME.PID.COUNT.old; `recover` brings it
back if the process was killed between the two renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambient_sci.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PathLike = str | os.PathLike[str]
#: .NAME.PID.COUNT.part, .NAME.PID.COUNT.old (COUNT: none in files of earlier versions)
_DEBRIS = re.compile(r"\.(?P<name>.+?)\.(?P<pid>\d+)(\.\d+)?\.(?P<kind>part|old)")
#: No such lock on this file system, or on a folder there.
_NO_LOCKS = (errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class Part:
    """A file in the making, for writers that are open for long; `whole_file` is the short form.

    Args:
        path: its name to be. Debris of killed writers of this name is removed.

    Attributes:
        path: the empty file to write. A library that locks what it opens (HDF5) must be told not to: it is
            locked already.
    """

    def __init__(self, path: PathLike) -> None:
        self._goal = Path(path)
        sweep(self._goal.parent, self._goal.name)
        self.path, self._lock = claim(self._goal, folder=False)

    def settle(self) -> None:
        """Bring it to the disk: what does not fit is noticed here."""
        to_disk(self.path)

    def commit(self) -> None:
        """Give it, settled, its name."""
        os.replace(self.path, self._goal)
        to_disk(self._goal.parent)

    def discard(self) -> None:
        """Remove it unless it has its name; let go of the lock."""
        if self._lock >= 0:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """The path of an empty file to write, which takes the name ``path`` on leaving and disappears on an
    error."""
    part = Part(path)
    try:
        yield part.path
        part.settle()
        part.commit()
    finally:
        part.discard()


@contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """The path of an empty folder to fill, which takes the name ``path`` on leaving and disappears on an
    error.

    A folder that has the name is replaced as a whole; at any moment one of the two is there (see `recover`).

    Raises:
        InputError: ``path`` is a file.
    """
    path = Path(path).resolve() if Path(path).is_symlink() else Path(path)
    recover(path)
    sweep(path.parent, path.name)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: expected the name of a folder, got a file")
    part, lock = claim(path, folder=True)
    try:
        yield part
        for root, _, files in os.walk(part):
            for name in files:
                to_disk(Path(root, name))
            to_disk(Path(root))
        _take_place(part, path)
        to_disk(path.parent)
    finally:
        # After an exchange this is the old content.
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def recover(path: PathLike) -> None:
    """Bring back a folder that stepped aside for another one that never came; nothing to do where ``path`` is
    there.

    For systems without an exchange of names. A writer that is at it is waited for.
    """
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        return
    for old in sorted(path.parent.glob(f".{escaped(path.name)}.*.old")):
        found = _DEBRIS.fullmatch(old.name)
        if found is None or found["name"] != path.name:
            continue
        with _held(old, wait=True) as held:
            if held and not path.exists():
                os.rename(old, path)
                to_disk(path.parent)


def sweep(folder: PathLike, name: str | None = None) -> list[Path]:
    """Remove what killed writers left in ``folder``: of all files, or of the one called ``name``.

    What another process holds stays. A folder that stepped aside is brought back if its place is empty.
    Returns what was removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(".*" if name is None else f".{escaped(name)}.*")):
        found = _DEBRIS.fullmatch(path.name)
        if found is None or name not in (None, found["name"]):
            continue
        if found["kind"] == "old":
            recover(path.with_name(found["name"]))
        with _held(path, wait=False) as held:
            if held:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def check_output(path: PathLike, overwrite: bool = False, *, folder_exists: bool = False) -> Path:
    """The path of a file to be made.

    Args:
        path: the file.
        overwrite: it may exist.
        folder_exists: the folder that it goes to must be there; otherwise whoever writes makes it.

    Raises:
        InputError: it exists and ``overwrite`` is not set, it is a folder, or its folder is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: expected a file name for the output, got a folder")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: already exists; give --overwrite (overwrite=True) to replace it")
    if folder_exists and not path.parent.is_dir():
        raise InputError(f"{path}: expected an existing folder to write to, got {path.parent}")
    return path


def write_text(path: PathLike, text: str) -> None:
    """``text`` as the file ``path``, replacing one that is there."""
    with whole_file(path) as part:
        part.write_text(text)


def write_json(path: PathLike, value: Any) -> None:
    """``value``, of JSON types, as the file ``path``."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, each tensor in memory of its own.

    safetensors hands out views at whatever address the file puts them. Kernels choose their path by
    alignment, and another path rounds
    otherwise: a copy answers with the bits of the tensor that was saved.

    Raises:
        SafetensorError, OSError: the file is damaged or not there.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def write_tensors(path: PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, written into the file that is there, if there is one.

    safetensors' own writer puts another file in its place: the lock that a part is known by would be gone
    with the first, and another process's `sweep` would take the new one for debris.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    content = save(tensors, metadata=metadata)
    with open(path, "wb") as file:
        file.write(content)


def digest_of(tensors: dict[str, Tensor]) -> str:
    """A hash of names, types and values of tensors, the same wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:32]


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The values of a tensor, row by row, as bytes; a view where they lie so already."""
    import torch

    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # An axis of length 1 may keep the stride of an expansion, 0, and is contiguous all the same; views of
    # another type look at the stride.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy()


@contextmanager
def sole(path: PathLike) -> Iterator[bool]:
    """Whether this process is the only one here, and is until this ends: a lock on the file ``path``.

    The file holds the number of the process and goes with it; one that a killed process leaves is nobody's.
    Where the file system has no locks everybody is let in.
    """
    path = Path(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = _lock(descriptor, wait=False) is not False
        if not held or _is(path, descriptor):
            break
        os.close(descriptor)  # its last holder removed it between the two
    try:
        if held:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        yield held
    finally:
        if held and _is(path, descriptor):
            path.unlink()
        if held:
            with suppress(OSError):  # processes that were forked meanwhile keep the file open
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def holder_of(lock: Path) -> str:
    """The process that holds a lock of `sole`, in words."""
    with suppress(OSError, ValueError):
        return lock.read_text().strip() or "(unknown)"
    return "(unknown)"


def is_part(path: Path) -> bool:
    """Whether this is a file or folder in the making, or what a killed writer left of one."""
    found = _DEBRIS.fullmatch(path.name)
    return found is not None and found["kind"] == "part"


# -- parts, locks and renames ----------------------------------------------------------------------


def claim(path: Path, *, folder: bool) -> tuple[Path, int]:
    """A new part of ``path`` and the descriptor that holds its lock."""
    for count in itertools.count():
        part = path.with_name(f".{path.name}.{os.getpid()}.{count}.part")
        try:
            if folder:
                part.mkdir()
                lock = os.open(part, os.O_RDONLY)
            else:
                lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue  # of another thread or machine, or left by a process of this number
        try:
            _lock(lock, wait=True)
            if _is(part, lock):
                return part, lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # between creation and lock a sweep took the part for debris
    raise AssertionError("unreachable")


def _is(path: Path, descriptor: int) -> bool:
    """Whether a descriptor is that of what has this name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether the lock is held; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextmanager
def _held(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether nobody else works on a part, and nobody will until this ends."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        locked = _lock(descriptor, wait=wait)
        # Whoever held it may have moved it to its name meanwhile.
        yield _is(path, descriptor) and (not _alive(path) if locked is None else locked)
    finally:
        os.close(descriptor)


def _alive(path: Path) -> bool:
    """Whether a process has the number in the name of a part."""
    found = _DEBRIS.fullmatch(path.name)
    try:
        os.kill(int(found["pid"]) if found else 0, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def to_disk(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(part: Path, path: Path) -> None:
    """``part`` becomes ``path``; a folder that has the name becomes ``part``, or is removed."""
    try:
        os.rename(part, path)  # also over an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(part, path):
        return
    old = part.with_suffix(".old")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _lock(descriptor, wait=True)  # `recover` of a reader waits for this
        os.rename(path, old)
        try:
            os.rename(part, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if rename(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def escaped(name: str) -> str:
    """``name`` in a glob pattern."""
    return re.sub(r"([*?\[])", r"[\1]", name)
