"""Where weights come from: a network of one's own, another prior, by place or as it is; settings misspelt."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import ambient_sci as asci
from ambient_sci.errors import InputError
from ambient_sci.operators import Identity
from ambient_sci.priors import NetworkConfig, NetworkPrior, backbones, load_prior
from ambient_sci.priors.registry import REGISTERED
from ambient_sci.training import RunFolder, TrainConfig, fit, fit_em

SHAPE = (1, 4, 4)
MLP = NetworkConfig(kind="mlp", channels=(16,))
QUICK = TrainConfig(max_steps=3, batch_size=4, network=MLP, device="cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(scale: float = 1.0):
    y = scale * torch.randn(16, *SHAPE, generator=rng())
    return Identity(SHAPE), y, 0.2 * scale


class Mine(nn.Module):
    """A convolution that hears the level."""

    def __init__(self, channels: int = 1, width: int = 4) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(channels, width, 3, padding=1),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x, level):
        return self.two(torch.tanh(self.one(x)) * level.log().reshape(-1, 1, 1, 1).to(x))


def test_a_module_is_trained_as_a_copy_from_the_weights_it_has():
    with torch.random.fork_rng():
        mine = Mine()
    before = {k: t.clone() for k, t in mine.state_dict().items()}
    prior = fit(data(), QUICK, progress=False, network=mine)
    assert isinstance(prior.network, Mine) and prior.network is not mine
    assert all(torch.equal(t, before[k]) for k, t in mine.state_dict().items())
    assert not all(torch.equal(t, before[k]) for k, t in prior.network.state_dict().items())
    assert asci.generate(prior, 2, steps=3, seed=0).shape == (2, *SHAPE)
    assert asci.reconstruct(prior, *data(), seed=0, samples=2, steps=3).mean.shape == (16, *SHAPE)


def test_a_module_cannot_be_written_and_the_message_says_how_it_can(tmp_path):
    with torch.random.fork_rng():
        mine = Mine()
    prior = fit(data(), QUICK, progress=False, network=mine)
    with pytest.raises(InputError, match="register"):
        prior.save(tmp_path / "p")
    for call in (lambda: fit(data(), QUICK, tmp_path / "run", progress=False, network=mine), lambda: fit_em(data(), network=mine)):  # fmt: skip
        with pytest.raises(InputError, match=r"backbones\.register\('mine', factory\).*network='mine'"):
            call()
    assert not list(tmp_path.iterdir())


def test_registered_it_can_be_written(tmp_path):
    backbones.register("mine-of-test-start", lambda ins, outs, shape, width=4: Mine(ins, width))
    try:
        prior = fit(data(), QUICK, tmp_path / "run", progress=False, network="mine-of-test-start")
        again = load_prior(tmp_path / "run")
        assert all(map(torch.equal, prior.state_dict().values(), again.state_dict().values()))
        wide = NetworkConfig(kind="mine-of-test-start", options={"width": 6})
        assert fit(data(), QUICK, progress=False, network=wide).network.one.out_channels == 6
    finally:
        del REGISTERED["mine-of-test-start"]


class Flat(Mine):
    def forward(self, x, level):
        return super().forward(x, level).flatten(1)


class Deaf(Mine):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("network", "fragments"),
    [
        (Flat(), ["Flat", "(B, 1, 4, 4)", "(2, 16)"]),
        (Deaf(), ["Deaf", "forward(x (B, 1, 4, 4), level (B,))", "TypeError"]),
        (Mine(2), ["Mine", "RuntimeError"]),
        (3, ["NetworkConfig", "unet", "int"]),
        ("transformer", ["unet", "transformer"]),
        (NetworkPrior(SHAPE, 1.0, network=MLP), ["init_from"]),
    ],
)
def test_networks_that_do_not_fit(network, fragments):
    with pytest.raises(InputError) as error:
        fit(data(), QUICK, progress=False, network=network)
    said = str(error.value)
    assert "\n" not in said and "module:" not in said
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize("how", ["place", "prior", "initial", "config"])
def test_training_goes_on_from_another_prior(tmp_path, how):
    first = fit(data(), QUICK, tmp_path / "first", progress=False)
    place = str(tmp_path / "first")
    config, given = (
        QUICK,
        {"place": {"init_from": place}, "prior": {"init_from": first}, "initial": {"initial": place}},
    )
    if how == "config":
        config = TrainConfig.from_dict({**QUICK.to_dict(), "init_from": place})
    second = fit(data(), config, tmp_path / "second", progress=False, **given.get(how, {}))
    reference = fit(data(), QUICK, progress=False, initial=first)
    assert all(map(torch.equal, second.state_dict().values(), reference.state_dict().values()))
    assert RunFolder(tmp_path / "second").config.init_from == (None if how == "prior" else place)
    assert "initial" in RunFolder(tmp_path / "second").read_json("run.json")["data"]
    if how != "prior":  # resumed, the place need not be given again
        longer = TrainConfig.from_dict({**RunFolder(tmp_path / "second").config.to_dict(), "max_steps": 5})
        fit(data(), longer, tmp_path / "second", resume=True, progress=False)


@pytest.mark.parametrize(
    ("scale", "shape", "options", "fragment"),
    [
        (50.0, SHAPE, {"init_from": "PRIOR"}, r"scale \(standard deviation"),
        (0.02, SHAPE, {"init_from": "PRIOR"}, "multiply measurements and noise levels by"),
        (1.0, (1, 8, 8), {"init_from": "PRIOR"}, r"expected images \(1, 8, 8\)"),
        (1.0, SHAPE, {"init_from": "nowhere"}, "nowhere"),
        (1.0, SHAPE, {"init_from": 3}, "expected a prior"),
        (1.0, SHAPE, {"init_from": "PRIOR", "initial": "PRIOR"}, "got initial as well"),
        (1.0, SHAPE, {"device": "tpu"}, "'auto', 'cpu', 'cuda'"),
        (1.0, SHAPE, {"seed": -1}, "seed"),
    ],
)
def test_what_training_cannot_go_on_from(tmp_path, scale, shape, options, fragment):
    NetworkPrior(SHAPE, 1.0, network=MLP).save(tmp_path / "p")
    options = {k: str(tmp_path / "p") if v == "PRIOR" else v for k, v in options.items()}
    y = scale * torch.randn(16, *shape, generator=rng())
    with pytest.raises(InputError, match=fragment):
        fit((Identity(shape), y, 0.2 * scale), QUICK, progress=False, **options)


def test_a_seed_and_a_device_stand_before_the_configurations():
    priors = [fit(data(), QUICK, progress=False, seed=seed, device="cpu") for seed in (0, 5)]
    assert not torch.equal(*(next(p.parameters()) for p in priors))
    plain = fit(data(), QUICK, progress=False)
    assert torch.equal(next(plain.parameters()), next(priors[0].parameters()))


@pytest.mark.parametrize(
    "name",
    ["TrainConfig", "EMConfig", "LevelConfig", "LossConfig", "NetworkConfig", "StagedConfig", "JointConfig"],
)
def test_misspelt_settings_are_named_as_in_files(name):
    kind = getattr(asci, name)
    with pytest.raises(InputError) as error:
        kind(batchsize=3)
    said = str(error.value)
    assert "\n" not in said and said.startswith(f"{name}: batchsize: unknown setting")
    assert all(field.name in said for field in dataclasses.fields(kind))
    assert "batch_size" not in kind.__dataclass_fields__ or "perhaps batch_size" in said
    assert (
        "batchsize" not in inspect.signature(kind).parameters and len(inspect.signature(kind).parameters) > 2
    )
