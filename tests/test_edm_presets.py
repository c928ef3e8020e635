"""recipes/edm/*.yaml: every file is a configuration, and its network the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_import_prior import PUBLISHED

from ambient_sci.priors import backbones
from ambient_sci.training import TrainConfig

FILES = sorted((Path(__file__).parents[1] / "recipes" / "edm").glob("*.yaml"))
SAME = {
    "cifar10-ddpmpp": ("cifar10 vp", 512, 200),
    "cifar10-ncsnpp": ("cifar10 ve", 512, 200),
    "ffhq64-ddpmpp": ("ffhq, afhqv2 vp", 256, 200),
    "ffhq64-ncsnpp": ("ffhq, afhqv2 ve", 256, 200),
    "afhqv2-64-ddpmpp": ("ffhq, afhqv2 vp", 256, 200),
    "afhqv2-64-ncsnpp": ("ffhq, afhqv2 ve", 256, 200),
    "imagenet64-adm": ("imagenet adm", 4096, 2500),
}


def test_every_file_is_known():
    assert [f.stem for f in FILES] == sorted(SAME)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_file_is_the_published_training(file):
    config = TrainConfig.load(file)
    name, batch, millions = SAME[file.stem]
    _, kind, size, mult, blocks, attention, width, parameters = PUBLISHED[name]
    options = config.network.options
    assert config.network.kind == kind and config.batch_size == batch
    found = [options[k] for k in ("channel_mult", "num_blocks", "attn_resolutions", "model_channels")]
    assert found == [mult, blocks, attention, width]
    assert 0 <= config.max_steps * batch - millions * 10**6 < batch
    rate = config.learning_rate
    assert config.learning_rate_at(0, 0.0) < rate / 1000
    assert config.learning_rate_at(5 * 10**6 // batch, 0.5) == pytest.approx(rate / 2, rel=1e-2)
    assert config.learning_rate_at(10**7 // batch + 1, 0.99) == rate
    images = config.ema_half_life_images
    assert config.ema_decay_at(10**9) ** (images / batch) == pytest.approx(0.5)
    with torch.device("meta"):
        model = backbones.build(config.network, (3, size, size))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(parameters, abs=0.11)  # without the layer that is told of augmentations


def test_a_small_network_of_the_same_kind_trains_on_noisy_images_with_classes(tmp_path):
    from ambient_sci.data import write_measurements
    from ambient_sci.priors import Labels
    from ambient_sci.training import fit

    values = TrainConfig.load(FILES[1]).to_dict()
    values |= {"max_steps": 2, "batch_size": 4, "warmup_steps": 1, "device": "cpu"}
    small = {
        "model_channels": 64,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "label_dim": 3,
    }
    values["network"]["options"] |= small
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    about = {"mask": None, "noise_std": 0.2, "operator": "identity", "image_shape": (3, 8, 8)}
    data = write_measurements(tmp_path / "y.h5", measurements=images, labels=torch.arange(8) % 3, **about)
    prior = fit(data, TrainConfig.from_dict(values), tmp_path / "run")
    with torch.no_grad():
        told, free = (prior(images[:1], 0.5, Labels(torch.tensor([k]))) for k in (1, -1))
    assert not told.equal(free)
