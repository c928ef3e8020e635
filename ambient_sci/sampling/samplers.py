"""The posterior samplers by name."""

from __future__ import annotations

from ambient_sci.baselines import BASELINES
from ambient_sci.sampling.daps import sample_daps
from ambient_sci.sampling.guided import sample_a_dps, sample_dps, sample_mmps, sample_one_step, sample_pigdm
from ambient_sci.sampling.pnp_dm import sample_pnp_dm
from ambient_sci.sampling.posterior import DPS, MMPS, PiGDM
from ambient_sci.sampling.problem import PosteriorSampler
from ambient_sci.sampling.smc import sample_smc

POSTERIOR_SAMPLERS: dict[str, PosteriorSampler] = {
    "mmps": PosteriorSampler(
        sample_mmps, 14, "moment matching; exact for Gaussian priors, the default", denoiser=MMPS
    ),
    "daps": PosteriorSampler(sample_daps, 200, "decoupled annealing; no derivatives, many levels"),
    "smc": PosteriorSampler(
        sample_smc, 200, "twisted sequential Monte Carlo; exact in the limit, a reference", population=True
    ),
    "pnp-dm": PosteriorSampler(sample_pnp_dm, 100, "split Gibbs sampler; measurement noise appears larger"),
    "pigdm": PosteriorSampler(
        sample_pigdm, 100, "pseudo-inverse guidance; approximate spread", denoiser=PiGDM
    ),
    "dps": PosteriorSampler(
        sample_dps, 1000, "diffusion posterior sampling; over-confident, a baseline", denoiser=DPS
    ),
    "a-dps": PosteriorSampler(
        sample_a_dps,
        500,
        "diffusion posterior sampling for mask-conditional priors; no error bars",
        conditioning="mask-conditional",
    ),
    "one-step": PosteriorSampler(
        sample_one_step,
        2,
        "E[x0 | y] of a mask-conditional prior in one evaluation; no samples",
        conditioning="mask-conditional",
        point_estimate=True,
    ),
}
#: What draws no samples: one-step estimates and the classic reconstructions of `ambient_sci.baselines`.
POINT_ESTIMATES = frozenset(
    [*BASELINES, *(name for name, sampler in POSTERIOR_SAMPLERS.items() if sampler.point_estimate)]
)
