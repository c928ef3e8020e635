"""Measurements of images of another size than the prior's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.priors.tiled import TiledPrior
from ambient_sci.progress import say


def fitted(prior: Any, shape: tuple[int, ...] | None, tile_overlap: int | None = None) -> Any:
    """``prior`` for images of ``shape``, which it says in one line where they are of another size than its
    own.

    Args:
        prior: any; None, and what is only called like a prior, stay what they are.
        shape: (C, H, W); None: not known. Images of other channels are left for others to refuse.
        tile_overlap: of neighbouring tiles, see `Prior.at_shape`.

    Raises:
        ConditioningError: larger images and a mask-conditional prior.
        InputError: images that the prior cannot be made to fit, or an overlap where there are no tiles.
    """
    if shape is not None and hasattr(prior, "at_shape") and _of_another_size(tuple(shape), prior.shape):
        prior = prior.at_shape(shape, tile_overlap)
        say(prior.resized)
    if tile_overlap is not None and not isinstance(prior, TiledPrior):
        raise InputError(
            f"tile_overlap: expected images larger than the prior's, which are covered with tiles, got "
            f"{tile_overlap} for images {'of unknown size' if shape is None else tuple(shape)}"
        )
    return prior


def _of_another_size(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    return len(shape) == len(own) == 3 and shape[0] == own[0] and shape[1:] != tuple(own[1:])


def image_shape(operator: Any, y: Tensor) -> tuple[int, ...] | None:
    """(C, H, W) of the images that ``y`` measures; None where measurements and operator do not fit, which is
    for others to say."""
    try:
        with torch.no_grad():
            return tuple(operator.A_adjoint(y).shape[1:])
    except (InputError, RuntimeError, ValueError, IndexError, AssertionError, TypeError, AttributeError):
        return None
