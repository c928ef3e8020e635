r"""Priors on disk: a folder with prior.json (what it is) and weights.safetensors (its tensors). Nothing is
ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior, description_of, rebuild_prior
from ambient_sci.priors.pretrained import PREFIX, pretrained_folder
from ambient_sci.whole_files import read_tensors, whole_folder

FORMAT = 1
FILES = {"prior.json", "weights.safetensors"}


def save_prior(prior: Prior, path: str | Path) -> None:
    """Write ``prior`` to the folder ``path``. A prior there is replaced in one step once the new one is
    complete on disk.

    Raises:
        InputError: ``path`` is a file, or a folder that holds anything but a prior (it would be lost).
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists() and not (
        path.is_dir() and {p.name for p in path.iterdir() if p.name[0] != "."} <= FILES
    ):
        raise InputError(f"{path}: expected a new folder or one with a prior to replace, got something else")
    description = {"format": FORMAT, **description_of(prior)}
    # Copies: safetensors refuses tensors that share memory, as the two halves of a staged prior may.
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in prior.saved_tensors().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(path) as part:
        (part / "prior.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file(tensors, str(part / "weights.safetensors"))


def load_prior(path: str | Path, device: str | torch.device = "cpu") -> Prior:
    """Read a prior written by `Prior.save`, the prior of a training run's folder, or one that ships with the
    library.

    Args:
        path: the folder of a prior (prior.json) or of a run (prior/prior.json); or "pretrained:NAME"
            (`pretrained_names`).
        device: where to put it.

    Returns:
        the prior, in evaluation mode.

    Raises:
        InputError: no prior there, or a file that is damaged or of another format.
    """
    from safetensors import SafetensorError

    name = str(path)
    path = pretrained_folder(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(path)
    if not (path / "prior.json").exists() and (path / "prior" / "prior.json").exists():
        path = path / "prior"
    if not (path / "prior.json").exists():
        raise InputError(f"{path}: expected a prior or a training run (a folder with prior.json), found none")
    try:
        description = json.loads((path / "prior.json").read_text())
        if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
            raise InputError(f"{path / 'prior.json'}: expected a prior of format {FORMAT}")
        tensors, _ = read_tensors(path / "weights.safetensors")
        prior = rebuild_prior(description, tensors)
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path}: expected a readable prior, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return prior.to(device).eval()
