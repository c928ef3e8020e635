"""The benchmarks of posterior samplers in miniature, on a prior that a quickstart made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ambient_sci.errors import InputError
from ambient_sci.priors import StationaryGaussianPrior
from ambient_sci.quickstart import Settings
from ambient_sci.quickstart import run as quickstart
from recipes.benchmarks import first_hour
from recipes.benchmarks.posterior import capacity, mean_of_means, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quickstart") / "q"
    tiny = Settings(
        slices_per_person=1,
        samples=2,
        steps=3,
        max_iterations=1,
        train_steps=2,
        batch_size=2,
        channels=(16, 16),
    )
    quickstart(out, settings=tiny)
    return out


def test_methods_are_measured_once_and_counted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run.METHODS, "ours-mmps", lambda p, m: run.ours(p, m, steps=3, max_iterations=1))
    arguments = [str(folder), "--methods", "ours-mmps", "--samples", "2", "--out", str(tmp_path)]
    run.main(arguments)
    found = json.loads((tmp_path / "ours-mmps.json").read_text())
    assert found["method"] == "ours-mmps" and found["finite"] and found["samples"] == 2
    # Three levels, one evaluation each (and of single chains again where a guard stopped a solve); a Jacobian
    # product a solve.
    assert 3 <= found["forward_per_chain"] < 4 and found["vjp_per_chain"] >= 3
    assert f"| ours-mmps | {found['seconds']:.1f} |" in capsys.readouterr().out
    run.main(arguments)
    assert json.loads((tmp_path / "ours-mmps.json").read_text()) == found
    with pytest.raises(InputError, match="'samples': 3"):
        run.main([*arguments[:4], "3", *arguments[5:]])


def test_capacity_goes_on_to_the_number_of_solves(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(capacity, "SAMPLES", 1)
    monkeypatch.setattr(capacity, "SETTINGS", {"steps": 2, "max_iterations": 1, "sigma_max": 10.0})
    arguments = [str(folder / "run"), "--solves", "40", "--samples", "1", "--out", str(tmp_path)]
    capacity.main(arguments)
    found = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))]
    assert sum(f["solves"] for f in found) >= 40 > sum(f["solves"] for f in found[:-1])
    assert "| 2.5 | 1 | 0.05 | 16 |" in capsys.readouterr().out


def test_the_first_hour_in_two_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(first_hour, "KINDS", ("ellipses",))
    monkeypatch.setattr(first_hour, "NUM", 20)
    monkeypatch.setattr(first_hour, "WEIGHTS", (0.02, 0.12, 0.6))
    commands: list[list[str]] = []

    def command(*words: object) -> None:
        from ambient_sci.cli import main

        commands.append([str(w) for w in words])
        assert main(commands[-1]) == 0

    monkeypatch.setattr(first_hour, "command", command)
    arguments = ["--steps", "2", "--new", "2", "--out", str(tmp_path), "--device", "cpu"]
    first_hour.main(arguments)
    found = json.loads((tmp_path / "ellipses-steps-2.json").read_text())
    assert found["steps_made"] == 2 and "network small" in found["chosen"]
    assert found["sigma"] == pytest.approx(0.15, abs=0.02)
    for scores in found["scores"].values():
        assert scores["tv"] > scores["measured"] and scores["weight"] == 0.12
    assert [words[0] for words in commands] == ["import", "train"]
    assert not {"--config", "--preset", "--lr"} & set(commands[1]), "nothing else is given"
    assert "| ellipses | denoising new ones | 2 | 2 |" in capsys.readouterr().out
    first_hour.main(arguments)
    assert len(commands) == 2, "what is there is not made again"


def test_means_of_means_are_those_of_reconstruct(tmp_path, capsys, monkeypatch):
    """On a Gaussian prior: groups are made once, the control takes nearly all noise off, denoising has none from
    the start, and the mean of a group is what `reconstruct` returns."""
    prior = StationaryGaussianPrior(torch.zeros(2, 64, 64), torch.full((2, 64, 64), 0.06))
    prior.sigma_min = 0.05
    monkeypatch.setattr(mean_of_means.asci, "load_prior", lambda name: prior)
    monkeypatch.delitem(mean_of_means.PROBLEMS, "MRI, R = 2.5")
    arguments = ["--out", str(tmp_path), "--groups", "2"]
    mean_of_means.main(arguments)
    made = {p: p.read_bytes() for p in (tmp_path / "groups").glob("*.json")}
    assert len(made) == 4
    found = {f["problem"]: f for f in json.loads((tmp_path / "table.json").read_text())}
    psnr = found["inpainting"]["psnr"]
    assert abs(psnr["mean"]["4"] - psnr["mean"]["8"]) < 0.05 < abs(psnr["draws"]["4"] - psnr["draws"]["1"])
    assert psnr["mean"]["1"] == pytest.approx(psnr["conditional"]["1"]) != psnr["draws"]["1"]
    assert found["denoising"]["psnr"]["mean"]["1"] == pytest.approx(found["denoising"]["psnr"]["mean"]["8"])
    assert f"| inpainting | mean | {psnr['mean']['1']:.2f} |" in capsys.readouterr().out
    mean_of_means.main(arguments)
    assert made == {p: p.read_bytes() for p in (tmp_path / "groups").glob("*.json")}
    operator, y, truth = mean_of_means.problem_of("inpainting")
    result = mean_of_means.asci.reconstruct(
        prior, operator, y, 0.05, samples=4, precision="auto", generator=torch.Generator().manual_seed(0)
    )
    only = json.loads((tmp_path / "groups" / "000 inpainting.json").read_text())
    first = mean_of_means.quality(tmp_path / "groups", [only])
    assert first["psnr"]["mean"][4] == pytest.approx(
        float(mean_of_means.psnr(result.mean, truth, 1.0).mean()), abs=1e-3
    )
