"""Sampling: from a prior (`generate`), from a posterior (`reconstruct`), and the parts they are made of."""

from __future__ import annotations

from ambient_sci.sampling.api import generate, reconstruct
from ambient_sci.sampling.conditioning import Likelihood
from ambient_sci.sampling.export import Exported, export
from ambient_sci.sampling.export_volumes import export_nifti
from ambient_sci.sampling.fixed_mask import generate_fixed_mask
from ambient_sci.sampling.posterior import DPS, MMPS, PiGDM
from ambient_sci.sampling.problem import Draws, PosteriorSampler, Problem
from ambient_sci.sampling.result import Reconstruction, ResultFile, ResultWriter
from ambient_sci.sampling.samplers import POINT_ESTIMATES, POSTERIOR_SAMPLERS
from ambient_sci.sampling.solvers import conjugate_gradient, gaussian_draw, minimal_residual
from ambient_sci.sampling.streaming import generate_to_file, reconstruct_to_file
from ambient_sci.sampling.unconditional import (
    SAMPLERS,
    ancestral,
    heun,
    level_grid,
    level_range,
    multistep,
)
from ambient_sci.whole_files import check_output

__all__ = [
    "DPS",
    "MMPS",
    "POINT_ESTIMATES",
    "POSTERIOR_SAMPLERS",
    "SAMPLERS",
    "Draws",
    "Likelihood",
    "PiGDM",
    "PosteriorSampler",
    "Problem",
    "Reconstruction",
    "ResultFile",
    "ResultWriter",
    "ancestral",
    "check_output",
    "conjugate_gradient",
    "Exported",
    "export",
    "export_nifti",
    "gaussian_draw",
    "generate",
    "generate_fixed_mask",
    "generate_to_file",
    "heun",
    "level_grid",
    "level_range",
    "minimal_residual",
    "multistep",
    "reconstruct",
    "reconstruct_to_file",
]
