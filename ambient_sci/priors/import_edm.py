r"""Published checkpoints become priors: EDM's networks and baselines, and Ambient Diffusion's.

    prior = import_prior("edm-cifar10-32x32-uncond-vp.pkl")
    prior.save("priors/cifar10")

| preconditioning | in the file | prior |
|---|---|---|
| edm | EDMPrecond | `NetworkPrior`, data_std = sigma_data |
| vp | VPPrecond | `VPPrior`, epsilon, continuous times |
| ve | VEPrecond | `VEPrior` |
| iddpm | iDDPMPrecond | `VPPrior`, epsilon, cosine times; channels of the variance are left out |
| ambient | EDMPrecond that is shown a mask | `AmbientDiffusionPrior`, mask-conditional |

Values are in [-1, 1], as those networks were trained. The file is read, never run
(`ambient_sci.priors.edm_files`); whatever is in it that no network has a place for is an error.

Sources: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), table 1;
Daras et al., "Ambient Diffusion: Learning Clean Distributions from Corrupted Data" (2023).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior, Tensors
from ambient_sci.priors.config import NetworkConfig, PriorConfig
from ambient_sci.priors.edm_files import Checkpoint, read_checkpoint
from ambient_sci.priors.edm_networks import Architecture, architecture
from ambient_sci.priors.network import NetworkPrior
from ambient_sci.priors.published import AmbientDiffusionPrior, VEPrior
from ambient_sci.priors.vp_times import ContinuousSchedule, CosineSchedule, schedule_to_dict
from ambient_sci.priors.wrappers import VPPrior

SCHEMES = ("edm", "vp", "ve", "iddpm", "ambient")
_WRAPPERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
#: Standard deviation of the data in EDM's preconditioning, and the levels it is sampled between.
SIGMA_DATA, LOWEST, HIGHEST = 0.5, 0.002, 80.0
#: Highest level that iDDPM networks are sampled from; their schedule goes on to 20,000.
IDDPM_HIGHEST = 81.0


def import_prior(path: str | Path, preconditioning: str | None = None) -> Prior:
    """The prior in a checkpoint.

    Args:
        path: the file, see `ambient_sci.priors.edm_files`.
        preconditioning: one of "edm", "vp", "ve", "iddpm", "ambient", where the file does not say (tensors
            alone). A network of six channels in and out is "ambient" in any case: colours, and their mask.

    Returns:
        the prior, in evaluation mode, with the file's numbers as they are.

    Raises:
        InputError: a file that is no such checkpoint, tensors that are of no network that is known, a
            preconditioning that is not known, or that contradicts the file.
    """
    if preconditioning not in (None, *SCHEMES):
        raise InputError(f"preconditioning: expected one of {', '.join(SCHEMES)}, got {preconditioning!r}")
    path = Path(path)
    file = read_checkpoint(path)
    found = architecture(file.tensors, path, *(_rate(file, key) for key in ("dropout", "label_dropout")))
    scheme = _scheme(file, found, preconditioning, path)
    description, tensors = _describe(scheme, file, found, path)
    kind = description.pop("kind")
    return Prior.kinds[kind].rebuild(description, tensors).eval()


def _rate(file: Checkpoint, name: str) -> float:
    value = file.settings.get(name, 0.0)
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1 else 0.0


def _scheme(file: Checkpoint, found: Architecture, asked: str | None, path: Path) -> str:
    """The preconditioning, by the file, by its tensors and by what was asked for."""
    if file.wrapper is not None and file.wrapper not in _WRAPPERS:
        raise InputError(
            f"{path}: expected the preconditioning {', '.join(_WRAPPERS)}, got {file.wrapper!r:.80}"
        )
    told = None if file.wrapper is None else _WRAPPERS[file.wrapper]
    if asked == "ambient" or (found.in_channels == found.out_channels == 6):
        _check_masked(told, asked, found, path)
        return "ambient"
    if told is not None and asked not in (None, told):
        raise InputError(f"{path}: expected the preconditioning {told}, which the file has, got {asked}")
    scheme = told or asked
    if scheme is None:
        raise InputError(
            f"{path}: expected the preconditioning ({', '.join(SCHEMES)}), because the file holds tensors "
            "alone; got none"
        )
    outputs = found.in_channels * (2 if scheme == "iddpm" else 1)
    if found.out_channels != outputs:
        raise InputError(
            f"{path}: expected {outputs} output channels for the preconditioning {scheme}, got "
            f"{found.out_channels}"
        )
    return scheme


def _check_masked(told: str | None, asked: str | None, found: Architecture, path: Path) -> None:
    if told not in (None, "edm") or asked not in (None, "ambient", "edm"):
        raise InputError(
            f"{path}: expected EDM's preconditioning of a network that is shown a mask, got {told or asked}"
        )
    if found.label_dim:
        raise InputError(
            f"{path}: expected a network that is shown a mask or one that is told classes, got one for both "
            f"({found.label_dim} classes): a prior is told one thing"
        )
    if found.in_channels != found.out_channels or found.in_channels % 2:
        raise InputError(
            f"{path}: expected image and mask, twice the image's channels, in and out of a network that is "
            f"shown a mask, got {found.in_channels} and {found.out_channels} channels"
        )


def _describe(
    scheme: str, file: Checkpoint, found: Architecture, path: Path
) -> tuple[dict[str, Any], Tensors]:
    """A prior's description and its tensors, by the names they have in it."""
    channels = found.in_channels // 2 if scheme == "ambient" else found.in_channels
    tensors, note = file.tensors, {}
    if scheme == "iddpm":
        tensors = _without_levels(file, path)
    if scheme in ("iddpm", "ambient"):
        tensors = _first_outputs(tensors, found, channels)
        note = {"left_out": f"output channels {channels} to {found.out_channels - 1}, which nothing uses"}
    tensors = {f"network.model.{name}": tensor.float() for name, tensor in tensors.items()}
    common: dict[str, Any] = {
        "shape": (channels, found.resolution, found.resolution),
        "data_std": _setting(file, "sigma_data", SIGMA_DATA),
        "sigma_min": LOWEST,
        "sigma_max": HIGHEST,
    }
    about = {
        "imported": path.name,
        "sha256": file.digest,
        "preconditioning": scheme,
        "values": "[-1, 1]",
        "licence": "that of the file's authors; NVIDIA's are CC BY-NC-SA 4.0",
        **file.about,
        **note,
    }
    if scheme == "edm":
        config = PriorConfig(**common, network=found.config, about=about)
        return {"kind": NetworkPrior.kind, **config.to_dict()}, tensors
    network = _network(found.config)
    if scheme == "ambient":
        return {"kind": AmbientDiffusionPrior.kind, **common, "network": network, "about": about}, tensors
    levels, time = _levels(scheme, file)
    common |= dict(zip(("sigma_min", "sigma_max"), levels, strict=True))
    if scheme == "ve":
        return {"kind": VEPrior.kind, **common, "network": network, "about": about}, tensors
    vp = {"prediction": "epsilon", "time": time, "network": network, "about": about}
    return {"kind": VPPrior.kind, **common, **vp}, tensors


def _without_levels(file: Checkpoint, path: Path) -> Tensors:
    """The tensors without the table of levels of iDDPMPrecond, which must be the one that the schedule
    gives."""
    tensors = dict(file.tensors)
    table = tensors.pop("u", None)
    expected = _cosine(file).levels()
    if table is not None and not (
        table.shape == expected.shape and table.float().allclose(expected, rtol=1e-3)
    ):
        raise InputError(f"{path}: expected the noise levels of its own schedule, got a table of others")
    return tensors


def _cosine(file: Checkpoint) -> CosineSchedule:
    c1, c2 = _setting(file, "C_1", 0.001), _setting(file, "C_2", 0.008)
    return CosineSchedule(c1=c1, c2=c2, steps=int(_setting(file, "M", 1000)))


def _network(config: NetworkConfig) -> dict[str, Any]:
    return {"kind": config.kind, "options": config.options}


def _first_outputs(tensors: Tensors, found: Architecture, channels: int) -> Tensors:
    """The tensors with the first output channels of the last convolution only: channels do not mix there."""
    adm = found.config.kind == "adm"
    last = "out_conv" if adm else f"dec.{found.resolution}x{found.resolution}_aux_conv"
    ends = (f"{last}.weight", f"{last}.bias", f"{last}.gate_weight")
    return {name: tensor[:channels] if name in ends else tensor for name, tensor in tensors.items()}


def _setting(file: Checkpoint, name: str, default: float) -> float:
    value = file.settings.get(name)
    return float(value) if isinstance(value, (int, float)) else default


def _levels(scheme: str, file: Checkpoint) -> tuple[tuple[float, float], dict[str, Any] | None]:
    """The levels a network was trained for, and its times."""

    def ends(low: float, high: float) -> tuple[float, float]:
        return _setting(file, "sigma_min", low), _setting(file, "sigma_max", high)

    steps = int(_setting(file, "M", 1000))
    if scheme == "ve":
        return ends(0.02, 100.0), None
    if scheme == "vp":
        beta = (_setting(file, "beta_d", 19.9), _setting(file, "beta_min", 0.1))
        schedule = ContinuousSchedule(beta_d=beta[0], beta_min=beta[1], steps=steps)
        return ends(*_vp_ends(*beta, _setting(file, "epsilon_t", 1e-5))), schedule_to_dict(schedule)
    cosine = _cosine(file)
    low = float(cosine.levels()[steps - 1])
    return (_setting(file, "sigma_min", low), IDDPM_HIGHEST), schedule_to_dict(cosine)


def _vp_ends(beta_d: float, beta_min: float, first: float) -> tuple[float, float]:
    import math

    low, high = (math.sqrt(math.expm1(0.5 * beta_d * t**2 + beta_min * t)) for t in (first, 1.0))
    return low, high
