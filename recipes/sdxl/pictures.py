"""From a prior of latents to pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ambient_sci.priors import Prior, Prompt
from ambient_sci.sampling import generate
from ambient_sci.whole_files import whole_file


def draw(
    prior: Prior,
    prompt: Prompt,
    steps: int = 40,
    guidance: float = 1.0,
    sigma_min: float | None = None,
    sampler: str = "heun",
    batch: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents, one for each row of ``prompt``: `ambient_sci.sampling.generate` with guidance at every level,
    the last one, too."""
    return generate(
        prior,
        len(prompt.tokens),
        steps=steps,
        sampler=sampler,
        sigma_min=sigma_min,
        batch_size=batch,
        given=prompt,
        guidance=guidance,
        generator=generator,
    )


@torch.no_grad()
def decoded(pipeline: Any, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) in about [-1, 1] of scaled latents, float32 on the CPU, one at a time."""
    vae = pipeline.vae.to(latents.device)
    scaled = latents / vae.config.scaling_factor
    return torch.cat([vae.decode(z[None].to(vae.device, vae.dtype)).sample.float().cpu() for z in scaled])


def eight_bits(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 of images in [-1, 1]; what is beyond is cut, as in any picture file."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def sheet(images: Tensor, path: Path) -> Path:
    """All images in one PNG, row by row."""
    columns = math.ceil(math.sqrt(len(images)))
    tiles = eight_bits(images)
    rows = math.ceil(len(tiles) / columns)
    _, h, w, _ = tiles.shape
    canvas = torch.full((rows * h, columns * w, 3), 255, dtype=torch.uint8)
    for k, tile in enumerate(tiles):
        top, left = k // columns * h, k % columns * w
        canvas[top : top + h, left : left + w] = tile
    with whole_file(path) as part:
        Image.fromarray(canvas.numpy()).save(part, format="PNG")
    return path
