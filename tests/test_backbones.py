"""Networks of any kind in a prior: by name, through files, with labels and prompts, in half precision, with adapters."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from closed_forms import F64, UNET, network, normal, seeded
from torch import Tensor, nn

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.noise import VPSchedule, prediction_from_sample
from ambient_sci.priors import (
    GaussianPrior,
    Guided,
    Labels,
    LoraPrior,
    NetworkConfig,
    NetworkPrior,
    Prompt,
    StagedPrior,
    VPPrior,
    backbones,
    load_prior,
)
from ambient_sci.sampling import generate

SHAPE = (2, 8, 8)
EDM = {"model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.2}
DIFFUSERS = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
TEXT = {
    "block_out_channels": [16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
CONFIGS = {
    "unet": UNET,
    "ncsnpp": NetworkConfig(kind="ncsnpp", options=EDM),
    "ncsnpp, ddpm++": NetworkConfig(kind="ncsnpp", options={**EDM, "model_type": "ddpm"}),
    "ncsnpp, labels": NetworkConfig(kind="ncsnpp", options={**EDM, "label_dim": 5, "augment_dim": 3}),
    "adm, labels": NetworkConfig(kind="adm", options={**EDM, "label_dim": 5}),
    "diffusers": NetworkConfig(kind="diffusers-unet", options=DIFFUSERS),
    "diffusers, labels": NetworkConfig(kind="diffusers-unet", options={**DIFFUSERS, "num_class_embeds": 6}),
    "text": NetworkConfig(kind="diffusers-conditional-unet", options=TEXT),
}


def shaken(prior: NetworkPrior | VPPrior) -> NetworkPrior | VPPrior:
    """With weights as after training: last layers begin at zero."""
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=seeded(1)))
    return prior.eval()


def made(name: str) -> NetworkPrior:
    prior = shaken(NetworkPrior(SHAPE, 0.7, network=CONFIGS[name], sigma_min=0.1, generator=seeded(3)))
    assert isinstance(prior, NetworkPrior)
    return prior


# -- by name -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_any_backbone_is_saved_by_name_and_comes_back_bit_for_bit(name, tmp_path):
    prior, x = made(name), normal(2, *SHAPE).float()
    prior.save(tmp_path / "p")
    again = load_prior(tmp_path / "p")
    assert isinstance(again, NetworkPrior) and again.config == prior.config
    with torch.no_grad():
        sigma = torch.tensor([0.2, 3.0])
        assert torch.equal(prior(x, sigma), again(x, sigma))
        levels = torch.full((2,), 0.2), torch.full((2,), 2.0)
        seen = [prior.network(x, level) for level in levels]
        assert (seen[0] - seen[1]).abs().max() > 1e-2  # the level reaches the network
        alone = prior(x[1:], sigma[1:])
    assert torch.allclose(prior(x, sigma)[1:], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["ncsnpp", "diffusers"])
def test_seeds_decide_the_weights_of_foreign_networks(name):
    before = torch.get_rng_state()
    a, b, c = (
        NetworkPrior(SHAPE, 0.7, network=CONFIGS[name], generator=seeded(s)).state_dict() for s in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)


class Tiny(nn.Module):
    """A user's network: one convolution, scaled by the level."""

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, out_channels, 1)
        )
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.scale * self.body(x) * level.reshape(-1, 1, 1, 1).to(x)


def test_a_registered_network_is_a_backbone(tmp_path):
    """A buffer that is no part of the state is made anew at loading, not left without memory."""
    backbones.register("tests-tiny", lambda i, o, shape, width: Tiny(i, o, width), replace=True)
    prior, x = (
        NetworkPrior(SHAPE, 0.7, network=NetworkConfig(kind="tests-tiny", options={"width": 4})),
        normal(2, *SHAPE),
    )
    prior.save(tmp_path / "p")
    assert torch.equal(prior(x, 0.4), load_prior(tmp_path / "p")(x, 0.4))
    with pytest.raises(InputError, match="'unet', which is taken"):
        backbones.register("unet", lambda i, o, shape: Tiny(i, o, 1))
    with pytest.raises(InputError, match="'tests-tiny', which is taken"):
        backbones.register("tests-tiny", lambda i, o, shape: Tiny(i, o, 1))
    with pytest.raises(InputError, match="options that it takes, got .*depth"):
        NetworkPrior(SHAPE, 0.7, network=NetworkConfig(kind="tests-tiny", options={"depth": 4}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NetworkConfig(kind="transformer"), "expected kind unet, mlp, .*got 'transformer'"),
        (lambda: NetworkConfig(options={"width": 3}), "expected none for kind unet, got width"),
        (lambda: NetworkConfig(kind="adm", channels=(8, 8)), "under options, got channels"),
        (lambda: NetworkConfig(blocks=10**6), "blocks from 1 to 64"),
        (lambda: NetworkConfig(channels=(8,) * 40), "levels from 1 to 16"),
        (lambda: NetworkConfig(norm_groups=0), "norm_groups and head_channels of at least 1"),
        (lambda: NetworkPrior(SHAPE, 1.0, network=NetworkConfig(kind="adm", options={"depth": 3})), "got depth"),
        (lambda: NetworkPrior(SHAPE, 1.0, network=NetworkConfig(kind="ncsnpp", options={"pretrained": "x"})), "no option pretrained"),
        (lambda: NetworkPrior(SHAPE, 1.0, network=NetworkConfig(kind="ncsnpp", options={**EDM, "model_channels": 32})), "at least 64 channels"),
        (lambda: NetworkPrior(SHAPE, 1.0, network=NetworkConfig(kind="diffusers-unet", options={"norm_num_groups": 0})), "options that it takes"),
        (lambda: NetworkPrior(SHAPE, 1.0, sigma_min=2.0, sigma_max=1.0, network=UNET), "sigma_min <= sigma_max"),
    ],
)  # fmt: skip
def test_impossible_networks(build, message):
    with pytest.raises(InputError, match=message):
        build()


# -- what a denoiser is told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ncsnpp, labels", "adm, labels", "diffusers, labels"])
def test_labels_reach_the_network(name):
    prior, x = made(name), normal(3, *SHAPE).float()
    labels = Labels(torch.tensor([0, 4, -1]))
    assert prior.takes is Labels and prior.conditioning == "unconditional"
    with torch.no_grad():
        told, free = prior(x, 0.5, labels), prior(x, 0.5)
        other = prior(x, 0.5, Labels(torch.tensor([1, 4, -1])))
        repeated = prior(x.repeat(2, 1, 1, 1), 0.5, labels.repeat(2))
    assert torch.allclose(told[2], free[2], atol=1e-6)  # -1: no label, as without
    assert not torch.allclose(told[0], other[0], atol=1e-5) and torch.allclose(told[1], other[1], atol=1e-6)
    assert torch.allclose(repeated, told.repeat(2, 1, 1, 1), atol=1e-5)
    assert torch.equal(labels[[2, 0]].index, torch.tensor([-1, 0]))


def test_augmentation_labels_reach_the_network():
    prior, x = made("ncsnpp, labels"), normal(2, *SHAPE).float()
    index = torch.tensor([1, 1])
    augmented = Labels(index, torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]))
    with torch.no_grad():
        plain, told = prior(x, 0.5, Labels(index)), prior(x, 0.5, augmented)
    assert torch.allclose(plain[0], told[0], atol=1e-6) and not torch.allclose(plain[1], told[1], atol=1e-5)


def test_prompts_reach_the_network_and_guidance_drops_them():
    prior, x = made("text"), normal(2, *SHAPE).float()
    prompt = Prompt(normal(2, 3, 12).float(), normal(2, 10).float(), torch.ones(2, 6))
    with torch.no_grad():
        told = prior(x, 0.5, prompt)
        free = prior(x, 0.5, prompt.dropped(torch.tensor([True, True])))
        assert not torch.allclose(told, free, atol=1e-4)
        assert torch.allclose(prior(x[1:], 0.5, prompt[1:]), told[1:], atol=1e-5)
        guided = Guided(prior, 3.0)
        assert torch.allclose(guided(x, 0.5, prompt), free + 3 * (told - free), atol=1e-4)
        assert torch.equal(Guided(prior, 1.0)(x, 0.5, prompt), told)
        assert torch.equal(guided(x, 0.5), prior(x, 0.5))
    with pytest.raises(ConditioningError, match="expected given = Prompt, got Labels"):
        prior(x, 0.5, Labels(torch.zeros(2, dtype=torch.long)))
    with pytest.raises(InputError, match="takes labels or a prompt"):
        Guided(network(), 2.0)


def test_a_staged_prior_cuts_labels_where_it_cuts_the_batch():
    parts = [made("ncsnpp, labels"), shaken(made("ncsnpp, labels"))]
    staged, x, sigma = StagedPrior(*parts, 0.3), normal(4, *SHAPE).float(), torch.tensor([0.5, 0.1, 0.3, 0.2])
    labels = Labels(torch.tensor([0, 1, 2, -1]))
    with torch.no_grad():
        found = staged(x, sigma, labels)
        for i in range(4):
            expected = parts[0 if sigma[i] >= 0.3 else 1](x[i : i + 1], float(sigma[i]), labels[i : i + 1])
            assert torch.allclose(found[i], expected[0], atol=1e-5)


# -- half precision ------------------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """What a perfect VP network predicts for N(0, v), from inputs and to outputs of its own type; double inside."""

    def __init__(self, kind: str, variance: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.predicts, self.variance, self.level = kind, variance, 0.0

    def forward(self, state: Tensor, time: Tensor) -> Tensor:
        assert state.dtype == self.weight.dtype and time.dtype in (torch.float32, F64)
        return self.exact(state.double()).to(self.weight.dtype)

    def exact(self, state: Tensor) -> Tensor:
        alpha, scale = (1 + self.level**2) ** -0.5, self.level * (1 + self.level**2) ** -0.5
        clean = alpha * self.variance / (alpha**2 * self.variance + scale**2) * state
        noise = (state - alpha * clean) / scale
        return {"sample": clean, "epsilon": noise, "v": alpha * noise - scale * clean}[self.predicts]


def denoised(kind: str, x: Tensor, sigma: float, predicted: Tensor) -> Tensor:
    """x_0 in double from a prediction at the VP state of x, written out for each kind."""
    alpha = (1 + sigma**2) ** -0.5
    if kind == "epsilon":
        return x - sigma * predicted
    return predicted if kind == "sample" else alpha**2 * x - sigma * alpha * predicted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 5.0, 14.6, 80.0, 700.0])
def test_half_precision_costs_what_rounding_the_networks_input_and_output_costs(kind, sigma, dtype):
    """RMS error of D in float32 around a half-precision network, at most 1.2 times what the network's own rounding is worth in double."""
    network = Exact(kind, 0.25, dtype)
    network.level = sigma
    prior = VPPrior(network, (1, 32, 32), 0.5, kind)  # type: ignore[arg-type]
    x = (0.25 + sigma**2) ** 0.5 * normal(16, 1, 32, 32)
    exact = 0.25 / (0.25 + sigma**2) * x
    with torch.no_grad():
        found = prior(x.float(), sigma).double()
        state = (1 + sigma**2) ** -0.5 * x
        rounded = network.exact(state.to(dtype).double()).to(dtype).double()
    least = (denoised(kind, x, sigma, rounded) - exact).square().mean().sqrt()
    # The measurement itself comes in single precision, which is worth 2^-24 of x in D where D is a difference of the two.
    single = 2.0**-24 * x.square().mean().sqrt() if kind == "epsilon" else 0.0
    assert torch.isfinite(found).all()
    assert (found - exact).square().mean().sqrt() <= 1.2 * least + single


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["unet", "ncsnpp, labels", "adm, labels", "diffusers, labels", "text"])
def test_networks_in_half_precision_stay_near_themselves(name, dtype):
    """Weights rounded to the type; everything around the network in float32, also for inputs in half precision."""
    prior, x = made(name), normal(2, *SHAPE).float()
    with torch.no_grad():
        full = {sigma: prior(x * sigma, sigma) for sigma in (0.1, 1.0, 80.0)}
        prior.network.to(dtype)
        for sigma, expected in full.items():
            found = prior(x * sigma, sigma)
            assert found.dtype == torch.float32
            error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert error < (0.05 if dtype == torch.bfloat16 else 0.01), (sigma, error)
            assert prior((x * sigma).to(dtype), sigma).dtype == dtype


# -- VP networks and their times ---------------------------------------------------------------------------------------------------


def test_times_of_a_scaled_linear_schedule():
    """SDXL's: times 0, 100, 500, 800, 999 are VE levels 0.0292, 0.344, 1.62, 5.11, 14.61, and back; the product, not 1 - alpha^2."""
    schedule = VPSchedule()
    levels = schedule.levels()
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
    alpha2 = (1 - beta).cumprod(0)
    assert torch.allclose(levels, ((1 - alpha2) / alpha2).sqrt(), rtol=1e-9)
    assert [round(float(levels[k]), 3) for k in (0, 100, 500, 800, 999)] == [
        0.029,
        0.344,
        1.618,
        5.111,
        14.615,
    ]
    times = torch.tensor([0.0, 100.0, 500.0, 999.0], dtype=F64)
    assert torch.allclose(schedule.time(levels[times.long()]), times, atol=1e-6)
    halfway = (levels[10] * levels[11]).sqrt()
    assert torch.allclose(schedule.time(halfway[None]), torch.tensor([10.5], dtype=F64), atol=1e-6)
    assert torch.equal(schedule.time(torch.tensor([1e-4, 1e3])), torch.tensor([0.0, 999.0]))


def test_vp_priors_of_a_backbone_are_saved_and_others_say_why_not(tmp_path):
    prior = VPPrior(CONFIGS["text"], SHAPE, 1.0, "v", VPSchedule(), 0.03, 14.6, generator=seeded(1))
    shaken(prior).save(tmp_path / "p")
    again, x = load_prior(tmp_path / "p"), normal(2, *SHAPE).float()
    with torch.no_grad():
        assert torch.equal(prior(x, 0.5), again(x, 0.5)) and again.sigma_max == 14.6
    with pytest.raises(InputError, match="expected a backbone by name"):
        VPPrior(lambda x, t: x, SHAPE, 1.0).save(tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_subclass_without_a_kind_of_its_own_is_not_saved_as_its_parent(tmp_path):
    class Other(GaussianPrior):
        pass

    with pytest.raises(InputError, match="got Other, which would be loaded as GaussianPrior"):
        Other(torch.zeros(2), torch.eye(2)).save(tmp_path / "p")
    with pytest.raises(InputError, match="got Other"):
        StagedPrior(
            GaussianPrior(torch.zeros(2), torch.eye(2)), Other(torch.zeros(2), torch.eye(2)), 1.0
        ).save(tmp_path / "p")


# -- adapters ------------------------------------------------------------------------------------------------------------------


def adapted(tmp_path, source: bool) -> LoraPrior:
    base = made("text")
    base.save(tmp_path / "base")
    prior = LoraPrior(
        base, rank=2, alpha=3.0, targets=("to_q", "to_k"), source=str(tmp_path / "base") if source else None
    )
    with torch.no_grad():
        for name, p in prior.named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn(p.shape, generator=seeded(4)))
    return prior.eval()


@pytest.mark.parametrize("source", [True, False])
def test_adapters_are_saved_alone_or_with_their_base(source, tmp_path):
    prior, x = adapted(tmp_path, source), normal(2, *SHAPE).float()
    prompt = Prompt(normal(2, 3, 12).float())
    prompt = dataclasses.replace(prompt, pooled=torch.ones(2, 10), time_ids=torch.ones(2, 6))
    assert {n.split(".")[-3] for n, p in prior.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    prior.save(tmp_path / "p")
    again = load_prior(tmp_path / "p")
    with torch.no_grad():
        assert torch.equal(prior(x, 0.5, prompt), again(x, 0.5, prompt))
        assert not torch.allclose(prior(x, 0.5, prompt), made("text")(x, 0.5, prompt), atol=1e-5)
    adapter = sum(p.numel() * 4 for p in prior.parameters() if p.requires_grad)
    size = (tmp_path / "p" / "weights.safetensors").stat().st_size
    assert (size < 5 * adapter) == source


def test_a_new_adapter_changes_nothing_and_another_base_is_refused(tmp_path):
    base, x = made("text"), normal(2, *SHAPE).float()
    with torch.no_grad():
        before = base(x, 0.5)
        assert torch.allclose(LoraPrior(base)(x, 0.5), before, atol=1e-6)
    adapted(tmp_path, True).save(tmp_path / "p")
    shaken(made("text")).save(tmp_path / "base")
    with pytest.raises(InputError, match="expected the base that it was trained on"):
        load_prior(tmp_path / "p")
    with pytest.raises(InputError, match="adapter: "):
        LoraPrior(made("text"), targets=("nothing",))
    with pytest.raises(InputError, match="expected a prior with a network"):
        LoraPrior(GaussianPrior(torch.zeros(2), torch.eye(2)))


def test_vp_predictions_are_told_from_each_other():
    """The three kinds at one state, each from the clean image, give that image back; swapped they do not."""
    clean, sigma = normal(2, 1, 4, 4), 0.7
    x = clean + sigma * normal(2, 1, 4, 4, seed=2)
    alpha = (1 + sigma**2) ** -0.5
    for kind in ("epsilon", "v", "sample"):
        told = prediction_from_sample(clean, alpha * x, sigma * alpha, kind)  # type: ignore[arg-type]
        for other in ("epsilon", "v", "sample"):
            found = VPPrior(lambda s, t, told=told: told, (1, 4, 4), 1.0, other)(x, sigma)  # type: ignore[arg-type]
            assert torch.allclose(found, clean, atol=1e-12) == (kind == other)


def test_images_of_classes_are_generated_and_guided():
    """Each image of its label, whatever the batch; with guidance as `Guided` says; what does not fit is refused."""
    prior = made("ncsnpp, labels")
    prior.sigma_max = 5.0
    labels = Labels(torch.tensor([0, 3, -1]))
    options = {"steps": 4, "sampler": "multistep"}
    together = generate(prior, 3, given=labels, generator=seeded(1), **options)
    apart = generate(prior, 3, given=labels, batch_size=1, generator=seeded(1), **options)
    assert torch.allclose(together, apart, atol=1e-4)
    free = generate(prior, 3, generator=seeded(1), **options)
    assert torch.allclose(together[2], free[2], atol=1e-4) and not torch.allclose(
        together[0], free[0], atol=1e-3
    )
    guided = generate(prior, 3, given=labels, guidance=4.0, generator=seeded(1), **options)
    assert not torch.allclose(guided[0], together[0], atol=1e-3) and torch.allclose(
        guided[2], free[2], atol=1e-4
    )
    with pytest.raises(InputError, match="one row for each of 2 images, got 3"):
        generate(prior, 2, given=labels, **options)
    with pytest.raises(InputError, match="expected labels or a prompt to be guided by"):
        generate(prior, 2, guidance=3.0, **options)
    with pytest.raises(ConditioningError, match="expected given = nothing, got Labels"):
        generate(network(sigma_max=5.0), 3, given=labels, **options)
