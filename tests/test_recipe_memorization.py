"""The recipes memorization and attacks in miniature, on small files of images: every cell, its table and figures, resume, settings."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
import yaml

from ambient_sci.data import write_images
from ambient_sci.errors import InputError
from ambient_sci.training import TrainingInterrupted
from recipes.attacks import run as attacks
from recipes.memorization import cells, data, report, run

SETTINGS = {
    "images": {8: [0, 1], 12: [0]},
    "sigma_n": [0, 0.4],
    "stops": [3, 6],
    "show": [0, 0.4],
    "frontier": {"x": ["copies", "pixels"], "y": ["frechet", "means"]},
    "training": {
        "batch_size": 4,
        "schedule": "constant",
        "network": {"channels": [8], "patch": 4, "head_channels": 8},
        "levels": {"sigma_max": 40.0, "floor": 0.02},
    },
    "sampler": {"steps": 4, "batch_size": 20},
    "features": {
        "means": {"samples": 24, "held_out": 30, "quality": True, "at": "every"},
        "pixels": {"samples": 20, "held_out": 20, "memory": True, "at": "last"},
    },
}


@pytest.fixture
def settings(tmp_path, monkeypatch) -> dict:
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_images(tmp_path / "train.h5", images=x[:20])
    write_images(tmp_path / "held_out.h5", images=x[20:])
    files = {"kind": "files", "train": str(tmp_path / "train.h5"), "held_out": str(tmp_path / "held_out.h5")}
    found = {**SETTINGS, "data": files}
    real = cells.measure.__globals__["get_extractor"]

    def extractor(name):  # one that is cheap beside one of the library's
        function = real(lambda images: images.mean(-1).flatten(1))
        return function.__class__(name, function.function, "means 1") if name == "means" else real(name)

    monkeypatch.setitem(cells.measure.__globals__, "get_extractor", extractor)
    cells.measure.__globals__["extractor"].cache_clear()
    monkeypatch.setattr(run, "load_settings", lambda profile, part: found)
    return found


def test_cells_table_and_figures(settings, tmp_path, capsys):
    arguments = ["--part", "small", "--out", str(tmp_path / "runs"), "--device", "cpu"]
    run.main([*arguments, "--images", "8", "--seeds", "0"])
    out = tmp_path / "runs" / "two-core" / "small"
    assert {p.stem for p in out.glob("*.json")} == {
        f"n8-sigma{s}-s0-{k}" for s in ("0", "0.4") for k in (3, 6)
    }
    last = json.loads((out / "n8-sigma0.4-s0-6.json").read_text())
    assert set(last["scores"]) == {"means", "pixels"} and "frechet" in last["scores"]["means"]
    assert 0 <= last["scores"]["pixels"]["memory"]["ratio"]["copies"]["fraction"] <= 1
    assert set(json.loads((out / "n8-sigma0.4-s0-3.json").read_text())["scores"]) == {"means"}
    said = capsys.readouterr().out
    assert "| 8 | 0 (DSM) | 6 | 1 |" in said and "copies, pixels" in said and "Fréchet, means" in said
    assert all((out / f"{name}-n8.png").exists() for name in ("frontier", "samples", "denoised"))
    # What was trained is what was asked for, in the data's own units.
    told = json.loads((out / "n8-sigma0.4-s0" / "config.json").read_text())
    assert told["frozen_noise"] == {"sigma_n": 0.8, "seed": 0} and told["max_steps"] == 6
    # Again with a further seed: only that is made.
    times = {p: p.stat().st_mtime_ns for p in out.glob("*.json")}
    run.main([*arguments, "--images", "8", "--levels", "0", "--seeds", "0", "1"])
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    assert {p.stem for p in set(out.glob("*.json")) - set(times)} == {"n8-sigma0-s1-3", "n8-sigma0-s1-6"}
    assert "| 8 | 0 (DSM) | 6 | 2 |" in capsys.readouterr().out


def test_an_interrupted_cell_goes_on_and_ends_with_the_same_samples(settings, tmp_path, monkeypatch):
    def job(step: int) -> cells.Job:
        return cells.Job(8, 0.4, 0, step, settings)

    for out in ("whole", "cut"):
        (tmp_path / out).mkdir()
    for step in (3, 6):
        cells.work(job(step), tmp_path / "whole", "cpu")
    # A signal in the middle of the second stop.
    from ambient_sci.training import stages

    cells.work(job(3), tmp_path / "cut", "cpu")
    loss, calls = stages.AmbientStage.loss, []

    def interrupted(self, step, part=0):
        calls.append(step)
        if step == 4 and calls.count(4) == 1:
            os.kill(os.getpid(), 15)
        return loss(self, step, part)

    monkeypatch.setattr(stages.AmbientStage, "loss", interrupted)
    with pytest.raises(TrainingInterrupted):
        cells.work(job(6), tmp_path / "cut", "cpu")
    cells.work(job(6), tmp_path / "cut", "cpu")
    assert calls == [3, 4, 5] or calls == [3, 4, 4, 5]
    both = []
    for out in ("whole", "cut"):
        with data.ReferenceFile(tmp_path / out / job(6).run / "samples-6.h5") as file:
            both.append(file.images(slice(None)))
    assert torch.equal(*both)
    # A stop that the run has passed is not made from what it is by then.
    with pytest.raises(InputError, match="past this stop"):
        cells.work(job(3), tmp_path / "cut", "cpu")


def test_cells_come_in_the_order_of_what_they_say():
    order = [(j.images, j.seed, j.sigma_n) for j in cells.jobs(SETTINGS) if j.last]
    assert order == [(8, 0, 0.0), (8, 0, 0.4), (12, 0, 0.0), (12, 0, 0.4), (8, 1, 0.0), (8, 1, 0.4)]


def test_every_part_has_a_configuration_and_its_levels_fit():
    parts = {
        (profile, part): run.load_settings(profile, part)
        for profile, own in yaml.safe_load((run.HERE / "config.yaml").read_text()).items()
        if not profile.startswith(".")
        for part in own
    }
    assert {part for _, part in parts} == {"digits", "faces", "ffhq", "cifar10", "tiny-imagenet"}
    for own in parts.values():
        for job in cells.jobs(own):
            assert cells.configuration(job, "cpu").max_steps == job.step
        assert set(own["show"]) <= set(own["sigma_n"])
        for _, features in own["frontier"].values():
            assert features in own["features"]
    for folder in (run.HERE, attacks.HERE):  # what --readme fills in
        text = (folder / "README.md").read_text()
        assert all(f"<!-- two-core {part} -->" in text for part in ("digits", "faces"))
    with pytest.raises(InputError, match="expected one of digits, faces with --profile two-core"):
        run.load_settings("two-core", "ffhq")


def test_data_that_are_missing_say_how_to_get_them(tmp_path, monkeypatch):
    """With a script that says its steps, and without."""
    files = {"kind": "files", "train": str(tmp_path / "t.h5"), "held_out": str(tmp_path / "h.h5")}
    with pytest.raises(InputError, match=r"t\.h5: expected a file of images, found none; see datasets/"):
        data.load(files, 4, 0, 4)
    monkeypatch.setattr(data, "script", lambda name: SimpleNamespace(STEPS=f"run datasets/{name}.py"))
    with pytest.raises(InputError, match=r"found none; run datasets/ffhq\.py"):
        data.load({**files, "script": "ffhq"}, 4, 0, 4)
    with pytest.raises(InputError, match="expected at least 7 images"):
        data.pick(6, 7, 0)
    assert data.pick(10, 4, 0) == sorted(set(data.pick(10, 4, 0))) != data.pick(10, 4, 1)


def test_a_report_of_nothing(tmp_path):
    assert report.write_report(run.Grid(tmp_path), {**SETTINGS, "data": {}}) == "no cells yet"


def test_attacks_on_what_was_trained_and_on_any_prior(settings, tmp_path, monkeypatch, capsys):
    own = {"level": None, "hidden": 0.5, "num": 4, "samples": 2, "steps": 3, "plain": 6, "plain_steps": 3}
    own |= {
        "batch_size": 8,
        "features": "pixels",
        "runs": {"part": "small", "images": 8, "sigma_n": [0, 0.4]},
    }
    monkeypatch.setattr(attacks, "load_settings", lambda profile, part: own)
    where = ["--memorization", str(tmp_path / "runs"), "--out", str(tmp_path / "attacks"), "--device", "cpu"]
    with pytest.raises(
        InputError, match=r"recipes\.memorization\.run --part small --images 8 --levels 0 0\.4"
    ):
        attacks.main(["--part", "small", *where])
    run.main(
        [
            "--part",
            "small",
            "--out",
            str(tmp_path / "runs"),
            "--device",
            "cpu",
            "--images",
            "8",
            "--seeds",
            "0",
        ]
    )
    attacks.main(["--part", "small", *where])
    out = tmp_path / "attacks" / "two-core" / "small"
    assert {p.stem for p in out.glob("*.json")} == {"DSM-s0", "sigma_n-0.4-s0"}
    assert (out / "similarity.png").exists() and (out / "DSM-s0" / "inpaint.png").exists()
    said = capsys.readouterr().out
    for question in ("noise", "noise, MMSE", "hidden", "hidden, MMSE", "plain samples"):
        side = "generated" if question == "plain samples" else "trained on"
        assert f"| DSM-s0 | {question} | {side} |" in said and f"| DSM-s0 | {question} | held out |" in said
    # Made once; and any prior by its run folder.
    times = {p: p.stat().st_mtime_ns for p in out.glob("*.json")}
    folder = tmp_path / "runs" / "two-core" / "small" / "n8-sigma0-s0"
    files = ["--train", settings["data"]["train"], "--held-out", settings["data"]["held_out"]]
    attacks.main(["--part", "small", *where])
    attacks.main(["--part", "small", *where, "--prior", f"mine={folder}", *files])
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    assert json.loads((out / "mine.json").read_text())["attack"]["suspects"] == 4
    with pytest.raises(InputError, match="NAME=RUN"):
        attacks.main(["--part", "small", *where, "--prior", str(folder)])
