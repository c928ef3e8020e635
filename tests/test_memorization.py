"""Memorisation, planted: a perfect memory of 20 images is told from a prior that never saw them, by every
measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ambient_sci.cli import main
from ambient_sci.data import ReferenceFile, write_images
from ambient_sci.errors import InputError
from ambient_sci.evaluation import memorization_attack, memorization_error, memorization_score
from ambient_sci.evaluation import memorization_figures as figures
from ambient_sci.evaluation import memorization_statistics as statistics
from ambient_sci.evaluation.memorization_attack import _lower_part
from ambient_sci.operators import Masking
from ambient_sci.priors import EmpiricalPrior, GaussianPrior, Prior, load_prior
from ambient_sci.sampling import generate

F64 = torch.float64
SIZE, REMEMBERED, UNSEEN = 8, 20, 40


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth() -> GaussianPrior:
    """Smooth random fields: the law that all images here are drawn from."""
    places = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).double()
    cov = torch.exp(-torch.cdist(places, places).square() / 2) + 1e-3 * torch.eye(SIZE**2, dtype=F64)
    return GaussianPrior(torch.zeros(1, SIZE, SIZE, dtype=F64), (cov + cov.T) / 2)


class Planted:
    """A prior that remembers, one that never saw, what the one remembers, and what neither saw."""

    def __init__(self) -> None:
        self.law = smooth()
        draws = self.law.sample(REMEMBERED + UNSEEN, seeded(0))
        self.train, self.held_out = draws[:REMEMBERED], draws[REMEMBERED:]
        self.priors: dict[str, Prior] = {"memory": EmpiricalPrior(self.train), "law": self.law}


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted()


# -- the planted memory -----------------------------------------------------------------------------------


def test_the_score_tells_copies_from_others(planted: Planted) -> None:
    found = {}
    for name, prior in planted.priors.items():
        samples = generate(prior, 40, steps=20, generator=seeded(1))
        found[name] = memorization_score(samples, planted.train, planted.held_out, extractor="pixels")
    memory, law = found["memory"].report, found["law"].report
    assert memory["similarity"]["separation"]["auc"] >= 0.95 and memory["ratio"]["separation"]["auc"] >= 0.95
    for kind in ("similarity", "ratio"):
        low, high = law[kind]["separation"]["interval"]
        assert low < 0.5 < high
    near = [found[name].neighbours.similarity[:, 0] for name in ("memory", "law")]
    assert statistics.auc(*near) >= 0.95
    assert memory["similarity"]["samples"]["above"]["0.99"]["count"] == 40
    assert memory["similarity"]["held_out"]["above"]["0.9"]["count"] == 0


@pytest.fixture(scope="module")
def attacked(planted: Planted) -> dict[str, Any]:
    settings: dict[str, Any] = {"extractor": "pixels", "num": 20, "samples": 2, "steps": 20}
    return {
        name: memorization_attack(prior, planted.train, planted.held_out, **settings)
        for name, prior in planted.priors.items()
    }


@pytest.mark.parametrize("attack", ["noise", "inpaint"])
def test_the_attacks_tell_memory_from_others(attacked: dict[str, Any], attack: str) -> None:
    memory, law = (attacked[name].report["attacks"][attack] for name in ("memory", "law"))
    for kind in ("similarity", "mmse_similarity", "error", "mmse_error"):
        assert memory[kind]["separation"]["auc"] >= 0.95, kind
        low, high = law[kind]["separation"]["interval"]
        assert low < 0.5 < high, kind
    draws = [attacked[name].suspects[attack]["similarity"].mean(0) for name in ("memory", "law")]
    assert statistics.auc(*draws) >= 0.95


def test_the_error_curve_tells_memory_from_others(planted: Planted) -> None:
    found = {
        name: memorization_error(p, planted.train, planted.held_out, draws=2)
        for name, p in planted.priors.items()
    }
    memory, law = found["memory"].report, found["law"].report
    assert memory["separation"]["auc"] >= 0.95
    low, high = law["separation"]["interval"]
    assert low < 0.5 < high
    # Both ends are calm for a law; a perfect memory is calm where noise hides all, and has no error where it
    # hides nothing.
    assert len(law["memorised_at"]) <= 1 and len(memory["memorised_at"]) >= 8
    assert memory["levels"][0]["ratio"] > 1e6 and memory["levels"][-1]["ratio"] < 1.5
    between = [-(found[name].train / found["law"].train.mean(0)).mean(1) for name in ("memory", "law")]
    assert statistics.auc(*between) >= 0.95


# -- what the measures compute ----------------------------------------------------------------------------


def test_the_error_is_the_gaussians_own(planted: Planted) -> None:
    """Mean over images and draws of |D(x + sz, s) - x|^2 / n is tr(C (C + s^2)^-1 s^2) / n."""
    found = memorization_error(
        planted.law, planted.law.sample(400, seeded(2)), planted.held_out, num=400, levels=3
    )
    for row in found.report["levels"]:
        variance = row["sigma"] ** 2
        expected = float((planted.law.values * variance / (planted.law.values + variance)).mean())
        assert row["train"] == pytest.approx(expected, rel=0.1)
        assert row["ratio"] == pytest.approx(row["held_out"] / row["train"], rel=1e-6)


def test_the_calibrated_ratio_is_nearest_over_mean_of_k(planted: Planted) -> None:
    held = planted.held_out
    found = memorization_score(held[:5], planted.train, held, extractor="pixels", k=4)
    unit = [torch.nn.functional.normalize(x.flatten(1), dim=1) for x in (held[:5], planted.train)]
    distance = torch.cdist(*unit).sort(1).values[:, :4]
    torch.testing.assert_close(found.ratio, distance[:, 0] / distance.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.ratio, found.held_out_ratio[:5])
    whole = memorization_score(held, planted.train, held, extractor="pixels")
    assert whole.report["ratio"]["k"] == REMEMBERED  # no more than there are
    assert whole.report["similarity"]["separation"]["auc"] == 0.5


def test_an_attack_depends_on_the_seed_and_not_on_the_batches(planted: Planted) -> None:
    def draws(**settings: Any) -> Tensor:
        found = memorization_attack(
            planted.law, planted.train, extractor="pixels", num=3, samples=2, steps=5, **settings
        )
        return torch.cat([found.suspects[a]["samples"].flatten() for a in ("noise", "inpaint")])

    torch.testing.assert_close(draws(batch_size=4), draws(batch_size=32), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(draws(seed=1), draws(), atol=0.01)


def test_without_held_out_images_an_attack_concludes_nothing(planted: Planted, tmp_path: Path) -> None:
    from ambient_sci.evaluation.memorization_report import attack_text

    found = memorization_attack(planted.law, planted.train, extractor="pixels", num=2, samples=1, steps=3)
    assert found.controls is None and "separation" not in found.report["attacks"]["noise"]["similarity"]
    assert "nothing can be concluded" in attack_text(found.report)


def test_the_error_of_an_attack_is_of_what_was_hidden(attacked: dict[str, Any]) -> None:
    found = attacked["law"].suspects["inpaint"]
    hidden = found["hidden"][0].bool().expand_as(found["image"])
    difference = (found["mmse"] - found["image"])[hidden].reshape(20, -1)
    expected = difference.square().mean(1).sqrt() / smooth().data_std
    torch.testing.assert_close(found["mmse_error"], expected)
    seen = (found["samples"][0] - found["image"])[~hidden]
    assert float(seen.abs().mean()) < 0.1  # what was not hidden stays


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 1), (3, 8, 8), (1, 28, 28), (1, 5, 9)])
@pytest.mark.parametrize("hidden", [0.01, 0.5, 0.75, 0.999])
def test_a_mask_hides_something_and_never_all(shape: tuple[int, int, int], hidden: float) -> None:
    share = float(1 - _lower_part(shape, hidden).mean())
    assert 0 < share < 1
    if shape[1] >= 8 and 0.1 < hidden < 0.9:
        assert abs(share - hidden) < 0.15


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (
            lambda p: memorization_score(p.train[:, :, :4], p.train, p.held_out, extractor="pixels"),
            "samples of shape",
        ),
        (
            lambda p: memorization_score(p.train, p.train[:1], p.held_out, extractor="pixels"),
            "at least 2 training",
        ),
        (lambda p: memorization_score(p.train, p.train, p.held_out, extractor="pixels", k=1), "k >= 2"),
        (lambda p: memorization_attack(p.law, p.train[..., :4], extractor="pixels"), "train of shape"),
        (
            lambda p: memorization_attack(p.law, p.train, p.train[..., :4], extractor="pixels"),
            "held_out of shape",
        ),
        (lambda p: memorization_attack(p.law, p.train, extractor="pixels", level=1e-4), "noise level above"),
        (lambda p: memorization_attack(p.law, p.train, extractor="pixels", hidden=1.0), "0 < hidden < 1"),
        (lambda p: memorization_error(p.law, p.train[:1], p.held_out), "at least 2 images of train"),
        (lambda p: memorization_error(p.law, p.train, p.held_out, levels=1), "levels and num >= 2"),
        (
            lambda p: memorization_error(p.law, p.train, p.held_out, sigma_min=3, sigma_max=2),
            "sigma_min < sigma_max",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(planted: Planted, call, fragment: str) -> None:
    with pytest.raises(InputError) as error:
        call(planted)
    assert fragment in str(error.value) and "\n" not in str(error.value)


# -- statistics -------------------------------------------------------------------------------------------


def test_auc_counts_pairs_and_ties_by_halves() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 2.0])
    assert statistics.auc(a, b) == pytest.approx((1 + 0 + 1.5 + 1.5) / 6)
    assert statistics.auc(b, a) == pytest.approx(1 - statistics.auc(a, b))


def test_counts_have_wilsons_intervals() -> None:
    found = statistics.above(torch.tensor([0.5, 0.92, 0.96, 0.999]))
    assert [found[t]["count"] for t in ("0.9", "0.95", "0.99")] == [3, 2, 1]
    # Wilson (1927) for 1 of 4.
    assert found["0.99"]["interval"] == pytest.approx([0.0456, 0.6994], abs=1e-4)


def test_bootstrap_intervals_hold_the_difference_of_means() -> None:
    held = 0
    for seed in range(40):
        a, b = torch.randn(2, 60, generator=seeded(seed), dtype=F64)
        low, high = statistics.bootstrap(
            lambda x, y: float(x.mean() - y.mean()), a, b, seeded(0), resamples=200
        )
        held += low <= 0 <= high
    assert held >= 33  # 38 expected; five standard errors below


# -- the empirical prior ----------------------------------------------------------------------------------


def test_the_empirical_prior_is_its_formula_and_its_limits(planted: Planted) -> None:
    prior, x = EmpiricalPrior(planted.train), planted.held_out[:3]
    weights = torch.stack(
        [(-(x - i).flatten(1).square().sum(1) / (2 * 1.3**2)).exp() for i in planted.train], 1
    )
    expected = torch.einsum("bn,nchw->bchw", weights / weights.sum(1, keepdim=True), planted.train)
    torch.testing.assert_close(prior(x, 1.3), expected)
    torch.testing.assert_close(prior(planted.train, 0.01), planted.train)
    torch.testing.assert_close(prior(x, 1e6), planted.train.mean(0).expand_as(x), rtol=1e-4, atol=1e-4)
    levels = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    torch.testing.assert_close(prior(x, levels)[1:2], prior(x[1:2], 1.0))
    assert prior.data_std == pytest.approx(float(planted.train.var(0, correction=0).mean().sqrt()))


def test_the_empirical_prior_is_the_limit_of_narrow_mixtures(planted: Planted) -> None:
    from ambient_sci.priors import GaussianMixturePrior

    mixture = GaussianMixturePrior(planted.train, 1e-5)
    x = planted.held_out[:4]
    torch.testing.assert_close(EmpiricalPrior(planted.train)(x, 0.7), mixture(x, 0.7), rtol=1e-6, atol=1e-7)
    mask = torch.ones(1, 1, SIZE, SIZE, dtype=F64)
    mask[..., 2:] = 0
    operator = Masking(mask, (1, SIZE, SIZE))
    y = operator.A(x)
    ours = EmpiricalPrior(planted.train).posterior(operator, y, 1.5)
    torch.testing.assert_close(ours, mixture.posterior(operator, y, 1.5)[0], rtol=1e-6, atol=1e-8)


def test_the_empirical_prior_is_saved_and_loaded(planted: Planted, tmp_path: Path) -> None:
    prior = EmpiricalPrior(planted.train)
    prior.save(tmp_path / "prior")
    again = load_prior(tmp_path / "prior")
    assert isinstance(again, EmpiricalPrior) and torch.equal(again.images, planted.train)
    assert torch.equal(again(planted.held_out, 0.8), prior(planted.held_out, 0.8))
    drawn = prior.sample(50, seeded(3))
    assert float(torch.cdist(drawn.flatten(1), planted.train.flatten(1)).amin(1).max()) < 1e-6


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(5, 1, 2, 2),
        torch.ones(1, 1, 2, 2),
        torch.ones(3, 1, 2, 2).int(),
        torch.full((3, 4), float("nan")),
    ],
)
def test_the_empirical_prior_refuses_what_is_no_data(images: Tensor) -> None:
    with pytest.raises(InputError, match="empirical prior"):
        EmpiricalPrior(images)


# -- the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memorization")
    samples = generate(planted.priors["memory"], 12, steps=10, generator=seeded(4))
    for name, images in (("s", samples), ("t", planted.train), ("h", planted.held_out)):
        write_images(folder / f"{name}.h5", images=images.float())
    EmpiricalPrior(planted.train.float()).save(folder / "run")
    return folder


def commands(work: Path) -> dict[str, list[str]]:
    both = ["--train", f"{work}/t.h5", "--held-out", f"{work}/h.h5"]
    attack = [f"{work}/run", f"{work}/t.h5", "--held-out", f"{work}/h.h5", "--features", "pixels"]
    return {
        "score": [f"{work}/s.h5", *both, "--features", "pixels"],
        "attack": [*attack, "--num", "6", "--samples", "1", "--steps", "8"],
        "error": [f"{work}/run", *both, "--levels", "4", "--draws", "1"],
    }


@pytest.mark.parametrize("name", ["score", "attack", "error"])
def test_the_commands_write_reports_values_and_figures(
    work: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["memorization", name, *commands(work)[name], "--out", str(tmp_path / "deep" / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    out = tmp_path / "deep" / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["text"] in said and "0.5 is no memory" in said
    for figure in {
        "score": ("pairs", "similarity"),
        "attack": ("noise", "inpaint", "similarity"),
        "error": ("error",),
    }[name]:
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(
        out / f"{'errors' if name == 'error' else 'similarities'}.safetensors", framework="pt"
    ) as values:
        assert len(list(values.keys())) >= 2
    assert main(arguments) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    capsys.readouterr()
    assert json.loads((out / "report.json").read_text()) == report
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ("memorization", "one of memorization score, memorization attack, memorization error"),
        ("memorization paint", "got 'memorization paint'"),
        ("memorization score s.h5 --train t.h5 --out o", "--held-out"),
        ("memorization score s.h5 --train t.h5 --held-out h.h5 --out o --nearest 1", "--nearest"),
        ("memorization attack run t.h5 --out o --hidden 1", "--hidden"),
        ("memorization attack run t.h5 --out o", "run"),
        ("memorization error run --train t.h5 --held-out h.h5 --out o --levels 1", "--levels"),
    ],
)
def test_a_usage_error_of_a_group_is_one_line(
    arguments: str,
    fragment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert fragment in said and said.count("\n") == 1


def test_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["memorization", "--help"])
    said = capsys.readouterr().out
    assert exit.value.code in (0, None)
    assert all(name in said for name in ("memorization score", "memorization attack", "memorization error"))
    assert "simulate" not in said


def test_a_score_resumes_from_its_features(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from ambient_sci.evaluation import features

    out = tmp_path / "out"
    arguments = ["memorization", "score", *commands(work)["score"], "--out", str(out), "--batch-size", "4"]
    whole = features._Work._features
    calls: list[int] = []

    def stopping(self: Any, images: Tensor, start: int) -> Any:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(start)
        return whole(self, images, start)

    monkeypatch.setattr(features._Work, "_features", stopping)
    assert main(arguments) == 130
    said = capsys.readouterr().err
    assert "continue with: ambient-sci memorization score" in said and "--resume" not in said
    rest: list[int] = []
    monkeypatch.setattr(features._Work, "_features", lambda s, i, n: (rest.append(n), whole(s, i, n))[1])
    assert main(arguments) == 0
    assert len(rest) == 3 + 5 + 10 - 5  # batches of 12, 20 and 40 images, less those that were done
    with ReferenceFile(work / "s.h5") as file:
        assert json.loads((out / "report.json").read_text())["samples"] == len(file)


def test_copies_are_counted_against_the_held_out_images_own_threshold(planted: Planted) -> None:
    """By hand; and a law without memory is left at the false alarms, a memory is not."""
    held = torch.arange(1, 201).double()
    found = statistics.copies(torch.tensor([0.5, 2.5, 3.0, 4.0, 100.0]), held, seeded(0))
    assert found["threshold"] == pytest.approx(1 + 0.01 * 199) and found["fraction"] == pytest.approx(0.4)
    low, high = found["interval"]
    assert low < 0.4 < high
    assert statistics.copies(held, held, seeded(0), 0.1)["fraction"] == pytest.approx(0.1)
    shares = {}
    for name, prior in planted.priors.items():
        samples = generate(prior, 40, steps=20, generator=seeded(1))
        score = memorization_score(samples, planted.train, planted.held_out, extractor="pixels")
        shares[name] = score.report["ratio"]["copies"]["fraction"]
    assert shares["memory"] >= 0.95 and shares["law"] <= 0.1


def test_figures_of_frontiers_and_ranks(tmp_path: Path) -> None:
    point = {"x": 0.1, "y": 2.0, "x_interval": [0.05, 0.2], "y_interval": [1.8, 2.5], "text": "0.4"}
    curves = {"noise": [point, {**point, "x": 0.5, "x_interval": [0.4, 0.6]}], "steps": [point]}
    written = figures.frontier_figure(tmp_path / "a.png", curves, ("share of copies", "distance"), none=0.01)
    values = torch.rand(30, generator=seeded(0))
    panels = {"noise": {"DSM": values, "DSM, held out": values / 2}}
    assert written.exists() and figures.ranked_figure(tmp_path / "b.png", panels).exists()
