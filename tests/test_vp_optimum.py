"""The Ambient loss of VP networks at the analytic optimum of a Gaussian: gradient zero at every time, no 0/0."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.losses import tweedie_loss
from ambient_sci.noise import VPSchedule
from ambient_sci.operators import Identity
from ambient_sci.priors import VPPrior
from ambient_sci.randomness import seeded

SHAPE, BATCH, STD = (1, 4, 4), 32, 0.7
SCHEDULE = VPSchedule()
LEVELS = SCHEDULE.levels()


class Optimum(nn.Module):
    """F of x_0 ~ N(0, STD^2) at VP noise scale t, times ``gain``, plus ``bias``."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        self.prediction = prediction
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, state: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1, 1, 1)
        alpha = (1 - t**2).sqrt()
        x0 = alpha * STD**2 / (alpha**2 * STD**2 + t**2) * state
        epsilon = t / (alpha**2 * STD**2 + t**2) * state
        found = {"epsilon": epsilon, "v": alpha * epsilon - t * x0, "sample": x0}[self.prediction]
        return self.gain * found + self.bias


def moments(sigma_y: float) -> tuple[Tensor, Tensor]:
    """Measurements and noise whose means, variances and covariance are those of their law to rounding."""
    n = BATCH * math.prod(SHAPE)
    raw = torch.randn(n, 2, generator=seeded(1), dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), raw], 1))[0][:, 1:] * math.sqrt(n)
    y, z = (v.reshape(BATCH, *SHAPE) for v in q.unbind(1))
    return y * math.sqrt(STD**2 + sigma_y**2), z


def gradients(monkeypatch, prediction: str, t_n: int, t: int, gain: float = 1.0) -> tuple[float, list[float]]:
    """Loss, and its gradients by gain and bias."""
    sigma_y, sigma = (float(LEVELS[t_n]) if t_n else 0.0), float(LEVELS[t])
    y, z = moments(sigma_y)
    monkeypatch.setattr(tweedie_loss, "draw_noise", lambda like, generator: z)
    network = Optimum(prediction)
    network.gain.data.fill_(gain)
    network.bias.data.fill_(gain - 1)
    prior = VPPrior(network, SHAPE, STD, prediction)
    loss = losses.ambient(prior, Identity(SHAPE), y, sigma_y, sigma).mean()
    found = torch.autograd.grad(loss, [network.gain, network.bias])
    return loss.item(), [float(g) for g in found]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("t_n", [0, 100, 500, 800])
def test_the_gradient_is_zero_at_the_optimum_and_nowhere_else(monkeypatch, prediction, t_n):
    for t in (t_n + 1, (t_n + 999) // 2, 999):
        loss, found = gradients(monkeypatch, prediction, t_n, t)
        _, away = gradients(monkeypatch, prediction, t_n, t, gain=1.05)
        assert loss > 0 and max(map(abs, found)) < 1e-8 * max(map(abs, away)), (t, found, away)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("t_n", [100, 500, 800])
def test_at_the_level_of_the_data_nothing_is_taught_and_nothing_divided_by_zero(monkeypatch, prediction, t_n):
    """c = 0 there: the answer does not count, whatever it is."""
    for gain in (1.0, 3.0):
        loss, found = gradients(monkeypatch, prediction, t_n, t_n, gain)
        assert loss == pytest.approx(0, abs=1e-20) and found == [0.0, 0.0]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_clean_data_are_denoised(monkeypatch, prediction):
    """t_n = 0 is the denoising loss, to rounding."""
    y, z = moments(0.0)
    monkeypatch.setattr(tweedie_loss, "draw_noise", lambda like, generator: z)
    prior = VPPrior(Optimum(prediction), SHAPE, STD, prediction)
    for t in (0, 500, 999):
        sigma = float(LEVELS[t])
        ambient = losses.ambient(prior, Identity(SHAPE), y, 0.0, sigma)
        assert torch.allclose(ambient, losses.denoising(prior, y, sigma), rtol=1e-13, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_answer_at_every_time_is_that_of_the_law(prediction):
    """The last step of a sampler returns D at the lowest level, the first begins at the highest."""
    prior = VPPrior(Optimum(prediction), SHAPE, STD, prediction)
    x = torch.randn(3, *SHAPE, generator=seeded(2), dtype=torch.float64)
    for t in (0, 1, 100, 500, 800, 999):
        sigma = float(LEVELS[t])
        found = prior(x, sigma)
        assert torch.allclose(found, STD**2 / (STD**2 + sigma**2) * x, rtol=1e-9, atol=1e-9)
        assert float(SCHEDULE.time(torch.tensor([sigma], dtype=torch.float64))) == pytest.approx(t, abs=1e-8)
