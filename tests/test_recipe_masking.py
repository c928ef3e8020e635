"""recipes/masking in miniature: every run of a part gives its row and its figure, once; the full-size settings are valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from ambient_sci.errors import InputError
from recipes.masking import data, run, work

NAMES = ("digits", "faces", "celeba", "afhq", "cifar10")


@pytest.fixture
def small(monkeypatch) -> dict:
    settings = run.load_settings("two-core", "digits")
    settings["training"] |= {
        "max_steps": 2,
        "batch_size": 4,
        "network": {"channels": [8, 16]},
        "precision": "fp32",
    }
    settings["em"] |= {
        "laps": 1,
        "start_steps": 2,
        "steps": 2,
        "first_steps": 2,
        "held_out": 2,
        "sampler_steps": 2,
    }
    settings["sampler"] |= {"samples": 24, "steps": 2, "batch_size": 8}
    settings |= {"points": [20], "missing": [0.5]}
    images = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = lambda x: x.flatten(1)[:, :6]  # noqa: E731
    part = data.Images(
        images[:20],
        images[20:50],
        features,
        lambda x: {"frechet": float(x.std()), "kid": 0.0},
        lambda n: images[-n:],
    )
    monkeypatch.setattr(run, "load_settings", lambda profile, name: settings)
    monkeypatch.setattr(run, "load", lambda *_: part)
    return settings


def test_every_run_gives_its_row_and_its_figure_once(small, tmp_path, capsys):
    arguments = ["--part", "digits", "--out", str(tmp_path), "--device", "cpu"]
    run.main(arguments)
    folder = tmp_path / "two-core" / "digits"
    cells = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    assert cells.keys() == {"clean-0-n20-s0", "mask-conditional-0.5-n20-s0", "em-0.5-n20-s0"}
    for name, cell in cells.items():
        assert (folder / name / "pairs.png").stat().st_size > 1000 and (folder / name / "samples.h5").exists()
        assert cell["similarity"] <= 1 and 0 <= cell["copies"] <= 1 and "frechet" in cell["floor"]
    said = capsys.readouterr().out
    assert all(row in said for row in work.ROWS.values()) and "published on these data: none" in said
    times = {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    run.main(arguments)
    assert times == {p: p.stat().st_mtime_ns for p in folder.glob("*.json")}


def test_corruption_is_drawn_once_from_the_seed(small):
    clean = torch.ones(40, 1, 8, 8)
    job = work.Job("em", 0.8, 40, 3, small)
    (first, y, noise), _ = work.corrupted(clean, job)
    (second, again, _), _ = work.corrupted(clean, job)
    assert torch.equal(first.mask, second.mask) and torch.equal(y, again) and noise == 0.05
    assert float(first.mask.mean()) == pytest.approx(0.2, abs=0.03)
    assert bool((y[first.mask.expand_as(y) == 0] == 0).all()) and float(
        y[first.mask.expand_as(y) > 0].std()
    ) == pytest.approx(0.05, rel=0.15)
    other, _ = work.corrupted(clean, work.Job("em", 0.8, 40, 4, small))
    assert not torch.equal(other[0].mask, first.mask)


def test_copies_are_told_from_samples_that_are_none():
    images = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    part = data.Images(
        images[:100], images[100:300], lambda x: x.flatten(1), lambda x: {}, lambda n: images[:n]
    )
    fresh, _, _ = data.nearest(part, images[300:])
    copied, similarity, index = data.nearest(part, images[:100] + 0.01)
    assert fresh["copies"] < 0.1 and copied["copies"] == 1 and copied["similarity"] > 0.99
    assert index.tolist() == list(range(100)) and similarity.min() > 0.9


@pytest.mark.parametrize("profile", ["two-core", "gpu"])
@pytest.mark.parametrize("part", NAMES)
def test_all_settings_are_configurations(profile, part):
    if profile == "two-core" and part in data.FILES:
        with pytest.raises(InputError, match="expected one of digits, faces"):
            run.load_settings(profile, part)
        return
    settings = run.load_settings(profile, part)
    for name in work.RUNS:
        config = work.configuration(work.Job(name, 0.5, 10, 1, settings), "cpu")
        assert config.seed == 1 and (config.em is not None) == (name == "em")
        assert config.loss.keep == (settings["keep"] if name == "mask-conditional" else None)


def test_published_numbers_are_marked(capsys):
    text = run.published_table("cifar10")
    assert "published, not ours" in text and "6.76" in text and "Rozet" in text
    rows = yaml.safe_load((Path(run.__file__).parent / "config.yaml").read_text())["published"]
    assert all(row["source"] for own in rows.values() for row in own)


def test_absent_data_say_what_makes_them(tmp_path):
    for part in data.FILES:
        with pytest.raises(InputError, match=f"datasets/{part}.py"):
            data.load(part, 10, 0, tmp_path, tmp_path, "pixels")


def test_a_part_from_files(tmp_path):
    from ambient_sci.data import write_images

    x = torch.rand(60, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    for name, rows in (("train50k", x[:40]), ("test10k", x[40:])):
        (tmp_path / "cifar10").mkdir(exist_ok=True)
        write_images(tmp_path / "cifar10" / f"{name}.h5", images=rows)
    found = data.load("cifar10", 30, 0, tmp_path, tmp_path, "pixels")
    again = data.load("cifar10", 30, 0, tmp_path, tmp_path, "pixels")
    assert (
        found.train.shape == (30, 3, 4, 4)
        and torch.equal(found.train, again.train)
        and len(found.held_out) == 20
    )
    with pytest.raises(InputError, match="at most the 40 images"):
        data.load("cifar10", 41, 0, tmp_path, tmp_path, "pixels")
