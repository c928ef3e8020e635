r"""Measurements simulated from clean images: corruption drawn once, with a seed, and stored.

    identity    y = x + sigma n                          x real, or complex with a smooth phase
    masking     y = m (x + sigma n)                      m from a mask design
    mri         y_c = m (F(s_c x) + sigma n_c)         x complex; F centred and orthonormal; sum_c |s_c|^2 = 1

sigma is per real channel (complex standard deviation sqrt(2) sigma). Magnitude images get a smooth random
phase, as scans have one: a low-order polynomial in the coordinates u, v of [-1, 1],

    phi = c_0 + c_1 u + c_2 v + c_3 u v + c_4 (u^2 - 1/3) + c_5 (v^2 - 1/3),    c_0 ~ U(0, 2 pi), the others
    Gaussian,

drawn anew for every image. The clean images go to a separate reference file. Phase, masks, maps and noise
have random streams of their own, so that two simulations with one seed share images and noise at different
accelerations.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.clipping import check_plausible
from ambient_sci.data.hdf5_writer import close_together
from ambient_sci.data.layout import OPERATORS, check_noise_std
from ambient_sci.data.readers.guard import say
from ambient_sci.data.sources import ImageSource, as_complex, open_source
from ambient_sci.data.writing import ImageWriter, MeasurementWriter
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, MaskDesign, birdcage_maps, make_design
from ambient_sci.progress import track
from ambient_sci.whole_files import check_output
from ambient_sci.whole_sets import only_maker

#: Images simulated at a time. Random draws follow these blocks, so the number is part of what a seed means.
BLOCK = 64
#: Standard deviations of the polynomial coefficients c_1 .. c_5 of the phase, radians.
PHASE_STD = (1.0, 1.0, 0.6, 0.6, 0.6)


def smooth_phase(num: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Smooth random phases (num, H, W) in radians: the polynomial of the module docstring."""
    v = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    u = torch.linspace(-1, 1, width)[None].expand(height, width)
    basis = torch.stack((u, v, u * v, u**2 - 1 / 3, v**2 - 1 / 3))
    offset = 2 * math.pi * torch.rand(num, 1, 1, generator=generator)
    coefficients = torch.randn(num, 5, generator=generator) * torch.tensor(PHASE_STD)
    return offset + torch.einsum("nk,khw->nhw", coefficients, basis)


def with_phase(images: Tensor, phase: Tensor | None) -> Tensor:
    """x exp(i phi) as two channels (B, 2, H, W); ``phase`` None means a phase of zero."""
    if images.shape[1] != 1:
        raise InputError(f"phase: expected images of one channel, got {images.shape[1]}")
    if phase is None:
        return torch.cat((images, torch.zeros_like(images)), dim=1)
    return torch.cat((images * phase.cos()[:, None], images * phase.sin()[:, None]), dim=1)


def plan_design(
    operator: str,
    image_shape: Sequence[int],
    *,
    design: str | MaskDesign | None = None,
    acceleration: float | None = None,
    keep: float | None = None,
    acs: int | None = None,
    box: Sequence[int] | None = None,
) -> MaskDesign | None:
    """The mask design of a simulation, None when everything is measured.

    Masking: ``keep`` (Bernoulli, the default design) or a box. MRI: ``acceleration`` R > 1 with any k-space
    design (default "lines-uniform": a fixed number of uniformly drawn lines besides the calibration lines); R
    = 1 is fully sampled.

    Raises: InputError for options that contradict the operator or one another.
    """
    if isinstance(design, MaskDesign):
        return design
    given = {"design": design, "acceleration": acceleration, "keep": keep, "acs": acs, "box": box}
    if operator == "identity":
        _refuse("identity", given, allowed=())
        return None
    if operator == "masking":
        name = design or "bernoulli"
        _refuse(
            f"masking by {name}", given, allowed=("design", "box") if name == "box" else ("design", "keep")
        )
        if keep == 1:
            return None
        return make_design(name, image_shape=image_shape, keep=keep, box=box)
    if design is not None and design.startswith("bernoulli"):
        _refuse(f"mri by {design}", given, allowed=("design", "keep"))
        return make_design(design, image_shape=image_shape, keep=keep)
    _refuse("mri", given, allowed=("design", "acceleration", "acs"))
    if acceleration is None or acceleration == 1:
        _refuse("mri without acceleration", given, allowed=("acceleration",))
        return None
    return make_design(design or "lines-uniform", image_shape=image_shape, acceleration=acceleration, acs=acs)


def _refuse(what: str, given: dict[str, Any], allowed: Sequence[str]) -> None:
    extra = [name for name, value in given.items() if value is not None and name not in allowed]
    if extra:
        raise InputError(
            f"{what}: {', '.join(extra)} has no meaning here; expected {', '.join(allowed) or 'none'}"
        )


def simulate(
    images: Any,
    operator: str,
    out: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    noise_std: float | Sequence[float] | Tensor,
    noise_units: str = "scaled",
    acceleration: float | None = None,
    coils: int = 1,
    phase: str | None = None,
    keep: float | None = None,
    design: str | MaskDesign | None = None,
    acs: int | None = None,
    box: Sequence[int] | None = None,
    shared_mask: bool = False,
    vary_coils: bool = False,
    size: int | None = None,
    plane: str = "axial",
    min_foreground: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a measurement file and a separate reference file from clean images. Returns the measurement
    file's path.

    Args:
        images: anything ``open_source`` reads, or an ``ImageSource``.
        operator: "identity", "masking" or "mri".
        out, reference: the two files to write.
        noise_std: per real channel, one number or one an image.
        noise_units: "scaled" (as stored: pictures reach from 0 to 1) or "original" (grey levels, scanner
            units).
        acceleration, acs: R >= 1 and number of calibration lines (MRI).
        coils: simulated birdcage coils; 1 is a single coil of uniform sensitivity (MRI).
        phase: "smooth" (default for MRI of magnitude images) or "none" (default otherwise).
        keep: probability that a pixel is measured (masking); 1 measures everything.
        design: name of a mask design (see ``plan_design``), or a MaskDesign.
        box: (height, width) of the missing box (design "box").
        shared_mask: one mask for the whole data set instead of one an image.
        vary_coils: turn the coil array by a random angle for every image.
        size, plane, min_foreground: see ``open_source``.
        seed: fixes phase, masks, maps and noise.

    Raises: InputError for bad images, options that contradict one another, or outputs that exist; nothing is
    written.
    """
    out, reference = _check_outputs(out, reference, overwrite)
    if operator not in OPERATORS:
        raise InputError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
    if not isinstance(images, ImageSource):
        images = open_source(images, size=size, plane=plane, min_foreground=min_foreground)
    complex_images, phase = _plan_phase(images, operator, phase)
    shape = (2 if complex_images else images.image_shape[0], *images.image_shape[1:])
    plan = plan_design(operator, shape, design=design, acceleration=acceleration, keep=keep, acs=acs, box=box)
    _check_options(operator, coils, vary_coils, shared_mask, plan)
    levels = _levels(images, noise_std, noise_units)
    drawn = _Draws(operator, shape, plan, coils, vary_coils, shared_mask, phase, complex_images, seed)
    varying = " varying" * vary_coils
    history = (
        f"simulate {operator} from {images.origin}: noise_std {_range(levels)}, phase {phase}, "
        f"design {plan.name if plan else None}, coils {coils}{varying}, seed {seed}"
    ) + "".join(f"; {note}" for note in images.notes)
    common = {"history": history, "geometry": images.geometry, "overwrite": overwrite}
    file = MeasurementWriter(out, operator=operator, image_shape=shape, design=plan, **drawn.shared, **common)
    truth = ImageWriter(reference, **common, **_as_stored(images, complex_images))
    with only_maker(out), only_maker(reference):
        try:
            _fill(file, truth, images, drawn, levels)
            close_together(file, truth)
        finally:
            file.discard()
            truth.discard()
    return out


def _fill(
    file: MeasurementWriter, truth: ImageWriter, images: ImageSource, drawn: _Draws, levels: np.ndarray
) -> None:
    """Simulate block after block."""
    starts = range(0, len(images), BLOCK)
    for start in track(starts, f"simulating {len(images)} measurements"):
        rows = np.arange(start, min(start + BLOCK, len(images)))
        x, y, own = drawn.block(images.images(rows), levels[rows])
        if drawn.complex_images:
            x, y = as_complex(x), as_complex(y)
        subjects, scale = [images.subjects[r] for r in rows], images.scale_of(rows)
        labels = images.labels_of(rows)
        truth.append(x, subjects=subjects, scale=scale, labels=labels)
        file.append(y, noise_std=levels[rows], subjects=subjects, scale=scale, labels=labels, **own)


def _as_stored(images: ImageSource, complex_images: bool) -> dict[str, Any]:
    """How the clean images are written: as 8 bits where they came so and stay what they are."""
    if images.eight_bits is None or complex_images:
        return {}
    step, offset = images.eight_bits
    return {"dtype": "uint8", "step": step, "offset": offset}


def _levels(images: ImageSource, noise_std: Any, noise_units: str) -> np.ndarray:
    """Noise levels (N,) as stored, compared with the range of the images."""
    if noise_units not in ("scaled", "original"):
        raise InputError(f"noise_units: expected 'scaled' or 'original', got {noise_units!r}")
    num = len(images)
    levels, scale = check_noise_std(noise_std, num), np.broadcast_to(images.scale, (num,))
    if noise_units == "original":
        levels = check_noise_std(levels / scale, num)
    if levels.max() > 0:
        some = np.unique(np.linspace(0, num - 1, min(num, BLOCK)).astype(int))
        looked_at = images.images(some)
        doubt = check_plausible(
            float(levels.max()),
            float(looked_at.min()),
            float(looked_at.max()),
            float(scale.max()) if noise_units == "scaled" else 1.0,
            clean=True,
        )
        if doubt:
            say(images.notes, images.origin, doubt)
    return levels


def _check_outputs(out: Any, reference: Any, overwrite: bool) -> tuple[Path, Path]:
    out, reference = check_output(out, overwrite), check_output(reference, overwrite)
    if out.resolve() == reference.resolve():
        raise InputError(f"{out}: measurements and references need two files, got one name for both")
    return out, reference


def _check_options(
    operator: str, coils: int, vary_coils: bool, shared_mask: bool, plan: MaskDesign | None
) -> None:
    if shared_mask and plan is None:
        raise InputError("shared mask: everything is measured, there is no mask to share")
    if coils < 1 or (operator != "mri" and (coils != 1 or vary_coils)) or (vary_coils and coils == 1):
        raise InputError(
            f"coils: expected 1 or more for mri (more than 1 to vary them), 1 otherwise; got {coils}"
        )


def _plan_phase(images: ImageSource, operator: str, phase: str | None) -> tuple[bool, str]:
    """Whether the images will be complex, and the phase they get."""
    if phase not in (None, "smooth", "none"):
        raise InputError(f"phase: expected 'smooth' or 'none', got {phase!r}")
    channels = images.image_shape[0]
    if channels == 2:
        if phase == "smooth":
            raise InputError(
                "phase: the images are complex already (two channels), a smooth phase is for magnitudes"
            )
        return True, "none"
    phase = phase or ("smooth" if operator == "mri" else "none")
    if channels != 1 and (operator == "mri" or phase == "smooth"):
        raise InputError(
            f"{operator} with phase {phase}: expected images of one channel, or two (complex), got {channels}"
        )
    return operator == "mri" or phase == "smooth", phase


def _range(levels: np.ndarray) -> str:
    low, high = float(levels.min()), float(levels.max())
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


class _Draws:
    """The random streams of one simulation, block after block."""

    def __init__(
        self,
        operator: str,
        shape: tuple[int, ...],
        design: MaskDesign | None,
        coils: int,
        vary_coils: bool,
        shared_mask: bool,
        phase: str,
        complex_images: bool,
        seed: int,
    ):
        names = ("phase", "mask", "coils", "noise")
        seeds = np.random.SeedSequence(seed).generate_state(len(names), np.uint64) >> np.uint64(1)
        self.streams = {n: torch.Generator().manual_seed(int(s)) for n, s in zip(names, seeds, strict=True)}
        self.operator, self.shape, self.design, self.coils = operator, shape, design, coils
        self.vary_coils, self.phase, self.complex_images = vary_coils, phase, complex_images
        self.shared: dict[str, Any] = {}
        if operator != "identity" and design is None:
            self.shared["shared_mask"] = torch.ones(1, 1, *shape[1:])
        elif shared_mask and design is not None:
            self.shared["shared_mask"] = design.sample(1, self.streams["mask"])
        if coils > 1 and not vary_coils:
            self.shared["shared_coil_maps"] = birdcage_maps(coils, shape[1], shape[2])[None]

    def _maps(self, num: int) -> Tensor | None:
        if self.coils == 1:
            return None
        if not self.vary_coils:
            return self.shared["shared_coil_maps"]
        angles = 2 * math.pi * torch.rand(num, generator=self.streams["coils"])
        return torch.stack([birdcage_maps(self.coils, *self.shape[1:], rotation=float(a)) for a in angles])

    def block(self, images: Tensor, levels: np.ndarray) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Clean images x, measurements y (memory layout) and the mask and maps that are this block's own."""
        num = len(images)
        if self.complex_images and images.shape[1] == 1:
            smooth = self.phase == "smooth"
            images = with_phase(
                images, smooth_phase(num, *self.shape[1:], self.streams["phase"]) if smooth else None
            )
        mask = self.shared.get("shared_mask")
        if mask is None:
            full = torch.ones(1, 1, *self.shape[1:])
            mask = full if self.design is None else self.design.sample(num, self.streams["mask"])
        maps = self._maps(num)
        signal = (
            MRI(torch.ones(1, 1, *self.shape[1:]), maps).transform(images)
            if self.operator == "mri"
            else images
        )
        sigma = torch.from_numpy(levels).reshape(-1, *[1] * (signal.ndim - 1))
        noisy = signal + sigma * torch.randn(signal.shape, generator=self.streams["noise"])
        # torch.where, not a product: outside the mask a file holds +0, never -0.
        measured = torch.where((mask[:, :, None] if maps is not None else mask) > 0, noisy, torch.zeros(()))
        own: dict[str, Any] = {}
        if self.design is not None and "shared_mask" not in self.shared:
            own["mask"] = mask
        if self.vary_coils:
            own["coil_maps"] = maps
        return images, measured, own
