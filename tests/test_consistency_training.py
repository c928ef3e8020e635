"""Consistency as a stage of training: what it trains, what it leaves alone, and that it stops and resumes like any other."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from ambient_sci.data import write_measurements
from ambient_sci.errors import InputError
from ambient_sci.losses import consistency
from ambient_sci.operators import MRI, Identity, Independent, Masking, birdcage_maps
from ambient_sci.priors import GaussianMixturePrior, GaussianPrior, NetworkConfig, StagedPrior, load_prior
from ambient_sci.sampling import generate, level_range
from ambient_sci.training import (
    AmbientStage,
    ConsistencyConfig,
    ConsistencyStage,
    JointStage,
    LevelConfig,
    TrainConfig,
    TrainingInterrupted,
    fit,
    make_accelerator,
    open_source,
)
from ambient_sci.training import below_noise as stage_module

SHAPE = (1, 1, 3)
MLP = NetworkConfig(kind="mlp", channels=(32, 32))
ABSOLUTE = LevelConfig(sigma_max=10.0, floor=0.01, relative=False)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(num: int = 64, sigma: float = 0.4, shape=SHAPE):
    x = 0.6 * torch.randn(num, *shape, generator=rng())
    return Identity(shape), x + sigma * torch.randn(x.shape, generator=rng(1)), sigma


def small(consistency: ConsistencyConfig | None = None, **changes) -> TrainConfig:
    settings = {
        "max_steps": 6,
        "batch_size": 8,
        "log_interval": 3,
        "device": "cpu",
        "network": MLP,
        "levels": ABSOLUTE,
    }
    return TrainConfig(**{**settings, "consistency": consistency, **changes})


def below(**changes) -> ConsistencyConfig:
    return ConsistencyConfig(**{"max_steps": 6, **changes})


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def stages(measurements, config: TrainConfig) -> tuple[AmbientStage, ConsistencyStage]:
    first = AmbientStage(open_source(measurements, config), config, make_accelerator("cpu"))
    return first, ConsistencyStage(first.batches, first.module, config)


# -- staged --------------------------------------------------------------------------------------------------------------------


def test_a_staged_prior_is_the_ambient_prior_above_and_a_trained_copy_below(tmp_path):
    alone = fit(data(), small(), progress=False)
    prior = fit(data(), small(below()), out=tmp_path / "run", progress=False)
    assert isinstance(prior, StagedPrior) and prior.sigma_n == pytest.approx(0.4)
    assert prior.sigma_min == prior.below.sigma_min == pytest.approx(0.01)
    assert same(prior.anchor, alone) and not same(prior.below, alone)
    assert level_range(prior, None, None)[0] == pytest.approx(0.01)
    assert level_range(alone, None, None)[0] == pytest.approx(0.4)
    saved = load_prior(tmp_path / "run")
    assert isinstance(saved, StagedPrior) and same(saved, prior)
    said = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert [s["name"] for s in said] == ["ambient", "consistency"] and "0.4" in said[1]["reason"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("ambient", 3),
        ("ambient", 6),
        ("consistency", 3),
        ("consistency", 6),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"replay": True},
        {"replay": True, "warm_start": 1, "shrinkage": 0.3, "margin": 1.2},
        {"replay": True, "warm_start": 4},
    ],
)
def test_interrupted_in_the_second_stage_and_resumed(tmp_path, monkeypatch, changes):
    """The same bits as without the interruption, chains that are kept from step to step included."""
    config = small(below(**changes), max_steps=3)
    whole = fit(data(), config, out=tmp_path / "whole", progress=False)
    plain = ConsistencyStage.loss

    def interrupted(stage, step, part=0):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(stage, step, part)

    monkeypatch.setattr(ConsistencyStage, "loss", interrupted)
    with pytest.raises(TrainingInterrupted):
        fit(data(), config, out=tmp_path / "cut", progress=False)
    assert isinstance(load_prior(tmp_path / "cut"), StagedPrior)  # usable at any time
    monkeypatch.undo()
    assert same(fit(data(), out=tmp_path / "cut", resume=True, progress=False), whole)
    with pytest.raises(InputError, match="next stage has begun"):
        fit(data(), replace(config, max_steps=9), out=tmp_path / "cut", resume=True, progress=False)


def test_network_evaluations_of_a_step():
    """k walk steps, D_t, and all draws in one call; with replay no walk at all."""
    further = below(walk=(0, 0), antithetic=True, substeps=3)
    for settings, calls in (
        (below(walk=(2, 2)), 4),
        (further, 4),
        (below(walk=(0, 0)), 2),
        (below(replay=True), 2),
    ):
        _, stage = stages(data(), small(settings))
        sizes = []
        for module in (stage.anchor, stage.module):
            module.register_forward_hook(lambda module, inputs, out, sizes=sizes: sizes.append(len(out)))
        stage.loss(0)
        assert len(sizes) == calls and sizes[-1] == 8 * settings.draws


def test_a_chain_that_has_reached_the_bottom_starts_again_from_the_data():
    """At sigma_n, where the anchor answers; the other chains go on where they were, with the copy."""
    _, stage = stages(data(), small(below(replay=True)))
    bottom = torch.arange(8) % 2 == 0
    states, levels = torch.randn(8, *SHAPE, generator=rng()), torch.where(bottom, 0.005, 0.2)
    stage.chains = {0: (states, levels)}
    asked: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, prior in (("anchor", stage.anchor), ("copy", stage.module)):
        prior.register_forward_pre_hook(
            lambda m, inputs, name=name: asked.setdefault(name, inputs[:2]) and None
        )
    drawn = stage.batches.draw(0)
    stage.loss(0)
    x, t = asked["anchor"]
    assert torch.equal(x, drawn.y[bottom]) and torch.allclose(t, torch.full((4,), stage.sigma_n))
    x, t = asked["copy"]
    assert torch.equal(x, states[~bottom]) and torch.equal(t, levels[~bottom])
    after = stage.chains[0][1]
    assert bool((after[bottom] > 0.2).all()) and bool((after < torch.where(bottom, stage.sigma_n, 0.2)).all())


def test_gradients_reach_the_copy_and_never_the_anchor():
    """At t = sigma_n the anchor answers D_t, and the copy learns by D_s."""
    for settings in (below(walk=(0, 0)), below(walk=(3, 3))):
        _, stage = stages(data(), small(settings))
        stage.loss(0).mean().backward()
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in stage.module.parameters())
        assert all(p.grad is None for p in stage.anchor.parameters())


def test_a_pair_has_two_levels_whatever_is_drawn():
    """One draw in some millions is so small that t exp(-gap u) rounds to t; here all of them are."""
    _, stage = stages(data(), small(below(gap=1e-9)))
    assert bool(torch.isfinite(stage.loss(0)).all())


def test_walks_reach_down_and_never_below_the_floor():
    config = small(below(walk=(12, 12), sigma_min=0.1))
    prior = GaussianPrior(torch.zeros(SHAPE), 0.36 * torch.eye(3))
    _, stage = stages(data(), config)
    t = torch.full((200,), 0.4)
    x, t = stage_module.walk(
        prior,
        None,
        torch.randn(200, *SHAPE),
        t,
        steps=12,
        stride=1.0,
        sigma_min=stage.sigma_min,
        uniform=rng(),
        generator=rng(),
    )
    assert float(t.min()) == pytest.approx(0.1) and float((t <= 0.1001).float().mean()) > 0.99


def test_descending_follows_the_reverse_process():
    """States of a Gaussian, variance .36, walked down from level .8 to .2 in steps of equal factors: variance by the recursion of a linear
    denoiser, and near .36 + .04. 60,000 values, standard error .6 %; bounds at 4 of them."""
    prior = GaussianPrior(torch.zeros(SHAPE), 0.36 * torch.eye(3))
    x = (0.36 + 0.64) ** 0.5 * torch.randn(20_000, *SHAPE, generator=rng())
    x = stage_module.descend(prior, None, x, torch.full((20_000,), 0.8), 0.2, rng(1))
    levels = torch.linspace(0.8, 0.2, 2).log()
    steps = 6  # 4 ln 4 = 5.5
    grid = torch.linspace(float(levels[0]), float(levels[1]), steps + 1).exp().tolist()
    variance = 1.0
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        gain, ratio = 0.36 / (0.36 + t**2), (s / t) ** 2
        variance = (gain + ratio * (1 - gain)) ** 2 * variance + s**2 * (1 - ratio)
    assert float(x.var()) == pytest.approx(variance, rel=0.024)
    assert variance == pytest.approx(0.40, rel=0.2)
    assert torch.equal(stage_module.descend(prior, None, x, torch.full((20_000,), 0.2), 0.2, rng()), x)


def test_consistency_teaches_the_levels_below():
    """Two modes at -1 and 1, sigma_n = .3: at level .1, which the anchor has never seen, consistency leaves less than half of its error."""
    exact = GaussianMixturePrior(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), 0.15)
    x = exact.sample(10_000, rng())
    y = x + 0.3 * torch.randn(x.shape, generator=rng(1))
    config = small(
        below(max_steps=300, learning_rate=1e-3, ema_decay=0.98),
        max_steps=800,
        batch_size=512,
        learning_rate=1e-2,
        betas=(0.9, 0.999),
        ema_decay=0.98,
        gradient_clip=10.0,
        network=NetworkConfig(kind="mlp", channels=(64, 64)),
        levels=LevelConfig(kind="concentrated", sigma_max=10.0, floor=0.01, relative=False),
        log_interval=100,
    )
    prior = fit((Identity((1, 1, 1)), y, 0.3), config, progress=False)
    assert isinstance(prior, StagedPrior)
    x_t = x[:4000] + 0.1 * torch.randn(4000, 1, 1, 1, generator=rng(2))
    with torch.no_grad():
        errors = [
            float((p(x_t, 0.1) - exact(x_t, 0.1)).square().mean().sqrt()) for p in (prior, prior.anchor)
        ]
    assert errors[0] < 0.5 * errors[1] and errors[0] < 0.06, errors


# -- warm start, shrinkage, margin ----------------------------------------------------------------------------------------------


def gaussian_stage(num: int = 40_000, **changes) -> ConsistencyStage:
    """Stage 2 on Gaussian data, variance .36 and noise .4, whose anchor is exact, and so is the copy."""
    x = 0.6 * torch.randn(num, *SHAPE, generator=rng())
    y = x + 0.4 * torch.randn(x.shape, generator=rng(1))
    config = small(below(**changes), batch_size=num)
    first = AmbientStage(open_source((Identity(SHAPE), y, 0.4), config), config, make_accelerator("cpu"))
    return ConsistencyStage(first.batches, GaussianPrior(torch.zeros(SHAPE), 0.36 * torch.eye(3)), config)


@pytest.mark.parametrize("margin", [1.0, 1.5])
def test_a_warm_start_denoises_the_anchors_estimates(margin):
    """Estimates from level t = .4 margin have variance w = .36^2 / (.36 + t^2); at level s a denoiser of gain g = .36 / (.36 + s^2) errs on them by
    (1 - g)^2 w + g^2 s^2 in the mean, with weight 1/s^2 + 1/.36, s log-uniform. 120,000 entries, standard error .4 %; bound at 4 of them. With clean
    images or noisy data in place of estimates it differs by more."""
    stage = gaussian_stage(warm_start=1, margin=margin, sigma_min=0.2)
    t = 0.4 * margin
    assert stage.sigma_n == pytest.approx(t)
    s = torch.exp(torch.linspace(math.log(0.2), math.log(t), 4001, dtype=torch.float64))
    gain = 0.36 / (0.36 + s**2)

    def expected(variance: float) -> float:
        loss = ((1 - gain) ** 2 * variance + (gain * s) ** 2) * (1 / s**2 + 1 / 0.36)
        return float(loss.mean())

    found = float(stage.loss(0).mean())
    assert found == pytest.approx(expected(0.36**2 / (0.36 + t**2)), rel=0.015)
    assert all(abs(expected(wrong) / found - 1) > 0.04 for wrong in (0.36, 0.36 + t**2))


def test_a_margin_raises_the_noise_of_the_data_to_its_level():
    """Variance .36 + .6^2 at level 1.5 x .4; 120,000 values, standard error .4 %."""
    stage = gaussian_stage(margin=1.5)
    drawn = stage.batches.draw(0)
    _, x, t = stage._start(drawn, rng(3))
    assert float(t.min()) == float(t.max()) == pytest.approx(0.6)
    assert float(x.var()) == pytest.approx(0.36 + 0.36, rel=0.016)


def test_shrinkage_adds_that_loss_and_a_warm_start_leaves_later_steps_alone():
    losses = {}
    for name, changes in {
        "none": {},
        "warm": {"warm_start": 3},
        "half": {"shrinkage": 0.5},
        "whole": {"shrinkage": 1.0},
        "alone": {"warm_start": 5},
    }.items():
        _, stage = stages(data(), small(below(walk=(1, 1), **changes)))
        losses[name] = stage.loss(4)
    assert torch.equal(losses["warm"], losses["none"])
    assert torch.allclose(losses["whole"] - losses["half"], 0.5 * losses["alone"], atol=1e-4)
    assert bool((losses["alone"] > 0).all())


def test_pairs_below_leave_noise_in_and_only_the_anchor_objects():
    """D(x, sigma) = x below an exact anchor: violation 0 between levels .3 and .2, and s^4 / (.36 + t^2) (1 / s^2 + 1 / .36) from t = .4 to
    s = .2. 60,000 values; bounds at 4 standard errors."""

    class Idle(GaussianPrior):
        def forward(self, x, sigma, given=None):
            return x

    law = torch.zeros(SHAPE), 0.36 * torch.eye(3)
    hybrid = StagedPrior(GaussianPrior(*law), Idle(*law), 0.4)
    for t, expected in ((0.3, 0.0), (0.4, 0.2**4 / 0.52 * (25 + 1 / 0.36))):
        x = (0.36 + t**2) ** 0.5 * torch.randn(20_000, *SHAPE, generator=rng())
        loss = consistency(hybrid, x, t, 0.2, draws=2, generator=rng(1))
        error = float(loss.std()) / 20_000**0.5
        assert abs(float(loss.mean()) - expected) < 4 * error and error < 0.01


def test_a_warm_start_of_kept_rows_weighs_what_is_missing_by_what_can_be_known():
    """The copy errs on missing rows by about .1, and at sigma .01 the weight of complete data is 10,000."""
    shape = (1, 4, 4)
    design = Independent(shape, "pixels", 0.6)
    x = 0.6 * torch.randn(64, *shape, generator=rng())
    operator = Masking(design.sample(64, rng()), img_size=shape, design=design)
    y = operator.A(x) + 0.3 * torch.randn(x.shape, generator=rng(1)) * operator.mask
    _, stage = stages((operator, y, 0.3), small(below(warm_start=5)))
    with torch.no_grad():
        for weights in stage.module.parameters():
            weights += 0.1 * torch.randn(weights.shape, generator=rng(3))
        losses = torch.cat([stage.loss(step) for step in range(5)])
    assert 0.05 < float(losses.mean()) < 5, losses.mean()


# -- joint -----------------------------------------------------------------------------------------------------------------------


def test_joint_consistency_counts_from_its_kick_in_and_shares_the_denoiser():
    config = small(ConsistencyConfig(mode="joint", walk=(0, 0), kick_in=3, ramp=4, weight=2.0))
    source = open_source(data(), config)
    joint = JointStage(source, config, make_accelerator("cpu"))
    ambient = AmbientStage(source, small(), make_accelerator("cpu"))
    assert [joint.weight(s) for s in (0, 2, 3, 4, 6, 50)] == [0, 0, 0.5, 1.0, 2.0, 2.0]
    assert torch.equal(joint.loss(2), ambient.loss(2)) and not torch.equal(joint.loss(3), ambient.loss(3))
    sizes = []
    joint.module.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    joint.loss(9)
    assert sizes == [8, 32]  # D_t of the Ambient loss serves both


def test_joint_prior_is_one_network_that_reaches_below(tmp_path):
    prior = fit(data(), small(ConsistencyConfig(mode="joint")), out=tmp_path / "run", progress=False)
    assert not isinstance(prior, StagedPrior) and prior.sigma_min == pytest.approx(0.01)
    said = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]
    assert [s["name"] for s in said] == ["joint"]


# -- data of all kinds -------------------------------------------------------------------------------------------------------------


def test_clean_and_noisy_images_in_one_file(tmp_path):
    """Per-sample noise from the file to samples: a third clean, a third at .2, a third at .5; below .3 consistency and the quieter data."""
    sigma = torch.tensor([0.0, 0.2, 0.5]).repeat(12)
    x = 0.6 * torch.randn(36, 1, 4, 4, generator=rng())
    y = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=rng(1))
    path = write_measurements(
        tmp_path / "mixed.h5",
        measurements=y,
        mask=None,
        noise_std=sigma,
        operator="identity",
        image_shape=(1, 4, 4),
    )
    plain = fit(path, small(), progress=False)
    assert plain.sigma_min == pytest.approx(0.01)  # clean images teach every level
    with pytest.raises(InputError, match="consistency.sigma_n"):
        fit(path, small(below()), progress=False)
    prior = fit(path, small(below(sigma_n=0.3)), progress=False)
    assert isinstance(prior, StagedPrior) and prior.sigma_n == pytest.approx(0.3)
    images = generate(prior, 4, steps=5, generator=rng())
    assert images.shape == (4, 1, 4, 4) and bool(torch.isfinite(images).all())


def test_quieter_data_teach_the_copy_directly():
    sigma = torch.cat([torch.full((32,), 0.1), torch.full((32,), 0.5)])
    x = 0.6 * torch.randn(64, *SHAPE, generator=rng())
    y = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=rng(1))
    _, stage = stages((Identity(SHAPE), y, sigma), small(below(sigma_n=0.3, weight=1e-6)))
    drawn = stage.batches.draw(0)
    loss = stage.loss(0)
    quiet = drawn.sigma_y < 0.3
    assert bool((loss[quiet] > 1e-3).all()) and bool((loss[~quiet].abs() < 1e-3).all())


@pytest.mark.parametrize("kind", ["masking", "mri", "complete mri"])
def test_kept_rows_are_walked(kind):
    shape = (1, 4, 4) if kind == "masking" else (2, 4, 4)
    x = 0.6 * torch.randn(24, *shape, generator=rng())
    design = Independent(shape, "pixels", 0.7)
    if kind == "masking":
        operator = Masking(design.sample(24, rng()), img_size=shape, design=design)
    else:
        mask = torch.ones(4, 4) if kind == "complete mri" else design.sample(24, rng())
        operator = MRI(mask, birdcage_maps(2, 4, 4), design=None if kind == "complete mri" else design)
    y = operator.A(x)
    y = y + 0.3 * torch.randn(y.shape, generator=rng(1)) * operator.mask
    settings = below(walk=(1, 2), max_steps=3, warm_start=1, shrinkage=0.2, margin=1.1)
    prior = fit((operator, y, 0.3), small(settings), progress=False)
    assert isinstance(prior, StagedPrior)
    assert prior.conditioning == ("unconditional" if kind == "complete mri" else "mask-conditional")
    assert all(bool(torch.isfinite(p).all()) for p in prior.parameters())
    if kind != "complete mri":
        with pytest.raises(InputError, match="replay"):
            fit((operator, y, 0.3), small(below(replay=True)), progress=False)


# -- what is refused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"draws": 1}, "draws"),
        ({"draws": 2, "antithetic": True}, "draws"),
        ({"draws": 5, "antithetic": True}, "draws"),
        ({"substeps": 0}, "substeps"),
        ({"walk": (3, 1)}, "walk"),
        ({"max_steps": None}, "max_steps"),
        ({"kick_in": 5}, "kick_in"),
        ({"mode": "joint", "replay": True}, "replay"),
        ({"mode": "later"}, "mode"),
        ({"gap": 0.0}, "gap"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"margin": 0.9}, "margin"),
        ({"margin": 1.1, "sigma_n": 0.3}, "margin"),
        ({"mode": "joint", "margin": 1.1}, "margin"),
        ({"shrinkage": -0.1}, "shrinkage"),
        ({"mode": "joint", "shrinkage": 0.1}, "shrinkage"),
        ({"warm_start": -1}, "warm_start"),
        ({"warm_start": 5, "max_steps": 5}, "warm_start"),
        ({"warm_start": 5, "max_steps": 500, "max_minutes": 1.0}, "warm_start"),
        ({"warm_start": 5, "max_steps": None, "max_minutes": 1.0}, "warm_start"),
        ({"mode": "joint", "warm_start": 5}, "warm_start"),
    ],
)
def test_unusable_settings(changes, match):
    with pytest.raises(InputError, match=match):
        ConsistencyConfig(**changes)


def test_settings_that_do_not_go_together():
    with pytest.raises(InputError, match="sigma_min"):
        fit(data(), small(below(sigma_min=0.5)), progress=False)


def test_round_trip(tmp_path):
    config = small(ConsistencyConfig(mode="joint", walk=(1, 4), kick_in=7, sigma_n=0.2))
    config.save(tmp_path / "c.yaml")
    assert TrainConfig.load(tmp_path / "c.yaml") == config
