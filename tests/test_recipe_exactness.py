"""The exactness recipe in miniature: every run of the ring gives its rows, cells are made once, scores see
what they should."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from recipes.exactness import parts, run
from recipes.exactness.costs import training_evaluations
from recipes.exactness.limits import visible, without_modes
from recipes.exactness.methods import configuration
from recipes.exactness.toys import MODE_STD, truth
from recipes.small_images import scale, texture


@pytest.fixture(scope="module")
def settings() -> dict:
    config = yaml.safe_load((parts.HERE / "config.yaml").read_text())["two-core"]
    small = {"steps": 4, "batch_size": 16, "samples": 50, "sampler_steps": 3, "sampler_batch": 50}
    small |= {"network": {"kind": "mlp", "channels": [16]}, "points": [40], "seeds": [0], "curve": [60]}
    small |= {"sigma_n": [0.3]}
    em = {
        "laps": 1,
        "steps": 2,
        "first_steps": 2,
        "sampler_batch": 40,
        "held_out": 4,
        "initial_iterations": 2,
    }
    found = {}
    for part in ("ring", "masked-mixture"):
        found[part] = {**config[part], **small, "em": em, "joint": {"kick_in": 2}}
        found[part]["consistency"] = {**config[part]["consistency"], "max_steps": 2}
    return found


def test_every_row_of_the_ring(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_settings", lambda profile, part: settings[part])
    arguments = ["--part", "ring", "--out", str(tmp_path), "--device", "cpu"]
    run.main(arguments)
    rows = {"clean oracle", "noisy-as-clean", "ambient full", "ambient truncated", "staged", "joint", "em"}
    found = {p: json.loads(p.read_text()) for p in (tmp_path / "two-core" / "ring").glob("*.json")}
    assert {row for cell in found.values() for row in cell["rows"]} == rows
    assert {c["level"] for c in found.values() if c["run"] == "clean"} == {0.0}
    said = capsys.readouterr().out
    assert all(f"| {row} | 1 |" in said for row in rows) and "floor" in said
    # Once more, with the learning curve: only what is missing is made, and that is the staged run of the
    # other size.
    times = {p: p.stat().st_mtime_ns for p in found}
    run.main([*arguments, "--curve"])
    assert all(p.stat().st_mtime_ns == time for p, time in times.items())
    new = set((tmp_path / "two-core" / "ring").glob("*.json")) - set(found)
    assert {p.name for p in new} == {"staged-0.3-n60-s0.json"}


def test_masked_rows(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_settings", lambda profile, part: settings[part])
    arguments = ["--part", "masked-mixture", "--levels", "0", ".25"]
    run.main([*arguments, "--out", str(tmp_path), "--device", "cpu"])
    cells = [json.loads(p.read_text()) for p in (tmp_path / "two-core" / "masked-mixture").glob("*.json")]
    rows = {name: row for cell in cells for name, row in cell["rows"].items()}
    assert set(rows) == {"clean oracle", "em", "mask-conditional, fixed mask"}
    assert all(0 < row["sliced_w2"] < 10 for row in rows.values())


def test_every_part_is_found_and_every_run_has_a_configuration():
    config = yaml.safe_load((parts.HERE / "config.yaml").read_text())
    assert all(set(profile) == set(parts.MODULES) for profile in config.values())
    for profile in config.values():
        for name, settings in profile.items():
            for kind in parts.load_part(name).RUNS:  # a configuration that is refused raises
                assert configuration(kind, settings, 0, "cpu").batch_size == settings["batch_size"]


def test_the_cost_of_training_counts_every_evaluation():
    """By hand: a pair is 1 + draws, a walk of 0 to 4 steps is 2, an Ambient loss 1, an estimate and its
    denoising 2."""
    cost = training_evaluations
    plain = {"draws": 2, "walk": [0, 4], "max_steps": 100}
    whole = {**plain, "replay": True, "margin": 1.1, "warm_start": 40, "shrinkage": 0.5}
    settings = {"batch_size": 10, "steps": 200, "joint": {"kick_in": 50, "replay": False}}
    assert cost("ambient full", 99, {**settings, "consistency": plain}) == 2000
    assert cost("staged", 99, {**settings, "consistency": plain}) == 2000 + 10 * 100 * 5
    assert cost("staged", 99, {**settings, "consistency": whole}) == 2000 + 10 * (40 * 2 + 60 * (3 + 1 + 2))
    further = {**plain, "substeps": 3}
    assert cost("staged", 99, {**settings, "consistency": further}) == 2000 + 10 * 100 * (1 + 2 * 3 + 2)
    # The pair and the Ambient loss share an evaluation in one of five walk lengths.
    assert cost("joint", 99, {**settings, "consistency": whole}) == 2000 + 10 * 150 * (5 - 1 / 5)


def test_the_scores_of_digits_see_noise_and_blur():
    """The texture features do, by themselves: noise raises every one of them, blur lowers that across a
    stroke."""
    x = torch.zeros(200, 1, 28, 28)
    x[:, :, 4:24, 13] = 1.0
    g = torch.Generator().manual_seed(0)
    clean, noisy = texture(x), texture(x + 0.1 * torch.randn(x.shape, generator=g))
    assert clean.shape == (200, 6) and (noisy.mean(0) > clean.mean(0) + 0.02).all()
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert texture(blurred).mean(0)[0] < 0.7 * clean.mean(0)[0]


def test_features_that_never_vary_count_for_nothing():
    """A unit that is silent on the reference and fires for one sample: with a small number in place of no
    deviation it would outweigh the rest."""
    reference = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    reference[:, 1] = 0.0
    std = scale(reference)
    sample = torch.tensor([1.0, 0.3, 1.0])
    assert torch.equal((sample / std) == 0, torch.tensor([False, True, False]))
    assert torch.allclose(std[[0, 2]], reference.std(0)[[0, 2]])


def test_what_noise_leaves_of_the_ring():
    """The harmonics of its characteristic function, from the modes themselves: J_0 on average over directions, 2 J_5 cos(5 angle) next;
    the largest over k, damped by the noise, times sqrt(n)."""
    sigma, points = 0.6, 20_000
    k = torch.linspace(0.01, 12.0, 800, dtype=torch.float64)[:, None]
    angle = 2 * torch.pi * torch.arange(360, dtype=torch.float64) / 360
    direction = torch.stack([angle.cos(), angle.sin()], 1)
    modes = truth("ring").means.reshape(5, 2)
    phi = torch.exp(1j * k[..., None] * (direction @ modes.T)).mean(-1) * torch.exp(-0.5 * k**2 * MODE_STD**2)
    seen = phi * torch.exp(-0.5 * k**2 * sigma**2)
    fifth = 2 * (seen * torch.exp(-5j * angle)).mean(1).abs()
    gauss = torch.exp(-0.5 * k[:, 0] ** 2 * (0.5 + MODE_STD**2 + sigma**2))
    hole = (seen.mean(1) - gauss).abs()
    expected = [float(part.max()) * points**0.5 for part in (hole, fifth)]
    assert visible(sigma, points) == pytest.approx(expected, rel=1e-3)
    assert visible(1.2, points)[1] < 0.2 < 10 < visible(0.3, points)[1]
    blind = without_modes(4_000)
    assert float(blind.square().sum(-1).mean()) == pytest.approx(1 + 2 * MODE_STD**2, rel=0.03)
