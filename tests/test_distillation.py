"""One-step generators: the loss against its closed form, distillation of Gaussians in which every network is a
gain a mode, the prior that comes out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.cli import main
from ambient_sci.data import write_measurements
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.operators import Identity, Masking
from ambient_sci.operators.designs import Independent
from ambient_sci.priors import NetworkConfig, NetworkPrior, OneStepPrior, Prior, StagedPrior, load_prior
from ambient_sci.sampling import generate, reconstruct
from ambient_sci.training import (
    DistillConfig,
    LevelConfig,
    LossConfig,
    StagedConfig,
    TrainConfig,
    distill,
    fit,
)

MODES = torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
SIGMA_N = 0.2
TINY = NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8)


class Gains(Prior):
    """A Gaussian denoiser with a standard deviation a mode that can be trained."""

    kind = "test-gains"

    def __init__(self, std: Tensor, frozen: str | None = None, sigma_min: float = 1e-3) -> None:
        super().__init__()
        self.log_std = nn.Parameter(std.double().log().reshape(1, 1, 1, -1))
        self.shape, self.data_std = (1, 1, std.numel()), 0.5
        self.sigma_min, self.sigma_max, self.frozen = sigma_min, 40.0, frozen

    def forward(self, x: Tensor, sigma: float | Tensor, given: Any = None) -> Tensor:
        """s^2 / (s^2 + sigma^2) x; frozen below SIGMA_N: D, or (D - x) / sigma^2, of that level."""
        level = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1).double()
        variance, least = (2 * self.log_std).exp(), level.clamp(min=SIGMA_N if self.frozen else 0)
        if self.frozen == "score":
            return ((1 - level**2 / (variance + least**2)) * x.double()).to(x.dtype)
        return (variance / (variance + least**2) * x.double()).to(x.dtype)


def karras(num: int, low: float, high: float) -> Tensor:
    return losses.karras_levels((torch.arange(num, dtype=torch.float64) + 0.5) / num, low, high)


def push(a: Tensor, s: Tensor, alpha: float, sigma: Tensor, kf: Tensor | None = None) -> Tensor:
    """w dL/da of one level, 2 a k (kf - alpha k - 1) with k = kf - kg, mode by mode; ``kf``: of a teacher that is
    not exact. From E<k x_t, kf x_t - x_g - alpha k x_t> = k (kf - alpha k) (a^2 + sigma^2) - k a^2, k taken as
    given."""
    kf = s**2 / (s**2 + sigma**2) if kf is None else kf
    k = kf - a**2 / (a**2 + sigma**2)
    return 2 * a * k * (kf - alpha * k - 1)


def settled(s: Tensor, levels: Tensor, kf: Tensor) -> Tensor:
    """Gains at which the push of a teacher with gains ``kf`` (levels, modes) vanishes: gradient flow in log a."""
    a = s.clone()
    for _ in range(4000):
        w = ((((1 - kf) * a) ** 2 + (kf * levels[:, None]) ** 2).sqrt()).mean(1, keepdim=True)
        step = (push(a, s, 1.0, levels[:, None], kf) / w).mean(0)
        a = a * torch.exp(-0.05 * step / a)
    return a


# -- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2])
def test_the_gradient_is_that_of_the_closed_form(alpha: float):
    """Expectation over noise replaced by x_g = +-a, n = +-1, which have the moments that the quadratic needs."""
    s, sigma, a = 0.3, 0.7, torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    eps = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64)[:, None]
    n = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)[:, None]
    images = a * eps
    x = images + sigma * n
    kf, kg = s**2 / (s**2 + sigma**2), 0.25 / (0.25 + sigma**2)
    loss = losses.distillation(images, kf * x, kg * x, alpha)
    w = (images - kf * x).detach().abs().flatten(1).mean(1)
    (got,) = torch.autograd.grad((loss * w).mean(), a)
    k = kf - kg
    assert float(got) == pytest.approx(2 * 0.5 * k * (kf - alpha * k - 1), rel=1e-12)
    assert loss.shape == (4,)


def test_the_right_way_exactly_where_it_is_said():
    """alpha (a^2 - s^2) < a^2 + sigma^2 decides, on a grid of (a, s, sigma, alpha); alpha = 1.2 goes wrong once
    a^2 > 6 s^2 + 5 sigma^2."""
    wrong = 0
    for alpha in (0.5, 1.0, 1.2, 2.0):
        for s in (0.05, 0.3, 1.0):
            for a in (0.02, 0.2, 0.9, 3.0):
                for sigma in (0.01, 0.3, 2.0):
                    if a == s:
                        continue
                    value = float(push(torch.tensor(a), torch.tensor(s), alpha, torch.tensor(sigma)))
                    right = math.copysign(1, -value) == math.copysign(1, s - a)
                    assert right == (alpha * (a**2 - s**2) < a**2 + sigma**2)
                    if alpha == 1.2:
                        assert right == (a**2 < 6 * s**2 + 5 * sigma**2)
                    wrong += not right
                    assert right or alpha > 1
    assert wrong > 0


def test_levels_are_uniform_in_the_seventh_root():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    levels = losses.karras_levels(u, 0.01, 10.0)
    assert levels[0] == pytest.approx(10.0) and levels[-1] == pytest.approx(0.01)
    roots = levels ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff()[:1].expand(10), rtol=1e-9)
    each = losses.karras_levels(torch.ones(2, dtype=torch.float64), torch.tensor([0.1, 0.2]).double(), 10.0)
    assert each.tolist() == pytest.approx([0.1, 0.2])


# -- Gaussians -----------------------------------------------------------------------------------------------


def gaussian_data(sigma_n: float, num: int = 64) -> tuple[Identity, Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    x = MODES.float() * torch.randn(num, 1, 1, len(MODES), generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return Identity((1, 1, len(MODES))), x + sigma_n * noise, sigma_n


def config(steps: int, **settings: Any) -> TrainConfig:
    own = {"sigma_init": 6.0, "sigma_max": 40.0, "floor": 0.004, "learning_rate": 2e-2, **settings}
    return TrainConfig(
        max_steps=steps,
        batch_size=1024,
        ema_decay=0.99,
        gradient_clip=1e9,
        final_ratio=0.0,
        device="cpu",
        levels=LevelConfig(sigma_max=80.0, floor=4e-3, relative=False),
        loss=LossConfig(c_min=0.02),
        distillation=DistillConfig(generator_learning_rate=1e-2, **own),
    )


def gain(generator: OneStepPrior) -> Tensor:
    """Standard deviation of the generator's images, mode by mode."""
    unit = torch.ones(1, 1, 1, len(MODES), dtype=torch.float64)
    return generator.draw(unit).flatten().detach()


def teacher(frozen: str | None = None) -> StagedPrior:
    """Exact above SIGMA_N, and below it exact or as ``frozen`` says."""
    return StagedPrior(Gains(MODES, sigma_min=SIGMA_N), Gains(MODES, frozen, sigma_min=0.004), SIGMA_N)


def test_gains_of_a_gaussian_are_reached():
    """An exact teacher at all levels: every mode's gain within 2 %, half of the noise the smallest."""
    made = distill(teacher(), gaussian_data(SIGMA_N), config(1200), progress=False)
    assert isinstance(made, OneStepPrior)
    assert torch.allclose(gain(made), MODES, rtol=0.02), gain(made) / MODES


def test_what_the_teacher_says_below_the_noise_decides_what_comes_out():
    """Where its score stays what it is at sigma_n, modes of half and of the whole of the noise come out 1.42 and
    1.06 times too large (closed form; the smaller one converges slowly from below). Where its denoiser stays, they
    come out much too small."""
    levels = karras(2000, 0.004, 40.0)
    least = levels[:, None].clamp(min=SIGMA_N)
    expected = settled(MODES, levels, 1 - levels[:, None] ** 2 / (MODES**2 + least**2)) / MODES
    assert expected.tolist() == pytest.approx([1.42, 1.06, 1.003, 1.0], abs=5e-3)
    assert bool((settled(MODES, levels, MODES**2 / (MODES**2 + least**2)) / MODES < 0.7)[:2].all())
    made = gain(distill(teacher("score"), gaussian_data(SIGMA_N), config(1200), progress=False)) / MODES
    assert 1.25 < float(made[0]) < 1.45 and torch.allclose(made[1:], expected[1:], rtol=0.02), made


# -- data of every kind --------------------------------------------------------------------------------------


def small(steps: int, **options: Any) -> TrainConfig:
    """Few steps of a tiny network."""
    return TrainConfig(max_steps=steps, batch_size=8, device="cpu", network=TINY, **options)


def images(num: int = 16) -> Tensor:
    return torch.randn(num, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def measured(kind: str) -> tuple[Any, Tensor, float]:
    if kind == "identity":
        return Identity((1, 8, 8)), images() + 0.1 * images(), 0.1
    design = Independent((1, 8, 8), "pixels", 0.6)
    mask = design.sample(16, torch.Generator().manual_seed(2))
    operator = Masking(mask, (1, 8, 8), design=design)
    return operator, operator.A(images()), 0.1


@pytest.mark.parametrize(
    "kind, staged", [("identity", False), ("identity", True), ("masking", False), ("masking", True)]
)
def test_every_kind_of_prior_becomes_a_generator(kind: str, staged: bool, tmp_path: Path):
    """Complete and incomplete data, staged or not: trains, saves, loads, is called once, and goes on with the same
    bits after an interruption."""
    consistency = {"consistency": StagedConfig(max_steps=2, sigma_min=0.02)} if staged else {}
    data, run = measured(kind), tmp_path / "prior"
    fit(data, small(2, **consistency), run, progress=False)
    prior = load_prior(run / "prior")
    constant = {"schedule": "constant"}
    straight = distill(prior, data, small(6, **constant), tmp_path / "whole", progress=False)
    distill(prior, data, small(3, **constant), tmp_path / "parts", progress=False)
    distill(prior, data, small(6, **constant), tmp_path / "parts", resume=True, progress=False)
    loaded = load_prior(tmp_path / "parts" / "prior")
    assert isinstance(loaded, OneStepPrior)
    same = [generate(p, 3, generator=torch.Generator().manual_seed(3)) for p in (straight, loaded)]
    assert torch.equal(*same) and same[0].shape == (3, 1, 8, 8)
    if kind == "identity":
        with pytest.raises(ConditioningError, match="one-step generator"):
            reconstruct(loaded, data[0], data[1][:1], 0.1, samples=2)


def test_one_call_an_image():
    calls = []

    class Watched(Gains):
        def forward(self, x: Tensor, sigma: float | Tensor, given: Any = None) -> Tensor:
            calls.append(float(torch.as_tensor(sigma).max()))
            return super().forward(x, sigma)

    prior = OneStepPrior(Watched(MODES), 2.0)
    z = generate(prior, 4, batch_size=4, generator=torch.Generator().manual_seed(0))
    assert calls == [2.0] and z.shape == (4, 1, 1, len(MODES))
    with pytest.raises(InputError, match="one step at its own level 2"):
        generate(prior, 4, steps=10)
    with pytest.raises(InputError, match="expected its one level 2, got 1"):
        prior(torch.zeros(1, 1, 1, len(MODES)), 1.0)


def test_what_cannot_be_distilled_is_refused():
    data = measured("identity")
    with pytest.raises(InputError, match="expected the prior to distil"):
        fit(data, small(2, distillation=DistillConfig()), progress=False)
    prior = NetworkPrior((1, 8, 8), 1.0, network=TINY, sigma_min=0.1, sigma_max=80.0)
    with pytest.raises(InputError, match="sigma_init: expected a level that the prior has learned"):
        distill(prior, data, small(2, distillation=DistillConfig(sigma_init=0.01)), progress=False)
    with pytest.raises(ConditioningError, match="got a one-step generator"):
        distill(OneStepPrior(prior, 5.0), data, small(2), progress=False)
    other = NetworkPrior((1, 16, 16), 1.0, network=TINY)
    with pytest.raises(InputError, match="expected images"):
        distill(other, data, small(2), progress=False)
    with pytest.raises(InputError, match="no em and no consistency"):
        small(2, distillation=DistillConfig(), consistency=StagedConfig())


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """train, distill (and judged without clean images), generate; a generator is refused by reconstruct."""
    generator = torch.Generator().manual_seed(0)
    noisy = 0.5 * torch.randn(12, 1, 8, 8, generator=generator)
    write_measurements(
        tmp_path / "M.h5",
        measurements=noisy,
        mask=None,
        noise_std=0.1,
        operator="identity",
        image_shape=(1, 8, 8),
    )
    small(2).save(tmp_path / "c.json")
    run, made = str(tmp_path / "run"), str(tmp_path / "made")
    measurements, settings = str(tmp_path / "M.h5"), ["--config", str(tmp_path / "c.json"), "--device", "cpu"]
    assert main(["train", measurements, "--out", run, *settings]) == 0
    judged = ["--select-every", "2", "--select-num", "8"]
    assert main(["distill", run, measurements, "--out", made, *settings, "--max-steps", "4", *judged]) == 0
    assert "one call at level" in capsys.readouterr().out
    assert main(["distill", run, measurements, "--out", made, "--resume", "--max-steps", "6"]) == 2
    assert "expected the selection" in capsys.readouterr().err
    assert main(["generate", made, "--num", "3", "--out", str(tmp_path / "S.h5"), "--device", "cpu"]) == 0
    again = [
        "generate",
        made,
        "--num",
        "3",
        "--steps",
        "5",
        "--out",
        str(tmp_path / "T.h5"),
        "--device",
        "cpu",
    ]
    assert main(again) == 2 and "expected one step" in capsys.readouterr().err
    rec = ["reconstruct", made, measurements, "--out", str(tmp_path / "R.h5"), "--device", "cpu"]
    assert main(rec) == 2 and "one-step generator" in capsys.readouterr().err
