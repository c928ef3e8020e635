"""SDXL's parts as this library sees them: the network as a prior, prompts as both encoders embed them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import VPSchedule
from ambient_sci.priors import NetworkConfig, VPPrior
from ambient_sci.priors.base import filled
from ambient_sci.whole_files import digest_of

#: Layers that are adapted: the attention's, as in diffusers' own scripts.
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a folder with SDXL's weights in diffusers' layout; nothing is fetched.

    Raises:
        InputError: diffusers is not installed, or there are no such weights.
    """
    try:
        from diffusers import StableDiffusionXLPipeline
    except ImportError:
        raise InputError("SDXL: expected the package diffusers (pip install 'ambient-sci[sdxl]')") from None
    if not (Path(path) / "model_index.json").is_file():
        raise InputError(
            f"{path}: expected SDXL's weights in diffusers' layout (a folder with model_index.json, as "
            "`hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir FOLDER` leaves it), got none"
        )
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            str(path), torch_dtype=dtype, local_files_only=True, add_watermarker=False
        )
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: expected SDXL's weights, got {' '.join(str(error).split())[:200]}"
        ) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def schedule_of(scheduler: Any) -> VPSchedule:
    """The noise scales of a pipeline's scheduler.

    Raises:
        InputError: betas that no `VPSchedule` has.
    """
    found = scheduler.config
    name = str(found.beta_schedule).replace("_", "-")
    return VPSchedule(name, found.beta_start, found.beta_end, found.num_train_timesteps)  # type: ignore[arg-type]


def level_of(schedule: VPSchedule, t_n: int) -> float:
    """The VE level of time t_n of the schedule, 0 for t_n = 0: data that are taken for clean.

    Raises:
        InputError: a time that the schedule does not have.
    """
    if not 0 <= t_n < schedule.steps:
        raise InputError(f"t_n: expected a time from 0 (clean) to {schedule.steps - 1}, got {t_n}")
    return float(schedule.levels()[t_n]) if t_n else 0.0


def prior_of(pipeline: Any, latent: tuple[int, int, int], data_std: float = 1.0) -> VPPrior:
    """The pipeline's network as a prior of scaled latents; weights are shared, not copied."""
    unet = pipeline.unet
    given = ("sample_size", "in_channels", "out_channels")
    options = {k: v for k, v in unet.config.items() if not k.startswith("_") and k not in given}
    schedule = schedule_of(pipeline.scheduler)
    config = NetworkConfig("diffusers-conditional-unet", options=options)
    tensors = {f"network.model.{name}": tensor.detach() for name, tensor in unet.state_dict().items()}
    levels = schedule.levels()
    return filled(  # type: ignore[return-value]
        lambda: VPPrior(
            config,
            latent,
            data_std,
            prediction=PREDICTIONS[pipeline.scheduler.config.prediction_type],  # type: ignore[arg-type]
            time=schedule,
            sigma_min=float(levels[0]),
            sigma_max=float(levels[-1]),
        ),
        tensors,
    )


def vae_digest(pipeline: Any) -> str:
    """A digest of the autoencoder's weights, rounded to bfloat16: the same for both types."""
    return digest_of({k: v.to("cpu", torch.bfloat16) for k, v in pipeline.vae.state_dict().items()})


@torch.no_grad()
def embedded(pipeline: Any, texts: list[str], batch: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens (P, 77, width) and pooled embeddings (P, width) of texts, by both encoders, float32 on the CPU.

    Texts beyond 77 tokens are cut by the pipeline, which says so.
    """
    tokens, pooled = [], []
    for start in range(0, len(texts), batch):
        found = pipeline.encode_prompt(texts[start : start + batch], do_classifier_free_guidance=False)
        tokens.append(found[0].float().cpu())
        pooled.append(found[2].float().cpu())
    return torch.cat(tokens), torch.cat(pooled)
