r"""Which symmetries the images themselves do not contradict, told from noisy, possibly incomplete data.

A symmetry P (a reflection, a transposition, a change of phase) is true of the images where x and P x are
equally likely. White noise has the symmetry, and so have masks of an invariant design. Then the differences

    d_i = f(A_i^H y_i) - f(P A_i^H y_i)

have symmetric laws for every feature f: with random signs s_i, sum_i s_i d_i is distributed like sum_i d_i.
This gives an exact test without any assumption on the images [sign-flip test, Fisher 1935]:

    p = (1 + #{draws: ||sum_i s_i d_i||^2 >= ||sum_i d_i||^2}) / (1 + draws)

and how much of a difference is systematic is estimated without bias by

    rho = mean_{i != j} d_i . d_j / (2 E ||f(x) - E f(x)||^2)

(noise of known level is taken off the denominator). Features are the image itself (its magnitude where it is
complex; changes of phase look at the complex image) and its power spectrum, which sees oriented texture that
is everywhere. Images of one subject are taken together where there are eight subjects or more.

A symmetry is contradicted where p is at most 0.01 and rho at least 0.05 for one of the features. Faces have a
top and a bottom (rho = 0.14 for mirrored ones), left and right hardly differ (0.03); cells have no direction
at all (0.00). With few images only coarse asymmetries are seen, and with few images mirrored ones help most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.survey import Measurements, as_noisy_images, spread
from ambient_sci.randomness import seeded

_LOOKED_AT, _CHUNK, _DRAWS = 512, 64, 999
_LEVEL, _LEAST, _SUBJECTS = 0.01, 0.05, 8
_ENTRIES = 1 << 14  # features are averaged down to about this many numbers an image

Symmetry = Callable[[Tensor], Tensor]
SYMMETRIES: dict[str, Symmetry] = {
    "flip-horizontal": lambda x: x.flip(-1),
    "flip-vertical": lambda x: x.flip(-2),
    "transpose": lambda x: x.transpose(-1, -2),
    "phase": lambda x: torch.stack([-x[:, 1], x[:, 0]], 1),
}


def contradicted(data: Measurements, complete: bool, names: tuple[str, ...]) -> dict[str, float]:
    """Those of ``names`` that the data contradict, with rho.

    Args:
        data: measurements; up to 512 of them are looked at.
        complete: every row of every sample is measured.
        names: among `SYMMETRIES`; each must fit the shape of the images.
    """
    images, subjects, noise = _images(data, complete)
    found = {}
    for name in names:
        for feature in (_itself,) if name == "phase" else (_magnitude, _spectrum):
            here, there = feature(images), feature(SYMMETRIES[name](images))
            d = _grouped(here - there, subjects)
            rho = systematic(d, here, 0.0 if feature is _spectrum else noise)
            if rho >= _LEAST and sign_flip_p(d) <= _LEVEL:
                found[name] = max(rho, found.get(name, 0.0))
    return found


def systematic(differences: Tensor, features: Tensor, noise: float = 0.0) -> float:
    """rho of the module's equation.

    Args:
        differences: d_i, (n, ...), n >= 1.
        features: f(x_i), (N, ...).
        noise: standard deviation of white noise in each entry of the features.
    """
    d, f = differences.flatten(1).double(), features.flatten(1).double()
    if len(d) < 2:
        return 0.0
    square = float(d.sum(0).square().sum() - d.square().sum()) / (len(d) * (len(d) - 1))
    spread_of = 2 * float((f - f.mean(0)).square().sum()) / (len(f) - 1)
    # Where nearly all is noise, what is left of it is unsure: at least a tenth counts as signal.
    return square / max(spread_of - 2 * noise**2 * f.shape[1], 0.1 * spread_of, 1e-300)


def sign_flip_p(differences: Tensor, draws: int = _DRAWS) -> float:
    """p of the hypothesis that ``differences`` (N, ...) have symmetric laws; see the module's equation."""
    d = differences.flatten(1).double()
    gram = d @ d.T
    signs = torch.randint(0, 2, (draws, len(d)), generator=seeded(0, 77)).double() * 2 - 1
    drawn = ((signs @ gram) * signs).sum(1)
    observed = gram.sum()
    # Rounding: with one difference every sum is as large as the observed one.
    return (1 + int((drawn >= observed * (1 - 1e-9)).sum())) / (1 + draws)


def _images(data: Measurements, complete: bool) -> tuple[Tensor, list[str], float]:
    """A^H y of some samples, (n, C, H, W), who they are of, and the noise of each entry."""
    generator = torch.Generator().manual_seed(0)
    chosen, found, variances = spread(len(data), _LOOKED_AT), [], []
    factor = _factor(tuple(data.image_shape))
    for indices in np.array_split(chosen, math.ceil(len(chosen) / _CHUNK)):
        rows = torch.from_numpy(indices)
        operator, y, sigma = data.operator(rows), data.measurements(rows), data.sigma(rows)
        x = as_noisy_images(operator, y, sigma, generator)[1] if complete else operator.A_adjoint(y)
        variances.append(float(sigma.double().square().mean()) * float(operator.mask.double().mean()))
        found.append(torch.nn.functional.avg_pool2d(x.cpu(), factor) if factor > 1 else x.cpu())
    subjects = list(data.subjects)
    return torch.cat(found), [subjects[i] for i in chosen], math.sqrt(float(np.mean(variances))) / factor


def _factor(shape: tuple[int, ...]) -> int:
    """Side of the blocks that images are averaged over, so that a test of large ones stays cheap; it divides
    the image, or the blocks of the mirrored one would be others."""
    wanted = math.ceil(math.sqrt(math.prod(shape) / _ENTRIES))
    fits = [k for k in range(1, 2 * wanted) if shape[1] % k == 0 and shape[2] % k == 0]
    return max(fits) if wanted > 1 else 1


def _itself(x: Tensor) -> Tensor:
    return x


def _magnitude(x: Tensor) -> Tensor:
    return x.norm(dim=1, keepdim=True) if x.shape[1] == 2 else x


def _spectrum(x: Tensor) -> Tensor:
    """|F x|^2 without the mean, scaled so that each image counts about the same."""
    m = _magnitude(x)
    power = torch.fft.fft2(m - m.mean((-2, -1), keepdim=True)).abs() ** 2
    return power / power.mean((-3, -2, -1), keepdim=True).clamp(min=1e-30)


def _grouped(differences: Tensor, subjects: list[str]) -> Tensor:
    """The mean difference of each subject, where there are subjects enough to judge by."""
    numbers = {name: k for k, name in enumerate(dict.fromkeys(subjects))}
    if len(numbers) < _SUBJECTS:
        return differences
    index = torch.tensor([numbers[name] for name in subjects])
    sums = torch.zeros(len(numbers), *differences.shape[1:], dtype=torch.float64)
    sums.index_add_(0, index, differences.double())
    return sums / torch.bincount(index).reshape(-1, *[1] * (differences.ndim - 1))
