"""Names of backbones: those of the library, and those that users register. Free of torch, so that
configurations can ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Backbones whose settings are fields of `NetworkConfig`.
OWN = ("unet", "mlp")
BUILT_IN = (*OWN, "ncsnpp", "adm", "diffusers-unet", "diffusers-conditional-unet")
#: What users have registered (`ambient_sci.priors.backbones.register`).
REGISTERED: dict[str, Callable[..., Any]] = {}
#: What the names of modules begin with that were handed in as they are, and that no file can rebuild.
MODULE = "module:"


def is_module(name: str) -> bool:
    """Whether a backbone is such a module."""
    return name.startswith(MODULE)


def names() -> tuple[str, ...]:
    """All names that a person may give as `NetworkConfig.kind`."""
    return (*BUILT_IN, *sorted(name for name in REGISTERED if not is_module(name)))


def is_known(name: str) -> bool:
    """Whether there is a backbone of this name, or such a module."""
    return name in BUILT_IN or name in REGISTERED
