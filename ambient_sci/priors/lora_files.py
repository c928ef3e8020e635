r"""Adapters in the format that diffusers and peft share: one safetensors file, read by any pipeline.

    unet.LAYER.lora_A.weight (r, in),     unet.LAYER.lora_B.weight (out, r)

A file without further words means W + B A, so (alpha / r) B is written in the place of B; what is read may
state another alpha (``lora_adapter_metadata``), which is taken over.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.priors.adapters import LoraPrior
from ambient_sci.priors.base import Prior
from ambient_sci.whole_files import check_output, read_tensors, whole_file, write_tensors

#: The name that a pipeline's ``load_lora_weights(folder)`` looks for.
FILE = "pytorch_lora_weights.safetensors"
_PREFIX, _OURS = "unet.", "base.network.model."
_WORDS = "lora_adapter_metadata"


def write_lora(prior: LoraPrior, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Write an adapter for ``pipeline.load_lora_weights(folder)``.

    Args:
        prior: an adapter on a diffusers network.
        folder: gets a file `FILE`.
        overwrite: replace one that is there.

    Raises:
        InputError: an adapter of another network, or a file that is there.
    """
    found = {}
    for name, tensor in prior.state_dict().items():
        if ".lora_" not in name:
            continue
        if not name.startswith(_OURS):
            raise InputError(f"adapter: expected one of a diffusers network, got the layer {name}")
        scale = prior.alpha / prior.rank if ".lora_B." in name else 1.0
        found[_PREFIX + name[len(_OURS) :].replace(".default.", ".")] = (scale * tensor).cpu().contiguous()
    path = Path(folder) / FILE
    check_output(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        write_tensors(part, found, {"format": "pt"})
    return path


def read_lora(base: Prior, folder: str | os.PathLike[str], source: str | None = None) -> LoraPrior:
    """An adapter that `write_lora`, diffusers or peft wrote, on ``base``, which is taken over.

    Args:
        base: a prior of a diffusers network.
        folder: with a file `FILE`, or that file.
        source: see `LoraPrior`.

    Raises:
        InputError: no such file, names of another format, ranks that differ, or layers or shapes that the
            base does not have.
    """
    path = Path(folder) / FILE if Path(folder).is_dir() else Path(folder)
    tensors, words = _read(path)
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    ranks = {len(t) for name, t in tensors.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise InputError(f"{path}: expected one rank, got {sorted(ranks) or 'none'}")
    (rank,) = ranks
    stated = json.loads(words.get(_WORDS, "{}"))
    alpha = stated.get("unet.lora_alpha", rank)
    prior = LoraPrior(base, rank, alpha, targets=[f"model.{layer}" for layer in layers], source=source)
    own = {name: t for name, t in prior.state_dict().items() if ".lora_" in name}
    given = {
        _OURS
        + name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): t.float()
        for name, t in tensors.items()
    }
    if {k: t.shape for k, t in own.items()} != {k: t.shape for k, t in given.items()}:
        odd = sorted(
            {k for k in own.keys() | given.keys() if k not in own or k not in given}
            | {k for k in own.keys() & given.keys() if own[k].shape != given[k].shape}
        )
        raise InputError(f"{path}: expected an adapter of this base, got another at {odd[0]}")
    prior.load_state_dict(given, strict=False)
    return prior


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by layer, with peft's names, and what the file says about itself."""
    from safetensors import SafetensorError

    try:
        tensors, words = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: expected an adapter's safetensors file, got {error}") from None
    found = {}
    for name, tensor in tensors.items():
        short = name.replace(".lora.down.weight", ".lora_A.weight").replace(
            ".lora.up.weight", ".lora_B.weight"
        )
        if not short.startswith(_PREFIX) or not short.endswith((".lora_A.weight", ".lora_B.weight")):
            raise InputError(f"{path}: expected names unet.LAYER.lora_A.weight and lora_B.weight, got {name}")
        found[short[len(_PREFIX) :]] = tensor
    return found, words
