"""What an import is told, and what its two kinds (images, raw scans) share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ambient_sci.data.layout import check_noise_std
from ambient_sci.data.readers.guard import one_line
from ambient_sci.data.reductions import Reduction
from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.operators import MaskDesign, estimate_design


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import. The first group is for all data, the second for images, the third for raw scans.

    noise_std: per real channel; estimated when None. noise_units: "scaled" (as stored, the default of the
        library) or "original" (grey levels, scanner units). design: the mask design, if known. subject: one
        name for everything.
    kind: of complex numbers in an array or .npy file: "images" or "kspace"; None refuses what looks like
        k-space. mask: an array or .npy of 0/1 with what was measured of such k-space; None: where it is not
        zero.
    grey, crop, bin, size, patch, stride: see ``Reduction``. A noise level that is given is that of the pixels
        before. With noise_std = 0 (clean images) ``size`` pads and resizes as ``open_source`` does.
    channel, plane, min_foreground: see ``open_source``.
    noise_scan: noise readouts (N, n) complex: an array, .npy or BART file. coil_maps: an array, .npy or BART
        file instead of ESPIRiT.
        compress: number of virtual coils. remove_oversampling: crop the readout to its field of view.
            keep_padding: do not cut off zero padding around a fully sampled k-space.
    """

    noise_std: float | None = None
    noise_units: str = "scaled"
    design: MaskDesign | None = None
    subject: str | None = None
    kind: str | None = None
    mask: Any = None
    grey: bool = False
    crop: tuple[int, int] | None = None
    bin: int | None = None
    size: int | None = None
    patch: int | None = None
    stride: int | None = None
    channel: int | str | None = None
    plane: str = "axial"
    min_foreground: float = 0.0
    noise_scan: Any = None
    coil_maps: Any = None
    compress: int | None = None
    remove_oversampling: bool = True
    keep_padding: bool = False

    def __post_init__(self) -> None:
        if self.noise_units not in ("scaled", "original"):
            raise InputError(f"noise_units: expected 'scaled' or 'original', got {self.noise_units!r}")
        if self.kind not in (None, "images", "kspace"):
            raise InputError(f"kind: expected 'images' or 'kspace', got {self.kind!r}")
        if self.noise_std is not None:
            check_noise_std(self.noise_std, 1)

    @property
    def clean(self) -> bool:
        """Whether the images are stated to have no noise."""
        return self.noise_std == 0

    @property
    def reduction(self) -> Reduction:
        """What is done to noisy images."""
        size = None if self.clean else self.size
        return Reduction(self.grey, self.crop, self.bin, size, self.patch, self.stride)


def history_of(origin: Any, notes: list[str]) -> str:
    """What is recorded of an import, one line."""
    return f"import {one_line(origin, 400)}: {'; '.join(dict.fromkeys(notes))}"


def design_of(masks: torch.Tensor, given: MaskDesign | None) -> tuple[MaskDesign | None, str]:
    """The design to record and its status: given, estimated from the masks (n, m, H, W), or unknown."""
    if given is not None:
        return given, "given"
    if bool((masks != 0).all()):
        return None, "unknown"
    try:
        return estimate_design(masks), "estimated"
    except IdentifiabilityError:
        return None, "unknown"
