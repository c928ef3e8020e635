"""Priors from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior, description_of, rebuild_prior
from ambient_sci.priors.folder import DAMAGE, holds, read_folder
from ambient_sci.priors.pretrained import PREFIX, pretrained_folder
from ambient_sci.whole_files import recover


def save_prior(prior: Prior, path: str | Path) -> None:
    """`Prior.save`, as a function."""
    prior.save(path)


def is_saved(prior: Prior, path: str | Path) -> bool:
    """Whether the folder ``path`` holds this very prior, undamaged; not so for one that does not describe
    itself."""
    try:
        return holds(path, description_of(prior), prior.saved_tensors())
    except (InputError, AttributeError):
        return False


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
    name = str(path)
    path = pretrained_folder(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(path)
    for folder in (path, path / "prior"):
        recover(folder)
    if not (path / "prior.json").exists() and (path / "prior" / "prior.json").exists():
        path = path / "prior"
    if not (path / "prior.json").exists():
        raise InputError(f"{path}: expected a prior or a training run (a folder with prior.json), found none")
    try:
        prior = rebuild_prior(*read_folder(path))
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path}: expected a readable prior, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return prior.to(device).eval()
