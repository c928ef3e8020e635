"""Files that appear whole or not at all: written beside their place under another name, then moved there in one step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``text`` as the file ``path``, replacing one that is there."""
    path = Path(path)
    # The process number keeps processes that share a folder apart.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """``value``, of JSON types, as the file ``path``."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, each tensor in memory of its own.

    safetensors hands out views at whatever address the file puts them. Kernels choose their path by alignment, and another path rounds
    otherwise: a copy answers with the bits of the tensor that was saved.

    Raises:
        SafetensorError, OSError: the file is damaged or not there.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
