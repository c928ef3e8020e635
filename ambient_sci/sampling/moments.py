r"""Posterior mean and standard deviation from samples x_k, and from what the sampler knows besides them.

With m_k = E[x_k | u_k], the mean of each sample given less than decides it (u_k: the chain at its lowest
noise level, or the measurement alone), both estimates are unbiased:

    mean  = 1/S sum_k m_k                                                            Rao-Blackwell
    std^2 = 1/(S - 1) sum_k (m_k - mean)^2 + 1/S sum_k (x_k - m_k)^2                 law of total variance

since Var x = Var E[x | u] + E Var[x | u], and (x_k - m_k)^2 estimates Var[x | u_k] without bias. Where there
are no m_k, they are the x_k. One sample has no std: it is 0.

A control c_k is known to have mean zero and is like m_k - E m_k: then mean = 1/S sum_k (m_k - b c_k) has the
same expectation for any b. b is the regression of the m_k on the c_k over all entries of an image,

    b = sum_k <m_k - mean m, c_k - mean c> / sum_k |c_k - mean c|^2      within [0, 1]

which takes off the variance that they share, and nothing where they share none. It needs two samples; with
one, b = 0.

Sums are running ones (Welford), in double precision, so any number of samples needs the memory of a few.

Sources: Blackwell, "Conditional expectation and unbiased sequential estimation" (1947); Lavenberg & Welch, "A
perspective on the use of control variables to increase the efficiency of Monte Carlo simulations" (1981).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ambient_sci.sampling.problem import Draws


class Moments:
    """Running moments of samples of ``images`` images.

    Attributes:
        count: samples so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, sample: Tensor, mean: Tensor | None = None, control: Tensor | None = None) -> None:
        """One more sample of all images, (n, C, H, W), its conditional mean and its control."""
        x = sample.detach().double()
        m = x if mean is None else mean.detach().to(x)
        c = torch.zeros_like(x) if control is None else control.detach().to(x)
        if self.count == 0:
            zero = torch.zeros_like(x)
            self._m, self._c, self._square, self._rest = zero, zero, zero, zero
            self._shared = self._own = zero.flatten(1).sum(1)
        self.count += 1
        ahead, aside = m - self._m, c - self._c
        self._m = self._m + ahead / self.count
        self._c = self._c + aside / self.count
        self._square = self._square + ahead * (m - self._m)
        self._rest = self._rest + (x - m).square()
        remainder = c - self._c
        self._shared = self._shared + (ahead * remainder).flatten(1).sum(1)
        self._own = self._own + (aside * remainder).flatten(1).sum(1)

    def mean(self) -> Tensor:
        """Posterior mean, (n, C, H, W), float64."""
        weight = torch.where(self._own > 0, self._shared / self._own.clamp(min=1e-300), 0.0).clamp(0, 1)
        return self._m - weight.reshape(-1, *[1] * (self._m.ndim - 1)) * self._c

    def std(self) -> Tensor:
        """Posterior standard deviation, (n, C, H, W), float64."""
        if self.count < 2:
            return torch.zeros_like(self._square)
        return (self._square / (self.count - 1) + self._rest / self.count).sqrt()


def add_to(moments: Sequence[Moments], draws: Draws) -> None:
    """The samples (s, n, C, H, W) of ``draws``, to the moments of each of the n images."""
    for image, own in enumerate(moments):
        for k in range(len(draws.samples)):
            own.add(
                *(
                    None if x is None else x[k, image : image + 1]
                    for x in (draws.samples, draws.means, draws.controls)
                )
            )
