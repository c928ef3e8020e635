"""Parts "masked" (digits) and "masked-mixture" (16 dimensions): a fraction of the entries missing at random, the rest slightly noisy.

em                  an unconditional prior by expectation maximisation, sampled as it is
mask-conditional    the operator-aware Ambient loss, sampled with one fixed mask a chain (the published baseline)
clean               a prior trained on the images themselves
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import configuration, draw, train
from torch import Tensor
from toys import reference, sliced_wasserstein, truth

from ambient_sci.operators import Identity, Independent, Masking
from ambient_sci.sampling import generate_fixed_mask
from ambient_sci.training import LossConfig, em_report, fit

NOISE = 0.05


class Part:
    """Masked digits, or the masked mixture.

    Attributes:
        RUNS: what is trained.
    """

    RUNS = ("clean", "em", "mask-conditional")

    def __init__(self, name: str) -> None:
        self.digits = name == "masked"

    def levels(self, settings: dict[str, Any]) -> list[float]:
        """Fractions of the entries that are missing."""
        return settings["missing"]

    def run(
        self,
        run: str,
        level: float,
        size: int,
        seed: int,
        settings: dict[str, Any],
        folder: Path,
        device: str,
    ) -> dict[str, Any]:
        """Train, draw, score."""
        clean, score = self._problem(size, settings, seed, folder.parent)
        shape = tuple(clean.shape[1:])
        generator = torch.Generator().manual_seed(1000 + seed)
        design = Independent(shape, "pixels", 1 - level)
        operator = Masking(design.sample(size, generator), img_size=shape, design=design)
        y = operator.A(clean) + NOISE * torch.randn(clean.shape, generator=generator) * operator.mask
        extra: dict[str, Any] = {}
        if run == "mask-conditional":
            settings = {**settings, "consistency": {}, "clean_levels": "log-uniform"}
            config = configuration("clean", settings, seed, device)
            config = replace(config, loss=LossConfig(keep=settings["keep"], c_min=0.02))
            resume = (folder / "config.json").exists()
            prior = fit((operator, y, NOISE), config, folder, resume=resume)
            shown = operator.split(keep=settings["keep"], generator=generator).kept.to(
                device if device != "auto" else "cpu"
            )
            samples = generate_fixed_mask(
                prior,
                shown,
                settings["samples"],
                steps=settings["sampler_steps"],
                sigma_max=settings["sigma_max"],
                batch_size=settings["sampler_batch"],
                generator=torch.Generator().manual_seed(3000 + seed),
            )
            row = "mask-conditional, fixed mask"
        else:
            data = (Identity(shape), clean, 0.0) if run == "clean" else (operator, y, NOISE)
            prior, _ = train(data, run, {**settings, "consistency": {}}, seed, folder, device)
            samples, _ = draw(prior, settings["samples"], settings["sigma_min"], settings, seed)
            row = {"clean": "clean oracle", "em": "em"}[run]
            if run == "em":
                extra = {"laps": em_report(folder)}
        return {"rows": {row: score(samples)}, **extra}

    def _problem(self, size: int, settings: dict[str, Any], seed: int, folder: Path) -> tuple[Tensor, Any]:
        """Clean images, and what scores samples."""
        if self.digits:
            from digit_scores import Scores, images

            return images("test10k")[0][:size], Scores(folder)
        held_out = reference("mixture", settings["samples"], seed)
        clean = truth("mixture").sample(size, torch.Generator().manual_seed(2000 + seed)).float()
        return clean, lambda samples: {"sliced_w2": sliced_wasserstein(samples.cpu(), held_out)}
