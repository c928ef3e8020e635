r"""Priors on disk: bit for bit, whole or not at all, and damaged ones refused in one line."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from closed_forms import F64, MLP, gaussian_prior, mixture_prior, network, normal, random_mask
from closed_forms import NETWORK_SHAPE as SHAPE
from safetensors.torch import load_file, save_file

import ambient_sci as asci
from ambient_sci.data import brains
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, Masking
from ambient_sci.priors import (
    ConditionalMean,
    GaussianMixturePrior,
    GaussianPrior,
    KeptRows,
    Prior,
    StagedPrior,
    load_prior,
    pretrained_folder,
    pretrained_names,
)

KINDS = {
    "gaussian": lambda: gaussian_prior(SHAPE),
    "gaussian, single": lambda: GaussianPrior(normal(*SHAPE).float(), torch.linspace(0.1, 2.0, 128)),
    "mixture": lambda: GaussianMixturePrior(normal(3, *SHAPE), 0.4, torch.tensor([0.1, 0.2, 0.3], dtype=F64)),
    "network": network,
    "network, double": lambda: network(config=MLP).double(),
    "mask-conditional": lambda: network("mask-conditional", sigma_min=0.05, sigma_max=12.0, about={"people": 3}),
    "staged": lambda: StagedPrior(network(seed=1), network(seed=2, config=MLP), 0.3),
    "staged, one network": lambda: (lambda p: StagedPrior(p, p, 0.1))(network()),
    "staged, mask-conditional": lambda: StagedPrior(network("mask-conditional"), network("mask-conditional", seed=1), 0.3),
    "staged, exact": lambda: StagedPrior(gaussian_prior(SHAPE), mixture_prior(SHAPE), 1 / 3),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_saved_priors_come_back_bit_for_bit(kind, tmp_path):
    prior: Prior = KINDS[kind]()
    prior.save(tmp_path / "prior")
    again = load_prior(tmp_path / "prior")
    assert {p.name for p in tmp_path.iterdir()} == {"prior"}  # nothing temporary is left
    assert {p.name for p in (tmp_path / "prior").iterdir()} == {"prior.json", "weights.safetensors"}
    assert type(again) is type(prior) and not again.training
    for what in ("shape", "conditioning", "sigma_min", "sigma_max", "data_std"):
        assert getattr(again, what) == getattr(prior, what)
    expected, found = prior.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) and expected[k].dtype == found[k].dtype for k in expected)
    x = normal(3, *SHAPE)
    rows = KeptRows(Masking(random_mask(3, 1, 8, 8), SHAPE)) if prior.takes is KeptRows else None
    sigma = torch.tensor([0.05, 0.3, 2.0], dtype=F64)
    with torch.no_grad():
        assert torch.equal(prior(x, sigma, rows), again(x, sigma, rows))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_loaded_tensors_lie_where_new_ones_would(kind, tmp_path):
    """Kernels choose their path by alignment, and paths round differently: safetensors' views lie anywhere in the file."""
    KINDS[kind]().save(tmp_path / "p")
    tensors = load_prior(tmp_path / "p").state_dict()
    assert all(t.data_ptr() % 64 == 0 for t in tensors.values())
    storages = {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert len(storages) == len(tensors)  # each its own, none a view into the file


def test_descriptions_are_plain_json(tmp_path):
    KINDS["mask-conditional"]().save(tmp_path / "p")
    description = json.loads((tmp_path / "p" / "prior.json").read_text())
    assert description["shape"] == [2, 8, 8] and description["about"] == {"people": 3}
    assert description["kind"] == "network" and description["format"] == 1


def test_a_prior_is_replaced_whole(tmp_path):
    network(seed=1).save(tmp_path / "p")
    gaussian_prior(SHAPE).save(tmp_path / "p")
    assert isinstance(load_prior(tmp_path / "p"), GaussianPrior)
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_saving_never_removes_what_is_no_prior(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for path in ("results", "file"):
        with pytest.raises(InputError, match="expected a new folder or one with a prior"):
            gaussian_prior(SHAPE).save(tmp_path / path)
    assert (tmp_path / "results" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more work"
    with pytest.raises(InputError, match="ConditionalMean"):
        ConditionalMean(gaussian_prior(SHAPE), MRI(torch.ones(8, 8))).save(tmp_path / "p")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "results"]


def test_a_training_run_is_read_as_its_prior(tmp_path):
    gaussian_prior(SHAPE).save(tmp_path / "run" / "prior")
    assert isinstance(asci.load_prior(str(tmp_path / "run"), device="cpu"), GaussianPrior)


def edited(path, **changes):
    description = json.loads((path / "prior.json").read_text())
    description.update(changes)
    (path / "prior.json").write_text(json.dumps({k: v for k, v in description.items() if v != "drop"}))


def retensored(path, edit):
    tensors = load_file(path / "weights.safetensors")
    edit(tensors)
    save_file(tensors, path / "weights.safetensors")


DAMAGE = {
    "no folder": lambda p: shutil.rmtree(p),
    "no description": lambda p: (p / "prior.json").unlink(),
    "no weights": lambda p: (p / "weights.safetensors").unlink(),
    "empty description": lambda p: (p / "prior.json").write_text(""),
    "truncated description": lambda p: (p / "prior.json").write_text((p / "prior.json").read_text()[:40]),
    "binary description": lambda p: (p / "prior.json").write_bytes(b"\xff\xfe\x00\x01"),
    "a list": lambda p: (p / "prior.json").write_text("[1, 2]"),
    "another format": lambda p: edited(p, format=99),
    "another kind": lambda p: edited(p, kind="oracle"),
    "an unknown key": lambda p: edited(p, colour="red"),
    "no shape": lambda p: edited(p, shape="drop"),
    "a shape of words": lambda p: edited(p, shape=["a", "b"]),
    "no number": lambda p: edited(p, sigma_min="low"),
    "nothing": lambda p: edited(p, data_std=None),
    "a negative number": lambda p: edited(p, data_std=-1.0),
    "another size": lambda p: edited(p, shape=[3, 8, 8]),
    "no network": lambda p: edited(p, network=[]),
    "another network": lambda p: edited(p, network={"channels": [8, 8], "norm_groups": 4, "head_channels": 8}),
    "truncated weights": lambda p: (p / "weights.safetensors").write_bytes((p / "weights.safetensors").read_bytes()[:-100]),
    "empty weights": lambda p: (p / "weights.safetensors").write_bytes(b""),
    "a weight missing": lambda p: retensored(p, lambda t: t.pop(next(iter(t)))),
    "a weight too many": lambda p: retensored(p, lambda t: t.update(extra=torch.zeros(3))),
    "a weight of another shape": lambda p: retensored(p, lambda t: t.update({next(iter(t)): torch.zeros(3)})),
    "staged of nothing": lambda p: edited(p, kind="staged"),
    "staged at no level": lambda p: edited(p, kind="staged", sigma_n=None, anchor={"kind": "gaussian"}, below={"kind": "gaussian"}),
    "gaussian of nothing": lambda p: edited(p, kind="gaussian"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_priors_are_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "prior"
    network().save(path)
    DAMAGE[damage](path)
    with pytest.raises(InputError) as refusal:
        load_prior(path)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) > 20


# -- priors that ship with the package ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pretrained_names())
def test_shipped_priors_load_and_have_a_card(name):
    prior: Any = load_prior(f"pretrained:{name}")
    assert (
        prior.conditioning == "unconditional" and prior.sigma_min > 0
    )  # learned from measurements, not from clean images
    folder = pretrained_folder(name)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 8_000_000
    card = folder.with_name(f"{name}.md").read_text()
    assert "Limits" in card and "licence" in card and prior.config.about["licence"].startswith("Apache-2.0")


def test_a_shipped_prior_denoises_heads_it_has_not_seen():
    """64-px slices of three other people at its lowest level: much nearer to the truth than what was measured."""
    prior = load_prior("pretrained:brain64")
    images, _ = brains("test")
    clean = torch.cat((images[::6], torch.zeros_like(images[::6])), 1)
    noisy = clean + prior.sigma_min * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (prior(noisy, prior.sigma_min) - clean).square().mean().sqrt()
    assert error < 0.7 * prior.sigma_min


def test_an_unknown_shipped_prior_is_refused_with_the_names_of_those_there_are():
    with pytest.raises(InputError, match="expected one of brain64, got 'brain'"):
        load_prior("pretrained:brain")
