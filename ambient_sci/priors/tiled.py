r"""Images larger than those a prior was learned from.

A denoiser of small images becomes one of large images where tiles of the large one overlap and their answers
are averaged at every noise level,

    D(x, sigma) = sum_k W_k D_0(R_k x, sigma),        sum_k W_k = 1 at every pixel,

R_k the k-th tile of the state x and W_k a smooth window that vanishes at borders of the tile inside the
image. Every tile sees the same state, so what tiles say of a pixel that they share agrees, whatever is
sampled, and a sample is one image. Tiles that were sampled each by itself would disagree there: their average
spreads too little, and shows where they meet.

What it assumes: pixels further apart than the overlap tell nothing of each other that those between them do
not tell. It is exact for Gaussian images whose posterior correlation is shorter than the overlap. The
Jacobian, sum_k W_k J_k R_k, is what autograd makes of it; it is symmetric where tiles agree.

Source: Bar-Tal et al., "MultiDiffusion" (2023), for the average at every level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.priors.base import Prior, per_sample
from ambient_sci.priors.given import Given

#: Tiles (of all samples) that the network sees at a time, by the type of the device.
AT_ONCE = {"cpu": 16, "cuda": 256}


class TiledPrior(Prior):
    """A prior for images larger than its own, by overlapping tiles (equation above).

    The network sees ``at_once`` tiles at a time. Where there are more, what it computed for a gradient is
    forgotten and computed again when a gradient is taken, so that memory does not grow with the image.

    Args:
        prior: unconditional; may take labels or a prompt, which every tile is told.
        shape: (C, H, W) of the large images.
        overlap: pixels that neighbouring tiles share at least, 1 to half of the tile; default: a quarter.
        at_once: tiles of all samples in one call of the prior; default: 16 on a CPU, 256 elsewhere.

    Raises:
        ConditioningError: a mask-conditional prior.
        InputError: images of other channels, or smaller than a tile; an impossible overlap.
    """

    def __init__(
        self, prior: Prior, shape: tuple[int, ...], overlap: int | None = None, at_once: int | None = None
    ) -> None:
        super().__init__()
        _check(prior, shape)
        tile = tuple(prior.shape)
        smallest = min([t for n, t in zip(shape[1:], tile[1:], strict=True) if n > t], default=2)
        overlap = max(smallest // 4, 1) if overlap is None else overlap
        if not 1 <= overlap <= smallest // 2:
            raise InputError(
                f"tile_overlap: expected 1 to {smallest // 2} pixels, half of a tile, got {overlap}"
            )
        if at_once is not None and at_once < 1:
            raise InputError(f"tiles: expected at least 1 at once, got {at_once}")
        self.prior, self.overlap, self.at_once = prior, overlap, at_once
        self.shape, self.data_std, self.takes = tuple(shape), prior.data_std, prior.takes
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max
        axes = [_axis(n, t, overlap) for n, t in zip(shape[1:], tile[1:], strict=True)]
        self.corners = list(product(axes[0][0], axes[1][0]))
        # No buffers: what type and where a prior is, is what its own tensors say.
        self.rows, self.columns = axes[0][1], axes[1][1]
        self.resized = (
            f"images are {shape[1]} x {shape[2]}, the prior's {tile[1]} x {tile[2]}: {self.how}; longer "
            "structures than a tile are not in the prior"
        )

    @property
    def how(self) -> str:
        """How the images are covered, in words."""
        return (
            f"{len(self.corners)} tiles with an overlap of {self.overlap} pixels or more, averaged at every "
            "noise level"
        )

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """D(x, sigma) as above; ``x`` (B, C, H, W)."""
        self.check_given(given)
        if isinstance(sigma, Tensor):
            sigma = per_sample(sigma, x)
        forget = torch.is_grad_enabled() and x.requires_grad and len(x) * len(self.corners) > self._limit(x)
        tiles: list[Tensor] = []
        for corners in self._groups(len(x), self._limit(x)):
            if forget:
                from torch.utils.checkpoint import checkpoint  # loads a compiler

                told = checkpoint(
                    self._answers, x, sigma, given, corners, use_reentrant=False, preserve_rng_state=False
                )
            else:
                told = self._answers(x, sigma, given, corners)
            tiles += told.split(len(x))
        return self._blended(tiles)

    def _answers(
        self, x: Tensor, sigma: float | Tensor, given: Given | None, corners: list[tuple[int, int]]
    ) -> Tensor:
        """D_0 of some tiles of every sample, tile after tile."""
        height, width = self.prior.shape[1:]
        tiles = torch.cat([x[:, :, i : i + height, j : j + width] for i, j in corners])
        levels = sigma.repeat(len(corners)) if isinstance(sigma, Tensor) else sigma
        if given is None:
            return self.prior(tiles, levels)
        return self.prior(tiles, levels, given.repeat(len(corners)))

    def _limit(self, x: Tensor) -> int:
        return self.at_once or AT_ONCE.get(x.device.type, AT_ONCE["cuda"])

    def _groups(self, batch: int, limit: int) -> Iterator[list[tuple[int, int]]]:
        """Corners of the tiles of each call."""
        step = max(1, limit // batch)
        for start in range(0, len(self.corners), step):
            yield self.corners[start : start + step]

    def _blended(self, tiles: list[Tensor]) -> Tensor:
        """sum_k W_k tiles_k: along each strip of tiles, then over the strips, always in this order."""
        rows, columns = self.rows.to(tiles[0]), self.columns.to(tiles[0])
        (height, width), (high, wide) = self.shape[1:], self.prior.shape[1:]
        whole: Tensor | float = 0.0
        for i, row in enumerate(rows):
            strip: Tensor | float = 0.0
            for j, column in enumerate(columns):
                k = i * len(columns) + j
                left = self.corners[k][1]
                strip = strip + pad(tiles[k] * (row[:, None] * column), (left, width - left - wide))
            top = self.corners[i * len(columns)][0]
            whole = whole + pad(strip, (0, 0, top, height - top - high))  # type: ignore[arg-type]
        return whole  # type: ignore[return-value]


def _check(prior: Prior, shape: tuple[int, ...]) -> None:
    """Raise ConditioningError or InputError unless tiles of ``prior`` can cover images of ``shape``."""
    if prior.conditioning != "unconditional":
        raise ConditioningError(
            f"tiles: expected an unconditional prior, got one that is {prior.conditioning}: images "
            "larger than it was trained on take a prior of complete measurements, or one from EM"
        )
    tile = tuple(prior.shape)
    fits = len(tile) == len(shape) == 3 and shape[0] == tile[0]
    if not fits or any(n < t or 1 == t < n for n, t in zip(shape[1:], tile[1:], strict=True)):
        raise InputError(
            f"tiles: expected images of at least {tile}, (C, H, W), and tiles of 2 pixels or more, got "
            f"{tuple(shape)}"
        )


def _axis(size: int, tile: int, overlap: int) -> tuple[list[int], Tensor]:
    """Where tiles begin along an axis, evenly, and their windows (tiles, tile), which add up to 1.

    A window is flat and falls as a squared sine over the middle half of what the tile shares with its
    neighbour. It is zero in the quarter next to where the tile ends, where it knows least of what is around a
    pixel, and stays 1 at the border of the image.
    """
    count = 1 if size == tile else math.ceil((size - overlap) / (tile - overlap))
    starts = [round(k * (size - tile) / max(count - 1, 1)) for k in range(count)]
    windows = torch.ones(count, tile, dtype=torch.float64)
    for k in range(count - 1):
        shared = starts[k] + tile - starts[k + 1]
        along = (torch.arange(shared, dtype=torch.float64) + 0.5) / shared
        ramp = torch.sin(math.pi / 2 * (2 * along - 0.5).clamp(0, 1)) ** 2
        windows[k + 1, :shared] *= ramp
        windows[k, -shared:] *= ramp.flip(0)
    # Where three tiles meet (overlaps near a half), what they weigh together is not 1 yet.
    total = torch.zeros(size, dtype=torch.float64)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    for start, window in zip(starts, windows, strict=True):
        window /= total[start : start + tile]
    return starts, windows
