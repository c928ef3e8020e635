"""A LoRA of SDXL, learned from a file of noisy latents alone.

    python -m recipes.sdxl.train --weights SDXL --data runs/sdxl/ffhq-500.h5 --out runs/sdxl/ffhq-500
        [--consistency joint --kick-in 30000] [--minutes 600] [--resume]

The run folder is the library's (ambient_sci.training.fit): killed at any instant, it goes on with --resume.
``adapter/`` has the result for any diffusers pipeline: ``pipeline.load_lora_weights(FOLDER)``; of a staged
run, that of the levels below the noise is in ``adapter-below/``. ``validation.png`` has images of the prompts
of the first samples.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ambient_sci.data import MeasurementFile
from ambient_sci.errors import InputError
from ambient_sci.priors import LoraPrior, Prior, VPPrior, load_prior
from ambient_sci.priors.lora_files import write_lora
from ambient_sci.priors.wrappers import StagedPrior
from ambient_sci.randomness import seeded
from ambient_sci.training import JointConfig, LevelConfig, StagedConfig, TrainConfig, fit
from ambient_sci.whole_files import digest_of
from recipes.sdxl.model import TARGETS, TYPES, level_of, load_pipeline, prior_of, schedule_of, vae_digest
from recipes.sdxl.pictures import decoded, draw, sheet

VALIDATION, ADAPTER = 0, 1


def main(arguments: list[str] | None = None) -> Prior:
    """Train, then write the adapter and images of it."""
    options = parse(arguments)
    pipeline = load_pipeline(options.weights, TYPES[options.precision])
    check_data(options.data, pipeline, options.weights)
    initial = adapter_on(pipeline, options)
    config = config_of(options, initial)
    prior = fit(
        str(options.data),
        config,
        options.out,
        resume=options.resume,
        overwrite=options.overwrite,
        initial=initial,
    )
    write_adapters(prior, options.out)
    if options.validation:
        validate(prior, pipeline, options)
    return prior


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; its defaults are the published settings, batch apart."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--weights", type=Path, required=True, help="SDXL in diffusers' layout")
    found.add_argument("--data", type=Path, required=True, help="of recipes.sdxl.latents")
    found.add_argument("--out", type=Path, required=True, help="run folder")
    found.add_argument("--base", type=Path, help="the frozen network as a prior (default: beside --out)")
    found.add_argument("--rank", type=int, default=4)
    found.add_argument("--alpha", type=float, help="default: the rank")
    found.add_argument("--learning-rate", type=float, default=1e-4)
    found.add_argument("--steps", type=int, help="default: 20,000, or none with --minutes")
    found.add_argument("--minutes", type=float, help="end, saved, after so much training")
    found.add_argument("--batch", type=int, default=4, help="samples of a step")
    found.add_argument("--accumulation", type=int, default=1, help="parts in which a step computes them")
    found.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="of the frozen network")
    found.add_argument("--checkpointing", action="store_true", help="compute activations twice, keep fewer")
    found.add_argument("--drop", type=float, default=0.1, help="probability of the empty prompt")
    found.add_argument("--ema", type=float, default=0.999)
    found.add_argument("--consistency", choices=["joint", "staged"], help="learn below the noise, too")
    found.add_argument("--consistency-weight", type=float, default=0.01)
    found.add_argument("--kick-in", type=int, default=30_000, help="of joint consistency")
    found.add_argument("--walk", type=int, default=2, help="most steps of a walk below the noise")
    found.add_argument("--gap", type=float, default=0.5, help="widest pair of levels, in log sigma")
    found.add_argument("--draws", type=int, default=2, help="states of a pair, >= 2")
    found.add_argument("--second-steps", type=int, default=5_000, help="of staged consistency")
    found.add_argument("--validation", type=int, default=4, help="images to draw at the end")
    found.add_argument("--sampler-steps", type=int, default=40)
    found.add_argument("--checkpoint-minutes", type=float, default=10.0)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    found.add_argument("--resume", action="store_true")
    found.add_argument("--overwrite", action="store_true")
    return found.parse_args(arguments)


def check_data(path: Path, pipeline: Any, weights: Path) -> None:
    """Refuse latents of another autoencoder or of other noise scales than the weights have.

    Raises:
        InputError: a file that `recipes.sdxl.latents` has not written, or of other weights.
    """
    with MeasurementFile(path) as file:
        about = json.loads(str(file.attributes.get("made_of", "null")))
        if about is None or file.prompts([0]) is None:
            raise InputError(
                f"{path}: expected latents with prompts (recipes.sdxl.latents makes them), got others"
            )
        factor = pipeline.vae.config.scaling_factor
        if (about["scaling_factor"], about["vae"]) != (factor, vae_digest(pipeline)):
            raise InputError(
                f"{path}: expected latents of the autoencoder in {weights}, got those of another"
            )
        level = level_of(schedule_of(pipeline.scheduler), int(file.attributes["t_n"]))
        if abs(float(file.noise_std.max()) - level) > 1e-5 * max(level, 1.0):
            raise InputError(
                f"{path}: expected the noise of t = {file.attributes['t_n']} in {weights}, {level:.6g}, got "
                f"{float(file.noise_std.max()):.6g}"
            )


def adapter_on(pipeline: Any, options: argparse.Namespace) -> LoraPrior:
    """A new adapter on the pipeline's network, which is written once as the base that runs refer to."""
    with MeasurementFile(options.data) as file:
        base = prior_of(pipeline, file.image_shape)
    place = options.base or options.out.parent / f"base-{options.weights.name}-{options.precision}"
    if not place.exists():
        base.save(place)
    elif digest_of(load_prior(place).saved_tensors()) != digest_of(base.saved_tensors()):
        raise InputError(f"{place}: expected the network of {options.weights}, got another; give --base")
    if options.checkpointing:
        base.network.model.enable_gradient_checkpointing()  # type: ignore[union-attr]
    generator = seeded(options.seed, ADAPTER)
    return LoraPrior(base, options.rank, options.alpha, TARGETS, str(place.resolve()), generator)


def config_of(options: argparse.Namespace, initial: LoraPrior) -> TrainConfig:
    """What `fit` is told. Levels lie between the noise of the data and the schedule's last."""
    assert isinstance(initial.base, VPPrior)
    assert initial.sigma_max is not None
    pairs: dict[str, Any] = {
        "weight": options.consistency_weight,
        "walk": (0, options.walk),
        "gap": options.gap,
        "draws": options.draws,
        "sigma_min": initial.sigma_min,
    }
    consistency = {
        None: lambda: None,
        "joint": lambda: JointConfig(kick_in=options.kick_in, **pairs),
        "staged": lambda: StagedConfig(
            max_steps=options.second_steps, learning_rate=options.learning_rate, **pairs
        ),
    }[options.consistency]()
    return TrainConfig(
        seed=options.seed,
        max_steps=options.steps,
        max_minutes=options.minutes,
        batch_size=options.batch,
        micro_batches=options.accumulation,
        learning_rate=options.learning_rate,
        schedule="constant",
        warmup_steps=0,
        ema_decay=options.ema,
        augmentations=(),
        centre=False,
        drop_labels=options.drop,
        checkpoint_minutes=options.checkpoint_minutes,
        device=options.device,
        levels=LevelConfig(
            kind="log-uniform", sigma_max=initial.sigma_max, floor=initial.sigma_min, relative=False
        ),
        consistency=consistency,
    )


def write_adapters(prior: Prior, out: Path) -> None:
    """The adapters of a run for diffusers' pipelines."""
    parts = {"adapter": prior}
    if isinstance(prior, StagedPrior):
        parts = {"adapter": prior.anchor, "adapter-below": prior.below}
    for name, part in parts.items():
        assert isinstance(part, LoraPrior)
        write_lora(part, out / name, overwrite=True)


def validate(prior: Prior, pipeline: Any, options: argparse.Namespace) -> None:
    """Images of the prompts of the first samples, down to the lowest level that was learned."""
    with MeasurementFile(options.data) as file:
        num = min(options.validation, len(file))
        told = file.prompts(list(range(num)))
        assert told is not None
        bottom = None if options.consistency else float(file.noise_std.min()) or None
    latents = draw(
        prior,
        told,
        steps=options.sampler_steps,
        sigma_min=bottom,
        generator=seeded(options.seed, VALIDATION),
    )
    sheet(decoded(pipeline, latents), options.out / "validation.png")


if __name__ == "__main__":
    main()
