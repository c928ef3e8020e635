"""Networks by name, for images of any size. Plain data, no torch.

    preset    patch    blocks    channels at 32 px    at 64 px        at 128 px            parameters (64 px)
    small     2        1         32, 64               32, 64          32, 64, 64           0.65 million
    medium    1        1         32, 64               32, 64, 64      32, 64, 64, 128      1.1 million
    large     1        2         64, 128              64, 128, 128    64, 128, 128, 256    6.1 million

There are two levels, and more until the coarsest image has 16 pixels a side or fewer (six at most): the
self-attention there costs the square of its pixels. Images of a size that cannot be halved so often are
padded (`ambient_sci.priors.padding`); where that would add more than a quarter to their pixels there are
fewer levels. "small" folds 2 x 2 pixels into channels, which makes a step a third as long; where padding for
that would add as much, it has patch 1 and half the channels.
"""

from __future__ import annotations

from ambient_sci.errors import InputError
from ambient_sci.priors.config import NetworkConfig

PRESETS = ("small", "medium", "large")
_PATCH = {"small": 2, "medium": 1, "large": 1}
_WIDTH = {"small": 32, "medium": 32, "large": 64}
_BLOCKS = {"small": 1, "medium": 1, "large": 2}
_MULTIPLES = (1, 2, 2, 4, 4, 4)
_COARSEST, _MOST_PADDING = 16, 1.25


def preset(name: str, height: int, width: int) -> NetworkConfig:
    """The network of this name for images of ``height`` x ``width`` pixels.

    Args:
        name: one of `PRESETS`.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Raises:
        InputError: another name.
    """
    if name not in PRESETS:
        raise InputError(f"network: expected one of {', '.join(PRESETS)}, got {name!r}")
    patch = _PATCH[name] if _growth(height, width, _PATCH[name]) <= _MOST_PADDING else 1
    levels = _levels(max(height, width) // patch)
    while levels > 1 and _growth(height, width, patch * 2 ** (levels - 1)) > _MOST_PADDING:
        levels -= 1
    base = _WIDTH[name] * patch // _PATCH[name]
    channels = tuple(base * k for k in _MULTIPLES[:levels])
    return NetworkConfig(channels=channels, blocks=_BLOCKS[name], patch=patch)


def _growth(height: int, width: int, multiple: int) -> float:
    """Pixels of an image that is padded to multiples, by its own."""
    rows, columns = (-(-size // multiple) * multiple for size in (height, width))
    return rows * columns / (height * width)


def _levels(size: int) -> int:
    """Levels that bring ``size`` down to `_COARSEST`, two at least, as far as there are widths for them."""
    levels = 2 if size >= 8 else 1
    while size / 2 ** (levels - 1) > _COARSEST and levels < len(_MULTIPLES):
        levels += 1
    return levels
