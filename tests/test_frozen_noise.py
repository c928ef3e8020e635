"""One noisy copy of each image for the whole run: what a step is shown, what is learned from it in closed form, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ambient_sci import losses
from ambient_sci.errors import InputError
from ambient_sci.operators import Identity
from ambient_sci.priors import EmpiricalPrior, NetworkConfig
from ambient_sci.priors.base import Prior
from ambient_sci.training import (
    AmbientStage,
    Batches,
    ConsistencyConfig,
    EMConfig,
    FrozenNoiseConfig,
    LevelConfig,
    TrainConfig,
    fit,
    make_accelerator,
    open_source,
)
from ambient_sci.training import frozen_noise as module

F64 = torch.float64
SHAPE, NUM, SIGMA_N = (1, 4, 4), 6, 0.5
LEVELS = LevelConfig(kind="log-uniform", sigma_max=4.0, floor=0.05, relative=False)


def images(num: int = NUM) -> Tensor:
    return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(3))


def config(sigma_n: float | None = SIGMA_N, **changes) -> TrainConfig:
    frozen = None if sigma_n is None else FrozenNoiseConfig(sigma_n=sigma_n)
    settings = {"max_steps": 6, "batch_size": 12, "device": "cpu", "levels": LEVELS, "frozen_noise": frozen}
    network = NetworkConfig(kind="mlp", channels=(16,))
    return TrainConfig(**{**settings, "network": network, **changes})


def batches(settings: TrainConfig, data=None) -> Batches:
    data = (Identity(SHAPE), images(), 0.0) if data is None else data
    return Batches(open_source(data, settings), settings, make_accelerator("cpu"))


def shown(settings: TrainConfig, steps: int, data=None) -> dict[int, list[Tensor]]:
    """Sample -> the measurements that steps show above the level, all unmirrored."""
    found: dict[int, list[Tensor]] = {}
    source = batches(settings, data)
    for step in range(steps):
        drawn = source.draw(step)
        for row, index in enumerate(source.indices(step)):
            if drawn.sigma[row] >= SIGMA_N:
                found.setdefault(index, []).append(drawn.y[row])
    return found


def test_below_the_level_the_image_and_above_it_one_noisy_copy():
    source, x = batches(config()), images()
    for step in range(4):
        drawn, rows = source.draw(step), source.indices(step)
        low = drawn.sigma < SIGMA_N
        assert 0 < int(low.sum()) < len(low)
        assert torch.equal(drawn.y[low], x[rows][low]) and not drawn.sigma_y[low].any()
        assert torch.equal(drawn.sigma_y[~low], torch.full_like(drawn.sigma_y[~low], SIGMA_N))
        assert torch.equal(drawn.sigma_y_host, drawn.sigma_y)
    copies = shown(config(), 6)
    assert set(copies) == set(range(NUM))
    assert all(torch.equal(first, other) for first, *others in copies.values() for other in others)
    # A property of the image, not of the run's seed; another seed of its own is another copy.
    other = shown(config(seed=9), 6)
    assert all(torch.equal(copies[i][0], other[i][0]) for i in copies)
    moved = shown(dataclasses.replace(config(), frozen_noise=FrozenNoiseConfig(SIGMA_N, seed=1)), 6)
    assert not any(torch.equal(copies[i][0], moved[i][0]) for i in copies)


def test_the_noise_is_white_and_differs_from_image_to_image():
    frozen = module.FrozenNoise(1.0, 0, 500, (1, 8, 8), torch.device("cpu"))
    n = frozen.noise(torch.arange(500)).flatten(1).double()
    assert abs(float(n.mean())) < 4 / n.numel() ** 0.5
    assert abs(float(n.var()) - 1) < 4 * (2 / n.numel()) ** 0.5
    off = (n @ n.T / n.shape[1])[~torch.eye(500, dtype=torch.bool)]
    assert float(off.abs().max()) < 6 / n.shape[1] ** 0.5


def test_noise_is_the_same_whether_it_is_kept_or_drawn_again(monkeypatch):
    kept = module.FrozenNoise(1.0, 5, 9, SHAPE, torch.device("cpu"))
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    again = module.FrozenNoise(1.0, 5, 9, SHAPE, torch.device("cpu"))
    assert kept._kept is not None and again._kept is None
    which = torch.tensor([7, 0, 7, 3])
    assert torch.equal(kept.noise(which), again.noise(which))


def test_symmetries_move_image_and_noise_together():
    """A mirrored image has the mirrored copy; a copy of the mirrored image with noise of its own would be a second look at it."""
    source = batches(config(augmentations=("flip-horizontal",)))
    frozen = shown(config(), 8)
    seen = set()
    for step in range(8):
        drawn = source.draw(step)
        for row, index in enumerate(source.indices(step)):
            if drawn.sigma[row] < SIGMA_N:
                continue
            plain = torch.equal(drawn.y[row], frozen[index][0])
            assert plain or torch.equal(drawn.y[row], frozen[index][0].flip(-1))
            seen.add(plain)
    assert seen == {True, False}


def test_noise_that_the_data_have_is_filled_up():
    """Samples of less noise get the rest of it, samples of more stay what they are; so do entries."""
    own = torch.tensor([0.0, 0.3, 0.3, 0.7, 0.0, 0.7])
    y, frozen = images(), module.FrozenNoise(SIGMA_N, 0, NUM, SHAPE, torch.device("cpu"))
    sigma = torch.tensor([1.0, 1.0, 0.4, 1.0, 0.1, 0.8])
    rows = torch.arange(NUM)
    found = frozen(rows, y, own, own, sigma)
    added = torch.tensor([0.5, 0.4, 0.0, 0.0, 0.0, 0.0]).reshape(-1, 1, 1, 1)
    assert torch.allclose(found.y, y + added * frozen.noise(rows), atol=1e-7)
    assert torch.allclose(found.sigma_y, torch.tensor([0.5, 0.5, 0.3, 0.7, 0.0, 0.7]))
    entries = own.reshape(-1, 1, 1, 1).expand_as(y).contiguous()
    by_entry = frozen(rows, y, entries, own, sigma)
    assert torch.allclose(by_entry.y, found.y) and torch.equal(by_entry.largest, found.largest)
    assert torch.allclose(by_entry.sigma_y, found.sigma_y.reshape(-1, 1, 1, 1).expand_as(y))


@pytest.mark.parametrize("augmentations", [(), ("gain",)])
def test_without_noise_it_is_denoising_to_the_bit(augmentations):
    plain, none = (
        AmbientStage(open_source((Identity(SHAPE), images(), 0.0), c), c, make_accelerator("cpu"))
        for c in (config(None, augmentations=augmentations), config(0.0, augmentations=augmentations))
    )
    assert torch.equal(plain.loss(0), none.loss(0)) and plain.reason == none.reason


# -- closed form -----------------------------------------------------------------------------------------------------------------


class Moved(Prior):
    """A denoiser D with two parameters for each sample: a step towards another one, and towards x; at 0 it is D itself."""

    conditioning = "unconditional"

    def __init__(self, exact, other) -> None:
        super().__init__()
        self.exact, self.other, self.shape, self.data_std = exact, other, SHAPE, 1.0
        self.theta = torch.zeros(0)

    def forward(self, x, sigma, given=None):  # type: ignore[override]
        d = self.exact(x, sigma)
        self.theta = torch.zeros(2, len(x), 1, 1, 1, dtype=F64, requires_grad=True)
        return d + self.theta[0] * (self.other(x, sigma) - d) + self.theta[1] * x


def minimiser(clean: Tensor, noisy: Tensor):
    """Of finite data: below, the mean of the images by responsibility; above, (s^2 m - sigma_n^2 x) / (s^2 - sigma_n^2), m that of
    the noisy copies under noise of variance s^2 - sigma_n^2."""
    below, copies = EmpiricalPrior(clean), EmpiricalPrior(noisy)

    def exact(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.reshape(-1, 1, 1, 1)
        high = level >= SIGMA_N
        rest = torch.where(high, level**2 - SIGMA_N**2, 1.0)
        above = (level**2 * copies(x, rest.sqrt().flatten()) - SIGMA_N**2 * x) / rest
        return torch.where(high, above, below(x, sigma))

    return exact


def test_the_minimiser_above_is_that_of_the_noisy_copies_and_below_that_of_the_images():
    x = images()
    settings = config(batch_size=6000)
    frozen = shown(settings, 1)
    noisy = torch.stack([frozen[i][0] for i in range(NUM)])
    drawn = batches(settings).draw(0)

    def score(exact, other, which: Tensor) -> float:
        """Largest mean gradient over these samples in standard errors."""
        prior, part = Moved(exact, other), drawn.rows(which)
        step = losses.ambient(
            prior,
            Identity(SHAPE),
            part.y.double(),
            part.sigma_y.double(),
            part.sigma.double(),
            generator=torch.Generator().manual_seed(1),
        )
        rows = torch.autograd.grad(step.sum(), prior.theta)[0].flatten(1).T
        return float((rows.mean(0).abs() / (rows.std(0) / len(rows) ** 0.5)).max())

    right = minimiser(x.double(), noisy.double())
    memory = EmpiricalPrior(x.double())  # of the clean images
    low = (drawn.sigma_host < SIGMA_N).nonzero().flatten()[:1000]
    high = (drawn.sigma_host >= 1.1 * SIGMA_N).nonzero().flatten()[:2000]
    assert score(right, lambda y, s: memory(y, s.clamp(min=SIGMA_N)), low) < 4
    assert score(right, memory, high) < 4
    assert score(memory, right, high) > 8


# -- runs ------------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_sees_the_same_copies(tmp_path):
    data = (Identity(SHAPE), images(), 0.0)
    settings = config(schedule="constant")
    whole = fit(data, settings, progress=False)
    fit(data, dataclasses.replace(settings, max_steps=3), tmp_path / "run", progress=False)
    resumed = fit(data, settings, tmp_path / "run", resume=True, progress=False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    other = dataclasses.replace(settings, max_steps=8, frozen_noise=FrozenNoiseConfig(0.6))
    with pytest.raises(InputError, match=r"frozen_noise\.sigma_n"):
        fit(data, other, tmp_path / "run", resume=True, progress=False)


def test_levels_follow_the_data_where_levels_do():
    settings = config(levels=dataclasses.replace(LEVELS, relative=True))
    data = (Identity(SHAPE), 10 * images(), 0.0)
    found = batches(settings, data)
    assert found._frozen is not None
    assert found._frozen.sigma_n == pytest.approx(SIGMA_N * found.source.data_std)
    assert f"{found._frozen.sigma_n:.4g}" in found.reason and "frozen_noise" in found.reason


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"frozen_noise": FrozenNoiseConfig(4.0)}, "below levels.sigma_max"),
        ({"consistency": ConsistencyConfig()}, "no consistency"),
        ({"em": EMConfig(), "max_steps": None}, "no em"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, named):
    with pytest.raises(InputError, match=named):
        config(**settings)
    with pytest.raises(InputError, match=r"frozen_noise\.sigma_n: expected a value >= 0"):
        FrozenNoiseConfig(-1.0)
