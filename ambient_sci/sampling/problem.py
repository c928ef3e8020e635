"""What a posterior sampler works on: the chains (samples x images) of one batch, each with its own stream of
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from ambient_sci.noise import ChainNoise, draw_noise
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.precision import Precision, precision_context
from ambient_sci.priors.base import Prior
from ambient_sci.sampling.notes import merge


class RepeatedPhysics(LinearPhysics):
    """A foreign physics with parameters for a batch of B, applied to k B chains (k samples of each image,
    sample-major).
    """

    def __init__(self, physics: LinearPhysics, batch: int) -> None:
        super().__init__(noise_model=physics.noise_model)
        self.physics, self.batch = physics, batch

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """physics.A, one sample of all images at a time."""
        return torch.cat([self.physics.A(part, **kwargs) for part in x.split(self.batch)])

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """physics.A_adjoint, one sample of all images at a time."""
        return torch.cat([self.physics.A_adjoint(part, **kwargs) for part in y.split(self.batch)])


def repeat_operator(operator: LinearPhysics, images: int, samples: int) -> LinearPhysics:
    """The operator of ``samples`` x ``images`` chains, sample-major, from the one of ``images``."""
    if isinstance(operator, RowMaskedOperator):
        return operator if operator.batch_size == 1 else operator[torch.arange(images).repeat(samples)]
    return operator if images == 1 else RepeatedPhysics(operator, images)


@dataclass
class Problem:
    """One batch of chains, ``samples`` of each of ``images`` images, sample-major.

    Attributes:
        prior: the prior.
        image_operator: A for the images.
        image_y: measurements of the images, (images, ...).
        image_sigma_y: their noise levels, (images,), or (images, ...) where noise differs by entry.
        sigmas: decreasing noise levels.
        seeds: one for each chain.
        report: numbers a sampler adds.
        operator, y, sigma_y: the same for each chain.
        noise: one random stream for each chain.
    """

    prior: Prior
    image_operator: LinearPhysics
    image_y: Tensor
    image_sigma_y: Tensor
    sigmas: Tensor
    seeds: Sequence[int]
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images = len(self.image_y)
        self.samples = len(self.seeds) // self.images
        self.operator = repeat_operator(self.image_operator, self.images, self.samples)
        self.y = self._repeated(self.image_y)
        self.sigma_y = self._repeated(self.image_sigma_y)
        self.noise = ChainNoise(self.seeds, self.y.device)

    def _repeated(self, each: Tensor) -> Tensor:
        """(images, ...) as (chains, ...)."""
        return each.repeat(self.samples, *([1] * (each.ndim - 1)))

    def start(self) -> Tensor:
        """Pure noise at the highest level, one image for each chain."""
        return draw_noise(self.like_images(), self.noise) * float(self.sigmas[0])

    def like_images(self) -> Tensor:
        """An empty batch of images, (chains, C, H, W), in the type and on the device of the measurements."""
        return torch.empty(len(self.y), *self.prior.shape, dtype=self.y.dtype, device=self.y.device)

    def level(self, sigma: float) -> Tensor:
        """The level ``sigma`` for each chain, (chains,)."""
        return torch.full((len(self.y),), sigma, dtype=self.y.dtype, device=self.y.device)

    def denoise(self, x: Tensor, sigma: float, precision: Precision) -> Tensor:
        """D(x, sigma) for every chain, in the type of ``x``."""
        with precision_context(precision, x.device):
            return self.prior(x, self.level(sigma)).to(x.dtype)

    def of(self, images: list[int]) -> Problem:
        """The chains of some images; of an operator of this library, or one that is the same for all."""
        operator = self.image_operator
        if isinstance(operator, RowMaskedOperator) and operator.batch_size > 1:
            operator = operator[torch.tensor(images)]
        seeds = torch.tensor(self.seeds).reshape(self.samples, self.images)[:, images].flatten().tolist()
        return Problem(
            self.prior, operator, self.image_y[images], self.image_sigma_y[images], self.sigmas, seeds
        )

    def by_image(self, ways: dict[Any, Callable[[Problem], Draws]], chosen: list[Any]) -> Draws:
        """Each image sampled in its own way, all of one way at a time.

        Args:
            ways: how a problem is sampled, by key; all with means or all without.
            chosen: key of each image.
        """
        keys = list(dict.fromkeys(chosen))
        if len(keys) == 1:
            return ways[keys[0]](self)
        found = Draws(self.like_images())
        for key in keys:
            images = [i for i, k in enumerate(chosen) if k == key]
            part = self.of(images)
            own = ways[key](part)
            index = torch.arange(len(self.y)).reshape(self.samples, self.images)[:, images].flatten()
            found.samples[index] = own.samples
            for name in ("means", "controls"):
                if (value := getattr(own, name)) is not None:
                    # Images without a control have one of zero.
                    whole = getattr(found, name)
                    whole = torch.zeros_like(found.samples) if whole is None else whole
                    whole[index] = value
                    setattr(found, name, whole)
            found.left |= own.left
            self.report.update(merge(self.report, part.report))
        return found

    def with_samples(self, samples: int) -> Problem:
        """The same images with ``samples`` new chains each; seeds derive from those of each image's first
        chain.
        """
        generators = [torch.Generator().manual_seed(int(s)) for s in self.seeds[: self.images]]
        seeds = torch.stack([torch.randint(2**62, (samples,), generator=g) for g in generators], 1)
        return Problem(
            self.prior,
            self.image_operator,
            self.image_y,
            self.image_sigma_y,
            self.sigmas,
            seeds.flatten().tolist(),
        )


@dataclass
class Draws:
    """What a posterior sampler returns of its chains.

    Attributes:
        samples: one image for each chain, (chains, C, H, W).
        means: what each sample is the mean of, given less than decides the sample: E[sample | state of the
            chain], or E[sample | y]; their average estimates the posterior mean with less noise than that of
            the samples (Rao-Blackwell). None where the sampler has none.
        controls: images of mean zero that are like the deviations of the means, if there are any; see
            `ambient_sci.sampling.moments`.
        left: mean square per entry that linear solves left undone in the images, by noise level.
    """

    samples: Tensor
    means: Tensor | None = None
    controls: Tensor | None = None
    left: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PosteriorSampler:
    """A posterior sampler and what the runner has to know about it.

    Attributes:
        run: (problem, **options) -> `Draws`, or the images alone, one for each chain; puts its numbers into
            problem.report.
        steps: default number of noise levels.
        rho: default bend of the grid of levels; infinite for equal ratios.
        conditioning: kind of prior it needs.
        denoiser: the posterior denoiser that it hands its further options to, if any.
        point_estimate: it draws no samples.
        population: the samples of an image depend on each other and must be drawn in one batch.
        about: one line.
    """

    run: Callable[..., Draws | Tensor]
    steps: int
    about: str
    rho: float = math.inf
    conditioning: Literal["unconditional", "mask-conditional"] = "unconditional"
    denoiser: type | None = None
    point_estimate: bool = False
    population: bool = False
