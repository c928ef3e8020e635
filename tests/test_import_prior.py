"""Checkpoints of EDM's structure, made here and pickled as its code pickles, become priors with the same answers; hostile ones do not."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ambient_sci.cli import main
from ambient_sci.data import ReferenceFile
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.operators import Masking
from ambient_sci.priors import (
    AmbientDiffusionPrior,
    KeptRows,
    Labels,
    NetworkConfig,
    NetworkPrior,
    VEPrior,
    VPPrior,
    backbones,
    import_prior,
    load_prior,
)
from ambient_sci.priors.edm_files import read_checkpoint
from ambient_sci.priors.edm_networks import architecture
from ambient_sci.priors.vp_times import (
    ContinuousSchedule,
    CosineSchedule,
    schedule_from_dict,
    schedule_to_dict,
)

SIZE = 8
SONG = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "group_channels": 4,
}
KINDS = {
    "ddpm": ("ncsnpp", {**SONG, "model_type": "ddpm", "augment_dim": 9}),
    "ncsn": ("ncsnpp", {**SONG, "model_type": "ncsn", "label_dim": 2}),
    "adm": ("adm", {**SONG, "model_channels": 64, "attn_resolutions": [], "label_dim": 2}),
}


# -- EDM's way of pickling, with nothing of EDM's


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the import ran what is in the file")


@pytest.fixture
def persistence(monkeypatch):
    """A module torch_utils.persistence, so that pickles name EDM's function."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
    return module


class Persistent:
    """Pickled as EDM pickles an object: its class's name, source code and state, under one function."""

    def __init__(self, class_name: str, state: dict) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        source = "import os\nos.system('touch /tmp/ambient_sci_was_run')\n"
        meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": self.class_name,
            "state": self.state,
        }
        return _reconstruct_persistent_obj, (meta,)


def persistent(module: nn.Module, class_name: str, **attributes) -> Persistent:
    """A module and those in it, containers of torch left as they are."""
    children = OrderedDict()
    for name, child in module._modules.items():
        if isinstance(child, nn.ModuleDict):
            container = nn.ModuleDict()
            container._modules = {k: persistent(v, "UNetBlock") for k, v in child._modules.items()}
            children[name] = container
        elif child is not None:
            children[name] = persistent(child, type(child).__name__)
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float)) and k != "training"}
    state = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": children,
        "skip_scale": np.sqrt(0.5),
        **plain,
        **attributes,
    }
    return Persistent(class_name, state)


def network(kind: str, in_channels: int = 3, out_channels: int = 3, **more) -> nn.Module:
    """deepinv's network under random weights."""
    name, options = KINDS[kind]
    config = NetworkConfig(name, options={**options, **more})
    from ambient_sci.priors import foreign_networks

    torch.manual_seed(0)
    model = foreign_networks.FACTORIES[config.kind](
        in_channels, out_channels, (out_channels, SIZE, SIZE), **config.options
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model.eval()


def wrapped(model: nn.Module, wrapper: str, **attributes) -> Persistent:
    inner = "DhariwalUNet" if hasattr(model.model, "out_conv") else "SongUNet"
    whole = nn.Module()
    whole.model = model.model
    found = persistent(whole, wrapper, **attributes)
    found.state["_modules"]["model"].class_name = inner
    found.state["_init_kwargs"] = {"dropout": 0.13, "model_type": inner}
    return found


def snapshot(path: Path, model: nn.Module, wrapper: str, protocol: int = 4, **attributes) -> Path:
    data = {
        "ema": wrapped(model, wrapper, **attributes),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}),
        "augment_pipe": None,
        "dataset_kwargs": {"resolution": SIZE, "corruption_probability": 0.5},
    }
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def states(channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [0.05, 0.7, 9.0]
    )


def raw(model: nn.Module, x: torch.Tensor, time: torch.Tensor, labels: Labels | None) -> torch.Tensor:
    with torch.no_grad():
        return model.at(x, time, labels)


def wide(sigma: torch.Tensor) -> torch.Tensor:
    return sigma[:, None, None, None]


#: D of each preconditioning, written out from table 1 of Karras et al. (2022).
def expected(
    scheme: str, model: nn.Module, x: torch.Tensor, sigma: torch.Tensor, labels: Labels | None
) -> torch.Tensor:
    s = wide(sigma)
    if scheme == "edm":
        v = 0.25 + s**2
        return 0.25 / v * x + 0.5 * s / v.sqrt() * raw(model, x / v.sqrt(), sigma.log() / 4, labels)
    if scheme == "ve":
        return x + s * raw(model, x, (sigma / 2).log(), labels)
    if scheme == "vp":
        time = 999 * ((0.01 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
        return x - s * raw(model, x / (1 + s**2).sqrt(), time, labels)
    u = CosineSchedule().levels()
    index = torch.tensor([int((u - v).abs().argmin()) for v in sigma])
    return x - s * raw(model, x / (1 + s**2).sqrt(), (999 - index).float(), labels)[:, : x.shape[1]]


CASES = [
    ("edm", "EDMPrecond", "ddpm", NetworkPrior),
    ("edm", "EDMPrecond", "ncsn", NetworkPrior),
    ("edm", "EDMPrecond", "adm", NetworkPrior),
    ("vp", "VPPrecond", "ddpm", VPPrior),
    ("ve", "VEPrecond", "ncsn", VEPrior),
    ("iddpm", "iDDPMPrecond", "adm", VPPrior),
]


@pytest.mark.parametrize(("scheme", "wrapper", "kind", "prior_type"), CASES)
def test_a_snapshot_answers_as_it_did(tmp_path, persistence, scheme, wrapper, kind, prior_type):
    model = network(kind, 3, 6 if scheme == "iddpm" else 3)
    attributes = (
        {"sigma_data": 0.5}
        if scheme == "edm"
        else {"sigma_min": 0.02, "sigma_max": 100.0}
        if scheme == "ve"
        else {}
    )
    path = snapshot(tmp_path / "edm.pkl", model, wrapper, **attributes)
    prior = import_prior(path)
    assert type(prior) is prior_type and prior.shape == (3, SIZE, SIZE) and prior.data_std == 0.5
    assert not Path("/tmp/ambient_sci_was_run").exists()
    x, sigma = states()
    labels = Labels(torch.tensor([1, 0, -1])) if KINDS[kind][1].get("label_dim") else None
    want = expected(scheme, model, x, sigma, labels)
    assert want.std() > 0.1
    prior.save(tmp_path / "prior")
    for found in (prior, load_prior(tmp_path / "prior")):
        with torch.no_grad():
            assert torch.allclose(found(x, sigma, labels), want, rtol=1e-4, atol=1e-4)
    about = prior.describe()["about"]
    assert about["preconditioning"] == scheme and about["dataset"]["corruption_probability"] == 0.5
    assert prior.config.network.options["dropout"] == 0.13 if scheme == "edm" else True


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle(tmp_path, persistence, protocol):
    model = network("ddpm")
    path = snapshot(tmp_path / "edm.pkl", model, "EDMPrecond", protocol, sigma_data=0.5)
    found = read_checkpoint(path)
    assert found.wrapper == "EDMPrecond" and found.settings["sigma_data"] == 0.5
    mine = model.model.state_dict()
    assert found.tensors.keys() == mine.keys() and all(found.tensors[k].equal(mine[k]) for k in mine)


@pytest.mark.parametrize(("scheme", "kind"), [("edm", "ddpm"), ("ve", "ncsn")])
@pytest.mark.parametrize("form", ["pt", "legacy", "safetensors", "deepinv"])
def test_tensors_alone_need_the_preconditioning(tmp_path, scheme, kind, form):
    model = network(kind)
    tensors = {f"{'' if form == 'deepinv' else 'model.'}{k}": v for k, v in model.model.state_dict().items()}
    path = tmp_path / f"x.{'safetensors' if form == 'safetensors' else 'pt'}"
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(InputError, match="expected the preconditioning .edm, vp"):
        import_prior(path)
    x, sigma = states()
    labels = Labels(torch.tensor([1, 0, -1])) if kind == "ncsn" else None
    with torch.no_grad():
        got = import_prior(path, scheme)(x, sigma, labels)
    assert torch.allclose(got, expected(scheme, model, x, sigma, labels), rtol=1e-4, atol=1e-4)


# -- Ambient Diffusion


def gated_reference(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A gated convolution of Ambient Diffusion's, one of its branches at a time."""
    w, f = conv.weight, conv.resample_filter
    if conv.fused_resample and conv.down:
        pad = w.shape[-1] // 2 + (f.shape[-1] - 1) // 2
        gate = torch.sigmoid(F.conv2d(x, conv.gate_weight, padding=pad))
        x = F.conv2d(x, w, padding=pad) * torch.sigmoid(gate)
        x = F.conv2d(x, f.tile([conv.out_channels, 1, 1, 1]), groups=conv.out_channels, stride=2)
        return x + conv.bias.reshape(1, -1, 1, 1)
    if conv.up:
        f = f.mul(4).tile([conv.in_channels, 1, 1, 1])
        x = F.conv_transpose2d(x, f, groups=conv.in_channels, stride=2, padding=(f.shape[-1] - 1) // 2)
    if conv.down:
        f = f.tile([conv.in_channels, 1, 1, 1])
        x = F.conv2d(x, f, groups=conv.in_channels, stride=2, padding=(f.shape[-1] - 1) // 2)
    if w is not None:
        gate = torch.sigmoid(F.conv2d(x, conv.gate_weight, padding=w.shape[-1] // 2))
        x = F.conv2d(x, w, padding=w.shape[-1] // 2) * torch.sigmoid(gate)
    return x if conv.bias is None else x + conv.bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("kind", ["ddpm", "ncsn"])
def test_gated_convolutions(kind):
    model = network(kind, label_dim=0, gated=True)
    seen = set()
    for conv in model.modules():
        if hasattr(conv, "gate_weight"):
            x = torch.randn(2, conv.in_channels, 8, 8)
            assert torch.allclose(conv(x), gated_reference(conv, x), atol=1e-5)
            seen.add((conv.up, conv.down, conv.fused_resample, conv.weight is not None))
    assert len(seen) == (4 if kind == "ncsn" else 3)


@pytest.mark.parametrize(
    ("kind", "gated", "channels"),
    [("ddpm", True, 3), ("ncsn", True, 3), ("ddpm", False, 3), ("ddpm", True, 1)],
)
def test_ambient_diffusions_networks_are_mask_conditional_priors(
    tmp_path, persistence, kind, gated, channels
):
    model = network(kind, 2 * channels, 2 * channels, gated=gated, label_dim=0, augment_dim=0)
    named = OrderedDict((f"_orig_mod.model.{k}", v) for k, v in model.model.state_dict().items())
    data = {
        "ema": named,
        "loss_fn": Persistent("AmbientLoss", {}),
        "dataset_kwargs": {"corruption_probability": 0.4},
    }
    path = tmp_path / "network-snapshot-000100.pkl"
    path.write_bytes(pickle.dumps(data))
    prior = import_prior(path, None if channels == 3 else "ambient")
    assert type(prior) is AmbientDiffusionPrior and prior.conditioning == "mask-conditional"
    assert prior.about["dataset"] == {"corruption_probability": 0.4} and "left_out" in prior.about
    x, sigma = states(channels)
    mask = (torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2)) < 0.6).float()
    both = torch.cat([x * mask, mask.expand(-1, channels, -1, -1)], 1)
    want = expected("edm", model, both, sigma, None)[:, :channels]
    given = KeptRows(Masking(mask, img_size=(channels, SIZE, SIZE)))
    prior.save(tmp_path / "prior")
    with torch.no_grad():
        assert torch.allclose(prior(x * mask, sigma, given), want, rtol=1e-4, atol=1e-5)
        assert load_prior(tmp_path / "prior")(x * mask, sigma, given).equal(prior(x * mask, sigma, given))
    with pytest.raises(ConditioningError):
        prior(x, sigma)


def test_such_a_prior_is_sampled_with_a_fixed_mask(tmp_path):
    from ambient_sci.sampling import generate_fixed_mask

    model = network("ddpm", 6, 6, gated=True, augment_dim=0)
    torch.save(model.model.state_dict(), tmp_path / "x.pt")
    mask = (torch.rand(2, 1, SIZE, SIZE) < 0.6).float()
    images = generate_fixed_mask(
        import_prior(tmp_path / "x.pt"), Masking(mask, img_size=(3, SIZE, SIZE)), 2, steps=2
    )
    assert images.shape == (2, 3, SIZE, SIZE)


# -- the published networks, name by name


def block(prefix: str, attention: bool, skip: str, resampled: bool) -> set[str]:
    """Tensors of a block of EDM's; ``skip``: "", "kernel" or "filter"."""
    names = {
        f"{part}.{end}"
        for part in ("norm0", "conv0", "affine", "norm1", "conv1")
        for end in ("weight", "bias")
    }
    names |= (
        {f"{part}.{end}" for part in ("norm2", "qkv", "proj") for end in ("weight", "bias")}
        if attention
        else set()
    )
    names |= {"conv0.resample_filter"} if resampled else set()
    names |= {"skip.weight", "skip.bias"} if skip == "kernel" else set()
    names |= {"skip.resample_filter"} if skip and resampled else set()
    return {f"{prefix}.{name}" for name in names}


def published_names(
    kind: str, resolution: int, mult: list[int], blocks: int, attention: list[int], adm: bool
) -> set[str]:
    """Every tensor of an unconditional published network with augmentation, from the architecture as the paper and its code describe it."""
    names = {f"map_layer{k}.{end}" for k in (0, 1) for end in ("weight", "bias")} | {"map_augment.weight"}
    names |= {"map_noise.freqs"} if kind == "ncsn" else set()
    projects = not adm  # SongUNet's resampled skips have a kernel even where the width stays
    width, skips = 0, []
    for level, m in enumerate(mult):
        size = resolution >> level
        if level == 0:
            names |= {f"enc.{size}x{size}_conv.{end}" for end in ("weight", "bias")}
            width = m if adm else 1
        else:
            names |= block(f"enc.{size}x{size}_down", False, "kernel" if projects else "filter", True)
            if kind == "ncsn":
                names |= {
                    f"enc.{size}x{size}_aux_residual.{end}" for end in ("weight", "bias", "resample_filter")
                }
        skips.append(width)
        for k in range(blocks):
            names |= block(
                f"enc.{size}x{size}_block{k}", size in attention, "kernel" if width != m else "", False
            )
            width = m
            skips.append(width)
    for level, m in reversed(list(enumerate(mult))):
        size = resolution >> level
        if level == len(mult) - 1:
            names |= block(f"dec.{size}x{size}_in0", True, "", False) | block(
                f"dec.{size}x{size}_in1", False, "", False
            )
        else:
            names |= block(f"dec.{size}x{size}_up", False, "kernel" if projects else "filter", True)
        for k in range(blocks + 1):
            attends = size in attention and (adm or k == blocks)
            names |= block(
                f"dec.{size}x{size}_block{k}", attends, "kernel", False
            )  # a skip joins: never as wide
            width = m
    ends = (
        ("out_norm", "out_conv")
        if adm
        else (f"dec.{resolution}x{resolution}_aux_norm", f"dec.{resolution}x{resolution}_aux_conv")
    )
    return names | {f"{part}.{end}" for part in ends for end in ("weight", "bias")}


PUBLISHED = {
    "cifar10 vp": ("ddpm", "ncsnpp", 32, [2, 2, 2], 4, [16], 128, 55.7),
    "cifar10 ve": ("ncsn", "ncsnpp", 32, [2, 2, 2], 4, [16], 128, 56.4),
    "ffhq, afhqv2 vp": ("ddpm", "ncsnpp", 64, [1, 2, 2, 2], 4, [16], 128, 61.8),
    "ffhq, afhqv2 ve": ("ncsn", "ncsnpp", 64, [1, 2, 2, 2], 4, [16], 128, 62.8),
    "imagenet adm": ("", "adm", 64, [1, 2, 3, 4], 3, [32, 16, 8], 192, 295.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_tensor_of_the_published_networks_has_a_place(name):
    kind, backbone, size, mult, blocks, attention, width, millions = PUBLISHED[name]
    options = {
        "model_channels": width,
        "channel_mult": mult,
        "num_blocks": blocks,
        "attn_resolutions": attention,
        "augment_dim": 9,
    }
    options |= {"model_type": kind} if kind else {"label_dim": 1000}
    with torch.device("meta"):
        model = backbones.build(NetworkConfig(backbone, options=options), (3, size, size))
    tensors = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    wanted = published_names(kind, size, mult, blocks, attention, backbone == "adm")
    wanted |= {"map_label.weight"} if not kind else set()
    assert tensors.keys() == wanted
    assert sum(
        v.numel() for k, v in tensors.items() if "filter" not in k and "freqs" not in k
    ) / 1e6 == pytest.approx(millions, abs=0.1)
    found = architecture(tensors, name)
    said = found.config.options
    assert found.config.kind == backbone and found.resolution == size
    assert {k: said[k] for k in options} == options


# -- refused


def changed(path: Path, **tensors) -> Path:
    model = network("ddpm")
    torch.save({**model.model.state_dict(), **tensors}, path)
    return path


def test_what_no_network_has_a_place_for_is_refused(tmp_path, persistence):
    with pytest.raises(InputError, match="1 surplus.*odd"):
        import_prior(changed(tmp_path / "x.pt", odd=torch.zeros(1)), "edm")
    with pytest.raises(InputError, match="1 of another shape"):
        import_prior(changed(tmp_path / "y.pt", **{"map_layer1.bias": torch.zeros(3)}), "edm")
    with pytest.raises(InputError, match="skip encoder"):
        import_prior(changed(tmp_path / "z.pt", **{"enc.4x4_aux_skip.weight": torch.zeros(1)}), "edm")
    with pytest.raises(InputError, match="another variant"):
        import_prior(changed(tmp_path / "w.pt", **{"map_noise.freqs": torch.zeros(16)}), "edm")
    with pytest.raises(InputError, match="tensors of an EDM network"):
        torch.save({"a": torch.zeros(2)}, tmp_path / "v.pt")
        import_prior(tmp_path / "v.pt", "edm")
    path = snapshot(tmp_path / "a.pkl", network("ddpm"), "EDMPrecond")
    with pytest.raises(InputError, match="expected the preconditioning edm, which the file has, got vp"):
        import_prior(path, "vp")
    with pytest.raises(InputError, match="got 'NewPrecond'"):
        import_prior(snapshot(tmp_path / "b.pkl", network("ddpm"), "NewPrecond"))
    with pytest.raises(InputError, match="6 output channels"):
        import_prior(snapshot(tmp_path / "c.pkl", network("ddpm"), "iDDPMPrecond"))
    torch.save(network("ncsn", 6, 6).model.state_dict(), tmp_path / "d.pt")
    with pytest.raises(InputError, match="a prior is told one thing"):
        import_prior(tmp_path / "d.pt")


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ambient_sci_was_run",)


class EvalInState:
    def __reduce__(self):
        return eval, ("__import__('os').system('touch /tmp/ambient_sci_was_run')",)


@pytest.mark.parametrize("payload", [Evil(), EvalInState()])
def test_hostile_files_are_refused_by_name_and_nothing_runs(tmp_path, persistence, payload):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"ema": Persistent("EDMPrecond", {"_modules": {"model": payload}})}))
    with pytest.raises(InputError, match=r"refers to '(posix\.system|builtins\.eval)'"):
        import_prior(path)
    torch.save({"x": payload}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt: expected tensors by name and nothing else; refused"):
        import_prior(tmp_path / "evil.pt")
    assert not Path("/tmp/ambient_sci_was_run").exists()


def tensor_record(flat: torch.Tensor, offset: object, size: object, stride: object) -> object:
    class Made:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                flat.storage(),
                offset,
                size,
                stride,
                False,
                OrderedDict(),
            )

    return Made()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (10**12,), (0,)),
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
        (0, (-2,), (1,)),
    ],
)
def test_sizes_that_the_file_does_not_hold_are_refused(tmp_path, offset, size, stride):
    path = tmp_path / "huge.pkl"
    path.write_bytes(
        pickle.dumps({"ema": OrderedDict(w=tensor_record(torch.arange(4.0), offset, size, stride))})
    )
    with pytest.raises(InputError, match="sizes of 'w' that its 4 numbers fill"):
        read_checkpoint(path)


def test_damaged_and_truncated_files(tmp_path, persistence):
    path = snapshot(tmp_path / "edm.pkl", network("ddpm"), "EDMPrecond")
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="edm.pkl"):
            import_prior(path)
    storage = pickle.dumps(torch.arange(4.0))
    path.write_bytes(storage.replace((4).to_bytes(8, "little"), (2**40).to_bytes(8, "little")))
    with pytest.raises(InputError, match="edm.pkl"):
        import_prior(path)
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(1 << 24))
    with pytest.raises(InputError, match="bomb"):
        import_prior(bomb)
    with pytest.raises(InputError, match="no such file"):
        import_prior(tmp_path / "absent.pkl")


def test_views_and_types_of_tensors_survive(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.t(),
        "part": base[1:3, 2:5],
        "half": base.half(),
        "whole": torch.arange(5),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"ema": OrderedDict(tensors)}))
    found = read_checkpoint(path).tensors
    for name, tensor in tensors.items():
        assert found[name].equal(tensor) and found[name].dtype == tensor.dtype and found[name].is_contiguous()


# -- schedules, options, command


def test_schedules_round_trip_and_agree_with_their_equations():
    sigma = torch.tensor([0.01, 0.5, 3.0, 100.0], dtype=torch.float64)
    t = ContinuousSchedule().time(sigma) / 999
    assert torch.allclose((9.95 * t**2 + 0.1 * t).expm1().sqrt(), sigma, rtol=1e-9)
    u = CosineSchedule().levels()
    assert u[-1] == 0 and bool((u.diff() < 0).all())
    assert CosineSchedule().time(u[[1000, 600, 20]]).tolist() == [-1, 399, 979]
    for schedule in (ContinuousSchedule(beta_d=5.0), CosineSchedule(steps=50)):
        assert schedule_from_dict(schedule_to_dict(schedule)) == schedule
    with pytest.raises(InputError, match="other"):
        schedule_from_dict({"kind": "other"})


def test_groups_of_four_channels_at_least():
    model = network("ddpm")
    groups = {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups[32] == 8 and groups[64] == 16 and groups[128] == 32
    with pytest.raises(InputError, match="group_channels of at least 2"):
        backbones.build(
            NetworkConfig("ncsnpp", options={"model_channels": 32, "channel_mult": [1]}), (3, 8, 8)
        )


def test_the_command(tmp_path, persistence, capsys):
    path = snapshot(tmp_path / "edm.pkl", network("ncsn"), "EDMPrecond", sigma_data=0.5)
    out = tmp_path / "prior"
    assert main(["import-prior", str(path), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "unconditional, 3 x 8 x 8" in text and "2 classes" in text
    assert main(["import-prior", str(path), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["import-prior", str(path), "--out", str(out), "--overwrite"]) == 0
    drawn = tmp_path / "s.h5"
    command = ["generate", str(out), "--num", "3", "--out", str(drawn), "--steps", "2"]
    assert main([*command, "--classes", "1", "2"]) == 2
    assert "classes from 0 to 1" in capsys.readouterr().err and not drawn.exists()
    assert main([*command, "--classes", "1", "0"]) == 0
    with ReferenceFile(drawn) as file:
        assert file.labels().tolist() == [1, 0, 1]


def test_copies_share_nothing_with_the_file(tmp_path, persistence):
    path = snapshot(tmp_path / "edm.pkl", network("ddpm"), "EDMPrecond")
    prior = import_prior(path)
    other = copy.deepcopy(prior)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not next(prior.parameters()).equal(next(other.parameters()))
    assert io.BytesIO(path.read_bytes()).read(2) == b"\x80\x04"
