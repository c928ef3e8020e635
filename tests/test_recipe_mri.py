"""The parts of recipes/mri, and a few of its cells from end to end, in miniature."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import recipes.mri.cells as recipe_cells
import recipes.mri.priors as recipe_priors
import recipes.mri.report as recipe_report
import recipes.mri.run as recipe
import recipes.mri.scans as recipe_scans
import recipes.mri.ship as recipe_ship
from ambient_sci.data import MeasurementFile, ReferenceFile, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.losses import denoise_measurement
from ambient_sci.operators import make_design
from ambient_sci.priors import load_prior
from ambient_sci.training import RunFolder, TrainConfig, make_accelerator, run_stage
from recipes.mri.ablation_stages import ARMS
from recipes.mri.ablations import run_ablation
from recipes.mri.ssdu import SplittingStage


@pytest.fixture(scope="module")
def profile() -> dict:
    return recipe.load_profile("miniature")


@pytest.fixture(scope="module")
def scans(profile, tmp_path_factory) -> recipe_scans.Scans:
    return recipe_scans.Scans(profile["scans"], tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="module")
def config(profile) -> TrainConfig:
    return recipe_priors.configuration({"kind": "k-space"}, profile, "cpu")


# -- scans -------------------------------------------------------------------------------------------------------------------


def test_the_same_test_scan_at_every_acceleration(scans):
    """Truth, maps and noise agree; where both masks measure, so do the measurements. Maps differ from scan to
    scan."""
    found = {r: scans.test(r) for r in (4, 8)}
    assert torch.equal(found[4].truth, found[8].truth) and found[4].subjects == found[8].subjects
    assert len(set(found[4].subjects)) == 3 and not any("colin" in s for s in found[4].subjects)
    with MeasurementFile(found[4].path) as a, MeasurementFile(found[8].path) as b:
        both = a.operator().mask * b.operator().mask
        assert torch.equal(a.measurements() * both, b.measurements() * both) and float(both.sum()) > 0
        assert float(a.operator().mask.mean()) == 1 / 4 and float(b.operator().mask.mean()) == 1 / 8
        maps = a.coil_maps()
        assert torch.equal(maps, b.coil_maps()) and maps.shape[1] == 4
        assert float((maps[0] - maps[1]).abs().max()) > 0.1
        rest = a.measurements() - a.operator().A(found[4].truth)
        noise = rest[a.operator().mask.expand_as(rest) > 0]
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)


def test_training_scans(scans):
    """Complete and clean only where asked for; a part of the slices is spread over all of them."""
    with (
        MeasurementFile(scans.training(1, clean=True, slices=6)) as clean,
        MeasurementFile(scans.training(1, slices=6)) as noisy,
    ):
        assert len(clean) == len(noisy) == 6 and bool((clean.noise_std == 0).all())
        assert float((noisy.measurements() - clean.measurements()).std()) == pytest.approx(0.05, rel=0.05)
        assert set(noisy.subjects) == {"colin27"}
    assert recipe_scans.chosen_slices(["a"] * 100, {}, "train", 3) == [0, 50, 99]
    several = ["a"] * 11 + ["b"]
    assert recipe_scans.chosen_slices(several, {"test_slices": 2}, "test", None) == [2, 8, 11]


def measured_scans(path: Path, missing: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5, 2, 3, 32, 24, generator=generator)
    mask = torch.ones(1, 1, 32, 24)
    if missing:
        mask[..., 3] = 0
        y = y * mask[:, :, None]
    maps = torch.randn(1, 3, 32, 24, generator=generator, dtype=torch.complex64)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    write_measurements(
        path, measurements=y, mask=mask, noise_std=0.3, operator="mri", image_shape=(2, 32, 24), coil_maps=maps,
        subjects=["a", "a", "a", "b", "b"],
    )  # fmt: skip


def test_measured_scans_lose_rows_and_nothing_else(tmp_path, profile):
    """Rows that are left are as measured; the truth is what all rows show, and a person's full scale that of
    all of its slices."""
    settings = {
        **profile["scans"],
        "source": "measurements",
        "train": tmp_path / "m.h5",
        "test": tmp_path / "m.h5",
    }
    measured_scans(tmp_path / "m.h5")
    scans = recipe_scans.Scans(settings, tmp_path / "scans")
    found = scans.test(4)
    rows = recipe_scans.chosen_slices(["a", "a", "a", "b", "b"], settings, "test", None)
    with MeasurementFile(tmp_path / "m.h5") as full, MeasurementFile(found.path) as part:
        mask = part.operator().mask
        assert float(mask.mean()) == pytest.approx(1 / 4) and part.design is not None
        assert torch.equal(part.measurements(), full.measurements(rows) * mask)
        assert torch.allclose(found.truth, full.operator(rows).A_adjoint(full.measurements(rows)), atol=1e-6)
        assert torch.equal(part.sigma(), full.sigma(rows))
        everything = full.operator([0, 1, 2]).A_adjoint(full.measurements([0, 1, 2]))
        assert found.peaks["a"] == pytest.approx(
            float(np.quantile(everything.norm(dim=1).numpy(), 0.999)), rel=1e-3
        )
    assert MeasurementFile(scans.training(1)).operator().complete


def test_scans_that_do_not_fit(tmp_path, profile):
    settings = {
        **profile["scans"],
        "source": "measurements",
        "train": tmp_path / "m.h5",
        "test": tmp_path / "m.h5",
    }
    with pytest.raises(InputError, match=r"scans\.train: .*no such file"):
        recipe_scans.Scans(settings, tmp_path)
    measured_scans(tmp_path / "m.h5", missing=True)
    with pytest.raises(InputError, match="fully sampled scans"):
        recipe_scans.Scans(settings, tmp_path / "scans").test(4)
    assert not list((tmp_path / "scans").glob("*.h5"))
    with pytest.raises(InputError, match="scans.source"):
        recipe_scans.Scans({**settings, "source": "x"}, tmp_path)


# -- priors ------------------------------------------------------------------------------------------------------------------


def test_kept_fraction():
    assert recipe_priors.kept_fraction("R+1", 4) == 0.8 and recipe_priors.kept_fraction(0.75, 4) == 0.75
    for wrong in ("R+2", 1.0, 0.0):
        with pytest.raises(InputError, match="keep"):
            recipe_priors.kept_fraction(wrong, 4)


def test_a_model_of_several_accelerations(scans, config):
    """Batches of each acceleration in turn, of slices of its own, one network, the loss of each with its own
    design and fraction."""
    files = [scans.training(r) for r in (4, 8)]
    accelerator = make_accelerator("cpu")
    configs = [dataclasses.replace(config, loss=dataclasses.replace(config.loss, keep=k)) for k in (0.6, 0.8)]
    both = recipe_priors.SeveralAccelerations(files, configs, accelerator)
    one, other = both.stages
    assert one.module is other.module is both.module and (one.batches.keep, other.batches.keep) == (0.6, 0.8)
    assert one.source.design.budget > other.source.design.budget
    assert both.module.conditioning == "mask-conditional"
    with MeasurementFile(files[0]) as f4, MeasurementFile(files[1]) as f8:
        assert torch.equal(one.source.measurements.measurements([1]), f4.measurements([2]))
        assert torch.equal(other.source.measurements.measurements([1]), f8.measurements([3]))
    for step in range(2):
        assert torch.equal(both.loss(step), both.stages[step].loss(step))
        fraction = float(both.stages[step].batches.draw(step).operator.mask.mean())
        assert fraction == pytest.approx((1 / 4, 1 / 8)[step])
    assert not torch.equal(one.batches.draw(0).sigma, other.batches.draw(0).sigma)


def splitting(scans, config, robust: bool, **changes) -> SplittingStage:
    options = {
        "split_ratio": 0.6,
        "alpha": 0.75,
        "acceleration": 2,
        "design": "lines-variable",
        "acs": 1,
        **changes,
    }
    return SplittingStage(scans.training(4), config, make_accelerator("cpu"), robust=robust, **options)


def test_ssdu_by_hand(scans, config):
    """||A_2 f(y_1) - y_2||^2 / |mask_2| with f shown the rows of mask_1; masks differ from sample to sample
    and step to step."""
    config = dataclasses.replace(config, batch_size=4)
    stage = splitting(scans, config, robust=False)
    with torch.no_grad():
        for p in stage.module.parameters():  # a last layer of zeros would hide what the network is shown
            p.add_(0.02)
    loss = stage.loss(3)
    shown = stage.model.get_masks()[-1]
    drawn = stage.batches.draw(3)
    measured = drawn.operator.mask
    assert shown.shape == measured.shape and bool((shown <= measured).all())
    fraction = shown.flatten(1).sum(1) / measured.flatten(1).sum(1)
    assert torch.allclose(fraction, torch.full((4,), 0.6), atol=0.01)
    assert len(torch.unique(shown.flatten(1), dim=0)) == 4
    h = denoise_measurement(stage.module, drawn.operator.with_mask(shown), drawn.y, drawn.sigma_y)
    rest = measured - shown
    by_hand = ((drawn.operator.transform(h) - drawn.y) * rest).square().mean() / rest.mean()
    assert loss.shape == (4,) and torch.allclose(loss, by_hand.expand(4), rtol=1e-5)
    assert torch.equal(stage.loss(3), loss) and not torch.equal(stage.loss(4), loss)


def test_robust_ssdu_by_hand(scans, config):
    """What f is given has noise alpha sigma_y more, sample by sample; lines weigh (1 - K)^(-1/2), K = (1 - P)
    / (1 - P~ P)."""
    config = dataclasses.replace(config, batch_size=6, augmentations=("gain",))
    stage = splitting(scans, config, robust=True)
    seen: list = []
    original = stage.one_step.forward
    stage.one_step.forward = lambda y, physics: seen.append(y) or original(y, physics)
    loss = stage.loss(0)
    drawn, shown = stage.batches.draw(0), stage.model.get_masks()[-1]
    assert bool((shown <= drawn.operator.mask).all()) and len(torch.unique(shown.flatten(1), dim=0)) > 2
    assert len(torch.unique(drawn.sigma_y)) == 6
    added = seen[0] - drawn.y * shown
    for i in range(6):
        values = added[i][shown[i].expand_as(added[i]) > 0]
        assert float(values.std()) == pytest.approx(0.75 * float(drawn.sigma_y[i]), rel=0.15)
        assert float(added[i][shown[i].expand_as(added[i]) == 0].abs().max()) == 0
    generator = torch.Generator().manual_seed(5)
    p = stage.batches.source.design.sample(8000, generator)[:, 0, 0].double().mean(0)
    further = make_design("lines-variable", image_shape=(2, 32, 32), acceleration=2, acs=1)
    q = further.sample(8000, generator)[:, 0, 0].double().mean(0)
    weight = (1 - (1 - p) / (1 - p * q.clamp(max=1 - 1e-9))).rsqrt()
    found = stage.splitting.metric.weights[32][0]
    inner = slice(8, 25)  # deepinv estimates them from 2,000 masks, of which few measure the outer lines
    assert torch.allclose(found[inner].double(), weight[inner], rtol=0.1)
    operator, mask = drawn.operator, drawn.operator.mask
    h = denoise_measurement(stage.module, operator.with_mask(shown), seen[0], drawn.sigma_y)
    error = operator.A(h) - drawn.y
    split = (found * (mask - shown) * error).square().mean()
    kept = ((1 + 1 / 0.75**2) * shown * error).square().mean()
    assert torch.allclose(loss[0], split + kept, rtol=1e-4)


def test_ssdu_continues_from_its_checkpoint(scans, config, tmp_path):
    """Two steps and two more are the four steps of a run that was not interrupted."""
    config = dataclasses.replace(config, schedule="constant", checkpoint_minutes=0.0)

    def train(folder: str, steps: int):
        stage = splitting(scans, config, robust=True)
        own = dataclasses.replace(config, max_steps=steps)
        run = RunFolder(tmp_path / folder)
        if not (run.path / "config.json").exists():
            run.create(own, {"data": stage.fingerprint()})
        return run_stage(
            stage, own, accelerator=make_accelerator("cpu"), folder=run, resume=True
        ).state_dict()

    train("a", 2)
    resumed, whole = train("a", 4), train("b", 4)
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_every_profile_can_be_configured():
    for name in ("two-core", "gpu", "fastmri", "miniature"):
        profile = recipe.load_profile(name)
        assert recipe_cells.all_cells(profile)
        for entry in profile["priors"].values():
            config = recipe_priors.configuration(entry, profile, "cpu")
            assert (config.em is not None) == (entry["kind"] == "em")
            if entry["kind"] == "k-space":
                assert all(
                    0 < recipe_priors.kept_fraction(entry["keep"], r) < 1
                    for r in recipe_priors.accelerations(entry)
                )
    with pytest.raises(InputError, match="kind: expected one of"):
        recipe_priors.configuration({"kind": "x"}, recipe.load_profile("miniature"), "cpu")
    with pytest.raises(InputError, match="--profile"):
        recipe.load_profile(".base")


# -- cells and report --------------------------------------------------------------------------------------------------------


def test_filters(profile):
    every = recipe_cells.all_cells(profile)
    names = [c.name for c in every]
    assert len(set(names)) == len(names) and "em-R8--mmps--R4" in names and "classic--tv--R8" in names
    assert "ssdu-R4--a-dps--R4" not in names and "k-space-R4--mmps--R4" not in names
    some = recipe_cells.chosen(every, None, ["classic", "em-*"], [4])
    assert {c.name for c in some} == {
        "classic--zero-filled--R4", "classic--sense--R4", "classic--l1-wavelet--R4", "classic--tv--R4",
        "em-R4--mmps--R4", "em-R8--mmps--R4",
    }  # fmt: skip
    assert [c.name for c in recipe_cells.chosen(every, ["clean--*--R8"], None, None)] == ["clean--mmps--R8"]


def cell(prior: str | None, method: str, people: dict[str, float]) -> dict:
    mean = sum(people.values()) / len(people)
    scores = {"psnr": {"mean": mean, "people": people}}
    return {"prior": prior, "kind": "em", "R_train": [4], "method": method, "R_test": 4, "scores": scores, "slices": dict.fromkeys(people, 1)}  # fmt: skip


def test_differences_are_paired_by_person():
    """People differ by 10 dB, methods by 1 and 3 dB: the standard error is that of the difference."""
    ours, tv = cell("em-R4", "mmps", {"a": 21.0, "b": 33.0}), cell(None, "tv", {"a": 20.0, "b": 30.0})
    text = recipe_report.differences([ours, tv])
    assert "| em-R4 − tv | 4 | +2.00 ± 1.00 |" in text
    assert recipe_report.standard_error([1.0, 3.0]) == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert recipe_report.with_error(ours["scores"]["psnr"], 2) == "27.00 ± 6.00"
    assert recipe_report.differences([tv]) == ""


def test_ablations_are_paired_by_seed():
    found = [
        {"arm": arm, "seed": s, "scores": {"psnr": {"mean": base + 10 * s}, "nrmse": {"mean": 0.1}}}
        for arm, base in (("full", 20.0), ("no-tweedie", 18.0))
        for s in (0, 1)
    ]
    text = recipe_report.ablation_table(found)
    assert "| no-tweedie | 2 | 23.00 ± 7.07 | 0.1000 ± 0.0000 | -2.00 ± 0.00 |" in text


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A few cells of every kind, run from end to end."""
    out = tmp_path_factory.mktemp("out")
    cells = [
        "classic--zero-filled--R4",
        "noisy--mmps--R4",
        "k-space-R4,8--*--R4",
        "robust-ssdu-R4--*--R4",
        "em-R4--mmps--R4",
    ]
    status = recipe.main(["--profile", "miniature", "--out", str(out), "--device", "cpu", "--cells", *cells])
    assert status == 0
    return out / "miniature"


def test_cells_end_to_end(finished):
    names = {p.stem for p in (finished / "cells").glob("*.json")}
    assert names == {
        "classic--zero-filled--R4", "noisy--mmps--R4", "k-space-R4,8--one-step--R4", "k-space-R4,8--a-dps--R4",
        "robust-ssdu-R4--one-step--R4", "em-R4--mmps--R4",
    }  # fmt: skip
    found = json.loads((finished / "cells" / "em-R4--mmps--R4.json").read_text())
    assert set(found["scores"]["psnr"]["people"]) == set(found["slices"]) and len(found["slices"]) == 3
    for test in ("with_truth", "held_out"):
        assert 0 < found[test]["coverage"]["80"]["observed"] < 1
    assert json.loads((finished / "priors" / "em-R4.json").read_text())["laps"][-1]["lap"] == 1
    text = (finished / "table.md").read_text()
    assert "| em-R4 | em, R = 4 | mmps |" in text and "| robust-ssdu-R4 | robust, R = 4 | one-step |" in text
    assert (finished / "images-R4.png").stat().st_size > 10_000 and (
        finished / "psnr.png"
    ).stat().st_size > 5_000


def test_what_is_there_is_not_made_again(finished, monkeypatch, capsys):
    """A cell that is missing is made from the prior that is there; table only makes nothing."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(recipe_priors, "_trained", never)
    path = finished / "cells" / "noisy--mmps--R4.json"
    before = json.loads(path.read_text())
    arguments = ["--profile", "miniature", "--out", str(finished.parent), "--device", "cpu"]
    path.unlink()
    assert recipe.main([*arguments, "--table-only"]) == 0
    assert not path.exists() and "| noisy |" not in capsys.readouterr().out
    assert recipe.main([*arguments, "--cells", "noisy--mmps--R4"]) == 0
    assert json.loads(path.read_text())["scores"] == before["scores"]
    assert recipe.main([*arguments, "--cells", "nothing"]) == 2


def test_a_prior_is_shipped_with_the_numbers_of_its_cells(finished, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "miniature")
    arguments = [
        "--profile",
        "miniature",
        "--runs",
        str(runs),
        "--out",
        str(tmp_path / "assets"),
        "--name",
        "b",
    ]
    assert recipe_ship.main(arguments) == 2 and "needs the cells" in capsys.readouterr().err
    assert not (tmp_path / "assets").exists()
    cells = runs / "miniature" / "cells"
    for made, source in (("noisy--mmps--R8", "noisy--mmps--R4"), ("classic--tv--R4", "classic--zero-filled--R4"), ("classic--tv--R8", "classic--zero-filled--R4")):  # fmt: skip
        shutil.copy(cells / f"{source}.json", cells / f"{made}.json")
    assert recipe_ship.main(arguments) == 0
    prior = load_prior(tmp_path / "assets" / "b")
    assert prior.config.about["noise_std"] == 0.05 and prior.config.about["acceleration"] == [1]
    trained = load_prior(finished / "priors" / "noisy")
    x = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prior(x, 0.3), trained(x, 0.3))
    card, score = (
        (tmp_path / "assets" / "b.md").read_text(),
        json.loads((cells / "noisy--mmps--R4.json").read_text()),
    )
    assert f"| 4 | {score['scores']['psnr']['mean']:.2f} ±" in card and "Limits." in card
    assert recipe_ship.main([*arguments, "--prior", "clean"]) == 2
    assert "from measurements alone" in capsys.readouterr().err


def test_an_entry_may_have_levels_and_loss_of_its_own(profile, scans, tmp_path):
    own = copy.deepcopy(profile)
    entry = {**own["priors"]["k-space-R4"], "keep": 0.5, "steps": 1, "levels": {"mean": -1.45}, "loss": {"c_min": 0.1}, "ablation": "keep-acs"}  # fmt: skip
    own["priors"]["k-space-R4"] = entry
    recipe_priors.train("k-space-R4", own, scans, tmp_path, "cpu")
    config = json.loads((tmp_path / "k-space-R4" / "config.json").read_text())
    assert config["levels"]["mean"] == -1.45 and config["levels"]["std"] == profile["levels"]["std"]
    assert config["loss"]["c_min"] == 0.1 and config["loss"]["keep"] == 0.5
    said = json.loads((tmp_path / "k-space-R4" / "run.json").read_text())
    assert said["data"]["ablation"] == "keep-acs"
    own["priors"]["k-space-R4"] = {**entry, "ablation": "keep-all"}
    with pytest.raises(InputError, match="ablation: expected one of full, no-tweedie"):
        recipe_priors.train("k-space-R4", own, scans, tmp_path / "other", "cpu")


def test_an_ablation(tmp_path, profile):
    """Each arm says in its run folder what it is, and trains another network from the same batches."""
    small, weights = copy.deepcopy(profile), {}
    for arm in ARMS:
        found = run_ablation(arm, 0, small, tmp_path, "cpu")
        assert math.isfinite(found["scores"]["psnr"]["mean"])
        assert json.loads((tmp_path / f"{arm}-s0" / "run.json").read_text())["data"]["ablation"] == arm
        prior = load_prior(tmp_path / f"{arm}-s0")
        weights[arm] = torch.cat([p.detach().flatten() for p in prior.parameters()])
    assert len({tuple(w.tolist()) for w in weights.values()}) == len(ARMS)
    configs = {(tmp_path / f"{arm}-s0" / "config.json").read_text() for arm in ARMS}
    assert len(configs) == 1
    with ReferenceFile(next((tmp_path / "scans" / "test").glob("*truth.h5"))) as truth:
        assert truth.image_shape[-1] == 32
