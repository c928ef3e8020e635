"""Every command that writes, killed before every operation on files and on a disk that is full from there on:
its outputs are old or new, the next run goes on, and nothing is left.

A few operations of most commands are tried; EVERY_OPERATION=1 tries all of all, in half an hour.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import every, hidden, killed, on_a_full_disk
from test_reliability import prior, rng, scans

from ambient_sci import quickstart
from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile, write_images
from ambient_sci.errors import InputError
from ambient_sci.sampling import generate, generate_to_file, reconstruct_to_file, streaming
from ambient_sci.training import TrainConfig

SHAPE = (1, 4, 4)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """These tests stop processes, not machines: that fsync is called counts, not what it does."""
    monkeypatch.setattr(os, "fsync", os.fstat)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A prior, scans, a result, generated, training and held-out images, arrays."""
    folder = tmp_path_factory.mktemp("inputs")
    prior().save(folder / "prior")
    scans(folder / "m.h5", 1)
    with MeasurementFile(folder / "m.h5") as file:
        for seed in (1, 2):
            options = {"samples": 2, "steps": 2, "generator": rng(seed)}
            reconstruct_to_file(prior(), file, folder / f"r{seed}.h5", **options)
    for name, seed in (("s", 5), ("t", 6), ("h", 7)):
        write_images(folder / f"{name}.h5", images=generate(prior(), 8, steps=2, generator=rng(seed)))
    for seed in (1, 2):
        np.save(folder / f"x{seed}.npy", torch.rand(8, 4, 4, generator=rng(seed)).numpy())
    return folder


#: The command, its outputs below out/ (of a set the last to come first), what makes an older generation of them,
#: and every how many operations are tried (all, with EVERY_OPERATION=1).
COMMANDS: dict[str, tuple[str, list[str], list[str], int]] = {
    "import": ("import x1.npy --noise-std 0.1 --out out/m.h5", ["m.h5"], ["x1.npy=x2.npy"], 9),
    "simulate": (
        "simulate x1.npy --operator identity --noise-std 0.1 --out out/m.h5 --reference out/t.h5",
        ["t.h5", "m.h5"],
        ["x1.npy=x2.npy"],
        23,
    ),
    "reconstruct": (
        "reconstruct prior m.h5 --samples 2 --steps 2 --out out/r.h5",
        ["r.h5"],
        ["--samples 2=--samples 3"],
        37,
    ),
    "generate": (
        "generate prior --num 4 --steps 2 --out out/s.h5",
        ["s.png", "s.h5"],
        ["--num 4=--num 2"],
        43,
    ),
    "export": ("export r1.h5 --out out/r.nii.gz", ["r.nii.gz"], ["r1.h5=r2.h5"], 5),
    "evaluate": (
        "evaluate r1.h5 --reference t.h5 --out out",
        ["report.json", "figure.png", "calibration.png"],
        ["r1.h5=r2.h5"],
        29,
    ),
    "inspect": ("inspect m.h5 --out out/m.png", ["m.png"], ["m.h5=t.h5"], 9),
    "memorization error": (
        "memorization error prior --train t.h5 --held-out h.h5 --num 4 --levels 2 --draws 1 --out out",
        ["report.json", "errors.safetensors", "error.png"],
        ["--levels 2=--levels 3"],
        29,
    ),
    "memorization score": (
        "memorization score s.h5 --train t.h5 --held-out h.h5 --features pixels --nearest 3 --out out",
        ["report.json", "similarities.safetensors", "similarity.png", "pairs.png"],
        ["s.h5=h.h5"],
        29,
    ),
    "memorization attack": (
        "memorization attack prior t.h5 --held-out h.h5 --features pixels --num 2 --samples 1 --steps 2 --out out",
        ["report.json", "similarities.safetensors", "similarity.png", "noise.png", "inpaint.png"],
        ["t.h5=s.h5"],
        29,
    ),
}

EVERY = bool(os.environ.get("EVERY_OPERATION"))
#: The other commands of memorization write by the same function as the one that is always tried.
TRIED = [name for name in COMMANDS if EVERY or name not in ("memorization score", "memorization attack")]


def run(inputs: Path, folder: Path, command: str, *more: str) -> int:
    """A command whose outputs are below ``folder``; what it reads is in ``inputs``."""
    words = [str(inputs / w) if (inputs / w).exists() else w for w in command.split()]
    return main([str(folder / w) if w.split("/")[0] == "out" else w for w in words] + list(more))


def points(tmp_path: Path, start: Path | None, stride: int) -> Iterator[tuple[int, Path]]:
    """Numbers of operations to stop at, others where something is overwritten than where nothing is."""
    stride = 1 if EVERY else stride
    return every(tmp_path, start, stride, 1 if start is None else 1 + stride // 2)


def outputs(folder: Path, names: list[str]) -> list[bytes | None]:
    paths = [folder / "out" / name for name in names]
    found = [p.read_bytes() if p.exists() else None for p in paths]
    # The report names its figures with their folder.
    return [f and re.sub(rb'"[^"]*/out/', b'"', f) for f in found]


@pytest.fixture(scope="module")
def generations(inputs, tmp_path_factory) -> dict[str, tuple[Path, list, list]]:
    """For each command a folder with older outputs, these, and the new ones."""
    found = {}
    for name in TRIED:
        command, names, changes, _ = COMMANDS[name]
        old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
        older = command
        for change in changes:
            older = older.replace(*change.split("=", 1))
        assert older != command
        assert run(inputs, old, older) == 0 and run(inputs, new, command) == 0, name
        found[name] = (old, outputs(old, names), outputs(new, names))
        assert None not in found[name][2] and found[name][1] != found[name][2]
    return found


def contents(folder: Path) -> dict[Path, bytes | bool]:
    """What is there; a cache of features is gone on from and may stay."""
    kept = [p for p in folder.rglob("*") if "features" not in p.parts]
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in kept if p.name != "out"}


def consistent(found: list, old: list, new: list) -> bool:
    """Files that are there are of one generation; those without which the first says nothing are there, too."""
    generations = [
        [f is None or f == g for f, g in zip(found, generation, strict=True)] for generation in (old, new)
    ]
    whole = found[0] is None or None not in found
    return whole and any(all(same) for same in generations)


def goes_on(inputs: Path, folder: Path, command: str) -> None:
    assert run(inputs, folder, command) == 0 or run(inputs, folder, command, "--overwrite") == 0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", TRIED)
def test_killed_before_an_operation(name, overwrite, inputs, generations, tmp_path, capfd):
    command, names, _, stride = COMMANDS[name]
    start, old, new = generations[name]
    more = ["--overwrite"] if overwrite else []
    seen = set()
    for k, folder in points(tmp_path, start if overwrite else None, stride):
        died = killed(folder, k, lambda folder=folder: run(inputs, folder, command, *more))
        found = outputs(folder, names)
        assert consistent(found, old if overwrite else [None] * len(names), new), (k, names)
        assert found == new or died
        seen.add(found == new)
        goes_on(inputs, folder, command)
        assert outputs(folder, names) == new and hidden(folder) == [], (k, hidden(folder))
        if not died:
            break
    assert k > 4 and seen == {False, True}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", TRIED)
def test_a_disk_that_is_full_from_an_operation_on(name, overwrite, inputs, generations, tmp_path, capfd):
    """One line, exit 2, what was there as it was, nothing left; HDF5 and Python say nothing beside it."""
    command, names, _, stride = COMMANDS[name]
    start, old, new = generations[name]
    more = ["--overwrite"] if overwrite else []
    for k, folder in points(tmp_path, start if overwrite else None, stride):
        before = contents(folder)
        status, said = on_a_full_disk(folder, k, lambda folder=folder: run(inputs, folder, command, *more))
        found = outputs(folder, names)
        if status == 0:
            assert found == new, (k, said)
            break
        lines = [line for line in said.splitlines() if not line.startswith("ambient-sci: warning: ")]
        assert status == 2 and len(lines) == 1 and lines[0].startswith("ambient-sci: error: "), (k, said)
        after = contents(folder)
        if name == "generate" and found[1] == new[1]:  # it had its name; the contact sheet did not fit
            before |= {Path("out/s.h5"): after[Path("out/s.h5")]}
            before.pop(Path("out/s.png"), None)
        if name == "reconstruct" and found == new:  # the same of the picture beside it
            before |= {Path("out/r.h5"): after[Path("out/r.h5")]}
            before.pop(Path("out/r.png"), None)
            after.pop(Path("out/r.png"), None)
        assert after == before or "go on with" in said and ".parts-" in said, (
            k,
            after.keys() ^ before.keys(),
        )
    assert k > 1


@pytest.mark.parametrize("what", ["reconstruct", "generate"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_parts_that_were_finished_are_not_made_again(what, overwrite, inputs, tmp_path, monkeypatch):
    """Two parts: wherever the first run dies, the second makes what is missing and the same bits."""

    def work(folder: Path, again: bool) -> None:
        if what == "generate":
            settings = {"steps": 2, "images_at_once": 4, "generator": rng(3), "overwrite": again}
            generate_to_file(prior(), 8, folder / "x.h5", **settings)
            return
        with MeasurementFile(inputs / "m.h5") as file:
            settings = {
                "samples": 2,
                "steps": 2,
                "images_at_once": 4,
                "generator": rng(3),
                "overwrite": again,
            }
            reconstruct_to_file(prior(), file, folder / "x.h5", **settings)

    (tmp_path / "new").mkdir()
    work(tmp_path / "new", False)
    new = (tmp_path / "new" / "x.h5").read_bytes()
    start = tmp_path / "old"
    shutil.copytree(tmp_path / "new", start)
    if overwrite:
        shutil.copy(inputs / ("s.h5" if what == "generate" else "r1.h5"), start / "x.h5")
    made, name = [], "chains" if what == "generate" else "prepare"
    plain = getattr(streaming, name)
    monkeypatch.setattr(streaming, name, lambda *a, **k: made.append(1) or plain(*a, **k))
    saved = set()
    for k, folder in points(tmp_path, start if overwrite else None, 31):
        died = killed(folder, k, lambda folder=folder: work(folder, overwrite))
        finished = len(list(folder.glob(".*/*.h5")))
        there = (folder / "x.h5").exists() and (folder / "x.h5").read_bytes()
        assert there in ((start / "x.h5").read_bytes(), new) if overwrite else there in (False, new)
        made.clear()
        work(folder, overwrite or bool(there))
        assert len(made) == 2 - finished or (there == new and not overwrite)
        assert (folder / "x.h5").read_bytes() == new and hidden(folder) == []
        saved.add(finished)
        if not died:
            break
    assert {0, 1, 2} <= saved or not EVERY


def test_a_quickstart_that_starts_anew_and_dies_is_not_mixed_with_the_older_one(tmp_path, monkeypatch):
    """Killed while it writes new scans: no report, run or result of the older one is left to be gone on from."""
    kept = {"notes.txt": "mine", "report.json": "{}", "figure.png": "", "reconstruction.h5": ""}
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    TrainConfig().save(tmp_path / "config.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "run" / "config.json")

    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "make_scans", dies)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()  # no run of ours
    with pytest.raises(InputError, match="expected a training run to overwrite"):
        quickstart.run(tmp_path, overwrite=True)
