r"""Is the noise of images white? Pixels that were interpolated, smoothed or compressed are not independent,
and then no level is "the" level.

Flat places show the noise alone. In the flattest tiles (8 x 8, a plane taken off each) white noise has the
lag-1 correlation

    b = sum_{p, q neighbours} P_pq / tr P,        P = I - the projection onto planes,

slightly below 0; r - b above (or below) the threshold by more than chance means correlated pixels. Tiles of
equal pixels say nothing and are not looked at. Texture that fills the flattest fifth of an image looks
correlated, too, and spoils the level in the same way.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

#: Lag-1 correlations up to this pass. Zero-filling by a tenth gives .1 and makes the level about a fifth too
#: small.
THRESHOLD = 0.08
_TILE = 8
_FLATTEST = 0.2
_LEAST_TILES = 12
_MOST_IMAGES, _MOST_TILES = 32, 20_000


def _plane_projection() -> np.ndarray:
    """P: what is left of a tile (64 values) without its best plane."""
    i, j = np.meshgrid(np.arange(_TILE), np.arange(_TILE), indexing="ij")
    basis, _ = np.linalg.qr(np.stack([np.ones(_TILE**2), i.ravel(), j.ravel()], axis=1))
    return np.eye(_TILE**2) - basis @ basis.T


def _neighbours(axis: int) -> tuple[np.ndarray, np.ndarray]:
    number = np.arange(_TILE**2).reshape(_TILE, _TILE)
    return number.take(range(_TILE - 1), axis).ravel(), number.take(range(1, _TILE), axis).ravel()


def noise_correlation(images: Tensor) -> float | None:
    """Excess lag-1 correlation of the noise in images (B, C, H, W), of the axis where it is larger: 0 for
    white noise.

    None when there is too little to tell: images below 8 pixels, or (nearly) no tiles with noise in them.
    """
    images = images[:: max(1, len(images) // _MOST_IMAGES)]
    values = images.double().flatten(0, 1).numpy()
    height, width = values.shape[-2] // _TILE, values.shape[-1] // _TILE
    if min(height, width) < 1:
        return None
    values = values[:, : height * _TILE, : width * _TILE].reshape(-1, height, _TILE, width, _TILE)
    tiles = values.transpose(0, 1, 3, 2, 4).reshape(-1, _TILE**2)
    # Exact zeros and plateaus are padding, masks or clipping; a tile with many equal values has no noise to
    # show.
    tiles = tiles[(np.diff(np.sort(tiles, axis=1), axis=1) > 0).mean(axis=1) > 0.25]
    tiles = tiles[:: max(1, len(tiles) // _MOST_TILES)]
    projection = _plane_projection()
    rest = tiles @ projection
    power = (rest**2).sum(axis=1)
    rest = rest[power > 1e-12 * (1e-30 + (tiles**2).sum(axis=1))]
    if len(rest) < _LEAST_TILES:
        return None
    power = (rest**2).sum(axis=1)
    chosen = rest[np.argsort(power)[: max(_LEAST_TILES, int(_FLATTEST * len(rest)))]]
    chosen = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
    excess = []
    for axis in (0, 1):
        left, right = _neighbours(axis)
        expected = projection[left, right].sum() / np.trace(projection)
        found = (chosen[:, left] * chosen[:, right]).sum(axis=1).mean()
        excess.append(float(found - expected))
    largest = max(excess, key=abs)
    chance = 4 / math.sqrt(len(chosen) * len(_neighbours(0)[0]))
    return largest if abs(largest) > chance else 0.0
