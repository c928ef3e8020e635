"""Sampling: from a prior (`generate`), from a posterior (`reconstruct`), and the parts they are made of."""

from __future__ import annotations

from ambient_sci.sampling.posterior import MMPS
from ambient_sci.sampling.reconstruct import (
    POSTERIOR_SAMPLERS,
    Problem,
    reconstruct,
    reconstruct_to_file,
    run_chunks,
    sample_mmps,
    sample_one_step,
)
from ambient_sci.sampling.result import Reconstruction, ResultFile, ResultWriter, check_output
from ambient_sci.sampling.solvers import conjugate_gradient
from ambient_sci.sampling.unconditional import SAMPLERS, ancestral, generate, heun, level_range

__all__ = [
    "MMPS",
    "POSTERIOR_SAMPLERS",
    "SAMPLERS",
    "Problem",
    "Reconstruction",
    "ResultFile",
    "ResultWriter",
    "ancestral",
    "check_output",
    "conjugate_gradient",
    "generate",
    "heun",
    "level_range",
    "reconstruct",
    "reconstruct_to_file",
    "run_chunks",
    "sample_mmps",
    "sample_one_step",
]
