r"""Quality of generated images without clean ones: measure them as the data were measured, and compare.

    x_g -> y_g = A x_g + sigma_y n          with operators and noise of the data
    score = distance( A^H y_g , A^H y )

If the images have the law of the clean data, the two have the same law; where the corruption loses nothing of
the law for good (noise does not, masks may, see `ambient_sci.operators.identifiability`), only then. Noise
blurs the difference, so that a score is small where images differ in what the noise hides; it ranks.

Source: Zhang et al., "Restoration Score Distillation" (2025), where it picks the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data.survey import Measurements
from ambient_sci.errors import InputError
from ambient_sci.evaluation.distances import Features, frechet_distance, kernel_distance, sliced_wasserstein
from ambient_sci.noise import draw_noise, expand

#: Distances by name: (a, b, features) -> number.
DISTANCES: dict[str, Callable[[Tensor, Tensor, Features | None], float]] = {
    "sliced-wasserstein": lambda a, b, features: sliced_wasserstein(*_features_of(a, b, features)),
    "frechet": frechet_distance,
    "kid": lambda a, b, features: kernel_distance(a, b, features)["mean"],
}


class ProximalScore:
    """The score above, with the data's side of it drawn once.

    Args:
        measurements: the data: a measurement file, or data in memory (`MeasurementArrays`).
        num: most samples of them to compare with.
        distance: "sliced-wasserstein" (on entries, or features), "frechet" or "kid".
        features: images (n, C, H, W) to features (n, d); default: the entries themselves.
        seed: of the samples, and of the noise that generated images are measured with.

    Raises:
        InputError: another distance, or fewer than two samples.
    """

    def __init__(
        self,
        measurements: Measurements,
        num: int = 2000,
        distance: str = "sliced-wasserstein",
        features: Features | None = None,
        seed: int = 0,
    ) -> None:
        if distance not in DISTANCES:
            raise InputError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
        least = min(num, len(measurements))
        if least < 2:
            raise InputError(f"proximal score: expected at least 2 samples, got {least}")
        self.distance, self.features, self.seed = distance, features, seed
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(measurements), generator=generator)[:num].sort().values
        self.operator = measurements.operator(rows)
        self.sigma = measurements.sigma(rows)
        self.adjoint = self.operator.A_adjoint(measurements.measurements(rows).to(torch.float32))

    def __len__(self) -> int:
        """Number of samples of the data."""
        return len(self.adjoint)

    def __call__(self, images: Tensor) -> float:
        """The distance of ``images`` (n, C, H, W), measured; lower is better. Image k is measured like sample
        k of the data, and with the same noise whenever it is asked.

        Raises:
            InputError: images of another shape, fewer than two, or more than there are samples.
        """
        images = images.detach().to(self.adjoint)
        if not 2 <= len(images) <= len(self) or images.shape[1:] != self.adjoint.shape[1:]:
            raise InputError(
                f"proximal score: expected 2 to {len(self)} images of {tuple(self.adjoint.shape[1:])}, got "
                f"{tuple(images.shape)}"
            )
        rows = torch.arange(len(images))
        operator = self.operator if self.operator.batch_size == 1 else self.operator[rows]
        y = operator.A(images)
        noise = draw_noise(y, torch.Generator().manual_seed(self.seed + 1))
        sigma = self.sigma if self.sigma.ndim == 0 or len(self.sigma) == 1 else self.sigma[rows]
        measured = operator.A_adjoint(y + expand(sigma, y) * noise)
        return DISTANCES[self.distance](measured, self.adjoint, self.features)


def proximal_score(
    images: Tensor, measurements: str | os.PathLike[str] | Measurements, **options: Any
) -> float:
    """`ProximalScore` of ``images`` once; options are its arguments."""
    from ambient_sci.data import MeasurementFile

    data = MeasurementFile(measurements) if isinstance(measurements, (str, os.PathLike)) else measurements
    return ProximalScore(data, **{"num": len(images), **options})(images)


def _features_of(a: Tensor, b: Tensor, features: Features | None) -> tuple[Tensor, Tensor]:
    return (a, b) if features is None else (features(a), features(b))
