"""A tiny SDXL in the layout of the real one, made offline: for tests and for trying commands.

    python -m recipes.sdxl.tiny runs/sdxl/tiny [--prediction v_prediction] [--seed 0]

Its weights are random: it draws nothing that resembles anything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from ambient_sci.errors import InputError

LATENT, SCALING = 8, 2.0


def main(arguments: list[str] | None = None) -> None:
    """Write one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--prediction", default="epsilon", choices=["epsilon", "v_prediction"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.out, options.prediction, options.seed)


def write(folder: Path, prediction: str = "epsilon", seed: int = 0) -> Path:
    """Write a tiny SDXL as ``save_pretrained`` does; images of 16 px, latents of (4, 8, 8).

    Args:
        folder: where; it must not exist.
        prediction: what the network predicts, in diffusers' words.
        seed: of the weights.

    Raises:
        InputError: the folder is there, or diffusers or transformers are not installed.
    """
    if Path(folder).exists():
        raise InputError(f"{folder}: expected a folder that does not exist, got one that does")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        _pipeline(prediction).save_pretrained(folder)
    return Path(folder)


def _pipeline(prediction: str):
    try:
        from diffusers import (
            AutoencoderKL,
            EulerDiscreteScheduler,
            StableDiffusionXLPipeline,
            UNet2DConditionModel,
        )
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as error:
        raise InputError(
            f"tiny SDXL: expected diffusers and transformers (pip install 'ambient-sci[sdxl]'): {error}"
        ) from None

    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
    )
    unet = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=2 * LATENT,
        scaling_factor=SCALING,
    )
    schedule = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction,
    )
    first, second = _tokenizers()
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text).eval(),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=schedule,
        add_watermarker=False,
    )


def _tokenizers():
    """Two tokenizers of single bytes: every text can be written, none of its words is known."""
    from transformers import CLIPTokenizer

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + k) for k in range(len(rest))]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as place:
        vocabulary, merges = Path(place) / "vocab.json", Path(place) / "merges.txt"
        vocabulary.write_text(json.dumps({word: k for k, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        return tuple(
            CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77, pad_token=pad)
            for pad in ("<|endoftext|>", "!")
        )


if __name__ == "__main__":
    main()
