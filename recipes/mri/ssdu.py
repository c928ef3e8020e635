r"""SSDU and robust SSDU, by deepinv's losses, on the network that the mask-conditional priors have.

    SSDU      y = y_1 + y_2 by a random pixel mask, 2-D Gaussian density;
    loss ||A_2 f(y_1) - y_2||^2 / |mask_2|
    robust    y~ = M_1 (y + alpha sigma_y n), M_1 random lines;
    loss ||(1 - K)^(-1/2) (y_2 - A_2 f(y~))||^2
                                                                                     + ||(1 + 1/alpha^2) M_1 M
                                                                                     (A f(y~) - y)||^2

f is shown the zero-filled image and the mask of what it is given, at the noise level of the data; applied, it
is given all rows. So it is a `NetworkPrior` whose one-step estimate is its reconstruction, and what it has in
common with a mask-conditional prior ends there.

deepinv's mask generators and noise models are given generators that are seeded with the step; by default they
would all be seeded alike.

Sources: Yaman et al., "Self-supervised learning of physics-guided reconstruction neural networks" (2020);
Millard & Chiew, "A theoretical framework for self-supervised MR image reconstruction" (2023), "Clean
self-supervised MRI reconstruction from noisy, sub-sampled training data with robust SSDU" (2024).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.losses import denoise_measurement
from ambient_sci.operators import MaskDesign, make_design
from ambient_sci.randomness import seeded
from ambient_sci.training import Batches, OneModule, TrainConfig, initial_prior, open_source

#: Stream of randomness of the splits, beside those of the other stages.
_SPLITS = 30


class DesignMasks:
    """A mask design as what deepinv takes for a mask generator, (B, 1, H, W); K-weighted losses ask one for
    its average."""

    def __init__(self, design: MaskDesign, generator: torch.Generator) -> None:
        self.design, self.rng = design, generator

    def step(self, batch_size: int = 1, **kwargs: Any) -> dict[str, Tensor]:
        """Fresh masks."""
        return {"mask": self.design.sample(batch_size, self.rng)}

    def average(self, **kwargs: Any) -> dict[str, Tensor]:
        """P(row is measured), from as many masks as deepinv draws by default."""
        return {"mask": self.step(2000)["mask"].mean(0, keepdim=True)}


class ShapedLikeInput:
    """A deepinv splitting generator whose masks have the shape of the mask that they split.

    deepinv multiplies the two. Our multi-coil masks are (B, 1, 1, H, W); against its (B, 1, H, W) that would
    broadcast to every pair of samples in the batch, without an error.
    """

    def __init__(self, splits: Any, average: Any = None) -> None:
        self.splits, self.average = splits, average

    def step(self, batch_size: int, input_mask: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Part of each mask of ``input_mask``, its samples split independently; drawn on the CPU, wherever
        the masks are."""
        flat = input_mask.cpu().reshape(len(input_mask), 1, *input_mask.shape[-2:])
        # One at a time: for a batch of one, deepinv would drop the batch axis.
        parts = [self.splits.batch_step(input_mask=mask) for mask in flat]
        return {"mask": torch.stack(parts).reshape(input_mask.shape).to(input_mask)}


def splitting_loss(
    design: MaskDesign,
    generator: torch.Generator,
    *,
    robust: bool,
    split_ratio: float,
    further: MaskDesign,
    alpha: float,
) -> Any:
    """deepinv's loss, whose splits come from ``generator``; robust SSDU's ``noise_model`` has yet to be given
    one, and a noise level.

    Args:
        design: how the scans were undersampled.
        generator: source of splits.
        robust: robust SSDU instead of SSDU.
        split_ratio: fraction of the measured points that the network is shown (SSDU).
        further: masks that the measured ones are multiplied by (robust SSDU).
        alpha: standard deviation of the added noise in units of ``sigma_y`` (robust SSDU).
    """
    from deepinv.loss import SplittingLoss
    from deepinv.loss.mri import RobustSplittingLoss
    from deepinv.physics import GaussianNoise
    from deepinv.physics.generator import (
        GaussianSplittingMaskGenerator,
        MultiplicativeSplittingMaskGenerator,
    )

    size = (1, *design.image_shape[1:])
    if not robust:
        points = GaussianSplittingMaskGenerator(size, split_ratio, center_block=0, rng=generator)
        return SplittingLoss(mask_generator=ShapedLikeInput(points), eval_split_input=False)  # type: ignore[arg-type]
    masks: Any = DesignMasks(further, generator)
    lines: Any = ShapedLikeInput(MultiplicativeSplittingMaskGenerator(size, masks), masks.average)
    measured: Any = DesignMasks(design, generator)
    return RobustSplittingLoss(lines, measured, noise_model=GaussianNoise(1.0), alpha=alpha)


class OneStep(nn.Module):
    """f(y, physics) of deepinv's losses: the prior's estimate from the rows that ``physics`` measures.

    Attributes:
        sigma_y: noise level of each sample of the batch at hand, (B,).
    """

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior, self.sigma_y = prior, torch.zeros(1)

    def forward(self, y: Tensor, physics: Any) -> Tensor:
        """``physics``: one of our operators, or what deepinv makes of it when it splits: (ours, a mask)."""
        parts = list(getattr(physics, "physics_list", [physics]))
        operator = parts[0]
        if len(parts) > 1:
            operator = operator.with_mask(operator.mask * parts[1].mask)
        prior: Any = self.prior
        return denoise_measurement(prior, operator, y, self.sigma_y)


class SplittingStage(OneModule):
    """A stage of training for `run_stage`.

    Args:
        path: undersampled scans.
        config: the run; its levels and its loss are not used.
        accelerator: device; one process.
        robust: robust SSDU instead of SSDU.
        split_ratio, alpha: see `splitting_loss`.
        acceleration: of the further masks of robust SSDU, drawn by the name of the design of the scans.
        design: that name.
        acs: calibration lines of the further masks.

    Raises:
        InputError: scans with nothing missing.
    """

    name = "ssdu"

    def __init__(
        self,
        path: Path,
        config: TrainConfig,
        accelerator: Any,
        *,
        robust: bool,
        split_ratio: float,
        alpha: float,
        acceleration: float,
        design: str,
        acs: int,
    ) -> None:
        source = open_source(path, config)
        if source.design is None:
            raise InputError(f"{path}: SSDU: expected undersampled scans, got fully sampled ones")
        # Batches, symmetries, network and initial weights are those of the Ambient stage; only the loss is
        # another.
        self.batches = Batches(source, config, accelerator)
        self.module: nn.Module = initial_prior(self.batches)
        self.seed, self.alpha = config.seed, alpha
        self.generator = torch.Generator().manual_seed(config.seed)
        self.noise_generator = torch.Generator(accelerator.device)
        further = make_design(
            design, image_shape=source.design.image_shape, acceleration=acceleration, acs=acs
        )
        self.splitting = splitting_loss(
            source.design,
            self.generator,
            robust=robust,
            split_ratio=split_ratio,
            further=further,
            alpha=alpha,
        )
        self.one_step = OneStep(self.module)
        self.model = self.splitting.adapt_model(self.one_step)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data."""
        return self.batches.source.fingerprint()

    def loss(self, step: int, part: int = 0) -> Tensor:
        """The loss of a part of a batch, which deepinv means over it, for each of its samples."""
        drawn, key = self.batches.draw(step, part), (_SPLITS, step, self.batches.share(part))
        splits, noise = torch.randint(2**62, (2,), generator=seeded(self.seed, *key)).tolist()
        self.generator.manual_seed(splits)
        self.one_step.sigma_y = drawn.sigma_y
        if hasattr(self.splitting, "noise_model"):
            self.splitting.noise_model.update_parameters(sigma=self.alpha * drawn.sigma_y)
            self.splitting.noise_model.rng = self.noise_generator.manual_seed(noise)
        self.model.train()
        estimated = self.model(drawn.y, drawn.operator, update_parameters=True)
        loss = self.splitting(estimated, drawn.y, drawn.operator, self.model)
        return loss.expand(len(drawn.y))

    def indices(self, step: int, part: int = 0) -> list[int]:
        """Samples of that part."""
        return self.batches.indices(step, part)
