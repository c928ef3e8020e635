"""The measurements of a profile: for training one file an acceleration, for testing one more with its
reference, made when first asked for.

Two sources:

    images         clean magnitude images of people; phase, coil maps, noise and masks are simulated
                   ("packaged": those of the library)
    measurements   the user's own fully sampled scans (`ambient-sci import`); masks are drawn, everything else
                   is as it was measured

Simulations with one seed share phase, maps and noise, so that the same test scan is seen at every
acceleration; it is the mask that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data import MeasurementFile, ReferenceFile, brains, simulate
from ambient_sci.data.images import resize
from ambient_sci.data.sources import ImageSource, as_complex
from ambient_sci.data.writing import ImageWriter, MeasurementWriter
from ambient_sci.errors import InputError
from ambient_sci.evaluation import volume_peak
from ambient_sci.operators import make_design
from ambient_sci.progress import track
from recipes.grid import locked

#: Slices undersampled at a time.
BLOCK = 16
#: Test slices of a person lie between these parts of the volume: the outermost hold little more than scalp.
LOWEST, HIGHEST = 0.2, 0.85


class Evaluation(NamedTuple):
    """Scans to reconstruct at one acceleration, with their truth; ``peaks`` is the full scale of each
    person."""

    path: Path
    truth: Tensor
    subjects: list[str]
    peaks: dict[str, float]


class Scans:
    """Measurement files of a profile in a folder.

    Args:
        settings: ``scans`` of config.yaml.
        folder: where the files go.

    Raises:
        InputError: an unknown source, or files that are not there.
    """

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings, self.folder = settings, folder
        if settings["source"] not in ("packaged", "images", "measurements"):
            raise InputError(
                f"scans.source: expected packaged, images or measurements, got {settings['source']!r}"
            )
        if settings["source"] != "packaged":
            for part in ("train", "test"):
                if not Path(settings[part]).exists():
                    raise InputError(
                        f"scans.{part}: {settings[part]}: no such file (the README says how to make it)"
                    )
        folder.mkdir(parents=True, exist_ok=True)

    def training(self, acceleration: float, *, clean: bool = False, slices: int | None = None) -> Path:
        """The training scans at one acceleration, all or ``slices`` of them, evenly spread; ``clean``:
        without noise, if simulated."""
        name = f"train-R{acceleration:g}" + "-clean" * clean + (f"-{slices}" if slices else "")
        return self._made(name, "train", acceleration, clean, slices)[0]

    def test(self, acceleration: float) -> Evaluation:
        """The test scans at one acceleration and the images they are scored against."""
        path, reference = self._made(f"test-R{acceleration:g}", "test", acceleration, False, None)
        with ReferenceFile(reference) as file:
            truth, subjects = file.images(), list(file.subjects)
        return Evaluation(path, truth, subjects, self._peaks(subjects))

    def _peaks(self, people: Sequence[str]) -> dict[str, float]:
        """Full scale of each person: 1 for images, which are scaled so; the 99.9th percentile of the whole
        volume of measured scans."""
        names = list(dict.fromkeys(people))
        if self.settings["source"] != "measurements":
            return dict.fromkeys(names, 1.0)
        with MeasurementFile(self.settings["test"]) as scans:
            everyone = list(scans.subjects)
            return {
                p: volume_peak(full_images(scans, [i for i, s in enumerate(everyone) if s == p]))
                for p in names
            }

    def _made(
        self, name: str, part: str, acceleration: float, clean: bool, slices: int | None
    ) -> tuple[Path, Path]:
        path, reference = self.folder / f"{name}.h5", self.folder / f"{name}-truth.h5"
        with locked(self.folder / f".{name}.lock"):
            if not (path.exists() and reference.exists()):
                make = undersample if self.settings["source"] == "measurements" else simulate_images
                make(self.settings, part, acceleration, clean, slices, path, reference)
        return path, reference


def design_of(settings: dict[str, Any], acceleration: float, shape: Sequence[int]) -> Any:
    """How masks are drawn at this acceleration; None where everything is measured."""
    if acceleration == 1:
        return None
    return make_design(settings["design"], image_shape=shape, acceleration=acceleration, acs=settings["acs"])


def chosen_slices(
    subjects: Sequence[str], settings: dict[str, Any], part: str, slices: int | None
) -> list[int]:
    """Rows to use: for training all or ``slices`` evenly spread, for testing ``test_slices`` of each person
    between the outermost."""
    if part == "train":
        count = len(subjects) if slices is None else min(slices, len(subjects))
        return sorted({round(k) for k in np.linspace(0, len(subjects) - 1, count)})
    chosen: list[int] = []
    for person in dict.fromkeys(subjects):
        rows = [i for i, s in enumerate(subjects) if s == person]
        spread = np.linspace(LOWEST, HIGHEST, settings["test_slices"]) * (len(rows) - 1)
        chosen += sorted({rows[round(k)] for k in spread})
    return chosen


def clean_images(settings: dict[str, Any], part: str) -> tuple[Tensor, list[str]]:
    """Magnitude images (N, 1, H, W) of this part and whom they show, at the profile's size."""
    if settings["source"] == "packaged":
        images, subjects = brains(part)
    else:
        with ReferenceFile(settings[part]) as file:
            images, subjects = file.images(), list(file.subjects)
    return torch.from_numpy(resize(images.numpy(), settings["size"])), subjects


def simulate_images(
    settings: dict[str, Any],
    part: str,
    acceleration: float,
    clean: bool,
    slices: int | None,
    path: Path,
    reference: Path,
) -> None:
    """Scans of clean images: smooth phase, coil maps that vary from scan to scan if asked for, white noise,
    masks."""
    images, subjects = clean_images(settings, part)
    rows = chosen_slices(subjects, settings, part, slices)
    images, subjects = images[rows], [subjects[i] for i in rows]
    source = ImageSource(
        (1, *images.shape[2:]), subjects, lambda rows: images[torch.as_tensor(rows)], "brains"
    )
    simulate(
        source,
        "mri",
        path,
        reference,
        noise_std=0.0 if clean else settings["noise_std"],
        coils=settings["coils"],
        vary_coils=settings["vary_coils"],
        phase="smooth",
        design=design_of(settings, acceleration, (2, *images.shape[2:])),
        seed=2 * settings["seed"] + (part == "test"),
        overwrite=True,
    )


def undersample(
    settings: dict[str, Any],
    part: str,
    acceleration: float,
    clean: bool,
    slices: int | None,
    path: Path,
    reference: Path,
) -> None:
    """Fully sampled scans with rows taken away; the truth they are scored against is what all rows together
    show.

    ``clean`` changes nothing: measured scans have noise. The prior called clean-trained takes them for clean,
    as the published one does.
    """
    with MeasurementFile(settings[part]) as scans:
        if not bool((scans.mask() > 0).all()):
            raise InputError(f"{settings[part]}: expected fully sampled scans, got some with rows missing")
        rows = chosen_slices(scans.subjects, settings, part, slices)
        design = design_of(settings, acceleration, scans.image_shape)
        generator = torch.Generator().manual_seed(2 * settings["seed"] + (part == "test"))
        common: dict[str, Any] = {
            "history": f"recipes/mri: {settings[part]} at R = {acceleration:g}",
            "overwrite": True,
        }
        with (
            MeasurementWriter(
                path, operator="mri", image_shape=scans.image_shape, design=design, **common
            ) as file,
            ImageWriter(reference, **common) as truth,
        ):
            starts = range(0, len(rows), BLOCK)
            for start in track(starts, f"undersampling {len(rows)} slices, R = {acceleration:g}"):
                some = rows[start : start + BLOCK]
                y = scans.measurements(some)
                mask = (
                    torch.ones(1, 1, *y.shape[-2:]) if design is None else design.sample(len(some), generator)
                )
                names = [scans.subjects[i] for i in some]
                seen = mask[:, :, None] if y.ndim == 5 else mask
                file.append(
                    torch.where(seen > 0, y, torch.zeros(())),
                    noise_std=scans.sigma(some),
                    mask=mask,
                    coil_maps=scans.coil_maps(some),
                    subjects=names,
                )
                truth.append(as_complex(full_images(scans, some)), subjects=names)


def full_images(scans: MeasurementFile, rows: list[int]) -> Tensor:
    """Coil-combined images of fully sampled scans, (B, 2, H, W)."""
    parts = [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]
    return torch.cat([scans.operator(p).A_adjoint(scans.measurements(p)) for p in parts])
