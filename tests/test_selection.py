"""Scores without clean images, and runs that keep the state that scores best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ambient_sci.data.loader import MeasurementArrays
from ambient_sci.errors import InputError
from ambient_sci.evaluation import ProximalScore, proximal_score
from ambient_sci.operators import Identity, Masking
from ambient_sci.operators.designs import Independent
from ambient_sci.priors import NetworkConfig, load_prior
from ambient_sci.training import EMConfig, Selection, StagedConfig, TrainConfig, fit


def draw(num: int, seed: int, std: float = 0.5) -> Tensor:
    return std * torch.randn(num, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def data(kind: str, num: int = 2000) -> MeasurementArrays:
    clean = draw(num, 0)
    if kind == "identity":
        return MeasurementArrays(Identity((1, 4, 4)), clean + 0.3 * draw(num, 1, 1.0), 0.3)
    design = Independent((1, 4, 4), "pixels", 0.6)
    operator = Masking(design.sample(num, torch.Generator().manual_seed(2)), (1, 4, 4), design=design)
    return MeasurementArrays(operator, operator.A(clean + 0.3 * draw(num, 1, 1.0)), 0.3)


@pytest.mark.parametrize("kind", ["identity", "masking"])
@pytest.mark.parametrize("distance", ["sliced-wasserstein", "frechet", "kid"])
def test_the_score_ranks_like_the_truth(kind: str, distance: str):
    """Images of standard deviation s against data of .5: the score falls towards .5 from both sides, and is
    that of two draws of one law there."""
    score = ProximalScore(data(kind), num=1000, distance=distance)
    found = {s: score(draw(1000, 5, s)) for s in (0.2, 0.4, 0.5, 0.6, 0.8)}
    assert found[0.2] > found[0.4] > found[0.5] < found[0.6] < found[0.8]
    assert score(draw(1000, 5, 0.4)) == found[0.4]


def test_noise_and_masks_are_put_on():
    """Clean images must be measured before they are compared: without noise, or with every row, they lose."""
    measured = data("masking")
    clean, y = draw(2000, 7), measured.measurements(torch.arange(2000))
    right = proximal_score(clean, measured)
    unmasked = ProximalScore(MeasurementArrays(Identity((1, 4, 4)), y, 0.3))(clean)
    quiet = ProximalScore(MeasurementArrays(measured.operator(torch.arange(2000)), y, 1e-6))(clean)
    assert unmasked > 4 * right and quiet > 2 * right


def test_scores_that_cannot_be_made_are_refused():
    score = ProximalScore(data("identity", 10))
    with pytest.raises(InputError, match="expected 2 to 10 images of"):
        score(draw(11, 0))
    with pytest.raises(InputError, match="expected 2 to 10 images of"):
        score(torch.zeros(4, 1, 8, 8))
    with pytest.raises(InputError, match="expected one of sliced-wasserstein, frechet, kid"):
        ProximalScore(data("identity", 10), distance="fid")
    with pytest.raises(InputError, match="at least 2 samples"):
        ProximalScore(data("identity", 1))


class Said:
    """A score that says what it is told to, and remembers how often it was asked."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.asked = scores, 0

    def __call__(self, images: Tensor) -> float:
        self.asked += 1
        return self.scores[self.asked - 1]


def config(steps: int, **options: Any) -> TrainConfig:
    network = NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8)
    return TrainConfig(
        max_steps=steps,
        batch_size=4,
        device="cpu",
        network=network,
        schedule="constant",
        log_interval=3,
        **options,
    )


def selection(*scores: float, every: int = 2) -> Selection:
    return Selection(Said(*scores), every=every, num=2, options={"steps": 2})


def tensors(path: Path) -> dict[str, Tensor]:
    return load_prior(path / "prior").state_dict()


def test_the_best_state_is_kept_and_a_resumed_run_keeps_it(tmp_path: Path):
    """Scores 3, 1, 2, 4 at steps 2, 4, 6, 7: the prior is that of a run of four steps, with the same bits; also
    where the run was interrupted before or after the best."""
    measured = tmp_path / "m"
    y = (Identity((1, 8, 8)), torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.1)
    del measured
    fit(y, config(4), tmp_path / "four", progress=False)
    returned = fit(y, config(7), tmp_path / "all", progress=False, selection=selection(3.0, 1.0, 2.0, 4.0))
    fit(y, config(3), tmp_path / "early", progress=False, selection=selection(3.0, 9.0))
    fit(y, config(7), tmp_path / "early", resume=True, progress=False, selection=selection(1.0, 2.0, 4.0))
    fit(y, config(5), tmp_path / "late", progress=False, selection=selection(3.0, 1.0, 5.0))
    fit(y, config(7), tmp_path / "late", resume=True, progress=False, selection=selection(2.0, 4.0))
    expected = tensors(tmp_path / "four")
    for name in ("all", "early", "late"):
        found = tensors(tmp_path / name)
        assert all(torch.equal(found[k], expected[k]) for k in expected), name
    assert all(torch.equal(returned.state_dict()[k], expected[k]) for k in expected)
    lines = [json.loads(text) for text in (tmp_path / "all" / "log.jsonl").read_text().splitlines()]
    scores = {k: v for line in lines for k, v in line.get("scores", {}).items()}
    assert scores == {"2": 3.0, "4": 1.0, "6": 2.0, "7": 4.0}
    with pytest.raises(InputError, match="expected the selection"):
        fit(y, config(9), tmp_path / "all", resume=True, progress=False)


def test_the_last_stage_and_laps_are_judged(tmp_path: Path):
    """Staged consistency: stage 2 alone; EM: the lap of the best score is kept, whatever its CRPS."""
    y = (Identity((1, 8, 8)), torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.1)
    said = selection(2.0, 1.0)
    fit(y, config(3, consistency=StagedConfig(max_steps=4)), tmp_path / "s", progress=False, selection=said)
    assert said.score.asked == 2  # type: ignore[attr-defined]
    em = EMConfig(laps=2, steps=2, sampler_steps=3, held_out=4, held_out_draws=2, initial_iterations=2)
    laps = TrainConfig(batch_size=4, device="cpu", network=config(1).network, em=em)
    fit(y, laps, tmp_path / "em", progress=False, selection=selection(3.0, 1.0, 2.0))
    report = json.loads((tmp_path / "em" / "em.json").read_text())
    assert report["best"] == 1 and [r["score"] for r in report["laps"]] == [3.0, 1.0, 2.0]
