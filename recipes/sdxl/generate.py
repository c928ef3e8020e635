"""Images of prompts by a trained adapter, to the end or truncated at the noise of its data.

    python -m recipes.sdxl.generate --weights SDXL --run runs/sdxl/ffhq-500 --prompt "a face" --num 8
        --out runs/sdxl/ffhq-500/samples [--guidance 5] [--truncate-at 500]

What draws is a run (--run), an adapter of any origin (--adapter FOLDER), or SDXL itself. Truncated, the last
step returns E[x_0 | x] at that time, with guidance like every other. The pictures of a folder are one by one,
together in sheet.png, and generate.json says how they were made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ambient_sci.errors import InputError
from ambient_sci.priors import Prior, load_prior
from ambient_sci.priors.lora_files import read_lora
from ambient_sci.randomness import seeded
from ambient_sci.whole_files import check_output, whole_folder, write_json
from recipes.sdxl.latents import prompts_of
from recipes.sdxl.model import TYPES, level_of, load_pipeline, prior_of, schedule_of
from recipes.sdxl.pictures import decoded, draw, eight_bits, sheet


def main(arguments: list[str] | None = None) -> Path:
    """Write a folder of pictures."""
    options = parse(arguments)
    check_output(options.out)
    pipeline = load_pipeline(options.weights, TYPES[options.precision])
    size = options.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    texts = [text for text in options.prompt for _ in range(options.num)]
    told = prompts_of(pipeline, texts, (size, size))[torch.arange(len(texts))]
    prior = prior_for(pipeline, options, size).to(options.device)
    bottom = level_of(schedule_of(pipeline.scheduler), options.truncate_at) or None
    latents = draw(
        prior,
        told,
        steps=options.steps,
        guidance=options.guidance,
        sigma_min=bottom,
        sampler=options.sampler,
        batch=options.batch,
        generator=seeded(options.seed),
    )
    images = decoded(pipeline, latents)
    with whole_folder(options.out) as folder:
        for k, picture in enumerate(eight_bits(images)):
            Image.fromarray(picture.numpy()).save(folder / f"{k:05d}.png")
        sheet(images, folder / "sheet.png")
        write_json(folder / "generate.json", described(options, texts, prior, bottom))
    return options.out


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--weights", type=Path, required=True, help="SDXL in diffusers' layout")
    found.add_argument("--run", type=Path, help="run folder of recipes.sdxl.train")
    found.add_argument("--adapter", type=Path, help="an adapter as diffusers writes it")
    found.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    found.add_argument("--prompt", nargs="+", default=[""])
    found.add_argument("--num", type=int, default=4, help="images of each prompt")
    found.add_argument("--steps", type=int, default=40)
    found.add_argument("--sampler", default="heun", choices=["heun", "multistep", "ancestral"])
    found.add_argument("--guidance", type=float, default=1.0, help="1: none")
    found.add_argument(
        "--truncate-at", type=int, default=0, help="time of the last step; 0: the lowest learned"
    )
    found.add_argument("--size", type=int, help="pixels (default: those of the weights)")
    found.add_argument("--batch", type=int, default=1)
    found.add_argument("--precision", default="bf16", choices=list(TYPES))
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return found.parse_args(arguments)


def prior_for(pipeline: Any, options: argparse.Namespace, size: int) -> Prior:
    """The prior that draws.

    Raises:
        InputError: a run and an adapter, a size that the autoencoder does not divide, or a run of another.
    """
    if options.run is not None and options.adapter is not None:
        raise InputError("generate: expected a run or an adapter, got both")
    factor = pipeline.vae_scale_factor
    if size < 1 or size % factor:
        raise InputError(f"size: expected a multiple of {factor} pixels, got {size}")
    latent = (pipeline.vae.config.latent_channels, size // factor, size // factor)
    if options.run is None:
        base = prior_of(pipeline, latent)
        return base if options.adapter is None else read_lora(base, options.adapter)
    prior = load_prior(options.run)
    if prior.shape != latent:
        raise InputError(f"size: expected latents {prior.shape} of the run, got {latent}")
    return prior


def described(
    options: argparse.Namespace, texts: list[str], prior: Prior, bottom: float | None
) -> dict[str, Any]:
    """How the pictures were made."""
    names = ("run", "adapter", "steps", "sampler", "guidance", "truncate_at", "precision", "seed")
    settings = {k: None if getattr(options, k) is None else getattr(options, k) for k in names}
    settings |= {k: str(settings[k]) for k in ("run", "adapter") if settings[k] is not None}
    return {**settings, "prompts": texts, "sigma_min": bottom or prior.sigma_min, "prior": repr(prior)}


if __name__ == "__main__":
    main()
