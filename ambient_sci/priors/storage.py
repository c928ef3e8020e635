r"""Priors on disk: a folder with prior.json (what it is) and weights.safetensors (its tensors). Nothing is
ever unpickled.

Each file vouches for the other: prior.json holds a digest of the tensors, the header of weights.safetensors
one of the text of prior.json. A flipped bit in either, or files of two priors, are refused. Priors without
digests, of before there were any, load as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior, Tensors, description_of, rebuild_prior
from ambient_sci.priors.pretrained import PREFIX, pretrained_folder
from ambient_sci.whole_files import digest_of, read_tensors, recover, whole_folder, write_tensors

FORMAT = 1
FILES = {"prior.json", "weights.safetensors"}
#: Where the digests are: of the tensors in prior.json, of prior.json in the header of weights.safetensors.
_KEY, _HEADER = "tensors", "description"
#: What reading a damaged prior raises, an InputError aside.
DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


def save_prior(prior: Prior, path: str | Path) -> None:
    """Write ``prior`` to the folder ``path``. A prior there is replaced in one step once the new one is
    complete on disk.

    Raises:
        InputError: ``path`` is a file, or a folder that holds anything but a prior (it would be lost).
    """
    path = Path(path)
    if path.exists() and not (
        path.is_dir() and {p.name for p in path.iterdir() if p.name[0] != "."} <= FILES
    ):
        raise InputError(f"{path}: expected a new folder or one with a prior to replace, got something else")
    # Copies: safetensors refuses tensors that share memory, as the two halves of a staged prior may.
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in prior.saved_tensors().items()
    }
    text = _text(prior)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(path) as part:
        (part / "prior.json").write_text(text)
        write_tensors(part / "weights.safetensors", tensors, {_HEADER: _digest(text)})


def is_saved(prior: Prior, path: str | Path) -> bool:
    """Whether the folder ``path`` holds this very prior, undamaged."""
    path = Path(path)
    try:
        return (path / "prior.json").read_text() == _text(prior) and bool(_read(path))
    except (InputError, *DAMAGE):
        return False


def _text(prior: Prior) -> str:
    """What prior.json says of it."""
    description = {"format": FORMAT, **description_of(prior), _KEY: digest_of(prior.saved_tensors())}
    return json.dumps(description, indent=2) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
        prior = rebuild_prior(*_read(path))
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path}: expected a readable prior, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return prior.to(device).eval()


def _read(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Description and tensors of a prior, compared with their digests.

    Raises:
        InputError: another format, or content that is not what was written; DAMAGE: no prior at all.
    """
    text = (path / "prior.json").read_text()
    description = json.loads(text)
    if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
        raise InputError(f"{path / 'prior.json'}: expected a prior of format {FORMAT}")
    tensors, header = read_tensors(path / "weights.safetensors")
    expected = description.pop(_KEY, None)
    if expected is None and _HEADER not in header:
        return description, tensors
    for name, same in (
        ("prior.json", header.get(_HEADER) == _digest(text)),
        ("weights.safetensors", expected == digest_of(tensors)),
    ):
        if not same:
            raise InputError(
                f"{path / name}: expected what was written with the prior, got another content (its digest "
                "differs): the file is damaged, was edited by hand, or belongs to another prior"
            )
    return description, tensors
