"""Parts "masked" (digits) and "masked-mixture" (16 dimensions): a fraction of the entries missing at random, the rest slightly noisy.

em                  an unconditional prior by expectation maximisation, sampled as it is
mask-conditional    the operator-aware Ambient loss, sampled with one fixed mask a chain (the published baseline)
clean               a prior trained on the images themselves
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digit_scores import Scores, spread
from methods import draw, train
from torch import Tensor
from toys import reference, sliced_wasserstein, truth

from ambient_sci.operators import Identity, Independent, Masking
from ambient_sci.sampling import generate_fixed_mask
from ambient_sci.training import em_report

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
        if run == "clean":
            prior, _ = train((Identity(shape), clean, 0.0), run, settings, seed, folder, device)
            samples, _ = draw(prior, settings["samples"], settings["sigma_min"], settings, seed)
            return {"rows": {"clean oracle": score(samples)}, "floor": self._floor(settings, seed, score)}
        generator = torch.Generator().manual_seed(1000 + seed)
        design = Independent(shape, "pixels", 1 - level)
        operator = Masking(design.sample(size, generator), img_size=shape, design=design)
        y = operator.A(clean) + NOISE * torch.randn(clean.shape, generator=generator) * operator.mask
        prior, _ = train((operator, y, NOISE), run, settings, seed, folder, device)
        if run == "em":
            samples, _ = draw(prior, settings["samples"], settings["sigma_min"], settings, seed)
            return {"rows": {"em": score(samples)}, "laps": em_report(folder)}
        samples = generate_fixed_mask(
            prior,
            operator.split(keep=settings["keep"], generator=generator).kept.to(
                next(prior.parameters()).device
            ),
            settings["samples"],
            steps=settings["sampler_steps"],
            sigma_max=settings["sigma_max"],
            batch_size=settings["sampler_batch"],
            generator=torch.Generator().manual_seed(3000 + seed),
        )
        return {"rows": {"mask-conditional, fixed mask": score(samples)}}

    def _floor(self, settings: dict[str, Any], seed: int, score: Any) -> dict[str, float]:
        """What as many draws of the truth score."""
        if self.digits:
            return score(spread(settings["samples"]))
        return score(reference("mixture", settings["samples"], seed + 100))

    def _problem(self, size: int, settings: dict[str, Any], seed: int, folder: Path) -> tuple[Tensor, Any]:
        """Clean images, and what scores samples."""
        if self.digits:
            return spread(size), Scores(folder)
        held_out = reference("mixture", settings["samples"], seed)
        clean = truth("mixture").sample(size, torch.Generator().manual_seed(2000 + seed)).float()
        return clean, lambda samples: {"sliced_w2": sliced_wasserstein(samples.cpu(), held_out)}
