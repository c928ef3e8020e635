"""The scripts of datasets/ as modules: by their path, because another library has the name `datasets`."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "datasets"


@lru_cache(maxsize=8)
def script(name: str) -> Any:
    """datasets/NAME.py, run once."""
    spec = importlib.util.spec_from_file_location(f"ambient_datasets_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
