"""The recipe of noisy images in miniature: every row, figures, published numbers apart, what is missing said."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ambient_sci.data import write_images
from recipes.exactness import parts
from recipes.exactness.methods import configuration
from recipes.noisy_images import data, run
from recipes.noisy_images.limits import recoverable
from recipes.noisy_images.part import Part
from recipes.noisy_images.published import NUMBERS, published_table

CONFIG = yaml.safe_load(run.CONFIG.read_text())
SMALL = {
    "steps": 3,
    "batch_size": 8,
    "samples": 24,
    "sampler_steps": 3,
    "sampler_batch": 24,
    "points": [32],
    "seeds_at": {},
}


@pytest.fixture
def blobs(tmp_path, monkeypatch):
    """A published set in miniature: 40 images 3 x 8 x 8 as files, scored on their pixels."""
    g = torch.Generator().manual_seed(0)
    x = (
        torch.rand(80, 3, 1, 1, generator=g).expand(80, 3, 8, 8)
        - 0.5
        + 0.3 * torch.randn(80, 3, 8, 8, generator=g)
    )
    files = {"train": str(tmp_path / "train.h5"), "held_out": str(tmp_path / "held_out.h5")}
    write_images(files["train"], images=x[:40].clamp(-1, 1))
    write_images(files["held_out"], images=x[40:].clamp(-1, 1))
    pixels = lambda images: images[:, :, ::4, ::4].flatten(1)  # noqa: E731
    pixels.fingerprint = "every fourth pixel"
    settings = {
        **CONFIG["gpu"]["cifar10"],
        **SMALL,
        "files": files,
        "features": "pixels",
        "network": {"channels": [16, 16]},
    }
    settings |= {
        "consistency": {**settings["consistency"], "max_steps": 3, "warm_start": 1},
        "relative": [0.8],
    }
    monkeypatch.setattr(run, "load_settings", lambda options: settings)
    monkeypatch.setattr(
        data,
        "frechet",
        lambda a, b, features: {"distance": float((a.mean(0) - b.mean(0)) @ (a.mean(0) - b.mean(0)))},
    )
    return settings


def test_every_row_and_a_figure(blobs, tmp_path, capsys):
    arguments = [
        "--profile",
        "gpu",
        "--data",
        "cifar10",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--seeds",
        "3",
    ]
    assert run.main(arguments) == 0
    folder = tmp_path / "out" / "gpu" / "cifar10" / "high"
    cells = [json.loads(p.read_text()) for p in folder.glob("*.json")]
    rows = {row: values for cell in cells for row, values in cell["rows"].items()}
    assert set(rows) == {"clean oracle", "noisy-as-clean", "ambient full", "ambient truncated", "staged"}
    assert all({"frechet, pixels", "kid, pixels", "sigma_n"} <= set(values) for values in rows.values())
    assert cells[0]["settings"]["network"] == {"channels": [16, 16]}
    std = float(Part("cifar10", "high").images(parts.Job("clean", 0.0, 32, 3, blobs)).std())
    assert rows["staged"]["sigma_n"] == pytest.approx(0.8 * std, rel=1e-5)
    seen = load_file(folder / "staged-0.8-n32-s3.samples.safetensors")
    assert float((seen["noisy"] - seen["clean"]).std()) == pytest.approx(0.8 * std, rel=0.1)
    assert (folder / "samples-0.8-s3.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "samples-0.8-s3.png" in said and "Published" not in said


def test_noise_is_a_function_of_the_seed_alone():
    x = torch.zeros(4, 1, 2, 2)
    assert torch.equal(data.noisy(x, 0.5, 3), data.noisy(x, 0.5, 3))
    assert not torch.equal(data.noisy(x, 0.5, 3), data.noisy(x, 0.5, 4))


def test_a_missing_set_ends_with_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--profile", "gpu", "--data", "ffhq", "--device", "cpu"]) == 2
    assert "datasets/ffhq.py" in capsys.readouterr().err
    assert run.main(["--data", "ffhq"]) == 2
    assert "digits, clothes" in capsys.readouterr().err


def test_cells_of_other_settings_are_not_taken(blobs, tmp_path, capsys):
    arguments = [
        "--profile",
        "gpu",
        "--data",
        "cifar10",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--runs",
        "clean",
    ]
    assert run.main([*arguments, "--seeds", "3"]) == 0
    blobs["consistency"] = {**blobs["consistency"], "gap": 0.1}  # of no concern to clean data
    assert run.main([*arguments, "--seeds", "3"]) == 0
    blobs["steps"] = 4
    assert run.main([*arguments, "--seeds", "3"]) == 2
    assert "expected {'settings'" in capsys.readouterr().err


def test_settings_are_reported_on_other_seeds_than_they_were_chosen_on():
    """In every part of both recipes."""
    exactness = yaml.safe_load((parts.HERE / "config.yaml").read_text())
    for config in (CONFIG, exactness):
        for profile in config.values():
            for name, settings in profile.items():
                reported = {
                    *settings["seeds"],
                    *(s for some in settings.get("seeds_at", {}).values() for s in some),
                }
                assert reported.isdisjoint(settings["chosen_on"]), name


def test_every_set_has_a_configuration_for_every_run():
    for profile in CONFIG.values():
        for settings in profile.values():
            for kind in Part.RUNS:
                assert configuration(kind, settings, 0, "cpu").batch_size == settings["batch_size"]


def test_published_numbers_say_so():
    """By hand, from the paper's table."""
    assert NUMBERS["cifar10"][1][0.1].consistency == 3.63
    said = published_table("celebahq")
    assert "Published for celebahq" in said and "| 0.2 | 61.14 | 13.90 | 12.97 |" in said
    assert published_table("digits") == ""


def test_the_error_of_a_variance_under_noise():
    """By repetition: 2,000 sets of 500 draws of variance s^2 + sigma^2, sigma^2 taken off; the formula to 6 % (four standard errors)."""
    variance, sigma, points = 0.5, 0.9, 500
    total = variance + sigma**2
    x = total**0.5 * torch.randn(
        2_000, points, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    measured = float((x.var(1) - sigma**2).std()) / variance
    at = lambda error: bool(recoverable(torch.tensor([variance]), sigma, points, error))  # noqa: E731
    assert at(1.06 * measured) and not at(0.94 * measured)
