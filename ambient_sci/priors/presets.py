"""Networks by name, for images of any size. Plain data, no torch.

    preset    width    blocks    channels at 32 px    at 64 px           at 128 px
    small     16       1         16, 32               16, 32, 32         16, 32, 32, 64
    medium    32       1         32, 64               32, 64, 64         32, 64, 64, 128
    large     64       2         64, 128              64, 128, 128       64, 128, 128, 256

Levels are added until the coarsest image has 16 pixels a side or fewer (six levels at most), as far as height
and width can be halved: the self-attention there costs the square of its pixels.
"""

from __future__ import annotations

from ambient_sci.errors import InputError
from ambient_sci.priors.config import NetworkConfig

PRESETS = ("small", "medium", "large")
_WIDTH = {"small": 16, "medium": 32, "large": 64}
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
    levels, wanted = 1, _wanted(max(height, width))
    while levels < wanted and height % 2**levels == 0 and width % 2**levels == 0:
        levels += 1
    if (height >> (levels - 1)) * (width >> (levels - 1)) > _MOST_PIXELS:
        factor = 2 ** (wanted - 1)
        raise InputError(
            f"image size: expected height and width divisible by {factor} for the {name} network (crop "
            f"the images), got {height} x {width}"
        )
    channels = tuple(_WIDTH[name] * k for k in _MULTIPLES[:levels])
    return NetworkConfig(channels=channels, blocks=_BLOCKS[name])


def _wanted(size: int) -> int:
    """Levels that bring ``size`` down to `_COARSEST`, as far as there are widths for them."""
    levels = 1
    while size / 2 ** (levels - 1) > _COARSEST and levels < len(_MULTIPLES):
        levels += 1
    return levels
