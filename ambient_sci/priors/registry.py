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


def names() -> tuple[str, ...]:
    """All names that `NetworkConfig.kind` may have."""
    return (*BUILT_IN, *sorted(REGISTERED))
