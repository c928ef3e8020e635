"""Measurement files from data that others wrote: images and raw MR scans.

- Images (npy/npz, pictures, zips, volumes, DICOM, see ``sources.py``) become noisy, complete measurements, y
= x + sigma n. Magnitudes of MR have Rician noise; the file says so and a warning is given.
- Raw MR scans (fastMRI and ISMRMRD HDF5, BART cfl/hdr, npz with ``kspace``; single files or folders of one
kind) become MRI measurements, y = M (F S x + sigma n), as ``kspace.py`` says.
- npz with ``images`` and ``mask`` becomes masked measurements, y = M (x + sigma n).

A noise level that is not given is estimated, and its standard error recorded; noise that is not white is
warned of. A mask design that is not given is estimated from the masks when there are enough different ones,
else it is unknown; the file says which. What readers left out or guessed is in the file's history.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ambient_sci.data.identify import identify
from ambient_sci.data.import_images import import_images, import_masked
from ambient_sci.data.import_options import ImportOptions
from ambient_sci.data.import_scans import array_scan, read_scans, write_scans
from ambient_sci.data.readers.arrays import as_array, load_npy, refuse_kspace
from ambient_sci.data.readers.fastmri import common_padding
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output
from ambient_sci.whole_sets import only_maker

__all__ = ["ImportOptions", "import_source", "write_scans"]

#: Options that mean something for images alone.
_OF_IMAGES = ("size", "grey", "crop", "bin", "patch", "stride", "channel")


def import_source(
    source: Any, out: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
) -> Path:
    """Write a measurement file from foreign data; ``options`` are those of :class:`ImportOptions`. Returns
    the path.

    Raises: InputError for anything missing, unreadable, contradictory or of mixed shapes; nothing is written
    then.
    """
    out = check_output(out, overwrite)
    with only_maker(out):
        _import(source, out, overwrite, ImportOptions(**options))
    return out


def _import(source: Any, out: Path, overwrite: bool, chosen: ImportOptions) -> None:
    """What kind of data it is decides who reads them."""
    left_out: list[str] = []
    kind, paths = _identify(source, chosen, left_out)
    if kind == "images":
        _refuse_options(chosen, "images", ("noise_scan", "coil_maps", "compress", "design", "mask"))
        import_images(source, out, chosen, overwrite)
    elif kind == "masked":
        _refuse_options(chosen, "masked images", ("noise_scan", "coil_maps", "compress", "mask", *_OF_IMAGES))
        import_masked(paths[0], out, chosen, overwrite)
    elif kind == "array":
        _refuse_options(chosen, "k-space", _OF_IMAGES)
        write_scans([array_scan(source, chosen)], out, chosen, overwrite)
    else:
        _refuse_options(chosen, "raw scans", ("mask", *_OF_IMAGES))
        padding = common_padding(paths) if kind == "fastmri" and len(paths) > 1 else None
        padding = 0 if padding is None and kind == "fastmri" and len(paths) > 1 else padding
        scans = read_scans(kind, paths, chosen)
        write_scans(scans, out, chosen, overwrite, padding=padding, notes=left_out)


def _refuse_options(chosen: ImportOptions, what: str, names: tuple[str, ...]) -> None:
    given = [
        name for name in names if getattr(chosen, name) is not None and getattr(chosen, name) is not False
    ]
    if given:
        raise InputError(f"import of {what}: {', '.join(given)} has no meaning here")


def _identify(source: Any, chosen: ImportOptions, left_out: list[str]) -> tuple[str, list[Path]]:
    """What a source is; complex numbers of an array or .npy may be images or k-space. ``left_out`` takes what
    of a folder is not read."""
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is not None and path.suffix.lower() != ".npy":
        if chosen.kind is not None:
            raise InputError(
                f"{path}: kind: expected an array or a .npy file with it, got another kind of source"
            )
        return identify(source, left_out)
    if chosen.kind == "kspace":
        return "array", []
    if chosen.kind is None:
        refuse_kspace(as_array(source, "images") if path is None else load_npy(path), path)
    return "images", []
