"""The folder of a prior on disk: prior.json (what it is) and weights.safetensors (its tensors). Nothing is
ever
unpickled.

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
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.numbers import check_numbers
from ambient_sci.whole_files import digest_of, read_tensors, whole_folder, write_tensors

FORMAT = 1
FILES = {"prior.json", "weights.safetensors"}
#: Where the digests are: of the tensors in prior.json, of prior.json in the header of weights.safetensors.
_KEY, _HEADER = "tensors", "description"
#: What reading a damaged prior raises, an InputError aside.
DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


def write_folder(path: str | Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write the folder ``path``. A prior there is replaced in one step once the new one is complete on disk.

    Raises:
        InputError: ``path`` is a file, or a folder that holds anything but a prior (it would be lost).
    """
    path = Path(path)
    if path.exists() and not (
        path.is_dir() and {p.name for p in path.iterdir() if p.name[0] != "."} <= FILES
    ):
        raise InputError(f"{path}: expected a new folder or one with a prior to replace, got something else")
    # Copies: safetensors refuses tensors that share memory, as the two halves of a staged prior may.
    copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    text = _text(description, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(path) as part:
        (part / "prior.json").write_text(text)
        write_tensors(part / "weights.safetensors", copies, {_HEADER: _digest(text)})


def holds(path: str | Path, description: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Whether the folder ``path`` holds this very prior, undamaged."""
    path = Path(path)
    try:
        return (path / "prior.json").read_text() == _text(description, tensors) and bool(read_folder(path))
    except (InputError, *DAMAGE):
        return False


def _text(description: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """What prior.json says."""
    return json.dumps({"format": FORMAT, **description, _KEY: digest_of(tensors)}, indent=2) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a prior, compared with their digests.

    Raises:
        InputError: another format, or content that is not what was written; DAMAGE: no prior at all.
    """
    text = (path / "prior.json").read_text()
    description = json.loads(text)
    if not isinstance(description, dict) or description.pop("format", None) != FORMAT:
        raise InputError(f"{path / 'prior.json'}: expected a prior of format {FORMAT}")
    check_numbers(description, str(path / "prior.json"))
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
