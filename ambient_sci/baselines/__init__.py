"""Classic reconstructions, without a learned prior: what anything learned has to be compared with.

`ambient_sci.reconstruct` takes them by name (`BASELINES`), so that they are called like any sampler.
"""

from __future__ import annotations

from ambient_sci.baselines.classic import (
    METHODS,
    Minimiser,
    l1_wavelet,
    sense,
    total_variation,
    zero_filled,
)
from ambient_sci.baselines.weights import least_risk

#: Names that `reconstruct` knows.
BASELINES = ("zero-filled", *METHODS)

__all__ = [
    "BASELINES",
    "METHODS",
    "Minimiser",
    "l1_wavelet",
    "least_risk",
    "sense",
    "total_variation",
    "zero_filled",
]
