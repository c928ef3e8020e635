r"""Where deconvolution of the ring stops, by theory: what of its law noise leaves to be seen in n points.

    python -m recipes.exactness.limits [--points 20000]

The empirical characteristic function of n points has noise 1 / sqrt(n) at every frequency, and the law's
own is multiplied by e^(-k^2 sigma_n^2 / 2). For m modes of standard deviation w on a circle of radius 1 it
is, on average over directions of k and in its first two harmonics,

    J_0(k) e^(-k^2 (w^2 + sigma_n^2) / 2)         that there is a ring
    2 J_m(k) e^(-k^2 (w^2 + sigma_n^2) / 2)       that it consists of m modes

The largest of each over k, times sqrt(n), is a ratio of signal to noise. Where it is far below 1 for the
second, no method can know the modes, and the best it can draw is a ring without them, whose distance to the
truth is printed.
"""

from __future__ import annotations

import argparse
import math

import torch
from scipy.special import jv
from torch import Tensor

from recipes.exactness.toys import MODE_STD, reference, sliced_wasserstein

MODES, RADIUS = 5, 1.0


def visible(sigma_n: float, points: int) -> tuple[float, float]:
    """Signal to noise of the ring's hole (against a Gaussian of its variance) and of its modes.

    Args:
        sigma_n: noise of the data.
        points: their number.
    """
    k = torch.linspace(0.01, 12.0, 2400, dtype=torch.float64)
    left = torch.exp(-0.5 * k**2 * (MODE_STD**2 + sigma_n**2))
    hole = (torch.as_tensor(jv(0, (k * RADIUS).numpy())) - torch.exp(-0.25 * (k * RADIUS) ** 2)).abs() * left
    modes = 2 * torch.as_tensor(jv(MODES, (k * RADIUS).numpy())).abs() * left
    return tuple(float(part.max()) * math.sqrt(points) for part in (hole, modes))  # type: ignore[return-value]


def without_modes(num: int, seed: int = 0) -> Tensor:
    """Draws of a ring of the same radius and width that has no modes, (num, 1, 1, 2)."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(num, generator=generator, dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], 1)
    return (x + MODE_STD * torch.randn(x.shape, generator=generator, dtype=x.dtype))[:, None, None]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.3, 0.6, 0.9, 1.2])
    arguments = parser.parse_args()
    print("| sigma_n | signal to noise of the hole | of the five modes |\n|---|---|---|")
    for level in arguments.levels:
        print(f"| {level:g} | " + " | ".join(f"{v:.3g}" for v in visible(level, arguments.points)) + " |")
    truth = reference("ring", 20_000, 0)
    blind = sliced_wasserstein(without_modes(20_000), truth)
    print(f"\nA ring without modes: sliced W2 {blind:.4f} from the truth.")


if __name__ == "__main__":
    main()
