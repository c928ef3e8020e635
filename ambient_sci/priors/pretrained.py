"""Priors that ship with the library, each with a card (``assets/NAME.md``) that says whose data it learned
from and how it was judged."""

from __future__ import annotations

from pathlib import Path

from ambient_sci.errors import InputError

#: What stands before a name where a path is expected: ``load_prior("pretrained:brain64")``.
PREFIX = "pretrained:"
_FOLDER = Path(__file__).parent / "assets"


def pretrained_names() -> tuple[str, ...]:
    """Names of the priors that ship with the library."""
    return tuple(sorted(p.parent.name for p in _FOLDER.glob("*/prior.json")))


def pretrained_folder(name: str) -> Path:
    """The folder of the prior ``name``: prior.json and weights.safetensors; its card, NAME.md, is beside it.

    Raises:
        InputError: there is none of this name.
    """
    if name not in pretrained_names():
        raise InputError(
            f"pretrained prior: expected one of {', '.join(pretrained_names()) or '(none here)'}, got "
            f"{name!r}"
        )
    return _FOLDER / name
