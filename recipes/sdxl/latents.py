"""Images encoded once, noised once, and stored with their prompts: all that training will ever see.

    python -m recipes.sdxl.latents --weights SDXL --images ffhq.h5 --out runs/sdxl/ffhq-500.h5 --t-n 500

The images are a reference file in [-1, 1] (datasets/ffhq.py makes one). Prompts: one for all (--prompt), or a
text file with a line for each image (--captions). The file says in its attributes what it was made of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data import MeasurementFile, ReferenceFile
from ambient_sci.data.prompts import Prompts
from ambient_sci.data.writing import MeasurementWriter
from ambient_sci.errors import InputError
from ambient_sci.randomness import seeded
from ambient_sci.whole_files import check_output
from recipes.sdxl.model import embedded, level_of, load_pipeline, schedule_of, vae_digest

# Streams of randomness of one file: numbers that keep the draws for different purposes apart.
ENCODER, NOISE, FLIPS = 0, 1, 2
#: How far the scale of latents may be from 1, at which SDXL was trained.
LARGEST_RATIO = 3.0


def main(arguments: list[str] | None = None) -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="SDXL in diffusers' layout")
    parser.add_argument("--images", type=Path, required=True, help="a reference file in [-1, 1]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--t-n", type=int, required=True, help="time of the noise; 0: clean latents")
    parser.add_argument("--prompt", default="", help="for every image (default: the empty one)")
    parser.add_argument("--captions", type=Path, help="a text file with a line for each image")
    parser.add_argument("--num", type=int, help="the first so many images (default: all)")
    parser.add_argument("--flips", action="store_true", help="mirror half of the images, once and for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overwrite", action="store_true")
    write(**vars(parser.parse_args(arguments)))


def write(
    weights: Path,
    images: Path,
    out: Path,
    t_n: int,
    prompt: str = "",
    captions: Path | None = None,
    num: int | None = None,
    flips: bool = False,
    seed: int = 0,
    batch: int = 4,
    device: str = "cpu",
    overwrite: bool = False,
) -> Path:
    """y_i = z_i + sigma_n n_i,  z_i a scaled sample of the encoder: both drawn once, functions of (seed, i).

    The VE level sigma_n is that of ``t_n``, so y_i is sqrt(1 + sigma_n^2) times SDXL's own noisy latent.
    Mirrored images take the place of the plain ones: with both, noise could be averaged out.

    Raises:
        InputError: no weights, a time beyond the schedule, images outside [-1, 1], captions of another
            number, latents of another scale than SDXL's.
    """
    check_output(out, overwrite)
    pipeline = load_pipeline(weights).to(device)
    sigma = level_of(schedule_of(pipeline.scheduler), t_n)
    with ReferenceFile(images) as file:
        count = len(file) if num is None else num
        if not 1 <= count <= len(file):
            raise InputError(f"num: expected 1 to {len(file)} images, got {count}")
        texts = _texts(prompt, captions, count)
        told = prompts_of(pipeline, texts, tuple(file.images([0]).shape[-2:]))
        mirrored = torch.rand(count, generator=seeded(seed, FLIPS)) < (0.5 if flips else 0.0)
        about = _about(pipeline, file, weights, t_n, sigma, seed, flips)
        first = _encoded(pipeline, file.images(list(range(min(batch, count)))), mirrored, 0, seed)
        _check_scale(first, float(pipeline.vae.config.scaling_factor))
        with MeasurementWriter(
            out,
            operator="identity",
            image_shape=first.shape[1:],
            history=_history(about, count, int(mirrored.sum()), len(set(texts))),
            attributes=about,
            overwrite=overwrite,
            prompts=told,
        ) as writer:
            for start in range(0, count, batch):
                rows = list(range(start, min(start + batch, count)))
                z = _encoded(pipeline, file.images(rows), mirrored, start, seed)
                noise = torch.stack(
                    [torch.randn(z.shape[1:], generator=seeded(seed, NOISE, i)) for i in rows]
                )
                writer.append(z + sigma * noise, noise_std=sigma, subjects=[file.subjects[i] for i in rows])
    MeasurementFile(out).close()
    return out


def prompts_of(pipeline: Any, texts: list[str], size: tuple[int, int]) -> Prompts:
    """Each different text embedded once; sizes say that images are whole and of the size they are."""
    different = list(dict.fromkeys(texts))
    tokens, pooled = embedded(pipeline, different)
    for k, text in enumerate(different):
        if not text and pipeline.config.force_zeros_for_empty_prompt:
            tokens[k], pooled[k] = 0, 0
    sizes = torch.tensor([*size, 0, 0, *size], dtype=torch.float32).expand(len(texts), 6)
    index = torch.tensor([different.index(text) for text in texts])
    return Prompts(tokens, index, pooled, sizes.clone())


@torch.no_grad()
def _encoded(pipeline: Any, images: Tensor, mirrored: Tensor, first: int, seed: int) -> Tensor:
    """Scaled latents of images first, first + 1, ..., on the CPU; one image a call, so that batches change no
    bit."""
    vae, found = pipeline.vae, []
    for k, image in enumerate(images):
        if float(image.abs().max()) > 1 + 1e-6:
            raise InputError(f"images: expected values in [-1, 1], got {float(image.abs().max()):g}")
        image = image.expand(3, *image.shape[1:]) if len(image) == 1 else image
        image = image.flip(-1) if bool(mirrored[first + k]) else image
        law = vae.encode(image[None].to(vae.device, vae.dtype)).latent_dist
        mean, std = law.mean.float().cpu(), law.std.float().cpu()
        found.append(mean + std * torch.randn(mean.shape, generator=seeded(seed, ENCODER, first + k)))
    return torch.cat(found) * vae.config.scaling_factor


def _texts(prompt: str, captions: Path | None, count: int) -> list[str]:
    if captions is None:
        return [prompt] * count
    if prompt:
        raise InputError("captions: expected no prompt beside them, got both")
    try:
        lines = captions.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"captions {captions}: expected a readable text file, got {error}") from None
    if len(lines) != count:
        raise InputError(f"captions {captions}: expected {count} lines, one an image, got {len(lines)}")
    return lines


def _check_scale(latents: Tensor, factor: float) -> None:
    std = float(latents.std())
    if not 1 / LARGEST_RATIO <= std <= LARGEST_RATIO:
        raise InputError(
            f"VAE: expected scaled latents of standard deviation about 1, got {std:.3g} with scaling_factor "
            f"{factor:g} in vae/config.json (SDXL's is 0.13025)"
        )


def _about(
    pipeline: Any, file: ReferenceFile, weights: Path, t_n: int, sigma: float, seed: int, flips: bool
) -> dict[str, Any]:
    """What a file was made of, as attributes."""
    data = file.checksum or hashlib.sha256(file.images().numpy().tobytes()).hexdigest()[:32]
    return {
        "t_n": t_n,
        "sigma_n": sigma,
        "made_of": json.dumps(
            {
                "images": data,
                "vae": vae_digest(pipeline),
                "scaling_factor": pipeline.vae.config.scaling_factor,
                "resolution": list(file.image_shape[1:]),
                "seed": seed,
                "flips": flips,
                "weights": weights.name,
            }
        ),
    }


def _history(about: dict[str, Any], count: int, mirrored: int, texts: int) -> str:
    flips = f", {mirrored} of them mirrored" if mirrored else ""
    noise = (
        f"noised once at t = {about['t_n']}, VE level {about['sigma_n']:.6g}" if about["t_n"] else "no noise"
    )
    return f"{count} images{flips} encoded once, {noise}; {texts} different prompts"


if __name__ == "__main__":
    main()
