"""A prior for images of another size than it was trained on."""

from __future__ import annotations

import copy

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior
from ambient_sci.priors.tiled import TiledPrior


def for_images(prior: Prior, shape: tuple[int, ...], overlap: int | None = None) -> Prior:
    """``prior`` for images of ``shape``, see `Prior.at_shape`."""
    own, shape = tuple(prior.shape), tuple(shape)
    if shape == own:
        return prior
    if len(own) != 3 or len(shape) != 3 or shape[0] != own[0] or min(shape) < 1:
        raise InputError(f"prior: expected images {own}, (C, H, W), or of another size, got {shape}")
    tile = (own[0], *(min(n, t) for n, t in zip(shape[1:], own[1:], strict=True)))
    fitted = prior if tile == own else _with_network_at(prior, tile)
    found = fitted if tile == shape else TiledPrior(fitted, shape, overlap)
    if tile != own:
        how = f", in {found.how}" if isinstance(found, TiledPrior) else ""
        found.resized = (
            f"images are {shape[1]} x {shape[2]}, the prior's {own[1]} x {own[2]}: its network runs on "
            f"{tile[1]} x {tile[2]} pixels, which it was not trained for{how}"
        )
    return found


def _with_network_at(prior: Prior, shape: tuple[int, ...]) -> Prior:
    """A copy with the same weights whose network runs on images of ``shape``.

    Raises:
        InputError: a prior without such a network.
    """
    parts = {name: part for name, part in prior._modules.items() if isinstance(part, Prior)}
    if not parts and not getattr(getattr(prior, "network", None), "any_size", False):
        raise InputError(
            f"prior: expected images of its size {tuple(prior.shape)} or larger, got {shape}: "
            f"{type(prior).__name__} has no network that does for smaller ones"
        )
    new = copy.copy(prior)
    new._modules = {**prior._modules, **{k: _with_network_at(part, shape) for k, part in parts.items()}}
    new.shape = shape
    return new
