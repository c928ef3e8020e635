"""Small files that appear whole or not at all: written beside their place under another name, then moved there in one step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


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
