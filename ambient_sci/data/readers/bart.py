"""BART arrays (Uecker et al., 2015): NAME.hdr with dimensions, NAME.cfl with complex64 values in Fortran
order."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ambient_sci.data.raw import RawScan, slices_along_readout
from ambient_sci.data.readers.guard import check_claim, check_regular, listed, one_line, reading
from ambient_sci.errors import InputError

#: Names of BART's dimensions, for errors.
_NAMES = "READ PHS1 PHS2 COIL MAPS TE COEFF COEFF2 ITER CSHIFT TIME TIME2 LEVEL SLICE AVG BATCH".split()


def read_cfl(path: Path) -> np.ndarray:
    """A BART array of up to 16 dimensions. InputError when header and values do not match."""
    base = path.with_suffix("") if path.suffix in (".cfl", ".hdr") else path
    head, values = (base.with_name(base.name + s) for s in (".hdr", ".cfl"))
    try:
        check_regular(head)
        stored = check_regular(values)
        lines = head.read_text()[: 1 << 16].splitlines()
        dimensions = [int(n) for n in lines[lines.index("# Dimensions") + 1].split()]
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable BART cfl/hdr pair ({one_line(error)})") from None
    if not 1 <= len(dimensions) <= 16 or min(dimensions) < 1:
        raise InputError(f"{head}: expected up to 16 dimensions of at least 1, got {listed(dimensions, 16)}")
    if stored != 8 * math.prod(dimensions):
        raise InputError(
            f"{path}: expected {math.prod(dimensions)} values for dimensions {dimensions}, got {stored / 8:g}"
        )
    check_claim(values, dimensions, 8, stored)
    with reading(path, "BART array"):
        return np.fromfile(values, np.complex64).reshape(dimensions, order="F")


def read_bart(path: Path) -> RawScan:
    """BART k-space with dimensions READ, PHS1, PHS2, COIL (0 to 3), optionally SLICE (13).

    Raises: InputError for an unreadable pair or other dimensions in use.
    """
    kspace = _slices(read_cfl(path), path)
    name = path.stem if path.suffix in (".cfl", ".hdr") else path.name
    scan = RawScan(kspace[..., 0], name, str(path))
    scan.notes.append("BART files state no geometry")
    if kspace.shape[-1] > 1:
        volume = np.abs(kspace).sum(1) > 0
        lines = np.broadcast_to(volume.any(1, keepdims=True), volume.shape)
        return slices_along_readout(scan, kspace, lines)
    return scan


def _slices(array: np.ndarray, path: Path) -> np.ndarray:
    """(S, N, X, Y, Z) from BART's dimension order."""
    shape = list(array.shape) + [1] * (16 - array.ndim)
    used = [d for d in range(4, 16) if shape[d] > 1 and d != 13]
    if used:
        raise InputError(
            f"{path}: expected BART dimensions 0-3 and 13 (slices), got sizes above 1 in dimensions {used} "
            f"({', '.join(_NAMES[d] for d in used)})"
        )
    array = array.reshape(*shape[:4], shape[13])
    return np.ascontiguousarray(array.transpose(4, 3, 0, 1, 2))
