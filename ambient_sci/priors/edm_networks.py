"""Which network a checkpoint of EDM's is of: its architecture, from the names and shapes of its tensors.

EDM's networks (DDPM++ and NCSN++ in ``SongUNet``, ADM in ``DhariwalUNet``; Karras et al. 2022) and
deepinv's (``NCSNpp``, ``ADMUNet``) name their tensors alike, because the latter are the former rewritten;
what differs is said by options of the backbones (`ambient_sci.priors.foreign_networks`). The names tell
resolution, blocks and attention, the shapes tell widths; so a file of bare tensors is enough, and one that
says more is held against the same. Every tensor must find its place in the network that is built: nothing is
left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.priors.config import NetworkConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A network: what builds it, and what it maps.

    Attributes:
        config: of the backbone.
        resolution: height and width.
        in_channels, out_channels: of the network.
        label_dim: number of classes, 0 for none.
    """

    config: NetworkConfig
    resolution: int
    in_channels: int
    out_channels: int
    label_dim: int


def architecture(
    tensors: Tensors, path: Any, dropout: float = 0.0, label_dropout: float = 0.0
) -> Architecture:
    """The architecture that names and shapes tell.

    Args:
        tensors: of the network, by EDM's names.
        path: names the file in errors.
        dropout, label_dropout: for training on; no tensor tells them.

    Raises:
        InputError: tensors of another network, or of a variant that deepinv does not have.
    """
    starts = [re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name) for name in tensors]
    found = [int(match[1]) for match in starts if match]
    needed = ("map_layer0.weight", "map_layer1.weight")
    if len(found) != 1 or any(name not in tensors for name in needed):
        raise InputError(
            f"{path}: expected the tensors of an EDM network (SongUNet, DhariwalUNet), got {len(tensors)} "
            f"others, first {next(iter(sorted(tensors)), 'none')!r:.80}"
        )
    adm = "out_conv.weight" in tensors
    _refuse_variants(tensors, path)
    resolution, first = found[0], tensors[f"enc.{found[0]}x{found[0]}_conv.weight"]
    width = int(tensors["map_layer0.weight"].shape[1]) if adm else int(first.shape[0])
    options: dict[str, Any] = {
        **_levels(tensors, resolution, width, path),
        "model_channels": width,
        "channel_mult_emb": _whole(tensors["map_layer0.weight"].shape[0], width, path),
        "label_dim": int(tensors["map_label.weight"].shape[1]) if "map_label.weight" in tensors else 0,
        "augment_dim": int(tensors["map_augment.weight"].shape[1]) if "map_augment.weight" in tensors else 0,
        "dropout": dropout,
        "label_dropout": label_dropout,
        "group_channels": 4,
        "gated": any(name.endswith(".gate_weight") for name in tensors),
    }
    if not adm:
        options["model_type"] = _song(tensors, width, path)
    last = "out_conv.weight" if adm else f"dec.{resolution}x{resolution}_aux_conv.weight"
    if last not in tensors:
        raise InputError(f"{path}: expected the tensors of an EDM network, found no {last}")
    config = NetworkConfig("adm" if adm else "ncsnpp", options=options)
    return Architecture(
        config, resolution, int(first.shape[1]), int(tensors[last].shape[0]), options["label_dim"]
    )


def _levels(tensors: Tensors, resolution: int, width: int, path: Any) -> dict[str, Any]:
    """Multipliers, blocks and attention of the encoder's resolutions."""
    multipliers, attention, blocks, size = [], [], 0, resolution
    while f"enc.{size}x{size}_block0.conv0.weight" in tensors:
        multipliers.append(_whole(tensors[f"enc.{size}x{size}_block0.conv0.weight"].shape[0], width, path))
        if f"enc.{size}x{size}_block0.qkv.weight" in tensors:
            attention.append(size)
        blocks = sum(f"enc.{size}x{size}_block{k}.conv0.weight" in tensors for k in range(64))
        size //= 2
    return {"channel_mult": multipliers, "num_blocks": blocks, "attn_resolutions": attention}


def _song(tensors: Tensors, width: int, path: Any) -> str:
    """deepinv's name of a SongUNet's variant."""
    fourier = "map_noise.freqs" in tensors
    residual = any("_aux_residual." in name for name in tensors)
    levels = any(name.endswith("_down.conv0.weight") for name in tensors)
    noise = _whole(tensors["map_layer0.weight"].shape[1], width, path)
    if (residual == fourier or not levels) and noise == (2 if fourier else 1):
        return "ncsn" if fourier else "ddpm"
    raise InputError(
        f"{path}: expected DDPM++ (positional embedding, standard encoder) or NCSN++ (Fourier embedding, "
        f"residual encoder), got a SongUNet of another variant: embedding "
        f"{'fourier' if fourier else 'positional'} of {noise} times the width, encoder "
        f"{'residual' if residual else 'standard'}"
    )


def _refuse_variants(tensors: Tensors, path: Any) -> None:
    for part, what in (("_aux_skip.", "skip encoder"), ("_aux_up.", "skip decoder")):
        if any(part in name for name in tensors):
            raise InputError(f"{path}: expected DDPM++, NCSN++ or ADM, got a SongUNet with a {what}")


def _whole(count: int, width: int, path: Any) -> int:
    if width < 1 or count < width or count % width:
        raise InputError(f"{path}: expected widths that are multiples of {width}, got {count}")
    return count // width
