r"""Priors with closed forms: Gaussian, and mixture of isotropic Gaussians. The measuring sticks of everything
else.

Gaussian N(mu, Sigma):   D(x, sigma) = mu + Sigma (Sigma + sigma^2 I)^-1 (x - mu)

Mixture sum_k w_k N(mu_k, s_k^2 I):

    D(x, sigma) = sum_k r_k(x) [mu_k + s_k^2 / (s_k^2 + sigma^2) (x - mu_k)],
    r_k proportional to w_k N(x; mu_k, (s_k^2 + sigma^2) I)

Both have exact posteriors under y = A x + sigma_y n (`posterior`), and an exact E[x_0 | y~, B], which is what
a mask-conditional network should learn (`ConditionalMean`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.noise import draw_noise
from ambient_sci.priors.base import Prior, TensorPrior, match_dtype, per_sample
from ambient_sci.priors.given import Given, KeptRows

if TYPE_CHECKING:
    from ambient_sci.operators.base import RowMaskedOperator


def operator_matrix(
    operator: RowMaskedOperator, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> Tensor:
    """A as matrices (B, rows, columns) of a small linear operator, rows outside the mask zero; for tests and
    analytic priors."""
    size, batch = math.prod(shape), operator.batch_size
    basis = torch.eye(size, dtype=dtype, device=operator.mask.device).reshape(size, *shape)
    columns = [operator.A(e.expand(batch, *shape)).flatten(1) for e in basis]
    return torch.stack(columns, 2).to(dtype)


class GaussianPrior(TensorPrior):
    """N(mean, cov).

    Args:
        mean: (C, H, W) or any shape of one image.
        cov: (n, n) symmetric positive semi-definite, n the number of entries of ``mean``; or (n,) or mean's
            shape for a diagonal.

    Raises:
        InputError: shapes that do not fit, or a covariance that is not symmetric positive semi-definite.
    """

    kind = "gaussian"
    arguments = ("mean", "cov")

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        super().__init__()
        n = mean.numel()
        if cov.numel() == n and cov.shape != (n, n):
            cov = torch.diag(cov.flatten())
        if cov.shape != (n, n):
            raise InputError(f"Gaussian prior: expected a covariance ({n}, {n}), got {tuple(cov.shape)}")
        if not torch.allclose(cov, cov.T, rtol=1e-5, atol=1e-6 * float(cov.abs().max())):
            raise InputError("Gaussian prior: expected a symmetric covariance")
        values, vectors = torch.linalg.eigh(cov)
        if float(values[0]) < -1e-5 * float(values[-1]):
            raise InputError(
                "Gaussian prior: expected a positive semi-definite covariance, got eigenvalue "
                f"{float(values[0]):g}"
            )
        self.shape = tuple(mean.shape)
        self.data_std = float((torch.trace(cov) / n).sqrt())
        self.register_buffer("mean", mean)
        self.register_buffer("cov", cov)
        self.register_buffer("values", values.clamp(min=0))
        # In the memory layout a file gives back: products of another layout round differently.
        self.register_buffer("vectors", vectors.contiguous())

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """mu + Sigma (Sigma + sigma^2 I)^-1 (x - mu), by the eigendecomposition of Sigma."""
        self.check_given(given)
        z = match_dtype(self, x)
        flat = (z - self.mean).flatten(1)
        variance = per_sample(sigma, z)[:, None] ** 2
        gain = self.values / (self.values + variance)
        gain = torch.where(
            self.values + variance > 0, gain, torch.ones_like(gain)
        )  # sigma = 0 on a null mode: x itself
        return (self.mean + ((flat @ self.vectors) * gain @ self.vectors.T).reshape(x.shape)).to(x.dtype)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """``num`` draws, (num, *shape)."""
        z = draw_noise(self.values.expand(num, -1), generator)
        return self.mean + (z * self.values.sqrt() @ self.vectors.T).reshape(num, *self.shape)

    def posterior(
        self, operator: RowMaskedOperator, y: Tensor, sigma_y: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exact posterior under y = A x + sigma_y n: means (B, *shape) and covariances (B, n, n).

        Dense linear algebra: for small images (n up to a few thousand).
        """
        a = operator_matrix(operator, self.shape, self.mean.dtype)
        batch = y.shape[0]
        a = a.expand(batch, -1, -1)
        cross = self.cov @ a.mT
        noise = torch.as_tensor(sigma_y, dtype=a.dtype, device=a.device).reshape(-1, 1, 1) ** 2
        # Rows outside the mask are zero in A and in y; unit noise there keeps the system regular and changes
        # nothing.
        measured = operator.mask.expand(batch, *y.shape[1:]).flatten(1).to(a.dtype)
        diagonal = torch.diag_embed(1 - measured) + noise * torch.diag_embed(measured)
        gain = torch.linalg.solve(a @ cross + diagonal, cross.mT).mT
        residual = y.flatten(1) - (a @ self.mean.flatten()[:, None])[..., 0]
        mean = self.mean.flatten() + (gain @ residual[..., None])[..., 0]
        return mean.reshape(batch, *self.shape), self.cov - gain @ cross.mT


class GaussianMixturePrior(TensorPrior):
    """sum_k w_k N(mu_k, s_k^2 I).

    Args:
        means: (K, *shape).
        std: s, one value or (K,), positive.
        weights: (K,) positive; normalised to sum 1. Default: equal.

    Raises:
        InputError: shapes that do not fit, or values out of range.
    """

    kind = "mixture"
    arguments = ("means", "std", "weights")

    def __init__(self, means: Tensor, std: float | Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        k = means.shape[0]
        std = torch.as_tensor(std, dtype=means.dtype).expand(k).clone()
        weights = (
            torch.ones(k, dtype=means.dtype)
            if weights is None
            else torch.as_tensor(weights, dtype=means.dtype)
        )
        if weights.shape != (k,) or not bool((weights > 0).all()) or not bool((std > 0).all()):
            raise InputError(f"mixture prior: expected {k} positive weights and standard deviations")
        self.shape = tuple(means.shape[1:])
        weights = weights / weights.sum()
        flat = means.flatten(1)
        centre = weights @ flat
        spread = (weights @ (flat - centre).square()).mean() + weights @ std**2
        self.data_std = float(spread.sqrt())
        self.register_buffer("means", means)
        self.register_buffer("std", std)
        self.register_buffer("weights", weights)

    def responsibilities(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Posterior probabilities of the components, (B, K)."""
        z = match_dtype(self, x)
        flat, means = z.flatten(1), self.means.flatten(1)
        variance = self.std**2 + per_sample(sigma, z)[:, None] ** 2
        distance = torch.cdist(flat, means, compute_mode="donot_use_mm_for_euclid_dist").square()
        log = self.weights.log() - distance / (2 * variance) - flat.shape[1] / 2 * variance.log()
        return log.softmax(1)

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """Responsibility-weighted mean of the components' posterior means."""
        self.check_given(given)
        z = match_dtype(self, x)
        flat, means = z.flatten(1), self.means.flatten(1)
        gain = self.std**2 / (self.std**2 + per_sample(sigma, z)[:, None] ** 2)
        r = self.responsibilities(z, sigma)
        mean = (r * (1 - gain)) @ means + (r * gain).sum(1, keepdim=True) * flat
        return mean.reshape(x.shape).to(x.dtype)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """``num`` draws, (num, *shape)."""
        index = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        z = draw_noise(self.means[:1].expand(num, *self.shape), generator)
        return self.means[index] + self.std[index].reshape(-1, *([1] * len(self.shape))) * z

    def posterior(
        self, operator: RowMaskedOperator, y: Tensor, sigma_y: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Exact posterior under y = A x + sigma_y n, again a mixture: weights (B, K), means (B, K, n),
        covariances (B, K, n, n)."""
        parts = [
            GaussianPrior(m, s**2 * torch.ones_like(m)) for m, s in zip(self.means, self.std, strict=True)
        ]
        moments = [p.posterior(operator, y, sigma_y) for p in parts]
        a = operator_matrix(operator, self.shape, self.means.dtype).expand(y.shape[0], -1, -1)
        measured = operator.mask.expand(y.shape).flatten(1).to(a.dtype)
        noise = torch.as_tensor(sigma_y, dtype=a.dtype, device=a.device).reshape(-1, 1, 1) ** 2
        evidence = []
        for mean, std in zip(self.means, self.std, strict=True):
            cov = std**2 * a @ a.mT + torch.diag_embed(1 - measured) + noise * torch.diag_embed(measured)
            residual = (y.flatten(1) - (a @ mean.flatten()[:, None])[..., 0]) * measured
            factor = torch.linalg.cholesky(cov)
            white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
            evidence.append(-0.5 * white.square().sum(1) - factor.diagonal(dim1=1, dim2=2).log().sum(1))
        weights = (self.weights.log() + torch.stack(evidence, 1)).softmax(1)
        means = torch.stack([m.flatten(1) for m, _ in moments], 1)
        return weights, means, torch.stack([c for _, c in moments], 1)


class ConditionalMean(Prior):
    r"""The exact mask-conditional h(A_B^H y~, sigma, B) = E[x_0 | y~, B] of an analytic prior, for any
    transform T.

    What a mask-conditional network converges to. With the maps of the coils known, z = A_B^H y~ is sufficient
    for x_0. It is G x_0 + noise of covariance sigma^2 G, G = A_B^H A_B, and so for each Gaussian N(mu, Sigma)

        E[x_0 | z] = mu + Sigma (G Sigma + sigma^2 I)^-1 (z - G mu),

    a mixture weighting these by the evidence of its components. No square T is needed, and nothing is
    inverted that could be singular.

    Args:
        prior: Gaussian or mixture.
        operator: any operator over the transform in question, with the coil maps of one scan or of each
            sample; its own mask does not matter.
    """

    takes = KeptRows

    def __init__(self, prior: GaussianPrior | GaussianMixturePrior, operator: RowMaskedOperator) -> None:
        super().__init__()
        self.prior, self.operator = prior, operator
        self.shape, self.data_std = prior.shape, prior.data_std

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """E[x_0 | y~, B] from x = A_B^H y~ and ``given`` = the rows B; without them B is complete."""
        mask = torch.ones_like(self.operator.network_mask[:1])
        if given is not None:
            self.check_given(given)
            mask = given.mask  # type: ignore[attr-defined]
        kept = self.operator.with_mask(self.operator._rows_from_network_mask(mask.to(x.dtype)))
        a = operator_matrix(kept, self.shape, x.dtype)
        normal, z = a.mT @ a, x.flatten(1)
        variance = per_sample(sigma, z)[:, None, None] ** 2
        if isinstance(self.prior, GaussianPrior):
            return self._component(z, normal, variance, self.prior.mean, self.prior.cov)[0].reshape(x.shape)
        identity = torch.eye(z.shape[1], dtype=x.dtype, device=x.device)
        parts = [
            self._component(z, normal, variance, mean, std**2 * identity)
            for mean, std in zip(self.prior.means, self.prior.std, strict=True)
        ]
        weights = (self.prior.weights.log() + torch.stack([e for _, e in parts], 1)).softmax(1)
        return torch.einsum("bk,bkn->bn", weights, torch.stack([m for m, _ in parts], 1)).reshape(x.shape)

    @staticmethod
    def _component(
        z: Tensor, normal: Tensor, variance: Tensor, mean: Tensor, cov: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (B, n) and log-evidence (B,) of one Gaussian, up to a constant that all components
        share."""
        mean = mean.flatten()
        image = normal @ mean
        system = normal @ cov + variance * torch.eye(len(mean), dtype=z.dtype, device=z.device)
        shift = torch.linalg.solve(system, (z - image)[..., None])[..., 0] @ cov
        # Woodbury: |y - A mu|^2 in the metric of the evidence needs y through z alone.
        fit = (mean * (2 * z - image)).sum(1) + ((z - image) * shift).sum(1)
        evidence = fit / (2 * variance.flatten()) - torch.linalg.slogdet(system / variance)[1] / 2
        return mean + shift, evidence
