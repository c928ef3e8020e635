"""Measurement files from data that others wrote: images and raw MR scans.

- Images (npy/npz, pictures, zips, NIfTI, DICOM, see ``sources.py``) become noisy, complete measurements, y =
  x + sigma n. NIfTI and DICOM magnitudes have Rician noise; the file says so and a warning is given.
- Raw MR scans (fastMRI and ISMRMRD HDF5, BART cfl/hdr, npz with ``kspace``; single files or folders of one
  kind) become MRI measurements, y = M (F S x + sigma n), as ``kspace.py`` says.
- npz with ``images`` and ``mask`` becomes masked measurements, y = M (x + sigma n).

A noise level that is not given is estimated, and its standard error recorded. A mask design that is not given
is estimated from the masks when there are enough different ones, else it is unknown; the file says which.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ambient_sci.data.files import IMAGE_FORMAT, MEASUREMENT_FORMAT
from ambient_sci.data.kspace import PreparedScan, combined_images, prepare
from ambient_sci.data.layout import check_noise_std
from ambient_sci.data.noise_estimation import estimate_noise
from ambient_sci.data.raw import RawScan, read_bart, read_cfl, read_fastmri, read_ismrmrd
from ambient_sci.data.sources import ImageSource, open_source
from ambient_sci.data.writing import ImageWriter, MeasurementWriter
from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.operators import MaskDesign, estimate_design
from ambient_sci.progress import track
from ambient_sci.whole_files import check_output

_BLOCK = 64
#: Images looked at for a noise level, and masks for a design.
_SAMPLED, _SAMPLED_MASKS = 512, 4096


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import. The first group is for all data, the second for images, the third for raw scans.

    noise_std: per real channel; estimated when None. noise_units: "scaled" (as stored, the default of the
    library) or
        "original" (grey levels, scanner units). design: the mask design, if known. subject: one name for everything.
    size, plane, min_foreground: see ``open_source``.
    noise_scan: noise readouts (N, n) complex: an array, .npy or BART file. coil_maps: an array, .npy or BART
    file instead of
        ESPIRiT. compress: number of virtual coils. remove_oversampling: crop the readout to its field of
        view.
    """

    noise_std: float | None = None
    noise_units: str = "scaled"
    design: MaskDesign | None = None
    subject: str | None = None
    size: int | None = None
    plane: str = "axial"
    min_foreground: float = 0.0
    noise_scan: Any = None
    coil_maps: Any = None
    compress: int | None = None
    remove_oversampling: bool = True

    def __post_init__(self) -> None:
        if self.noise_units not in ("scaled", "original"):
            raise InputError(f"noise_units: expected 'scaled' or 'original', got {self.noise_units!r}")
        if self.noise_std is not None:
            check_noise_std(self.noise_std, 1)


def import_source(
    source: Any, out: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
) -> Path:
    """Write a measurement file from foreign data; ``options`` are those of :class:`ImportOptions`. Returns
    the path.

    Raises: InputError for anything missing, unreadable, contradictory or of mixed shapes; nothing is written
    then.
    """
    out = check_output(out, overwrite)
    chosen = ImportOptions(**options)
    kind, paths = _identify(source)
    if kind == "images":
        _refuse_options(chosen, "images", ("noise_scan", "coil_maps", "compress", "design"))
        images = open_source(
            source, size=chosen.size, plane=chosen.plane, min_foreground=chosen.min_foreground
        )
        _import_images(images, out, chosen, overwrite)
    elif kind == "masked":
        _refuse_options(chosen, "masked images", ("noise_scan", "coil_maps", "compress", "size"))
        _import_masked(paths[0], out, chosen, overwrite)
    else:
        _refuse_options(chosen, "raw scans", ("size",))
        write_scans(_read_scans(kind, paths, chosen), out, chosen, overwrite)
    return out


def _refuse_options(chosen: ImportOptions, what: str, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(chosen, name) is not None]
    if given:
        raise InputError(f"import of {what}: {', '.join(given)} has no meaning here")


def _identify(source: Any) -> tuple[str, list[Path]]:
    """What a source is: "images", "masked", "npz", "fastmri", "ismrmrd" or "bart", and the files of a raw
    one."""
    if not isinstance(source, (str, os.PathLike)) or str(source).startswith("brains:"):
        return "images", []
    path = Path(source)
    if path.is_dir():
        raw = sorted(p for p in path.iterdir() if p.suffix.lower() in (".h5", ".hdf5", ".cfl"))
        kinds = {_identify(p)[0] for p in raw}
        if len(kinds) > 1 or (raw and kinds == {"images"}):
            raise InputError(f"{path}: expected a folder of one kind of raw scans, got {sorted(kinds)}")
        return (kinds.pop(), raw) if raw else ("images", [])
    suffix = path.suffix.lower()
    if suffix in (".cfl", ".hdr") or path.with_suffix(".cfl").exists():
        return "bart", [path]
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if suffix == ".npz":
        names = _npz_names(path)
        return ("npz" if "kspace" in names else "masked" if "mask" in names else "images"), [path]
    return (_identify_hdf5(path), [path]) if suffix in (".h5", ".hdf5", ".mrd") else ("images", [])


def _npz_names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception:  # whatever is wrong, open_source says it in one line
        return []


def _identify_hdf5(path: Path) -> str:
    try:
        with h5py.File(path, "r") as file:
            kind = file.attrs.get("format")
            names = sorted(file)
            acquisitions = any(isinstance(g, h5py.Group) and {"xml", "data"} <= set(g) for g in file.values())
    except OSError as error:
        raise InputError(f"{path}: not an HDF5 file, or truncated ({' '.join(str(error).split())})") from None
    if kind == MEASUREMENT_FORMAT:
        raise InputError(f"{path}: is a measurement file already, there is nothing to import")
    if kind == IMAGE_FORMAT:
        return "images"
    if "kspace" in names:
        return "fastmri"
    if acquisitions:
        return "ismrmrd"
    raise InputError(f"{path}: expected fastMRI (kspace) or ISMRMRD (xml, data) HDF5, got {names[:8]}")


# -- images
# ----------------------------------------------------------------------------------------------------------


def _import_images(images: ImageSource, out: Path, chosen: ImportOptions, overwrite: bool) -> None:
    levels, errors, how = _image_noise(images, chosen)
    attributes = {}
    if images.magnitude:
        attributes["magnitude"] = True
        warnings.warn(
            f"{images.origin}: magnitude images have Rician noise; it is taken for Gaussian, which is wrong where the signal is "
            "not well above the noise",
            stacklevel=3,
        )
    with MeasurementWriter(
        out,
        operator="identity",
        image_shape=images.image_shape,
        history=f"import {images.origin}: {how}",
        geometry=images.geometry,
        attributes=attributes,
        overwrite=overwrite,
    ) as writer:
        for start in track(range(0, len(images), _BLOCK), f"importing {len(images)} images"):
            rows = np.arange(start, min(start + _BLOCK, len(images)))
            writer.append(
                images.images(rows),
                noise_std=levels[rows],
                noise_std_error=None if errors is None else errors[rows],
                subjects=chosen.subject or [images.subjects[r] for r in rows],
                scale=images.scale_of(rows),
            )


def _image_noise(images: ImageSource, chosen: ImportOptions) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Noise levels (N,), their standard errors (None when given), and how they were found."""
    num = len(images)
    if chosen.noise_std is not None:
        scale = 1.0 if chosen.noise_units == "scaled" else np.broadcast_to(images.scale, (num,))
        return np.broadcast_to(chosen.noise_std / scale, (num,)), None, "noise level given"
    levels, errors = np.zeros(num), np.zeros(num)
    # Volumes have scales, and so noise levels, of their own; other images are taken to share one.
    for group in np.unique(images.scale) if isinstance(images.scale, np.ndarray) else [None]:
        rows = np.arange(num) if group is None else np.flatnonzero(images.scale == group)
        some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED)).astype(int))]
        found = estimate_noise(images.images(some))
        levels[rows], errors[rows] = found.sigma, found.standard_error
    return levels, errors, "noise level estimated from diagonal details"


def _import_masked(path: Path, out: Path, chosen: ImportOptions, overwrite: bool) -> None:
    """npz with images (zero where missing), mask, noise_std."""
    with np.load(path, allow_pickle=False) as archive:
        mask = archive["mask"]
        stated = (
            float(archive["noise_std"]) if "noise_std" in archive and archive["noise_std"].ndim == 0 else None
        )
    images = open_source(path)
    scale = images.scale if chosen.noise_units == "original" else 1.0
    level = stated if chosen.noise_std is None else chosen.noise_std / np.asarray(scale)
    if level is None:
        raise InputError(f"{path}: the noise level of incomplete images cannot be estimated; give noise_std")
    mask = mask[:, None] if mask.ndim == 3 else mask[None, None] if mask.ndim == 2 else mask
    design, status = _design(torch.from_numpy(mask.astype(np.float32)), chosen.design)
    with MeasurementWriter(
        out,
        operator="masking",
        image_shape=images.image_shape,
        shared_mask=mask if len(mask) == 1 else None,
        design=design,
        design_status=status,
        history=f"import {path}: noise level given",
        overwrite=overwrite,
    ) as writer:
        for start in range(0, len(images), _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, len(images)))
            writer.append(
                images.images(rows),
                noise_std=level,
                mask=None if len(mask) == 1 else mask[rows],
                subjects=chosen.subject or [images.subjects[r] for r in rows],
                scale=images.scale_of(rows),
            )


def _design(masks: torch.Tensor, given: MaskDesign | None) -> tuple[MaskDesign | None, str]:
    """The design to record and its status: given, estimated from the masks (n, m, H, W), or unknown."""
    if given is not None:
        return given, "given"
    if bool((masks != 0).all()):
        return None, "unknown"
    try:
        return estimate_design(masks), "estimated"
    except IdentifiabilityError:
        return None, "unknown"


# -- raw scans
# -------------------------------------------------------------------------------------------------------


def write_scans(
    scans: Iterable[tuple[Path, RawScan]],
    out: Path,
    chosen: ImportOptions,
    overwrite: bool,
    reference: Path | None = None,
) -> None:
    """Prepare raw scans one after the other and write their measurement file.

    reference: a file for their coil-combined images S^H F^H M y, in the same units. Of fully sampled scans these are what
    reconstructions are scored against; they have the noise of the scan.

    Raises: InputError for unusable scans, mixed shapes, or no scan at all; nothing is written then.
    """
    writer: MeasurementWriter | None = None
    truth = None if reference is None else ImageWriter(reference, overwrite=overwrite)
    masks: list[np.ndarray] = []
    volumes: list[dict[str, Any]] = []
    notes: list[str] = []
    try:
        for path, scan in scans:
            ready = prepare(
                scan,
                noise_std=chosen.noise_std,
                noise_scaled=chosen.noise_units == "scaled",
                compress=chosen.compress,
                remove_oversampling=chosen.remove_oversampling,
            )
            shape = (2, *ready.kspace.shape[2:])
            if writer is None:
                writer = MeasurementWriter(out, operator="mri", image_shape=shape, overwrite=overwrite)
                first = (path, ready.kspace.shape[1:])
            elif ready.kspace.shape[1:] != first[1]:
                raise InputError(
                    f"{path}: mixed shapes, k-space (coils, H, W) {ready.kspace.shape[1:]} unlike {first[1]} of {first[0].name}"
                )
            volumes.append(_volume(scan, ready, len(writer)))
            _append_scan(writer, scan, ready)
            if truth is not None:
                truth.append(combined_images(ready), subjects=scan.subject, scale=ready.scale)
            masks.append(ready.mask[: max(0, _SAMPLED_MASKS - sum(map(len, masks)))])
            notes += [f"import {path}: {'; '.join(ready.notes)}"]
        if writer is None:
            raise InputError("import: no scan found")
        found = torch.from_numpy(np.concatenate(masks)[:, None].astype(np.float32))
        writer.set_design(*_design(found, chosen.design))
        for file in (writer, truth):
            if file is not None:
                file.geometry = {"volumes": volumes}
                file.history = "\n".join(notes)
                file.close()
    finally:
        for file in (writer, truth):
            if file is not None:
                file.discard()


def _read_scans(kind: str, paths: list[Path], chosen: ImportOptions) -> Iterator[tuple[Path, RawScan]]:
    for path in track(paths, f"importing {len(paths)} scans"):
        if kind == "fastmri":
            scan = read_fastmri(path)
        elif kind == "ismrmrd":
            scan = read_ismrmrd(path)
        elif kind == "bart":
            scan = read_bart(path)
        else:
            scan = _read_npz(path)
        if chosen.subject is not None:
            scan.subject = chosen.subject
        if chosen.noise_scan is not None:
            noise = _array(chosen.noise_scan, "noise_scan")
            scan.noise = (
                noise.reshape(noise.shape[0], -1) if noise.shape[0] == scan.kspace.shape[1] else noise
            )
        if chosen.coil_maps is not None:
            scan.coil_maps = _array(chosen.coil_maps, "coil_maps")
        yield path, scan


def _array(value: Any, name: str) -> np.ndarray:
    """An array given as such, as .npy, or as a BART file (whose dimension 3 are the coils)."""
    if not isinstance(value, (str, os.PathLike)):
        return np.asarray(value)
    path = Path(value)
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{name} {path}: not a readable numpy file ({' '.join(str(error).split())})"
            ) from None
    array = read_cfl(path)
    array = array.reshape(*array.shape, *[1] * (14 - array.ndim)) if array.ndim < 14 else array
    # (slices, coils, x, y) for maps; coils first for noise, whose other dimensions are all readouts.
    ordered = np.moveaxis(array, (13, 3), (0, 1)).reshape(array.shape[13], array.shape[3], array.shape[0], -1)
    return ordered if name == "coil_maps" else ordered.swapaxes(0, 1).reshape(array.shape[3], -1)


def _read_npz(path: Path) -> RawScan:
    """npz with kspace (S, N, H, W) or (S, H, W) complex; optional mask, coil_maps, noise, noise_std,
    subject."""
    with np.load(path, allow_pickle=False) as archive:
        content = {name: archive[name] for name in archive.files}
    kspace = content["kspace"]
    if kspace.dtype.kind != "c" or kspace.ndim not in (3, 4):
        raise InputError(
            f"{path}: expected complex kspace (slices, coils, H, W) or (slices, H, W), got {kspace.dtype} {kspace.shape}"
        )
    kspace = kspace if kspace.ndim == 4 else kspace[:, None]
    mask = content.get("mask")
    if mask is not None:
        try:
            mask = np.broadcast_to(mask != 0, (len(kspace), *kspace.shape[2:]))
        except ValueError:
            raise InputError(f"{path}: the mask {mask.shape} does not fit kspace {kspace.shape}") from None
    return RawScan(
        kspace,
        str(content.get("subject", path.stem)),
        str(path),
        mask=mask,
        noise=content.get("noise"),
        noise_std=float(content["noise_std"]) if "noise_std" in content else None,
        coil_maps=content.get("coil_maps"),
    )


def _append_scan(writer: MeasurementWriter, scan: RawScan, ready: PreparedScan) -> None:
    multi = ready.coil_maps is not None
    writer.append(
        ready.kspace if multi else ready.kspace[:, 0],
        noise_std=ready.noise_std,
        noise_std_error=ready.noise_std_error,
        mask=ready.mask,
        coil_maps=ready.coil_maps,
        subjects=scan.subject,
        scale=ready.scale,
    )


def _volume(scan: RawScan, ready: PreparedScan, first: int) -> dict[str, Any]:
    """Geometry of one volume, array axes (H, W, slice)."""
    height, width = ready.kspace.shape[2:]
    return {
        "name": scan.subject,
        "affine": (np.eye(4) if scan.affine is None else scan.affine).tolist(),
        "shape": [height, width, len(scan.kspace)],
        "axis": 2,
        "first": first,
        "slices": ready.slices.tolist(),
    }
