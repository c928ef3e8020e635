"""Networks of other libraries, a user's own and adapters through train, save, load and resume: the same bits, small checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from closed_forms import UNET, seeded
from safetensors import safe_open
from torch import nn

from ambient_sci.data import write_measurements
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.operators import Identity, Masking
from ambient_sci.priors import (
    GaussianPrior,
    Labels,
    LoraPrior,
    NetworkConfig,
    NetworkPrior,
    Prior,
    StagedPrior,
    VPPrior,
    backbones,
    load_prior,
)
from ambient_sci.training import (
    Batches,
    LevelConfig,
    StagedConfig,
    TrainConfig,
    fit,
    make_accelerator,
    open_source,
)

SHAPE = (2, 8, 8)


class Normalised(nn.Module):
    """A user's network with dropout and running statistics."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Dropout(0.2),
            nn.Conv2d(8, out_channels, 1),
        )

    def forward(self, x, level):
        return self.body(x) * level.log().reshape(-1, 1, 1, 1).to(x)


backbones.register("tests-normalised", lambda i, o, shape: Normalised(i, o), replace=True)
EDM = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.2}
DIFFUSERS = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "dropout": 0.1,
}
NETWORKS = {
    "ncsnpp": NetworkConfig(kind="ncsnpp", options=EDM),
    "diffusers": NetworkConfig(kind="diffusers-unet", options=DIFFUSERS),
    "a user's": NetworkConfig(kind="tests-normalised"),
}


def scans(tmp_path):
    y = torch.randn(24, *SHAPE, generator=seeded(0))
    return write_measurements(
        tmp_path / "scans.h5",
        measurements=y,
        mask=None,
        noise_std=0.2,
        operator="identity",
        image_shape=SHAPE,
    )


def config(**changes) -> TrainConfig:
    settings = {
        "max_steps": 6,
        "batch_size": 4,
        "log_interval": 2,
        "checkpoint_minutes": 0.0,
        "device": "cpu",
        "warmup_steps": 2,
    }
    return TrainConfig(**{**settings, **changes})


def same_bits(a: Prior, b: Prior) -> bool:
    x = torch.randn(3, *SHAPE, generator=seeded(7))
    with torch.no_grad():
        return all(torch.equal(a.eval()(x, sigma), b.eval()(x, sigma)) for sigma in (0.3, 2.0))


def in_two_halves(data, out, settings, **options) -> Prior:
    """Three steps, and the rest from the checkpoint in another call."""
    # The schedule is that of the whole run: a run that is cut differs from it in its limit alone, so it is made constant.
    fit(data, dataclasses.replace(settings, max_steps=3), out=out, progress=False, **options)
    return fit(data, settings, out=out, resume=True, progress=False, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_trains_saves_loads_and_resumes_bit_for_bit(name, tmp_path):
    """Dropout and running statistics included; the global stream stays where it is."""
    data, settings = scans(tmp_path), config(network=NETWORKS[name], schedule="constant")
    before = torch.get_rng_state()
    whole = fit(data, settings, out=tmp_path / "whole", progress=False)
    halves = in_two_halves(data, tmp_path / "halves", settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(whole, halves) and same_bits(whole, load_prior(tmp_path / "whole"))
    assert same_bits(whole, load_prior(tmp_path / "halves"))
    first, last = (
        json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()[::2]
    )
    assert first["loss"] != last["loss"]


def test_running_statistics_reach_the_averaged_prior(tmp_path):
    prior = fit(scans(tmp_path), config(network=NETWORKS["a user's"]), out=tmp_path / "run", progress=False)
    for p in (prior, load_prior(tmp_path / "run")):
        assert isinstance(p, NetworkPrior)
        assert p.network.body[1].running_var.sub(1).abs().max() > 0.05  # as new they are 1
        assert int(p.network.body[1].num_batches_tracked) == 6


def base_prior() -> NetworkPrior:
    """A U-Net large beside its adapter, with weights as after training."""
    big = NetworkConfig(channels=(32, 64), norm_groups=8, head_channels=16)
    prior = NetworkPrior(SHAPE, 1.0, network=big, sigma_min=0.1, sigma_max=80.0, generator=seeded(1))
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=seeded(2)))
    return prior


@pytest.mark.parametrize("source", [True, False])
def test_an_adapter_on_a_frozen_base_trains_saves_loads_and_resumes(source, tmp_path):
    """A checkpoint is at most five times the adapter: weights, average and two moments; the base does not move and is not in it."""
    base_prior().save(tmp_path / "base")

    def adapter() -> LoraPrior:
        base = load_prior(tmp_path / "base")
        return LoraPrior(
            base, rank=4, targets=("to_q", "to_k", "to_v"), source=str(tmp_path / "base") if source else None
        )

    data, settings = scans(tmp_path), config(schedule="constant", learning_rate=0.01)
    initial = adapter()
    whole = fit(data, settings, out=tmp_path / "whole", progress=False, initial=initial)
    assert same_bits(initial, adapter()), "the prior handed over has moved"
    halves = in_two_halves(data, tmp_path / "halves", settings, initial=adapter())
    assert same_bits(whole, halves) and same_bits(whole, load_prior(tmp_path / "whole"))
    assert not same_bits(whole, adapter())
    frozen = dict(base_prior().state_dict())
    assert all(
        torch.equal(t, frozen[k.replace("base.", "", 1).replace(".base_layer", "")])
        for k, t in whole.state_dict().items()
        if "lora_" not in k
    )
    size = sum(p.numel() * p.element_size() for p in initial.parameters() if p.requires_grad)
    checkpoint = tmp_path / "whole" / "checkpoint" / "ambient.safetensors"
    with safe_open(checkpoint, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 5 * size


def test_an_adapter_is_shared_by_both_parts_of_a_staged_prior(tmp_path):
    """Staged consistency on an adapter: two adapters, one base in memory."""
    base_prior().save(tmp_path / "base")
    initial = LoraPrior(
        load_prior(tmp_path / "base"), rank=2, targets=("to_q",), source=str(tmp_path / "base")
    )
    staged = fit(
        scans(tmp_path),
        config(consistency=StagedConfig(max_steps=3)),
        out=tmp_path / "run",
        progress=False,
        initial=initial,
    )
    assert isinstance(staged, StagedPrior)
    weights = [p.base.network.body.conv_in.conv.weight for p in (staged.anchor, staged.below)]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    again = load_prior(tmp_path / "run")
    assert same_bits(staged, again) and again.sigma_min == staged.sigma_min < 0.1
    assert (tmp_path / "run" / "prior" / "weights.safetensors").stat().st_size < 100_000


def test_vp_priors_are_trained_and_saved(tmp_path):
    prior = VPPrior(NETWORKS["diffusers"], SHAPE, 1.0, "v", sigma_min=0.1, sigma_max=20.0)
    levels = LevelConfig(sigma_max=20.0, relative=False)
    trained = fit(scans(tmp_path), config(levels=levels), out=tmp_path / "run", progress=False, initial=prior)
    assert same_bits(trained, load_prior(tmp_path / "run")) and not same_bits(trained, prior)


def test_what_cannot_be_saved_or_trained_is_refused_before_anything_is_written(tmp_path):
    data = scans(tmp_path)
    refused = {
        "backbone by name": VPPrior(nn.Conv2d(2, 2, 1), SHAPE, 1.0),
        "parameters that require a gradient": GaussianPrior(torch.zeros(SHAPE), torch.eye(128)),
        "expected images \\(2, 8, 8\\), got a prior of \\(2, 16, 16\\)": NetworkPrior(
            (2, 16, 16), 1.0, network=UNET
        ),
    }
    for message, prior in refused.items():
        with pytest.raises(InputError, match=message):
            fit(data, config(), out=tmp_path / "run", progress=False, initial=prior)
    conditional = NetworkPrior(SHAPE, 1.0, "mask-conditional", UNET)
    with pytest.raises(ConditioningError, match="needs an unconditional prior"):
        fit(data, config(), out=tmp_path / "run", progress=False, initial=conditional)
    mask = (torch.rand(24, 1, 8, 8, generator=seeded(1)) < 0.6).float()
    masked = Masking(mask, SHAPE)
    with pytest.raises(ConditioningError, match="needs a mask-conditional prior"):
        fit(
            (masked, masked.A(torch.randn(24, *SHAPE)), 0.1),
            config(),
            progress=False,
            initial=NetworkPrior(SHAPE, 1.0, network=UNET),
        )
    assert not (tmp_path / "run").exists()


def test_another_initial_prior_is_other_data_to_a_resumed_run(tmp_path):
    data = (Identity(SHAPE), torch.randn(24, *SHAPE, generator=seeded(0)), 0.2)
    priors = [NetworkPrior(SHAPE, 1.0, network=UNET, generator=seeded(s)) for s in (1, 2)]
    fit(data, config(), out=tmp_path / "run", progress=False, initial=priors[0])
    for other in (priors[1], None):
        with pytest.raises(InputError, match="initial was"):
            fit(data, config(max_steps=9), out=tmp_path / "run", resume=True, progress=False, initial=other)
    with pytest.raises(InputError, match="initial was"):
        fit(data, config(max_steps=9), out=tmp_path / "run", resume=True, progress=False)


# -- labels and noise that differs by entry --------------------------------------------------------------------------------


def labelled(tmp_path, num=24):
    labels = torch.arange(num) % 3
    y = torch.randn(num, *SHAPE, generator=seeded(0)) + labels.reshape(-1, 1, 1, 1)
    return write_measurements(
        tmp_path / "labelled.h5",
        measurements=y,
        mask=None,
        noise_std=0.2,
        operator="identity",
        image_shape=SHAPE,
        labels=labels.numpy(),
    )


def test_labels_of_a_file_reach_the_network_and_are_dropped_at_times(tmp_path):
    """Drawn from (seed, step, share); a network that takes none trains on the same file."""
    network = NetworkConfig(kind="ncsnpp", options={**EDM, "label_dim": 3, "dropout": 0.0})
    settings = config(network=network, batch_size=8, drop_labels=0.5)
    batches = Batches(open_source(labelled(tmp_path), settings), settings, make_accelerator("cpu"))
    drawn = [batches.draw(step) for step in range(40)]
    index = torch.cat([d.given.index for d in drawn])
    truth = torch.cat([torch.tensor(batches.indices(step)) % 3 for step in range(40)])
    assert torch.equal(index[index >= 0], truth[index >= 0])
    assert abs(float((index < 0).float().mean()) - 0.5) < 4.5 * 0.5 / 320**0.5
    assert torch.equal(batches.draw(7).given.index, drawn[7].given.index)
    prior = fit(tmp_path / "labelled.h5", settings, progress=False)
    x = torch.randn(2, *SHAPE, generator=seeded(3))
    with torch.no_grad():
        told = [prior(x, 0.5, Labels(torch.full((2,), k))) for k in (0, 2)]
    assert not torch.equal(*told)
    fit(tmp_path / "labelled.h5", config(network=UNET), progress=False)


def test_noise_by_entry_moves_with_the_image_in_training(tmp_path):
    """Levels of the shape of y are flipped, transposed and scaled as the image is; the loss gets them, not one number."""
    level = 0.1 + 0.4 * torch.rand(24, *SHAPE, generator=seeded(5))
    y = (Identity(SHAPE), torch.randn(24, *SHAPE, generator=seeded(0)), level)
    settings = config(augmentations=("flip-horizontal", "flip-vertical", "transpose", "gain"), network=UNET)
    batches = Batches(open_source(y, settings), settings, make_accelerator("cpu"))
    for step in range(12):
        drawn = batches.draw(step)
        rows = batches.indices(step)
        assert drawn.sigma_y.shape == drawn.y.shape
        ratio = drawn.sigma_y.flatten(1).amax(1) / level[rows].flatten(1).amax(1)
        # The image scaled back and the level scaled back are the same pairs of numbers in some order: moved together.
        back = torch.stack([drawn.y.flatten(1), drawn.sigma_y.flatten(1)], -1) / ratio.reshape(-1, 1, 1)
        pairs = torch.stack([y[1][rows].flatten(1), level[rows].flatten(1)], -1)
        for mine, theirs in zip(back, pairs, strict=True):
            assert torch.allclose(mine[mine[:, 1].argsort()], theirs[theirs[:, 1].argsort()], atol=1e-5)
        assert bool((drawn.sigma.reshape(-1, 1, 1, 1) >= drawn.sigma_y).all())
        assert torch.allclose(drawn.sigma_y_host, drawn.sigma_y.flatten(1).amax(1))
    assert fit(y, settings, progress=False).sigma_min >= 0.1
    for refused in (config(augmentations=("phase",)), config(consistency=StagedConfig(max_steps=2))):
        with pytest.raises(InputError, match="one for each entry"):
            fit(y, refused, progress=False)
