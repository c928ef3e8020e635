"""Images of any size: padded inside a network that cannot divide them, tiled where they are larger than those of training."""

from __future__ import annotations

import logging

import pytest
import torch
from closed_forms import F64, UNET, normal, seeded
from test_backbones import CONFIGS, shaken
from torch import Tensor, nn

from ambient_sci import fit, reconstruct
from ambient_sci.operators import Identity, Independent, Masking
from ambient_sci.priors import KeptRows, NetworkPrior, load_prior
from ambient_sci.priors.network import call_network
from ambient_sci.priors.padding import on_multiples
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
