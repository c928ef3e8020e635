"""Networks by name, for images of any size. Plain data, no torch.

    preset    patch    blocks    channels at 32 px    at 64 px        at 128 px            parameters (64 px)
    small     2        1         32, 64               32, 64          32, 64, 64           0.65 million
    medium    1        1         32, 64               32, 64, 64      32, 64, 64, 128      1.1 million
    large     1        2         64, 128              64, 128, 128    64, 128, 128, 256    6.1 million

There are two levels, and more until the coarsest image has 16 pixels a side or fewer (six at most), as far as
height and width can be halved: the self-attention there costs the square of its pixels. "small" folds 2 x 2
pixels into channels, which makes a step a third as long; where height or width is odd it has patch 1 and half
the channels.
"""

from __future__ import annotations

from ambient_sci.errors import InputError
from ambient_sci.priors.config import NetworkConfig

PRESETS = ("small", "medium", "large")
_PATCH = {"small": 2, "medium": 1, "large": 1}
_WIDTH = {"small": 32, "medium": 32, "large": 64}
_BLOCKS = {"small": 1, "medium": 1, "large": 2}
_MULTIPLES = (1, 2, 2, 4, 4, 4)
_COARSEST, _MOST_PIXELS = 16, 48**2


def preset(name: str, height: int, width: int) -> NetworkConfig:
    """The network of this name for images of ``height`` x ``width`` pixels.

    Args:
        name: one of `PRESETS`.
        height: of the images, in pixels.
        width: of the images, in pixels.

    Raises:
        InputError: another name, or a size that cannot be halved often enough.
    """
    if name not in PRESETS:
        raise InputError(f"network: expected one of {', '.join(PRESETS)}, got {name!r}")
    patch = _PATCH[name] if height % _PATCH[name] == 0 and width % _PATCH[name] == 0 else 1
    wanted = _levels(max(height, width) // patch)
    factor = patch
    while factor < patch * 2 ** (wanted - 1) and height % (2 * factor) == 0 and width % (2 * factor) == 0:
        factor *= 2
    if (height // factor) * (width // factor) > _MOST_PIXELS:
        needed = patch * 2 ** (wanted - 1)
        raise InputError(
            f"image size: expected height and width divisible by {needed} for the {name} network (crop the "
            f"images), got {height} x {width}"
        )
    base = _WIDTH[name] * patch // _PATCH[name]
    channels = tuple(base * k for k in _MULTIPLES[: (factor // patch).bit_length()])
    return NetworkConfig(channels=channels, blocks=_BLOCKS[name], patch=patch)


def _levels(size: int) -> int:
    """Levels that bring ``size`` down to `_COARSEST`, two at least, as far as there are widths for them."""
    levels = 2 if size >= 8 else 1
    while size / 2 ** (levels - 1) > _COARSEST and levels < len(_MULTIPLES):
        levels += 1
    return levels
