"""Images of any size: padded inside a network that cannot divide them, tiled where they are larger than those of training."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import deepinv
import pytest
import torch
from closed_forms import F64, UNET, normal, seeded
from test_backbones import CONFIGS, made, shaken
from torch import Tensor, nn

from ambient_sci import fit, generate, reconstruct
from ambient_sci.cli import main
from ambient_sci.data import ReferenceFile, write_measurements
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.operators import MRI, Identity, Independent, Masking
from ambient_sci.priors import (
    GaussianPrior,
    KeptRows,
    Labels,
    NetworkPrior,
    StagedPrior,
    TiledPrior,
    load_prior,
)
from ambient_sci.priors.network import call_network
from ambient_sci.priors.padding import on_multiples
from ambient_sci.priors.tiled import _axis
from ambient_sci.sampling.batching import chain_memory
from ambient_sci.sampling.result import ResultFile
from ambient_sci.training import TrainConfig


class Smooth(nn.Module):
    """Halves and doubles: takes multiples of 4, is symmetric, and commutes with reflections."""

    multiple, any_size = 4, True

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=F64))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        assert x.shape[2] % 4 == 0 and x.shape[3] % 4 == 0
        means = nn.functional.avg_pool2d(x, 4)
        return self.gain * nn.functional.interpolate(means, scale_factor=4.0) + nn.functional.avg_pool2d(
            x, 3, 1, 1
        )


# -- padding -----------------------------------------------------------------------------------------------------------------


def test_sizes_that_divide_keep_their_bits():
    prior = shaken(NetworkPrior((2, 8, 12), 0.7, network=UNET, generator=seeded(3)))
    x, level = torch.randn(3, 2, 8, 12, generator=seeded(4)), torch.ones(3)
    assert torch.equal(call_network(prior.network, x, level), prior.network(x, level))


@pytest.mark.parametrize("size", [(5, 8), (6, 7), (1, 9)])
def test_others_are_put_into_the_middle_of_zeros_and_cut_out_again(size):
    x = normal(2, 3, *size)
    seen: list[Tensor] = []

    def network(z: Tensor) -> Tensor:
        seen.append(z)
        return 2 * z

    assert torch.equal(on_multiples(network, x, 4), 2 * x)
    rows, columns = seen[0].shape[2:]
    assert rows % 4 == columns % 4 == 0 and rows - size[0] < 4 and columns - size[1] < 4
    assert torch.equal(seen[0].sum((2, 3)), x.sum((2, 3))) or torch.allclose(
        seen[0].sum((2, 3)), x.sum((2, 3))
    )
    # The centre of Fourier space stays the centre.
    assert torch.equal(seen[0][:, :, rows // 2, columns // 2], x[:, :, size[0] // 2, size[1] // 2])


def test_a_padded_jacobian_stays_symmetric_and_equivariance_stays():
    network, level = Smooth(), torch.ones(1, dtype=F64)
    x = normal(1, 1, 5, 6)
    jacobian = torch.autograd.functional.jacobian(lambda z: call_network(network, z, level), x).reshape(
        30, 30
    )
    assert torch.allclose(jacobian, jacobian.T) and float(jacobian.abs().sum()) > 0
    x = normal(1, 1, 6, 6)  # two rows of zeros: one on either side
    assert torch.allclose(call_network(network, x.flip(3), level), call_network(network, x, level).flip(3))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("conditioning", ["unconditional", "mask-conditional"])
def test_every_network_takes_odd_sizes(name, conditioning):
    if conditioning == "mask-conditional" and name not in ("unet", "ncsnpp", "diffusers"):
        return
    shape = (2, 7, 11)
    prior = shaken(NetworkPrior(shape, 0.7, conditioning, CONFIGS[name], generator=seeded(3)))
    x = torch.randn(2, *shape, generator=seeded(4), requires_grad=True)
    mask = (torch.rand(2, 1, 7, 11, generator=seeded(5)) < 0.5).float()
    given = KeptRows(Masking(mask, img_size=shape)) if conditioning == "mask-conditional" else None
    answer = prior(x, torch.tensor([0.3, 2.0]), given)
    assert answer.shape == x.shape and bool(torch.isfinite(answer).all())
    (gradient,) = torch.autograd.grad(answer.square().sum(), x)
    assert bool((gradient.abs().sum((0, 1)) > 0).all())  # every pixel counts


@pytest.mark.parametrize("complete", [True, False])
def test_odd_images_train_save_load_and_are_reconstructed(complete, tmp_path, caplog):
    shape = (1, 7, 11)
    x = torch.randn(24, *shape, generator=seeded(1))
    if complete:
        operator = Identity(shape)
    else:
        design = Independent(shape, "pixels", 0.5)
        operator = Masking(design.sample(24, seeded(2)), img_size=shape, design=design)
    y = operator.A(x) + 0.1 * operator.A(torch.randn(24, *shape, generator=seeded(3)))
    config = TrainConfig(batch_size=4, max_steps=2, network=UNET, augmentations=())
    with caplog.at_level(logging.INFO, "ambient_sci"):
        prior = fit((operator, y, 0.1), config, tmp_path / "run")
    said = [r.getMessage() for r in caplog.records if "padded" in r.getMessage()]
    assert len(said) == 1 and "7 x 11 are padded with zeros to 8 x 12" in said[0]
    loaded = load_prior(tmp_path / "run")
    assert loaded.config.about["padding"] == said[0] and tuple(loaded.shape) == shape
    assert all(torch.equal(a, b) for a, b in zip(prior.parameters(), loaded.parameters(), strict=True))
    some = operator if complete else operator[:2]
    sampler = "mmps" if complete else "one-step"
    result = reconstruct(loaded, some, y[:2], 0.2, samples=2, sampler=sampler, steps=3, seed=0)
    assert result.mean.shape == (2, *shape)


# -- tiles -------------------------------------------------------------------------------------------------------------------


def correlated(height: int, width: int, length: float = 1.0, channels: int = 1) -> GaussianPrior:
    """Covariance exp(-|i - j| / length), alike at every size."""
    row, column = torch.meshgrid(
        torch.arange(height, dtype=F64), torch.arange(width, dtype=F64), indexing="ij"
    )
    place = torch.stack([row.flatten(), column.flatten()], 1)
    cov = torch.block_diag(*[torch.exp(-torch.cdist(place, place, p=1) / length)] * channels)
    return GaussianPrior(torch.full((channels, height, width), 0.3, dtype=F64), cov)


@pytest.mark.parametrize("size", [16, 17, 25, 28, 31, 33, 100])
@pytest.mark.parametrize("overlap", [1, 4, 7, 8])
def test_windows_add_up_to_one_and_end_smoothly(size, overlap):
    starts, windows = _axis(size, 16, overlap)
    total = torch.zeros(size, dtype=F64)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + 16] += window
    assert torch.allclose(total, torch.ones(size, dtype=F64), atol=1e-15)
    assert starts[0] == 0 and starts[-1] == size - 16
    assert all(0 < b - a <= 16 - overlap for a, b in zip(starts, starts[1:], strict=False))
    if overlap >= 4 and size > 16:  # next to nothing where a tile ends inside the image
        assert float(windows[0, -1]) < 0.05 > float(windows[1, 0]) and float(windows[0, 0]) == 1


def test_the_tiled_denoiser_is_the_large_one_where_correlations_are_short():
    small, large = correlated(16, 16), correlated(24, 28)
    tiled = TiledPrior(small, (1, 24, 28))
    assert len(tiled.corners) == 4 and tiled.overlap == 4
    x0 = large.sample(3, seeded(1))
    for sigma in (0.1, 1.0, 5.0):
        x = x0 + sigma * normal(3, 1, 24, 28, seed=2)
        error = (large(x, sigma) - x0).square().mean().sqrt()
        assert float((tiled(x, sigma) - large(x, sigma)).abs().max()) < 0.06 * float(error)
        # With overlaps of half a tile it is better by the distance to where a tile ends.
        half = TiledPrior(small, (1, 24, 28), overlap=8)
        assert float((half(x, sigma) - large(x, sigma)).abs().max()) < 0.015 * float(error)


@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_the_jacobian_is_that_of_the_sum_however_many_tiles_at_a_time(at_once):
    """Against autograd through all tiles at once, in two products through one graph; `at_once` changes nothing."""
    prior = shaken(NetworkPrior((1, 8, 8), 0.7, network=UNET, generator=seeded(3))).double()
    shape, level = (1, 12, 18), torch.tensor([0.5, 2.0], dtype=F64)
    x = normal(2, *shape, seed=1).requires_grad_()
    found = TiledPrior(prior, shape, 3, at_once)(x, level)
    z = x.detach().clone().requires_grad_()
    rows, columns = _axis(12, 8, 3), _axis(18, 8, 3)
    expected = torch.zeros_like(z)
    for i, row in zip(*rows, strict=True):
        for j, column in zip(*columns, strict=True):
            tile = prior(z[:, :, i : i + 8, j : j + 8], level) * row[:, None] * column
            expected = expected + nn.functional.pad(tile, (j, 18 - 8 - j, i, 12 - 8 - i))
    assert torch.allclose(found, expected, atol=1e-12)
    for seed in (2, 3):
        v = normal(2, *shape, seed=seed)
        ours = torch.autograd.grad(found, x, v, retain_graph=True)[0]
        assert torch.allclose(ours, torch.autograd.grad(expected, z, v, retain_graph=True)[0], atol=1e-12)


def test_memory_of_a_gradient_does_not_grow_with_the_image():
    prior = shaken(NetworkPrior((1, 8, 8), 0.7, network=UNET, generator=seeded(3)))

    def saved(size: int) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        tiled = TiledPrior(prior, (1, size, size), 2, at_once=1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tiled(torch.zeros(1, 1, size, size, requires_grad=True), 1.0)
        weights = {p.untyped_storage().data_ptr() for p in prior.parameters()}
        return sum(n for address, n in seen.items() if address not in weights)

    network = chain_memory(prior, torch.zeros(1))
    assert saved(32) < 0.5 * network  # 25 tiles


def test_tiles_are_told_the_class_of_their_sample_and_levels_of_their_own():
    prior = made("ncsnpp, labels")
    tiled = TiledPrior(prior, (2, 8, 14), 4)
    x, level = torch.randn(2, 2, 8, 14, generator=seeded(1)), torch.tensor([0.3, 3.0])
    both = tiled(x, level, Labels(torch.tensor([1, 4])))
    for k, label in enumerate((1, 4)):
        alone = tiled(x[k : k + 1], float(level[k]), Labels(torch.tensor([label])))
        assert torch.allclose(both[k], alone[0], atol=1e-5)
    assert not torch.allclose(both, tiled(x, level), atol=1e-3)


# -- posteriors of large images ----------------------------------------------------------------------------------------------


def test_posterior_of_a_large_image_is_the_exact_one():
    """Inpainting with tiles of 12: mean and spread against the closed form of the 12 x 20 image."""
    shape, sigma = (1, 12, 20), 0.3
    small, large = correlated(12, 12), correlated(12, 20)
    mask = (torch.rand(1, 1, 12, 20, generator=seeded(4)) < 0.6).to(F64)
    operator = Masking(mask, img_size=shape)
    y = operator.A(large.sample(1, seeded(1)) + sigma * normal(1, *shape, seed=2))
    mean, cov = large.posterior(operator, y, sigma)
    std = cov[0].diagonal().sqrt().reshape(shape)
    options = {"samples": 100, "steps": 12, "max_iterations": 20, "tolerance": 1e-4, "final": "draw"}
    result = reconstruct(small, operator, y, sigma, seed=0, **options)
    assert "images are 12 x 20, the prior's 12 x 12: 2 tiles" in result.report["notes"][0]
    assert result.report["tile_overlap"] == 3
    assert float(((result.mean - mean) / std).square().mean().sqrt()) < 0.12
    # The same sampler with the exact prior of the large image, from the same noise: what is left are the tiles.
    exact = reconstruct(large, operator, y, sigma, seed=0, **options)
    assert float(((result.mean - exact.mean) / std).abs().max()) < 0.05
    assert float((result.std / exact.std - 1).abs().max()) < 0.08  # tiles each by itself: 0.7 where they meet
    assert float(((result.samples - exact.samples) / std).square().mean().sqrt()) < 0.05


@pytest.mark.parametrize("sampler", ["mmps", "daps"])
def test_global_operators_of_large_images(sampler):
    """Half of the lines of Fourier space of 12 x 16 images, from a prior for 12 x 12: as good as the exact mean."""
    small, large = correlated(12, 12, 2.0, channels=2), correlated(12, 16, 2.0, channels=2)
    mask = torch.zeros(1, 1, 12, 16, dtype=F64)
    mask[..., ::2] = mask[..., 6:10] = 1
    operator, x = MRI(mask), large.sample(2, seeded(1))
    y = operator.A(x) + 0.8 * operator.A(operator.A_adjoint(normal(2, 2, 12, 16, seed=2)))
    exact, _ = large.posterior(operator, y, 0.8)
    steps = {"mmps": 10, "daps": 20}[sampler]
    result = reconstruct(small, operator, y, 0.8, samples=16, sampler=sampler, steps=steps, seed=0)
    best, error = ((m - x).square().mean() for m in (exact, result.mean))
    assert best < 0.7 * (operator.A_adjoint(y) - x).square().mean()
    assert error < {"mmps": 1.05, "daps": 1.2}[sampler] * best


def test_no_seams_in_a_denoised_image():
    """Steps between neighbouring columns, in mean, samples and std, are those that the exact prior of the large image
    has, whether tiles end there or not."""
    shape = (1, 12, 44)
    small, large = correlated(12, 12, 2.0), correlated(12, 44, 2.0)
    x = large.sample(8, seeded(1))
    y = x + 0.5 * normal(8, *shape, seed=2)
    ours, exact = (reconstruct(p, Identity(shape), y, 0.5, samples=8, seed=0) for p in (small, large))
    for name in ("mean", "samples", "std"):
        a, b = (getattr(r, name).diff(dim=-1).flatten(0, -2).square().mean(0).sqrt() for r in (ours, exact))
        assert float((a / b - 1).abs().max()) < {"mean": 0.004, "samples": 0.004, "std": 0.008}[name]


def test_images_of_any_size_are_drawn():
    small = correlated(8, 8)
    images = generate(small, 64, size=(8, 14), steps=20, seed=0)
    assert images.shape == (64, 1, 8, 14)
    centred = images - 0.3
    assert abs(float(centred.square().mean()) - 1) < 0.1
    neighbours = (centred[..., 1:] * centred[..., :-1]).mean(
        (0, 1, 2)
    )  # exp(-1), across borders of tiles too
    assert float((neighbours - 0.368).abs().max()) < 0.2


@pytest.mark.parametrize("size", [(6, 8), (6, 11), (5, 20)])
def test_smaller_images_run_the_network_at_their_size(size):
    prior = shaken(NetworkPrior((1, 8, 8), 0.7, network=UNET, sigma_min=0.05, generator=seeded(3)))
    operator, y = Identity((1, *size)), torch.randn(2, 1, *size, generator=seeded(1))
    result = reconstruct(prior, operator, y, 0.3, samples=2, seed=0)
    assert (
        result.mean.shape == y.shape
        and f"{size[0]} x {size[1]}, the prior's 8 x 8" in result.report["notes"][0]
    )
    assert prior.shape == (1, 8, 8) and not prior.resized  # a copy with the same weights
    fitted = prior.at_shape((1, *size))
    assert {id(p) for p in fitted.parameters()} == {id(p) for p in prior.parameters()}
    staged = StagedPrior(prior, prior, 0.3).at_shape((1, *size))
    assert torch.equal(staged(y, 0.5), fitted(y, 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.at_shape((3, 16, 16)), "expected images .*of another size, got"),
        (lambda p: p.at_shape((1, 16, 16), 5), "tile_overlap: expected 1 to 4"),
        (lambda p: p.at_shape((1, 16, 16), 0), "tile_overlap: expected 1 to 4"),
        (lambda p: p.at_shape((1, 16, 16)).save("nowhere"), "save the original"),
        (lambda p: p.at_shape((1, 4, 8)).save("nowhere"), "save the original"),
        (lambda p: TiledPrior(p, (1, 7, 16)), "images of at least"),
        (lambda p: correlated(8, 8).at_shape((1, 6, 8)), "no network that does for smaller ones"),
        (lambda p: generate(p, 1, tile_overlap=2), "tile_overlap: expected images larger"),
        (
            lambda p: reconstruct(p, Identity((1, 8, 8)), torch.zeros(1, 1, 8, 8), 0.1, tile_overlap=2),
            "larger",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        call(NetworkPrior((1, 8, 8), 0.7, network=UNET))


def test_mask_conditional_priors_take_no_tiles():
    with pytest.raises(ConditioningError, match="expected an unconditional prior"):
        NetworkPrior((1, 8, 8), 0.7, "mask-conditional", UNET).at_shape((1, 16, 16))


def test_one_large_measurement_of_a_foreign_physics_without_a_batch():
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.3))
    y = normal(1, 12, 20, seed=1).float()
    prior = shaken(NetworkPrior((1, 8, 8), 0.7, network=UNET, sigma_min=0.05, generator=seeded(3)))
    assert reconstruct(prior, physics, y, samples=2, seed=0).mean.shape == (1, 1, 12, 20)


def test_the_command_line_says_that_there_are_tiles(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shaken(NetworkPrior((1, 8, 8), 0.7, network=UNET, sigma_min=0.05, generator=seeded(3))).save("prior")
    write_measurements(
        "large.h5", measurements=torch.randn(2, 1, 12, 20, generator=seeded(1)), noise_std=0.3,
        operator="identity", mask=None, image_shape=(1, 12, 20),
    )  # fmt: skip
    for extra, overlap in ([], 2), (["--tile-overlap", "4", "--overwrite"], 4):
        words = ["reconstruct", "prior", "large.h5", "--out", "r.h5", "--samples", "2", "--steps", "3"]
        assert main([*words, *extra]) in (0, None)
        said = capsys.readouterr().out
        assert f"note: images are 12 x 20, the prior's 8 x 8: {6 if overlap == 2 else 8} tiles" in said
        with ResultFile("r.h5") as result:
            assert result.report["tile_overlap"] == overlap and result.mean(slice(None)).shape == (
                2,
                1,
                12,
                20,
            )
    # Held-out rows are sampled again, with the same tiles.
    assert main(["evaluate", "r.h5", "--calibration", "large.h5", "--prior", "prior", "--out", "e"]) in (
        0,
        None,
    )
    assert "held_out_rows" in json.loads(Path("e/report.json").read_text())
    assert main(
        ["generate", "prior", "--num", "2", "--out", "g.h5", "--steps", "2", "--size", "12", "20"]
    ) in (0, None)
    with ReferenceFile("g.h5") as images:
        assert images.images().shape == (2, 1, 12, 20)
