r"""Images of a size that a network cannot divide: padded before it, cropped after it.

A network that halves its input k times takes multiples of 2^k. Others are put into the middle of zeros,

    F'(x) = C F(P x),        P = C^T puts an image into zeros, C cuts it out again,

and not mirrored at their border, for three reasons. The Jacobian of a denoiser is a covariance; C J C^T is
one where J is, and a mirrored border would make it asymmetric. Zeros are what convolutions see beyond the
border of any image. And a mask of zeros says "missing". What goes into a network has mean zero or nearly so.
Images that divide are not touched.

The middle is that of Fourier space, row H // 2 of H, so that the masks of k-space lines keep their centre.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import pad


def multiple_of(network: Any) -> int:
    """What height and width have to be multiples of inside ``network``: its ``multiple``, else 1."""
    return int(getattr(network, "multiple", 1))


def padded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def described(shape: tuple[int, ...], multiple: int) -> str:
    """What happens to images of this shape, in words; empty where nothing does."""
    height, width = shape[-2:]
    rows, columns = padded(height, multiple), padded(width, multiple)
    if (rows, columns) == (height, width):
        return ""
    return (
        f"images of {height} x {width} are padded with zeros to {rows} x {columns} inside the network, which "
        f"takes multiples of {multiple}; what it answers is cut to their size"
    )


def on_multiples(network: Callable[[Tensor], Tensor], x: Tensor, multiple: int) -> Tensor:
    """network(x), with ``x`` (B, C, H, W) padded to multiples before and cropped after."""
    height, width = x.shape[-2:]
    rows, columns = padded(height, multiple), padded(width, multiple)
    if (rows, columns) == (height, width):
        return network(x)
    top, left = rows // 2 - height // 2, columns // 2 - width // 2
    answer = network(pad(x, (left, columns - width - left, top, rows - height - top)))
    return answer[..., top : top + height, left : left + width]
