"""Priors: analytic ones, learned ones, combinations of them, and how they are stored."""

from __future__ import annotations

from ambient_sci.priors import backbones
from ambient_sci.priors.adapters import LoraPrior
from ambient_sci.priors.analytic import ConditionalMean, GaussianMixturePrior, GaussianPrior, operator_matrix
from ambient_sci.priors.base import Prior, require_mask_conditional, require_unconditional
from ambient_sci.priors.config import NetworkConfig, PriorConfig
from ambient_sci.priors.empirical import EmpiricalPrior
from ambient_sci.priors.given import Given, KeptRows, Labels, Prompt
from ambient_sci.priors.import_edm import import_prior
from ambient_sci.priors.network import NetworkPrior
from ambient_sci.priors.one_step import OneStepPrior
from ambient_sci.priors.presets import PRESETS, preset
from ambient_sci.priors.pretrained import pretrained_folder, pretrained_names
from ambient_sci.priors.published import AmbientDiffusionPrior, VEPrior
from ambient_sci.priors.stationary import StationaryGaussianPrior
from ambient_sci.priors.storage import load_prior, save_prior
from ambient_sci.priors.tiled import TiledPrior
from ambient_sci.priors.wrappers import DeepinvPrior, Guided, StagedPrior, VPPrior

__all__ = [
    "AmbientDiffusionPrior",
    "ConditionalMean",
    "DeepinvPrior",
    "EmpiricalPrior",
    "GaussianMixturePrior",
    "GaussianPrior",
    "Given",
    "Guided",
    "KeptRows",
    "Labels",
    "LoraPrior",
    "PRESETS",
    "NetworkConfig",
    "NetworkPrior",
    "OneStepPrior",
    "Prior",
    "PriorConfig",
    "Prompt",
    "StagedPrior",
    "StationaryGaussianPrior",
    "TiledPrior",
    "VEPrior",
    "VPPrior",
    "backbones",
    "import_prior",
    "load_prior",
    "operator_matrix",
    "preset",
    "pretrained_folder",
    "pretrained_names",
    "require_mask_conditional",
    "require_unconditional",
    "save_prior",
]
