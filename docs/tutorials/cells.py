"""Pictures to practise on: blurred ellipses with noise, as a microscope's camera might store them.

    python docs/tutorials/cells.py cells --num 300 --size 32 --noise 0.15

writes ``cells/noisy`` and ``cells/clean`` (16-bit TIFF, one picture a file). A camera adds an offset and
leaves headroom: brightness x is stored as 65535 (0.25 + 0.5 x), so that noise of 0.15 is hardly ever clipped.
It is 0.075 of full scale.

    python docs/tutorials/cells.py fields --num 4 --size 512 --noise 0.15 --stack

writes fields of view with many such cells, of 3 to 6 pixels' radius whatever the size, as the stacks
``fields/noisy.tif`` and ``fields/clean.tif``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def cells(num: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Brightness in [0, 1], (num, size, size): two to five soft ellipses each, with a brighter nucleus."""
    row, column = np.mgrid[:size, :size] / size
    images = np.zeros((num, size, size))
    for image in images:
        for _ in range(generator.integers(2, 6)):
            draw(image, row, column, generator.uniform(0.1, 0.9, 2), generator)
    return images


def fields(num: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Fields of view, (num, size, size), in which as many cells of the same size lie, wherever they like."""
    row, column = np.mgrid[:size, :size] / 32
    images = np.zeros((num, size, size))
    for image in images:
        for _ in range(generator.poisson(3.5 * (size / 32) ** 2)):
            centre = generator.uniform(0, size, 2)
            # Far from a cell nothing of it is left: only a window around it is drawn.
            window = tuple(slice(max(int(c) - 14, 0), int(c) + 15) for c in centre)
            draw(image[window], row[window], column[window], centre / 32, generator)
    return images


def draw(
    image: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    centre: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """One cell into ``image``, whose pixels are at ``row`` and ``column``."""
    radii = generator.uniform(0.08, 0.2, 2)
    angle = generator.uniform(0, np.pi)
    a = np.cos(angle) * (row - centre[0]) + np.sin(angle) * (column - centre[1])
    b = np.cos(angle) * (column - centre[1]) - np.sin(angle) * (row - centre[0])
    distance = np.hypot(a / radii[0], b / radii[1])
    body = 1 / (1 + np.exp(np.clip(12 * (distance - 1), -50, 50)))
    nucleus = 1 / (1 + np.exp(np.clip(12 * (distance - 0.4), -50, 50)))
    np.maximum(image, generator.uniform(0.3, 0.6) * body + 0.4 * nucleus, out=image)


def save(out: Path, images: np.ndarray, stack: bool) -> None:
    """16-bit TIFF: one for each picture in the folder ``out``, or one stack beside it."""
    stored = np.clip(np.round(65535 * (0.25 + 0.5 * images)), 0, 65535).astype(np.uint16)
    pages = [Image.fromarray(image) for image in stored]
    if stack:
        out.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(out.with_suffix(".tif"), save_all=True, append_images=pages[1:])
        return
    out.mkdir(parents=True)
    for k, page in enumerate(pages):
        page.save(out / f"{k:04d}.tif")


def main() -> None:
    """Draw the pictures, write both folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stack", action="store_true", help="fields of view, as stacks")
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    clean = (fields if options.stack else cells)(options.num, options.size, generator)
    save(options.out / "clean", clean, options.stack)
    noisy = clean + options.noise * generator.standard_normal(clean.shape)
    save(options.out / "noisy", noisy, options.stack)


if __name__ == "__main__":
    main()
