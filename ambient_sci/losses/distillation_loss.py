r"""What a one-step generator is moved by: the score of what it makes, against the score of the data.

    x_g = G(z)                              an image that the generator makes
    x_t = x_g + sigma n                     the same at level sigma
    f   = D_teacher(x_t, sigma)             what the data say that it was
    g   = D_fake(x_t, sigma)                what the generator's own images say that it was

    L = <f - g, (f - x_g) - alpha (f - g)> / w,     w = mean |x_g - f| (no gradient)

f - g is sigma^2 times the difference of the scores of the data and of the generator's images at this level;
where the fake is exact, E L is, up to w, (1 - alpha) |f - g|^2 plus a term without a gradient of its own, the
Fisher divergence of the two laws. Gradients go through x_g and through the inputs of both denoisers, whose
weights stay as they are.

In closed form. For a mode of variance s^2 and a generator of gain a, with the exact fake, the gains of the
two denoisers are kf = s^2 / (s^2 + sigma^2) and kg = a^2 / (a^2 + sigma^2), and

    dL/da = 2 a k (kf - alpha k - 1) / w,     k = kf - kg.

It has the right sign (a grows where a < s) if and only if alpha (a^2 - s^2) < a^2 + sigma^2: always for
alpha <= 1, and for alpha = 1.2 unless a^2 > 6 s^2 + 5 sigma^2.

Source: Zhang et al., "Restoration Score Distillation" (2025), after Zhou et al., "Score identity
Distillation" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor


def distillation(images: Tensor, teacher: Tensor, fake: Tensor, alpha: float = 1.0) -> Tensor:
    """L of the equation above for each image, (B,), a mean over entries.

    Args:
        images: x_g, (B, ...), with its graph.
        teacher, fake: f and g at the same noisy copies of them, with their graphs down to ``images``.
        alpha: see above.
    """
    gap = teacher - fake
    product = gap * ((teacher - images) - alpha * gap)
    scale = (images - teacher).detach().abs().flatten(1).mean(1)
    return product.flatten(1).mean(1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def karras_levels(u: Tensor, sigma_min: float | Tensor, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Levels between ``sigma_min`` (u = 1) and ``sigma_max`` (u = 0) that are uniform in sigma^(1/rho) where
    u is (Karras et al. 2022, eq. 5)."""
    low = torch.as_tensor(sigma_min, dtype=u.dtype) ** (1 / rho)
    return (sigma_max ** (1 / rho) + u * (low - sigma_max ** (1 / rho))) ** rho
