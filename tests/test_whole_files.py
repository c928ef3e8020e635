"""Files and folders are whole or not there, whichever file operation a process is killed at, and debris goes
away."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch

from ambient_sci import whole_files
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output, recover, sweep, whole_file, whole_folder, write_json

OPERATIONS = ("open", "mkdir", "fsync", "replace", "rename", "unlink", "rmdir")


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """These tests stop processes, not machines: that fsync is called counts, not what it does."""
    monkeypatch.setattr(os, "fsync", os.fstat)


class Stop(OSError):
    """An operation that failed."""


def count_operations(patch: Callable, at: int, stop: Callable[[], None], *, after: bool = False) -> list[str]:
    """Replace the operations of `os` (and the exchange) by ones that stop at the ``at``-th call, before or
    after doing it."""
    done: list[str] = []

    def wrapped(name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            done.append(name)
            if len(done) == at and not after:
                stop()
            found = real(*args, **kwargs)
            if len(done) == at and after:
                stop()
            return found

        return call

    for name in OPERATIONS:
        patch(os, name, wrapped(name, getattr(os, name)))
    patch(whole_files, "_exchange", wrapped("exchange", whole_files._exchange))
    return done


def killed(work: Callable[[], None], at: int, *, after: bool) -> bool:
    """Run ``work`` in a child that is gone at the ``at``-th file operation; whether it was (or had come to
    its end)."""
    child = os.fork()
    if child == 0:
        try:
            count_operations(setattr, at, lambda: os._exit(9), after=after)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 9


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as part:
        (part / "a.txt").write_text(text)
        (part / "sub").mkdir()
        (part / "sub" / "b.txt").write_text(text)


def content(path: Path) -> set[str]:
    """All texts of a file or folder: of one generation if it is whole."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    assert not path.is_dir() or [str(p.relative_to(path)) for p in files] == ["a.txt", "sub/b.txt"]
    return {p.read_text() for p in files}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_file_is_old_or_new_whenever_the_process_is_killed(tmp_path, old, after):
    path, at, news = tmp_path / "x.json", 0, 0
    while True:
        at += 1
        for file in tmp_path.iterdir():
            file.unlink()
        if old:
            write_json(path, "old")
        stopped = killed(lambda: write_json(path, "new"), at, after=after)
        assert path.exists() or not old
        found = json.loads(path.read_text()) if path.exists() else None
        assert found in ({"old", "new"} if old else {None, "new"})
        news += found == "new"
        sweep(tmp_path)
        assert os.listdir(tmp_path) == (["x.json"] if found else [])
        if not stopped:
            break
    assert found == "new" and at > 4 and news < at


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_old_or_new_whenever_the_process_is_killed(tmp_path, old, after, exchange, monkeypatch):
    """With the exchange of names nothing has to be done; without it a reader calls `recover` first."""
    if not exchange:
        monkeypatch.setattr(whole_files, "_exchange", lambda a, b: False)
    path, at, seen = tmp_path / "prior", 0, set()
    while True:
        at += 1
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        if old:
            fill(path, "old")
        stopped = killed(lambda: fill(path, "new"), at, after=after)
        if not exchange:
            recover(path)
        assert path.exists() or not old
        found = content(path) if path.exists() else {None}
        assert len(found) == 1 and found <= ({"old", "new"} if old else {None, "new"})
        seen |= found
        sweep(tmp_path)
        assert (
            os.listdir(tmp_path) == (["prior"] if found != {None} else []) and content_or_none(path) == found
        )
        if not stopped:
            break
    assert found == {"new"} and seen == ({"old", "new"} if old else {None, "new"}) and at > 10


def content_or_none(path: Path) -> set:
    return content(path) if path.exists() else {None}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_operation_that_fails_leaves_no_debris(tmp_path, kind, exchange):
    """Every operation up to the last rename raises once: the error comes out, old or new is there, and
    nothing else."""
    path, at = tmp_path / "x", 0
    write = (
        (lambda text: fill(path, text))
        if kind == "folder"
        else (lambda text: whole_files.write_text(path, text))
    )
    while True:
        at += 1
        write("old")

        def stop() -> None:
            raise Stop("at will")

        with pytest.MonkeyPatch.context() as patch:
            if not exchange:
                patch.setattr(whole_files, "_exchange", lambda a, b: False)
            done = count_operations(patch.setattr, at, stop)
            try:
                write("new")
            except Stop:
                pass
        found = content(path)
        assert found in ({"old"}, {"new"})
        left = [p for p in os.listdir(tmp_path) if p != "x"]
        # Only a failure of the clean-up itself leaves something, which the next writer sweeps.
        assert not left or done[at - 1] in ("unlink", "rmdir", "open", "mkdir"), done
        write("old")
        assert os.listdir(tmp_path) == ["x"]
        if len(done) < at:
            break
    assert at > 4


def test_work_in_progress_is_not_debris_and_debris_of_a_number_in_use_is(tmp_path):
    """The lock decides: of a part of this very process that nobody holds, and of a part with the number of no
    process that is held."""
    mine = tmp_path / f".a.{os.getpid()}.0.part"
    mine.write_text("debris")
    older = tmp_path / f".a.{os.getpid()}.part"
    older.write_text("debris")
    foreign = tmp_path / ".b.999999999.0.part"
    foreign.write_text("in progress")
    other = tmp_path / ".b.part"
    other.write_text("no part")
    with foreign.open() as held, whole_file(tmp_path / "c") as part, whole_folder(tmp_path / "d") as folder:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert sorted(sweep(tmp_path)) == sorted([mine, older])
        assert foreign.exists() and part.exists() and folder.exists()
        part.write_text("c")
    assert sorted(os.listdir(tmp_path)) == [".b.999999999.0.part", ".b.part", "c", "d"]
    assert sweep(tmp_path, "a") == [] and sweep(tmp_path, "b") == [foreign]


def test_without_locks_the_number_decides(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(whole_files.errno.ENOLCK, "no locks")

    monkeypatch.setattr(whole_files.fcntl, "flock", none)
    mine, dead = tmp_path / f".a.{os.getpid()}.7.part", tmp_path / ".a.999999999.0.part"
    for path in (mine, dead):
        path.write_text("")
    assert sweep(tmp_path) == [dead] and mine.exists()
    write_json(tmp_path / "a", 1)
    assert json.loads((tmp_path / "a").read_text()) == 1


def test_two_writers_of_one_name_in_one_process(tmp_path):
    path = tmp_path / "x"
    with whole_file(path) as a, whole_file(path) as b:
        assert a != b
        a.write_text("a")
        b.write_text("b")
    assert path.read_text() == "a" and os.listdir(tmp_path) == ["x"]


def test_an_hdf5_part_that_is_written_is_not_swept(tmp_path):
    """HDF5 locks its files itself: told not to, it works under our lock."""
    with whole_file(tmp_path / "x.h5") as part, h5py.File(part, "w", locking=False) as file:
        file["a"] = [1, 2]
        assert sweep(tmp_path) == [] and part.exists()
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["a"][:].tolist() == [1, 2]


def test_recover_brings_back_what_stepped_aside_and_sweep_what_was_replaced(tmp_path):
    aside = tmp_path / ".p.999999999.0.old"
    aside.mkdir()
    (aside / "a").write_text("old")
    recover(tmp_path / "p")
    assert (tmp_path / "p" / "a").read_text() == "old" and not aside.exists()
    aside.mkdir()
    assert sweep(tmp_path) == [aside] and (tmp_path / "p" / "a").exists()
    shutil.rmtree(tmp_path / "p")
    aside.mkdir()
    assert sweep(tmp_path) == [] and (tmp_path / "p").is_dir()  # a sweep loses nothing
    recover(tmp_path / "nothing" / "there")


def test_folders_and_links(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected the name of a folder"), whole_folder(tmp_path / "file"):
        pass
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real") == {"x"}
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "real") as part:
        (part / "a.txt").write_text("half")
        raise ZeroDivisionError
    assert content(tmp_path / "real") == {"x"} and sorted(os.listdir(tmp_path)) == ["file", "link", "real"]


def test_outputs_are_checked_in_one_place(tmp_path):
    (tmp_path / "x").write_text("")
    assert check_output(tmp_path / "new" / "y") == tmp_path / "new" / "y"
    assert check_output(str(tmp_path / "x"), overwrite=True) == tmp_path / "x"
    for call, message in (
        (lambda: check_output(tmp_path, True), "expected a file name for the output, got a folder"),
        (lambda: check_output(tmp_path / "x"), "already exists; give --overwrite"),
        (lambda: check_output(tmp_path / "new" / "y", folder_exists=True), "expected an existing folder"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path):
    """Everything is synchronised before the rename, and the folder that holds the name after it."""
    with pytest.MonkeyPatch.context() as patch:
        done = count_operations(patch.setattr, 0, lambda: None)
        write_json(tmp_path / "x", 1)
        of_file = [name for name in done if name in ("fsync", "replace")]
        done.clear()
        fill(tmp_path / "folder", "new")
        new = [name for name in done if name in ("fsync", "rename", "exchange")]
        done.clear()
        fill(tmp_path / "folder", "newer")
        replaced = [name for name in done if name in ("fsync", "rename", "exchange")]
    assert of_file == ["fsync", "replace", "fsync"]
    assert new == [*["fsync"] * 4, "rename", "fsync"]  # two files, two folders
    assert replaced == [*["fsync"] * 4, "rename", "exchange", "fsync"]


def test_a_digest_is_of_values_wherever_and_however_they_lie():
    """Expanded, transposed, sliced, conjugated or alone in an axis of stride 0: the digest of a plain copy."""
    plain = torch.arange(12.0).reshape(3, 4)
    complex_numbers = torch.complex(plain, plain + 1)
    ways = [
        torch.tensor(2.0).expand(1),
        torch.tensor(2.0).expand(3, 4),
        torch.empty(1, 3).as_strided((1, 3), (0, 1)).fill_(5.0),
        torch.arange(24.0).reshape(6, 4)[::2],
        plain.T,
        complex_numbers.conj(),
        complex_numbers.conj().imag,
        torch.tensor([True, False]),
        torch.zeros(0, 3),
        plain.bfloat16()[:, 1],
    ]
    for way in ways:
        copy = torch.tensor(way.tolist(), dtype=way.dtype).reshape(way.shape)
        assert whole_files.digest_of({"a": way}) == whole_files.digest_of({"a": copy})
    digests = {whole_files.digest_of({"a": way}) for way in ways}
    assert len(digests) == len(ways)
