"""Training: configuration, augmentations, data judged from noisy measurements alone, stages, the loop."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from ambient_sci import losses
from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.noise import expand
from ambient_sci.operators import (
    MRI,
    FixedBudget,
    Identity,
    Independent,
    Masking,
    birdcage_maps,
    make_design,
)
from ambient_sci.priors import GaussianPrior, KeptRows, NetworkConfig, NetworkPrior, load_prior
from ambient_sci.randomness import seeded
from ambient_sci.training import (
    AmbientStage,
    Batches,
    JointConfig,
    LevelConfig,
    LossConfig,
    OneModule,
    StagedConfig,
    TrainConfig,
    TrainingDiverged,
    TrainingInterrupted,
    fit,
    make_accelerator,
    open_source,
    run_stage,
)
from ambient_sci.training import loop as loop_module
from ambient_sci.training.augment import (
    apply_symmetries,
    augment,
    check_augmentations,
    draw_symmetries,
    flip,
    reflect,
    rotate_phase,
)
from ambient_sci.training.run_folder import RunFolder
from ambient_sci.training.source import combine

MLP = NetworkConfig(kind="mlp", channels=(32, 32))
UNET = NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes) -> TrainConfig:
    return TrainConfig(
        **{"max_steps": 6, "batch_size": 4, "log_interval": 2, "device": "cpu", "network": MLP, **changes}
    )


def scans(num: int = 24, shape=(2, 8, 8), sigma: float = 0.1, seed: int = 0):
    x = torch.randn(num, *shape, generator=rng(seed)) * 0.5
    return Identity(shape), x + sigma * torch.randn(x.shape, generator=rng(seed + 1)), sigma


# -- configuration -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_configuration_survives_a_round_trip(tmp_path, suffix):
    config = TrainConfig(
        seed=3,
        max_minutes=2.5,
        betas=(0.9, 0.95),
        augmentations=("phase", "flip-vertical"),
        network=NetworkConfig(channels=(16, 32), attention=(False, True), patch=2),
        levels=LevelConfig(kind="concentrated", sigma_max=10.0, relative=False),
        loss=LossConfig(weighting="unbiased", keep=0.8),
    )
    config.save(tmp_path / f"c.{suffix}")
    assert TrainConfig.load(tmp_path / f"c.{suffix}") == config
    assert [p.name for p in tmp_path.iterdir()] == [f"c.{suffix}"]


def test_yaml_as_people_write_it(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nmax_minutes: 4\nnetwork: {channels: [16, 16]}\n")
    config = TrainConfig.load(tmp_path / "c.yaml")
    assert (config.learning_rate, config.max_minutes, config.network.channels) == (1e-3, 4.0, (16, 16))
    assert isinstance(config.max_minutes, float)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"learning_rat": 1.0}, "learning_rat"),
        ({"levels": {"sigma": 1.0}}, "levels.sigma"),
        ({"network": {"width": 1}}, "network.width"),
        ({"batch_size": "four"}, "batch_size"),
        ({"batch_size": 4.5}, "batch_size"),
        ({"seed": True}, "seed"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"precision": "fp16"}, "precision"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_minutes": -1.0}, "max_minutes"),
        ({"loss": {"keep": 1.5}}, "loss.keep"),
        ({"loss": {"weighting": "x"}}, "loss.weighting"),
        ({"loss": {"held_out_weights": "unit"}}, "loss.held_out_weights: expected 'exact' (unit weights"),
        ({"loss": {"hold_out_calibration": 0}}, "loss.hold_out_calibration"),
        ({"loss": {"tweedie": False}}, "recipes/mri"),
        ({"loss": {"kind": "denoising"}}, "recipes/exactness"),
        ({"consistency": {"detach_target": True}}, "consistency.detach_target"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"ema_half_life_images": 0.0}, "ema_half_life_images"),
        ({"em": {"sampler_precision": "fp16"}}, "em.sampler_precision"),
        ({"loss": 3}, "loss"),
        ({"levels": {"kind": "uniform"}}, "levels.kind"),
        ({"augmentations": ["rotation"]}, "augmentations"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_a_wrong_setting_is_named(values, named):
    with pytest.raises(InputError, match=re.escape(named)) as error:
        TrainConfig.from_dict(values)
    assert "\n" not in str(error.value)


def test_settings_that_older_files_have_are_read_where_they_say_nothing():
    loss = {"kind": "ambient", "tweedie": True, "held_out_weights": "exact", "hold_out_calibration": True}
    joint = {
        **{"mode": "joint", "max_steps": 7, "max_minutes": None, "learning_rate": 1e-4, "ema_decay": 0.9},
        **{
            "replay": False,
            "margin": 1.0,
            "shrinkage": 0.0,
            "warm_start": 0,
            "detach_target": False,
            "ramp": 3,
        },
    }
    staged = {
        "mode": "staged",
        "max_steps": 7,
        "kick_in": 0,
        "ramp": 0,
        "detach_target": False,
        "margin": 1.2,
    }
    assert TrainConfig.from_dict({"loss": {**loss, "c_min": 0.1}}).loss == LossConfig(c_min=0.1)
    assert TrainConfig.from_dict({"consistency": joint}).consistency == JointConfig(ramp=3)
    assert TrainConfig.from_dict({"consistency": staged}).consistency == StagedConfig(max_steps=7, margin=1.2)
    for config in (JointConfig(ramp=3), StagedConfig(margin=1.2)):
        whole = TrainConfig(consistency=config)
        assert TrainConfig.from_dict(whole.to_dict()) == whole


def test_rotation_is_refused_with_its_reason():
    with pytest.raises(InputError, match="colours the noise"):
        TrainConfig(augmentations=("rotation",))


@pytest.mark.parametrize("text", ["{", "a: [", "[1, 2]", "3"])
def test_a_file_that_is_no_configuration(tmp_path, text):
    path = tmp_path / ("c.yaml" if text == "a: [" else "c.json")
    path.write_text(text)
    with pytest.raises(InputError, match="c\\.(json|yaml)"):
        TrainConfig.load(path)
    with pytest.raises(InputError, match="absent"):
        TrainConfig.load(tmp_path / "absent.json")


def test_the_command_line_can_catch_errors_without_torch():
    code = (
        "import sys; from ambient_sci.training import TrainingInterrupted; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_schedule():
    config = TrainConfig(max_steps=100, learning_rate=2.0, warmup_steps=10, final_ratio=0.1, ema_decay=0.99)
    assert config.learning_rate_at(0, 0.0) == pytest.approx(0.2)
    assert config.learning_rate_at(50, config.progress(50, 1e9)) == pytest.approx(2.0 * 0.55)
    assert config.learning_rate_at(99, 1.0) == pytest.approx(0.2)
    assert dataclasses.replace(config, schedule="constant").learning_rate_at(99, 1.0) == 2.0
    by_time = TrainConfig(max_minutes=2.0)
    assert by_time.progress(10**6, 60.0) == pytest.approx(0.5) and by_time.step_limit is None
    both = TrainConfig(max_minutes=2.0, max_steps=10)
    assert both.progress(9, 0.0) == 0.9 and both.progress(1, 120.0) == 1.0
    assert TrainConfig().step_limit == 20_000
    assert config.ema_decay_at(0) == 0.1 and config.ema_decay_at(10**6) == config.ema_decay
    images = TrainConfig(batch_size=50, ema_half_life_images=200.0)
    assert images.ema_decay_at(10**6) ** 4 == pytest.approx(0.5) and images.ema_decay_at(0) == 0.1


# -- augmentations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (7, 9)])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("coils", [0, 3])
def test_reflected_scan_is_the_scan_of_the_reflected_image(size, axis, coils):
    """y of the mirrored anatomy under mirrored maps and mask is the mirrored y, for even and odd sizes."""
    generator = rng()
    mask = (torch.rand(2, *size, generator=generator) < 0.5).double()
    mask[:, 0, 0] = 1
    maps = torch.randn(2, 3, *size, generator=generator, dtype=torch.complex128) if coils else None
    operator = MRI(mask, maps)
    x = torch.randn(2, 2, *size, generator=generator, dtype=torch.float64)
    mirrored, y = flip(operator, operator.A(x), axis)
    assert torch.allclose(mirrored.A(reflect(x, axis, True)), y, atol=1e-12)
    if size[axis] % 2 == 0:  # the k = -n/2 line: mirroring without it is another scan
        plain = MRI(mask.flip(axis), None if maps is None else maps.flip(axis))
        assert not torch.allclose(plain.A(x.flip(axis)), operator.A(x).flip(axis), atol=1e-2)


def test_reflected_masking():
    mask = (torch.rand(3, 1, 4, 6, generator=rng()) < 0.5).double()
    mask[..., 0, 0] = 1
    operator = Masking(mask, img_size=(2, 4, 6))
    x = torch.randn(3, 2, 4, 6, generator=rng(1), dtype=torch.float64)
    mirrored, y = flip(operator, operator.A(x), -1)
    assert torch.equal(mirrored.A(x.flip(-1)), y)


def test_phase_commutes_with_the_operator():
    maps = birdcage_maps(3, 8, 8)
    operator = MRI((torch.rand(8, 8, generator=rng()) < 0.6).float(), maps)
    x = torch.randn(4, 2, 8, 8, generator=rng(1))
    angle = torch.tensor([0.3, 1.0, 2.0, 4.0])
    assert torch.allclose(operator.A(rotate_phase(x, angle)), rotate_phase(operator.A(x), angle), atol=1e-6)
    z = torch.complex(x[:, 0], x[:, 1]) * torch.exp(1j * angle)[:, None, None]
    assert torch.allclose(rotate_phase(x, angle), torch.stack([z.real, z.imag], 1), atol=1e-6)


def test_augment_draws_all_symmetries():
    y = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    names = ("flip-horizontal", "flip-vertical", "transpose")
    seen = {tuple(augment(Identity((2, 4, 4)), y, names, rng(s))[1].flatten().tolist()) for s in range(60)}
    assert len(seen) == 8  # the whole group of the square


LINES = FixedBudget((2, 8, 8), "columns", 2, always=[3, 4])


@pytest.mark.parametrize(
    ("name", "shape", "operator", "design"),
    [
        ("phase", (1, 8, 8), "identity", None),
        ("phase", (2, 8, 8), "masking", Independent((2, 8, 8), "entries", 0.5)),
        ("transpose", (2, 8, 6), "identity", None),
        ("transpose", (2, 8, 8), "mri", LINES),
        ("flip-horizontal", (2, 8, 8), "mri", LINES),  # calibration lines 3, 4 become 5, 4
        ("flip-vertical", (2, 8, 8), "mri", make_design("poisson", image_shape=(2, 8, 8), acceleration=2)),
        ("flip-vertical", (1, 2, 1), "masking", Independent((1, 2, 1), "pixels", [0.3, 0.6])),
    ],
)
def test_an_inexact_augmentation_is_refused(name, shape, operator, design):
    with pytest.raises(InputError, match=name):
        check_augmentations((name,), shape, operator, design)


def test_exact_augmentations_are_allowed():
    check_augmentations(("flip-vertical", "phase"), (2, 8, 8), "mri", LINES)  # along the readout
    symmetric = FixedBudget((2, 8, 8), "columns", 2, always=[3, 4, 5])
    check_augmentations(("flip-horizontal",), (2, 8, 8), "mri", symmetric)
    uniform = Independent((1, 8, 8), "pixels", 0.5)
    check_augmentations(("flip-horizontal", "flip-vertical"), (1, 8, 8), "masking", uniform)
    check_augmentations(("flip-horizontal", "transpose", "phase"), (2, 8, 8), "identity", None)


# -- the data, judged from noisy measurements ----------------------------------------------------------------------------------


def test_data_std_of_noisy_images():
    x = 0.7 + 0.3 * torch.randn(400, 1, 8, 8, generator=rng())
    y = x + 0.5 * torch.randn(x.shape, generator=rng(1))
    # 25,600 entries: the variance .34 +- .003, so d^2 = .09 +- .003 and 4 standard deviations are 7 % of d.
    assert open_source((Identity((1, 8, 8)), y, 0.5), small()).data_std == pytest.approx(0.3, rel=0.07)


def test_data_std_with_a_noise_level_per_sample():
    sigma = torch.linspace(0.0, 0.8, 400)
    x = 0.3 * torch.randn(400, 1, 8, 8, generator=rng())
    y = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=rng(1))
    assert open_source((Identity((1, 8, 8)), y, sigma), small()).data_std == pytest.approx(0.3, rel=0.07)


def test_data_std_of_undersampled_kspace():
    """Few lines away from the centre, where the image has little power: rows must be averaged one by one, not pooled."""
    design = FixedBudget((2, 16, 16), "columns", 4, weights=[10.0] * 8 + [1.0] * 8, always=[6, 7, 8, 9])
    mask = design.sample(300, rng())
    maps = birdcage_maps(4, 16, 16)
    smooth = torch.randn(300, 2, 1, 1, generator=rng(1)) * torch.ones(1, 1, 16, 16)
    x = 0.4 * smooth + 0.1 * torch.randn(300, 2, 16, 16, generator=rng(2))
    operator = MRI(mask, maps, design=design)
    y = operator.A(x) + 0.2 * torch.randn(300, 2, 4, 16, 16, generator=rng(3)) * operator.mask
    estimate = open_source((operator, y, 0.2), small()).data_std
    assert estimate == pytest.approx(float(x.square().mean().sqrt()), rel=0.05)


def test_noise_alone_is_refused():
    y = 0.1 * torch.randn(200, 1, 8, 8, generator=rng())
    with pytest.raises(InputError, match="no signal"):
        open_source((Identity((1, 8, 8)), y, 0.2), small())


@pytest.mark.parametrize(
    ("measurements", "match"),
    [
        (3, "path or"),
        ((Identity((1, 8, 8)), torch.zeros(2, 1, 8, 8)), "sigma_y: expected the noise level"),
        ((Identity((1, 8, 8)), torch.zeros(2, 1, 8, 7), 0.1), "8"),
        ((Identity((1, 8, 8)), torch.full((2, 1, 8, 8), torch.nan), 0.1), "NaN"),
        ((Identity((1, 8, 8)), torch.ones(2, 1, 8, 8), -0.1), ">= 0"),
        ((Identity((1, 8, 8)), torch.ones(2, 1, 8, 8), torch.ones(3)), "noise_std"),
        ((nn.Identity(), torch.ones(2, 1, 8, 8), 0.1), "Identity, Masking or MRI"),
        ("absent.h5", "absent"),
    ],
)
def test_unusable_measurements(measurements, match):
    with pytest.raises(InputError, match=match):
        fit(measurements, small(), progress=False)


def test_fully_sampled_scans_become_noisy_images():
    """[19] A^H y = x + sigma n with white n, and outside the support of cropped maps, where x = 0, noise is filled in.

    Variances of n from 2 x 40 x 144 entries and more: standard error 1.3 %; bounds at 5 of them.
    """
    maps = birdcage_maps(4, 12, 12)
    disc = (torch.linspace(-1, 1, 12)[:, None] ** 2 + torch.linspace(-1, 1, 12) ** 2 < 0.8).float()
    for support in (torch.ones(12, 12), disc):
        operator = MRI(torch.ones(12, 12), maps * support)
        x = torch.randn(40, 2, 12, 12, generator=rng()) * support
        y = operator.A(x) + 0.3 * torch.randn(40, 2, 4, 12, 12, generator=rng(1))
        noise = combine(operator, y, torch.full((40,), 0.3), rng(2)) - x
        for region in (support > 0, support == 0):
            if region.any():
                assert float(noise[..., region].var()) == pytest.approx(0.09, rel=0.065)
    with pytest.raises(InputError, match="normalise"):
        combine(MRI(torch.ones(12, 12), 2 * maps), y, torch.full((40,), 0.3), rng())


def trained_kind(measurements, config=None) -> tuple[str, NetworkPrior]:
    source = open_source(measurements, config or small())
    stage = AmbientStage(source, config or small(), make_accelerator("cpu"))
    assert stage.loss(0).shape == (4,) and bool(torch.isfinite(stage.loss(1)).all())
    return source.reason, stage.module


def test_the_stage_follows_from_the_data():
    x = torch.randn(24, 2, 8, 8, generator=rng())
    reason, prior = trained_kind((Identity((2, 8, 8)), x, torch.linspace(0.1, 0.5, 24)))
    assert prior.conditioning == "unconditional" and prior.sigma_min == pytest.approx(0.1)
    assert "Ambient loss" in reason and "0.1 to 0.5" in reason
    reason, prior = trained_kind((Identity((2, 8, 8)), x, 0.0))
    assert "denoising loss" in reason and prior.sigma_min == pytest.approx(0.004 * prior.data_std)

    maps = birdcage_maps(3, 8, 8)
    full = MRI(torch.ones(8, 8), maps)
    reason, prior = trained_kind((full, full.A(x), 0.1))
    assert prior.conditioning == "unconditional" and "fully sampled" in reason

    design = make_design("lines-variable", image_shape=(2, 8, 8), acceleration=2, acs=2)
    for operator in (
        MRI(design.sample(24, rng()), maps, design=design),
        MRI(design.sample(24, rng()), design=design),
        Masking(torch.rand(24, 1, 8, 8, generator=rng()).lt(0.7).float()),  # design estimated from the masks
    ):
        reason, prior = trained_kind((operator, operator.A(x), 0.1))
        assert prior.conditioning == "mask-conditional" and "mask-conditional" in reason
    assert "estimated" in reason


def test_data_that_cannot_be_trained_on():
    x = torch.randn(24, 1, 8, 8, generator=rng())
    one = Masking((torch.rand(1, 1, 8, 8, generator=rng()) < 0.5).float())
    with pytest.raises(IdentifiabilityError, match="8 different masks"):
        open_source((one, one.A(x), 0.1), small())
    lines = make_design("equispaced", image_shape=(2, 8, 8), acceleration=2, acs=0)
    operator = MRI(lines.sample(24, rng()), design=lines)
    y = operator.A(torch.randn(24, 2, 8, 8, generator=rng()))
    with pytest.raises(IdentifiabilityError, match="never measured"):
        open_source((operator, y, 0.1), small())
    design = Independent((1, 8, 8), "pixels", 0.5)
    masked = Masking(design.sample(24, rng()), img_size=(1, 8, 8), design=design)
    with pytest.raises(IdentifiabilityError):
        open_source((masked, masked.A(x), 0.1), small(loss=LossConfig(keep=1.0)))
    with pytest.raises(InputError, match="loss.keep"):
        open_source(scans(), small(loss=LossConfig(keep=0.5)))
    with pytest.raises(InputError, match="sigma_max"):
        fit(scans(sigma=0.1), small(levels=LevelConfig(sigma_max=0.05, relative=False)), progress=False)


# -- what is learned -----------------------------------------------------------------------------------------------------------


def correlated_gaussian() -> GaussianPrior:
    cov = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 0.5]])
    return GaussianPrior(torch.tensor([0.5, 0.0, -0.5]).reshape(1, 1, 3), cov)


def test_noisy_data_teach_the_clean_denoiser():
    """sigma_y = .7: after 500 steps D is within .08 RMS of E[x0 | x_t], where noisy-as-clean is wrong by more than .15."""
    exact = correlated_gaussian()
    x = exact.mean + torch.randn(4000, 1, 1, 3, generator=rng()) @ torch.linalg.cholesky(exact.cov.float()).T
    y = x + 0.7 * torch.randn(x.shape, generator=rng(1))
    config = small(
        max_steps=500,
        batch_size=256,
        learning_rate=5e-3,
        levels=LevelConfig(sigma_max=10.0, relative=False),
        log_interval=100,
    )
    x_t = x[:1000] + torch.randn(1000, 1, 1, 3, generator=rng(2))
    errors = {}
    for kind, declared in (("ambient", 0.7), ("noisy-as-clean", 0.0)):
        prior = fit((Identity((1, 1, 3)), y, declared), config, progress=False)
        errors[kind] = float((prior(x_t, 1.0) - exact(x_t, 1.0)).square().mean().sqrt().detach())
    assert errors["ambient"] < 0.08 and errors["noisy-as-clean"] > 0.15, errors


def test_masked_data_teach_the_conditional_mean():
    """Pixels missing at random: h(A_B^H y~, sigma, B) against the exact E[x0 | y~, B]; wrong without the correction."""
    exact = correlated_gaussian()
    x = exact.mean + torch.randn(4000, 1, 1, 3, generator=rng()) @ torch.linalg.cholesky(exact.cov.float()).T
    design = Independent((1, 1, 3), "pixels", 0.7)
    operator = Masking(design.sample(4000, rng(1)), img_size=(1, 1, 3), design=design)
    y = operator.A(x + 0.6 * torch.randn(x.shape, generator=rng(2)))
    config = small(
        max_steps=500,
        batch_size=256,
        learning_rate=5e-3,
        levels=LevelConfig(sigma_max=10.0, relative=False),
        log_interval=100,
    )
    cov, mean, sigma = exact.cov.float(), exact.mean.flatten().float(), 0.7

    def error(prior: NetworkPrior, mask: list[int]) -> float:
        b = torch.tensor(mask).bool()
        inputs = torch.zeros(1000, 3)
        inputs[:, b] = x[:1000].reshape(-1, 3)[:, b] + sigma * torch.randn(
            1000, int(b.sum()), generator=rng(3)
        )
        gain = cov[:, b] @ torch.linalg.inv(cov[b][:, b] + sigma**2 * torch.eye(int(b.sum())))
        truth = mean + (inputs[:, b] - mean[b]) @ gain.T
        seen = b.float().reshape(1, 1, 1, 3)
        h = prior(inputs.reshape(-1, 1, 1, 3), sigma, KeptRows(Masking(seen, (1, 1, 3)))).detach()
        return float((h.reshape(-1, 3) - truth).square().mean().sqrt())

    masks = ([1, 1, 0], [0, 1, 1], [0, 1, 0])
    errors = {}
    for stage_kind in (AmbientStage, Uncorrected):
        stage = stage_kind(open_source((operator, y, 0.6), config), config, make_accelerator("cpu"))
        prior = run_stage(stage, config, accelerator=make_accelerator("cpu"))
        errors[stage_kind] = [error(prior, mask) for mask in masks]
    assert max(errors[AmbientStage]) < 0.18, errors
    assert all(a < 0.7 * b for a, b in zip(errors[AmbientStage], errors[Uncorrected], strict=True)), errors


class Uncorrected(AmbientStage):
    """Kept rows are fitted noise and all."""

    def loss(self, step, part=0):
        drawn = self.batches.draw(step, part)
        found = losses.ambient_step(
            self.module, drawn.split, drawn.y, drawn.sigma_y, drawn.sigma, generator=drawn.generator
        )
        error = (drawn.operator.transform(found.denoised) - drawn.y).square()
        return losses.weighted_error(
            self.module, drawn.split, found.denoised, expand(drawn.sigma, error), error, error
        )


# -- batches ---------------------------------------------------------------------------------------------------------------------


def test_batches_are_a_function_of_step_and_share():
    """Two parts of one process are the two shares of the batch, whoever draws them: samples, levels, splits and noise."""
    design = make_design("lines-variable", image_shape=(2, 8, 16), acceleration=2, acs=3)
    operator = MRI(design.sample(12, rng()), birdcage_maps(2, 8, 16), design=design)
    y = operator.A(torch.randn(12, 2, 8, 16, generator=rng(1)))
    whole = small(batch_size=6, network=UNET, augmentations=("phase", "gain", "flip-vertical"))
    halves = dataclasses.replace(whole, micro_batches=2)
    source = open_source((operator, y, 0.1), whole)
    one = Batches(source, halves, make_accelerator("cpu"))
    assert one.indices(3, 0) + one.indices(3, 1) == Batches(source, whole, make_accelerator("cpu")).indices(3)
    for rank in (0, 1):
        other = Batches(source, whole, Rank(rank, 2))
        a, b = one.draw(3, rank), other.draw(3)
        for ours, theirs in (
            (a.y, b.y),
            (a.sigma, b.sigma),
            (a.sigma_y, b.sigma_y),
            (a.split.weights, b.split.weights),
        ):
            assert torch.equal(ours, theirs)
        assert torch.equal(torch.randn(3, generator=a.generator), torch.randn(3, generator=b.generator))
    first, second = one.draw(3, 0), one.draw(3, 1)
    assert not torch.equal(first.sigma, second.sigma)
    assert not torch.equal(
        torch.randn(3, generator=first.generator), torch.randn(3, generator=second.generator)
    )
    with pytest.raises(
        InputError, match=r"batch_size: expected a multiple of the 4 shares \(2 processes x 2"
    ):
        Batches(source, halves, Rank(0, 2))


class Rank:
    """An accelerator as far as batches know one."""

    device = torch.device("cpu")

    def __init__(self, process_index: int, num_processes: int) -> None:
        self.process_index, self.num_processes = process_index, num_processes


def test_a_mirrored_scan_is_split_where_it_is_measured():
    """The split is drawn from masks on the host, the mirrored ones: what is held out was measured."""
    design = Independent((2, 8, 8), "pixels", 0.5)
    operator = MRI(design.sample(12, rng()), birdcage_maps(2, 8, 8), design=design)
    y = operator.A(torch.randn(12, 2, 8, 8, generator=rng(1)))
    config = small(batch_size=12, network=UNET, augmentations=("flip-vertical", "flip-horizontal"))
    batches = Batches(open_source((operator, y, 0.1), config), config, make_accelerator("cpu"))
    seen = set()
    for step in range(12):
        drawn = batches.draw(step)
        split, rows = drawn.split, operator[torch.tensor(batches.indices(step))]
        seen.add(torch.equal(drawn.operator.mask, rows.mask))
        assert torch.equal((drawn.y != 0).any(2).any(1).float(), drawn.operator.mask[:, 0, 0])
        assert torch.equal(split.kept.mask + split.held_out.mask, drawn.operator.mask)
        assert bool(split.held_out.mask.any()) and bool((split.weights[split.held_out.mask > 0] > 1).all())
    assert seen == {True, False}


def test_a_gain_scales_data_and_noise_alike():
    """Noise alone, of levels that differ by sample: y / sigma_y stays standard normal (24 x 3,200 entries, standard error of the
    variance 0.5 %, bound at 5), and the gains reach down to 0.4."""
    sigma = torch.linspace(0.2, 1.0, 24)
    noise = torch.randn(24, 2, 40, 40, generator=rng())
    y = noise * sigma.reshape(-1, 1, 1, 1)
    symmetries = draw_symmetries(("gain",), 24, rng(1))
    _, scaled, levels = apply_symmetries(symmetries, Identity((2, 40, 40)), y, sigma)
    assert float((scaled / levels.reshape(-1, 1, 1, 1)).var()) == pytest.approx(1, rel=0.025)
    assert float((levels / sigma).min()) < 0.5 and bool((levels < sigma).all())

    config = small(batch_size=24, augmentations=("gain",))
    clean = 0.5 * torch.randn(24, 1, 1, 1, generator=rng(2)) + torch.zeros(24, 2, 40, 40)
    source = open_source((Identity((2, 40, 40)), clean + y, sigma), config)
    batches = Batches(source, config, make_accelerator("cpu"))
    drawn = batches.draw(0)
    inner = drawn.y - drawn.y.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(inner.flatten(1).std(1) / drawn.sigma_y, torch.ones(24), atol=0.1)
    assert bool((drawn.sigma_y < sigma[batches.indices(0)]).all()) and torch.equal(
        drawn.sigma_y, drawn.sigma_y_host
    )
    assert bool((drawn.sigma > drawn.sigma_y).all())


def test_batches_of_ones_own_divide_rows_their_way():
    """What the recipes' ablations do: another split in a subclass of `Batches`, another loss in one of the stage."""

    class Kept(Batches):
        def split(self, operator, num, generator, mask):
            return operator.split(
                keep=self.keep, generator=generator, num=num, mask=mask, keep_calibration=True
            )

    design = make_design("lines-variable", image_shape=(2, 8, 16), acceleration=2, acs=3)
    operator = MRI(design.sample(12, rng()), design=design)
    y = operator.A(torch.randn(12, 2, 8, 16, generator=rng(1)))
    config, accelerator = small(max_steps=2, batch_size=6, network=UNET), make_accelerator("cpu")
    source = open_source((operator, y, 0.1), config)
    own, plain = (
        AmbientStage(source, config, accelerator, batches=k(source, config, accelerator))
        for k in (Kept, Batches)
    )
    always = operator.design.always
    for step in range(3):
        assert bool((own.batches.draw(step).split.kept.mask[..., always] == 1).all())
    found, expected = own.loss(0), plain.loss(0)
    assert bool(torch.isfinite(found).all()) and not torch.allclose(found, expected, rtol=1e-3)
    drawn = plain.batches.draw(0)
    again = losses.ambient_step(
        plain.module, drawn.split, drawn.y, drawn.sigma_y, drawn.sigma, generator=drawn.generator
    )
    assert torch.equal(expected, again.loss)


# -- the loop --------------------------------------------------------------------------------------------------------------------


class Toy(OneModule):
    """A stage of one's own: fits a constant; counts calls, and does what a test asks at a given step."""

    name = "toy"

    def __init__(self, event=lambda step, loss: loss) -> None:
        self.module: nn.Module = NetworkPrior(
            (1, 1, 2), 1.0, network=NetworkConfig(kind="mlp", channels=(4,))
        )
        self.event = event

    def indices(self, step: int, part: int = 0) -> list[int]:
        return [10 * step, 10 * step + 1, 10 * step + 2]

    def loss(self, step: int, part: int = 0) -> torch.Tensor:
        x = torch.randn(3, 1, 1, 2, generator=seeded(0, step, part))
        return self.event(step, losses.denoising(self.module, x, 0.5, generator=seeded(1, step, part)))


def run_toy(stage: Toy, folder: RunFolder | None = None, resume: bool = False, **changes):
    config = small(max_steps=12, log_interval=4, **changes)
    if folder and not resume:
        folder.create(config, {"data": {}})
    return run_stage(stage, config, accelerator=make_accelerator("cpu"), folder=folder, resume=resume)


@pytest.mark.parametrize("spoil", [0, 1])
def test_divergence_names_step_and_samples(tmp_path, spoil):
    def event(step, loss):
        if step != 7:
            return loss
        return torch.where(torch.arange(3) == 1, torch.nan, loss) if spoil == 0 else (loss - loss).sqrt()

    folder = RunFolder(tmp_path / "run")
    with pytest.raises(TrainingDiverged, match="step 7") as error:
        run_toy(Toy(event), folder, checkpoint_minutes=0.0)
    assert error.value.step == 7 and error.value.indices == ([71] if spoil == 0 else [70, 71, 72])
    assert ("gradient" in str(error.value)) == (spoil == 1) and "\n" not in str(error.value)
    _, values = folder.load_checkpoint("toy")
    assert values["step"] == 7  # steps 0 to 6 are done
    assert all(bool(torch.isfinite(p).all()) for p in load_prior(tmp_path / "run").parameters())


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_resume_repeats_the_run(tmp_path, signum, status):
    def event(step, loss):
        if step == 5:
            os.kill(os.getpid(), signum)
        return loss

    before = signal.getsignal(signum)
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    expected = run_toy(Toy(), whole)
    with pytest.raises(TrainingInterrupted) as stopped:
        run_toy(Toy(event), cut)
    assert stopped.value.exit_status == status and stopped.value.step == 6
    assert signal.getsignal(signum) == before
    resumed = run_toy(Toy(), cut, resume=True)
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert trace(whole) == trace(cut) and len(trace(whole)) == 3


def trace(folder: RunFolder) -> list[tuple]:
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    return [(x["step"], x["loss"], x["gradient_norm"], x["learning_rate"]) for x in lines]


def test_the_saved_prior_is_the_moving_average(tmp_path):
    weights: list[torch.Tensor] = []

    def event(step, loss):
        weights.append(stage.module.network.body[0].weight.detach().clone())
        return loss

    stage = Toy(event)
    average = run_toy(stage, RunFolder(tmp_path / "run"), ema_decay=0.8)
    weights.append(stage.module.network.body[0].weight.detach().clone())
    mean = weights[0]
    for step, weight in enumerate(weights[1:]):
        decay = min(0.8, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(average.network.body[0].weight, mean, atol=1e-6)
    assert not torch.allclose(mean, weights[-1], atol=1e-6)
    saved = load_prior(tmp_path / "run")
    for a, b in zip(saved.parameters(), average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_is_a_function_of_its_seed_and_moves_no_global_stream():
    before = torch.get_rng_state()
    first, again, other = (
        fit(scans(), small(seed=s, augmentations=("phase", "transpose")), progress=False) for s in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    differ = [torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert all(same) and not all(differ)


def test_bf16_keeps_weights_in_fp32():
    prior = fit(scans(), small(network=UNET, precision="bf16"), progress=False)
    full = fit(scans(), small(network=UNET), progress=False)
    assert all(p.dtype == torch.float32 for p in prior.parameters())
    pairs = list(zip(prior.parameters(), full.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert all(torch.allclose(a, b, atol=0.02) for a, b in pairs)


def test_a_time_limit_ends_the_run(tmp_path, monkeypatch):
    """By a clock on which every look takes a tenth of a second, so that no machine is too slow or too fast for it."""
    looks = itertools.count()
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: 0.1 * next(looks))
    fit(scans(), small(max_steps=None, max_minutes=0.05), out=tmp_path / "run", progress=False)
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 3 <= last["seconds"] < 4 and last["learning_rate"] < 2e-4


# -- run folders ------------------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_complete_and_protected(tmp_path):
    out = tmp_path / "run"
    prior = fit(scans(), small(), out=out, progress=False)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint",
        "config.json",
        "log.jsonl",
        "prior",
        "run.json",
    ]
    explicit = TrainConfig.load(out / "config.json")
    assert not explicit.open_settings and small().network == explicit.network
    assert small(**{key: getattr(explicit, key) for key in TrainConfig.OPEN}) == explicit
    described = json.loads((out / "run.json").read_text())
    assert "Ambient loss" in described["stages"][0]["reason"] and described["data"]["samples"] == 24
    x = torch.randn(2, 2, 8, 8, generator=rng())
    assert torch.equal(load_prior(out)(x, 0.5), prior(x, 0.5))
    before = (out / "prior" / "weights.safetensors").read_bytes()
    with pytest.raises(InputError, match="overwrite"):
        fit(scans(), small(seed=1), out=out, progress=False)
    assert (out / "prior" / "weights.safetensors").read_bytes() == before
    fit(scans(), small(seed=1), out=out, overwrite=True, progress=False)
    assert (out / "prior" / "weights.safetensors").read_bytes() != before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="config.json"):
        fit(scans(), small(), out=tmp_path / "mine", overwrite=True, progress=False)
    with pytest.raises(InputError, match="got a file"):
        fit(scans(), small(), out=tmp_path / "mine" / "thesis.txt", progress=False)
    with pytest.raises(InputError):
        fit(
            (Identity((2, 8, 8)), torch.zeros(4, 2, 8, 8), 0.1),
            small(),
            out=tmp_path / "none",
            progress=False,
        )
    assert not (tmp_path / "none").exists()


def test_resume_refuses_another_run(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="config.json"):
        fit(scans(), small(), out=out, resume=True, progress=False)
    with pytest.raises(InputError, match="run folder"):
        fit(scans(), small(), resume=True, progress=False)
    fit(scans(), small(), out=out, progress=False)
    for config, named in (
        (small(learning_rate=2e-3), "learning_rate"),
        (small(network=NetworkConfig(kind="mlp", channels=(8,))), "network.channels"),
        (small(loss=LossConfig(c_min=0.1)), "loss.c_min"),
    ):
        with pytest.raises(InputError, match=named.replace(".", r"\.")):
            fit(scans(), config, out=out, resume=True, progress=False)
    full = MRI(torch.ones(8, 8))
    for data, named in (
        ((full, full.A(scans()[1]), 0.1), "operator"),
        (scans(num=25), "samples"),
        (scans(shape=(2, 4, 4)), "image_shape"),
        (scans(sigma=0.2), "noise_std"),
        (scans(seed=5), "content"),
    ):
        with pytest.raises(InputError, match=named):
            fit(data, small(), out=out, resume=True, progress=False)


def test_a_finished_run_can_be_continued(tmp_path):
    out = tmp_path / "run"
    constant = small(schedule="constant")
    fit(scans(), constant, out=out, progress=False)
    longer = fit(scans(), dataclasses.replace(constant, max_steps=11), out=out, resume=True, progress=False)
    whole = fit(scans(), dataclasses.replace(constant, max_steps=11), progress=False)
    for a, b in zip(longer.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    assert TrainConfig.load(out / "config.json").max_steps == 11
    again = fit(
        scans(), out=out, resume=True, progress=False
    )  # nothing left to do; the configuration is the run's own
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_damaged_checkpoint_is_named(tmp_path):
    out = tmp_path / "run"
    fit(scans(), small(), out=out, progress=False)
    (out / "checkpoint" / "ambient.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(InputError, match=r"ambient\.safetensors"):
        fit(scans(), small(), out=out, resume=True, progress=False)


def test_levels_lie_between_the_noise_of_each_sample_and_sigma_max():
    sigma = torch.linspace(0.01, 0.5, 24)
    for kind in ("log-normal", "log-uniform", "concentrated"):
        config = small(batch_size=24, levels=LevelConfig(kind=kind, sigma_max=2.0, relative=False))
        stage = AmbientStage(
            open_source((Identity((2, 8, 8)), scans()[1], sigma), config), config, make_accelerator("cpu")
        )
        batches = stage.batches
        drawn = batches.levels.sample(24, minimum=batches.noise_std[stage.indices(0)], generator=rng())
        assert bool((drawn >= sigma[stage.indices(0)]).all()) and float(drawn.max()) <= 2.0
    relative = small(levels=LevelConfig(sigma_max=20.0))
    stage = AmbientStage(open_source(scans(), relative), relative, make_accelerator("cpu"))
    assert stage.batches.levels.sigma_max == pytest.approx(20 * stage.module.data_std)
    assert math.isclose(stage.batches.levels.mean, math.log(stage.module.data_std))
