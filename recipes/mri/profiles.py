"""Profiles: the settings of config.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ambient_sci.errors import InputError

HERE = Path(__file__).parent


def load_profile(name: str) -> dict[str, Any]:
    """A profile of config.yaml.

    Raises:
        InputError: there is none of this name.
    """
    profiles = yaml.safe_load((HERE / "config.yaml").read_text())
    known = [k for k in profiles if not k.startswith(".")]
    if name not in known:
        raise InputError(f"--profile: expected one of {', '.join(known)}, got {name!r}")
    return profiles[name]
