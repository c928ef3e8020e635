"""Files that belong together: a report with its figures, new as a whole or old as a whole.

    with whole_set(folder, "report.json") as part:     # fill the folder `part`

What is written lies in a folder beside its goal and is complete on the disk before the first file gets its
name. The last one, which tells that the set is there, goes first and comes last: killed in between, the
folder has no report, never one beside the figures of another.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ambient_sci.errors import InputError
from ambient_sci.whole_files import PathLike, claim, escaped, holder_of, sole, sweep, to_disk


@contextmanager
def whole_set(folder: PathLike, last: str, stale: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to write files into, which get their names in ``folder`` on leaving; on an error, none.

    Args:
        folder: where they go; made if need be, and unmade on an error.
        last: the file that says that the others are there.
        stale: files of an earlier set, removed unless they are written again.
    """
    folder = Path(folder)
    with made_folder(folder):
        sweep(folder, last)
        part, lock = claim(folder / last, folder=True)
        try:
            yield part
            names = sorted((path.name for path in part.iterdir()), key=lambda name: (name == last, name))
            for name in names:
                to_disk(part / name)
            for name in (last, *(set(stale) - set(names))):
                (folder / name).unlink(missing_ok=True)
            for name in names:
                os.replace(part / name, folder / name)
            to_disk(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            os.close(lock)


@contextmanager
def made_folder(folder: PathLike) -> Iterator[None]:
    """``folder``, made where it is missing, and unmade if what is to fill it fails."""
    folder = Path(folder).absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def only_maker(path: PathLike) -> Iterator[None]:
    """Be the only process that makes the file ``path``: a lock beside it, which the system releases with the
    process.

    Raises:
        InputError: another process is at it.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    with made_folder(path.parent), sole(lock) as held:
        if not held:
            raise InputError(
                f"{path}: expected to be the only process that makes it, got process {holder_of(lock)} at "
                "work on it"
            )
        yield


def sweep_output(path: PathLike) -> None:
    """Remove what killed makers of the file ``path``, which is there, have left beside it.

    Parts of a newer output that was interrupted stay: whoever goes on with it needs them.
    """
    path = Path(path)
    sweep(path.parent, path.name)
    for folder in path.parent.glob(f".{escaped(path.name)}.parts-*"):
        newest = max((p.stat().st_mtime_ns for p in folder.glob("*.h5")), default=0)
        if newest <= path.stat().st_mtime_ns:
            with sole(folder / "lock") as given_up:
                if given_up:
                    shutil.rmtree(folder, ignore_errors=True)
    lock = path.with_name(f".{path.name}.lock")
    if lock.exists():
        with sole(lock):  # one that nobody holds goes with it
            pass
