r"""Results back to the kind of file they came from: PNG and TIFF pictures, numpy arrays, NIfTI volumes.

    mean      |mean_s x_s|                the posterior mean, complex images as magnitude
    std       the result's std   (complex: std_s |x_s| over the samples, S - 1 in the denominator)
    samples   |x_s|                       one sample after the other
    error     | |mean_s x_s| - |x| |      the distance to clean images x that are given as a reference

times the scale of each image: original units. The suffix of the output decides: ``.png`` (one picture),
``.tif`` (a stack), ``.npy``, ``.nii`` or ``.nii.gz``; no suffix is a folder of one file for each picture or
volume. Numpy arrays keep complex means and samples complex. Pictures that came as whole numbers of 8 or 16
bits go out as such; what cannot be whole numbers (std, error) is a floating-point TIFF or has its window
said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data.exporters import safe_names
from ambient_sci.data.files import ReferenceFile
from ambient_sci.data.layout import channels_to_complex
from ambient_sci.data.origins import origins_of
from ambient_sci.data.picture_writing import Encoding, Stack, full_window, write_png, write_tiff
from ambient_sci.data.subjects import stem
from ambient_sci.errors import InputError
from ambient_sci.sampling.export_places import names_of, stack_of_rows
from ambient_sci.sampling.export_volumes import export_nifti
from ambient_sci.sampling.result import ResultFile
from ambient_sci.whole_files import check_output, whole_file

WHAT = ("mean", "std", "samples", "error")
FORMATS = ("png", "tif", "npy", "nii", "nii.gz")
_NO_GEOMETRY = "the measurements came without geometry; voxels are 1 mm and slices stacked by subject"
_SUFFIXES = {".png": "png", ".tif": "tif", ".tiff": "tif", ".npy": "npy", ".nii": "nii", ".nii.gz": "nii.gz"}


@dataclass
class Exported:
    """What an export wrote: each file with the quantity in it, and what a reader should know."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [path for _, path in self.files]


def export(
    result: str | Path,
    out: str | Path,
    *,
    what: str = "mean",
    format: str | None = None,
    reference: str | Path | None = None,
    bits: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a result as pictures, arrays or volumes, in original units.

    Args:
        result: a result file (made by `reconstruct_to_file` or `Reconstruction.save`).
        out: FILE.png, .tif, .npy, .nii or .nii.gz, or a folder. With ``what="all"`` FILE_mean.tif and so on.
        what: "mean", "std", "samples", "error" or "all" (all that there are), as in the module's docstring.
        format: of the files in a folder: "png", "tif", "npy", "nii" or "nii.gz". Default: what the images
            came from, volumes as NIfTI, 8-bit pictures as PNG, other pictures as TIFF, arrays as npy.
        reference: file of the clean images, for "error".
        bits: 8, 16 or 32 (floating point) of pictures. Default: those of the pictures that were imported; 32
            in TIFF for std and error, and for what did not come as 16 bits.
        overwrite: replace files that exist.

    Returns:
        the files, and notes on rounding, windows and places that are not known.

    Raises:
        InputError: another quantity or suffix, a quantity that there is not, several pictures for one PNG, a
            reference of other images, or files that exist. Nothing is written then.
    """
    if what not in (*WHAT, "all"):
        raise InputError(f"export: expected one of {', '.join(WHAT)} or all, got {what!r}")
    if format is not None and format not in FORMATS:
        raise InputError(f"export: expected a format of {', '.join(FORMATS)}, got {format!r}")
    if bits not in (None, 8, 16, 32):
        raise InputError(f"export: expected 8, 16 or 32 bits, got {bits}")
    out = Path(out)
    with ResultFile(result) as file:
        chosen = _quantities(file, what, reference)
        suffix, kind = _kind(out, file, format)
        if kind.startswith("nii"):
            return _volumes(file, out, kind, suffix, chosen, bits, overwrite)
        job = _Job(file, out, suffix, kind, reference, bits, overwrite, len(chosen) > 1)
        planned = [(q, job.plan(q)) for q in chosen]
        for _, files in planned:
            for path, _ in files:
                check_output(path, overwrite)
        for quantity, files in planned:
            job.write(quantity, files)
        return job.exported


def _quantities(file: ResultFile, what: str, reference: Any) -> list[str]:
    several = file.shape[0] > 1
    if what == "all":
        there = {"mean": True, "std": several, "samples": True, "error": reference is not None}
        return [q for q in WHAT if there[q]]
    if what == "std" and not several:
        raise InputError(f"{file.path}: expected 2 or more samples for a standard deviation, got 1")
    if what == "error" and reference is None:
        raise InputError(
            "export: error: expected a reference (--reference REF.h5), the clean images, got none"
        )
    return [what]


def _kind(out: Path, file: ResultFile, given: str | None) -> tuple[str, str]:
    """The suffix of the output ("" for a folder) and the format."""
    name = out.name.lower()
    suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")
    if suffix and not out.is_dir():
        kind = _SUFFIXES[suffix]
        if given not in (None, kind):
            raise InputError(f"{out}: expected a folder with --format {given}, or the suffix .{given}")
        return suffix, kind
    if out.is_file() or (out.suffix and not out.is_dir()):
        right = ", ".join(f".{f}" for f in FORMATS)
        got = out.suffix or "a file"
        raise InputError(f"{out}: expected a file ending in {right}, or a folder (no suffix), got {got}")
    return "", given or _usual_format(file)


def _usual_format(file: ResultFile) -> str:
    """The format of what the images came from."""
    pictures = file.geometry.get("pictures")
    of_pictures = file.source.get("operator") in ("identity", "masking")
    if file.geometry.get("volumes") or not (pictures or of_pictures):
        return "nii.gz"
    if not pictures or str(pictures["files"][0]).lower().endswith((".npy", ".npz")):
        return "npy"
    return "png" if pictures.get("dtype") == "uint8" and not pictures.get("stacks") else "tif"


def _volumes(
    file: ResultFile, out: Path, kind: str, suffix: str, chosen: list[str], bits: int | None, overwrite: bool
) -> Exported:
    if bits is not None or "error" in chosen:
        raise InputError(
            f"{out}: NIfTI holds mean, std and samples as floating-point numbers; expected .tif or .npy"
        )
    found = Exported()
    for quantity in chosen:
        own = out
        if suffix and len(chosen) > 1:
            own = out.with_name(f"{out.name[: -len(suffix)]}_{quantity}{suffix}")
        paths = export_nifti(file.path, own, what=quantity, overwrite=overwrite, suffix=f".{kind}")
        found.files += [(quantity, p) for p in paths]
    if not file.geometry.get("volumes"):
        found.notes.append(_NO_GEOMETRY)
    return found


#: a file to write, and the images that go into it (with the number of one sample, for PNG)
_Files = list[tuple[Path, tuple[list[int], int | None]]]


class _Job:
    """One export to pictures or arrays."""

    def __init__(
        self,
        file: ResultFile,
        out: Path,
        suffix: str,
        kind: str,
        reference: Any,
        bits: int | None,
        overwrite: bool,
        several: bool,
    ) -> None:
        self.file, self.out, self.suffix, self.kind = file, out, suffix, kind
        self.bits, self.overwrite, self.several = bits, overwrite, several
        self.truth = None if reference is None else _Truth(file, Path(reference))
        self.origins = origins_of(file.geometry)
        self.pictures = file.geometry.get("pictures", {})
        self.exported = Exported()
        if self.pictures.get("patch"):
            self.exported.notes.append("these are the patches that were imported, not whole pictures")

    # -- which files

    def plan(self, quantity: str) -> _Files:
        """The files of one quantity. InputError for several pictures in one PNG."""
        every = list(range(len(self.file)))
        if self.suffix and self.kind == "png":
            return self._one_png(quantity)
        if self.suffix:
            stem_ = self.out.name[: -len(self.suffix)] + (f"_{quantity}" if self.several else "")
            return [(self.out.with_name(stem_ + self.suffix), (every, None))]
        if self.kind == "npy":
            return [(self.out / f"{quantity}.npy", (every, None))]
        if self.kind == "png":
            return [
                f
                for row, name in zip(every, names_of(self.file, self.origins), strict=True)
                for f in self._pngs(row, name, quantity)
            ]
        groups: dict[str, list[int]] = {}
        for row in every:
            groups.setdefault(self.origins[row].file if self.origins else "images", []).append(row)
        names = safe_names([stem(name) for name in groups])
        return [
            (self.out / f"{n}_{quantity}.tif", (rows, None))
            for n, rows in zip(names, groups.values(), strict=True)
        ]

    def _one_png(self, quantity: str) -> _Files:
        if len(self.file) > 1:
            raise InputError(
                f"{self.out}: expected a folder for {len(self.file)} pictures (--format png), or a .tif "
                "file, which "
                "holds a stack; a PNG holds one"
            )
        base = self.out.name[: -len(self.suffix)]
        folder = self.out.parent
        if quantity == "samples" and self.file.shape[0] > 1:
            count = range(self.file.shape[0])
            return [(folder / f"{base}_sample{k + 1}{self.suffix}", ([0], k)) for k in count]
        return [(folder / f"{base}{f'_{quantity}' if self.several else ''}{self.suffix}", ([0], None))]

    def _pngs(self, row: int, name: str, quantity: str) -> _Files:
        if quantity != "samples":
            return [(self.out / f"{name}_{quantity}.png", ([row], None))]
        return [(self.out / f"{name}_sample{k + 1}.png", ([row], k)) for k in range(self.file.shape[0])]

    # -- numbers

    def values(self, quantity: str, row: int) -> np.ndarray:
        """One image in original units, (C, H, W), or of samples (S, C, H, W); complex ones as magnitude."""
        rows = slice(row, row + 1)
        if quantity == "samples":
            found = _magnitude(self.file.samples(rows))[:, 0]
        elif quantity == "std":
            found = self.file.std(rows)[0]
            if found.shape[0] == 2:
                found = _magnitude(self.file.samples(rows)).double().std(0)[0]
        else:
            found = _magnitude(self.file.mean(rows))[0]
            if quantity == "error":
                assert self.truth is not None
                found = (found - _magnitude(self.truth.images(row))[0]).abs()
        return found.numpy() * self._scale(row)

    def _scale(self, row: int) -> np.float32:
        scale = np.broadcast_to(np.asarray(self.file.scale, np.float32), (len(self.file),))
        return scale[row]

    def encoding(self, quantity: str, rows: list[int]) -> Encoding:
        """How the numbers are stored: as they came where that is possible."""
        came = {"uint8": 8, "uint16": 16}.get(str(self.pictures.get("dtype")))
        levels = quantity in ("mean", "samples")
        if self.kind == "tif":
            bits = self.bits or (16 if levels and came == 16 else 32)
        else:
            colour = self.file.shape[2] == 3
            bits = self.bits or (came or 16 if not colour else 8)
        if bits == 32 or (levels and came is not None and bits >= came):
            return Encoding(bits)
        return Encoding(bits, full_window(self.values(quantity, r) for r in rows))

    # -- writing

    def write(self, quantity: str, files: _Files) -> None:
        """All files of one quantity."""
        every = sorted({r for _, (rows, _) in files for r in rows})
        encoding = Encoding(32) if self.kind == "npy" else self.encoding(quantity, every)
        facts = {"quantity": quantity, "result": self.file.path.name}
        for path, (rows, sample) in files:
            if self.kind == "npy":
                self._write_npy(path, quantity)
            elif self.kind == "png":
                values = self.values(quantity, rows[0])
                image = values if values.ndim == 3 else values[sample or 0]
                write_png(path, image, encoding, facts)
            else:
                self._write_tiff(path, quantity, rows, encoding, facts)
            self.exported.files.append((quantity, path))
        self.exported.notes.append(f"{quantity}: {encoding.text()}")

    def _write_npy(self, path: Path, quantity: str) -> None:
        """(N, C, H, W), or samples (S, N, C, H, W); complex (N, H, W) and (S, N, H, W)."""
        samples, num, channels, *size = self.file.shape
        keep = channels == 2 and quantity in ("mean", "samples")
        shape = [num, *size] if channels == 2 and keep else [num, 1 if channels == 2 else channels, *size]
        shape = [samples, *shape] if quantity == "samples" else shape
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            with part.open("wb") as file:
                np.lib.format.write_array_header_2_0(
                    file,
                    {"descr": "<c8" if keep else "<f4", "fortran_order": False, "shape": tuple(shape)},
                )
                start = file.tell()
                file.truncate(start + int(np.prod(shape)) * (8 if keep else 4))
            stored = np.memmap(part, "<c8" if keep else "<f4", "r+", start, tuple(shape))
            for row in range(num):
                own = slice(row, row + 1)
                if keep and quantity == "mean":
                    stored[row] = channels_to_complex(self.file.mean(own).numpy())[0] * self._scale(row)
                elif keep:
                    drawn = self.file.samples(own)[:, 0].numpy()
                    stored[:, row] = channels_to_complex(drawn) * self._scale(row)
                elif quantity == "samples":
                    stored[:, row] = self.values(quantity, row)
                else:
                    stored[row] = self.values(quantity, row)
            stored.flush()
            del stored

    def _write_tiff(self, path: Path, quantity: str, rows: list[int], encoding: Encoding, facts: Any) -> None:
        channels, *size = self.file.shape[2:]
        channels = 1 if channels == 2 else channels
        stack = stack_of_rows(self.file, self.origins, rows)
        if quantity == "samples":
            axis = "C" if channels == 1 and "C" not in stack.axes else "Q"
            stack = Stack(
                stack.axes + axis,
                (*stack.shape, self.file.shape[0]),
                stack.resolution,
                stack.unit,
                stack.spacing,
            )

        def pages() -> Iterator[np.ndarray]:
            for row in rows:
                values = self.values(quantity, row)
                yield from ([values] if values.ndim == 3 else values)

        write_tiff(path, pages(), (channels, *size), encoding, stack, facts)


class _Truth:
    """The clean images that belong to those of a result."""

    def __init__(self, file: ResultFile, path: Path) -> None:
        self._file = ReferenceFile(path)
        num = len(self._file)
        chosen = file.source.get("indices")
        if num == len(file):
            self._rows: list[int] = list(range(num))
        elif isinstance(chosen, list) and len(chosen) == len(file) and num == file.source.get("samples"):
            self._rows = chosen
        else:
            raise InputError(
                f"{path}: expected {len(file)} clean images, one for each of the result, got {num}"
            )
        if tuple(self._file.image_shape) != tuple(file.shape[2:]):
            raise InputError(f"{path}: expected images {tuple(file.shape[2:])}, got {self._file.image_shape}")

    def images(self, row: int) -> torch.Tensor:
        """The clean image of one of the result's."""
        return self._file.images([self._rows[row]])


def _magnitude(x: torch.Tensor) -> torch.Tensor:
    """(..., C, H, W) to (..., 1, H, W) for complex images, others as they are."""
    return torch.linalg.vector_norm(x, dim=-3, keepdim=True) if x.shape[-3] == 2 else x
