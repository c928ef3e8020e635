"""numpy files and arrays: which axis is what, and what an npz holds.

Images are (N, C, H, W), (N, H, W), (N, H, W, C), (H, W) or (H, W, C) of C = 1 or 3. A shape that has two
sensible readings is refused with the one that was tried; (N, 1, H, W) is never ambiguous.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ambient_sci.data.layout import complex_to_channels, to_numpy
from ambient_sci.data.raw import RawScan
from ambient_sci.data.readers.guard import check_claim, check_regular, listed, reading
from ambient_sci.errors import InputError

#: Axes this short count as channels.
_CHANNELS = (1, 2, 3, 4)
#: More channels than this are taken for slices or time points.
_MOST_CHANNELS = 16
_WAY_OUT = "give (N, C, H, W), for grey images (N, 1, H, W)"


def as_array(source: Any, name: str) -> np.ndarray:
    """Numbers from anything array-like. bfloat16 and float8 tensors become float32; masked arrays are
    refused."""
    if isinstance(source, Tensor):
        if source.is_quantized or source.layout.__str__() != "torch.strided":
            raise InputError(f"{name}: expected a dense tensor, got {source.layout}")
        if source.is_floating_point() and source.dtype.itemsize <= 2:
            source = source.float()
        return to_numpy(source, name)
    if isinstance(source, np.ma.MaskedArray) and np.ma.is_masked(source):
        raise InputError(f"{name}: a masked array; fill it, or import images with their mask from an npz")
    with reading(name, "array"):
        return to_numpy(source, name)


def channels_first(array: np.ndarray, origin: str) -> tuple[np.ndarray, str | None]:
    """Images (N, C, H, W), complex ones as two channels, and what was done to the axes (None: nothing).

    Raises: InputError for a shape with two readings, or none.
    """
    if array.size == 0 or not 2 <= array.ndim <= 4:
        raise InputError(
            f"{origin}: expected images (N, H, W), (N, C, H, W) or (N, H, W, C), got {array.shape}"
        )
    if array.dtype.kind == "c":
        return _complex(array, origin)
    if array.ndim == 2:
        return array[None, None], "one image (H, W)"
    return _three_axes(array, origin) if array.ndim == 3 else _four_axes(array, origin)


def _complex(array: np.ndarray, origin: str) -> tuple[np.ndarray, str | None]:
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 4:
        raise InputError(
            f"{origin}: expected complex images (N, H, W), got {array.shape}; are these coils? combine "
            "them first, or import their k-space (--kind kspace)"
        )
    array = array[None] if array.ndim == 2 else _three_axes(array, origin)[0][:, 0]
    return complex_to_channels(array).numpy(), None


def _refuse(origin: str, shape: tuple[int, ...], reading: str, other: str) -> InputError:
    return InputError(f"{origin}: ambiguous axes {shape}, read as {reading} but perhaps {other}; {_WAY_OUT}")


def _three_axes(array: np.ndarray, origin: str) -> tuple[np.ndarray, str | None]:
    a, b, c = array.shape
    if c in (1, 3) and min(a, b) > 4 and array.dtype.kind != "c":
        return np.moveaxis(array, -1, 0)[None], f"one image (H, W, {c})"
    # Square slices along the last axis, or slices that would be strips: (H, W, N) is as likely.
    square_last = a == b and c != b
    strips = max(b, c) > 4 * min(b, c) and max(a, b) <= 2 * min(a, b)
    if min(b, c) > 1 and (c in _CHANNELS and min(a, b) > 4 or square_last or strips):
        raise _refuse(origin, array.shape, "(N, H, W)", "(H, W, N)")
    # A picture with channels first looks like this, too; by the documented order these are grey images.
    several = a in (3, 4) and array.dtype == np.uint8
    return array[:, None], f"{array.shape} read as {a} grey images (N, H, W)" if several else None


def _four_axes(array: np.ndarray, origin: str) -> tuple[np.ndarray, str | None]:
    _, first, middle, last = array.shape
    if first in _CHANNELS and (last not in _CHANNELS or first == 1):
        return array, None
    if last in _CHANNELS and first > 4:
        if middle <= 4:
            raise _refuse(origin, array.shape, "(N, H, W, C)", "(H, W, C, N)")
        if last == 4 and array.dtype == np.uint8:
            raise InputError(f"{origin}: {array.shape} looks like RGBA; take the alpha channel away first")
        return np.moveaxis(array, -1, 1), f"channels last, {array.shape[1:]} to {(last, first, middle)}"
    if first in _CHANNELS and last in _CHANNELS:
        raise _refuse(origin, array.shape, "(N, C, H, W)", "(N, H, W, C)")
    if first > _MOST_CHANNELS or first >= min(middle, last):
        raise _refuse(origin, array.shape, f"images of {first} channels", "volumes or another order of axes")
    return array, None


# -- files


def load_npy(path: Path, what: str = "numpy file") -> np.ndarray:
    """An .npy file. InputError for a damaged or foreign one, objects, or a header that claims more than the
    file holds."""
    stored = check_regular(path)
    with reading(path, what), path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise InputError(
                f"{path}: expected a numpy file of numbers, got pickled objects, which are never loaded"
            )
        if math.prod(shape) * dtype.itemsize > stored:
            raise InputError(f"{path}: truncated, the header claims {shape} {dtype} in {stored} bytes")
        check_claim(path, shape, dtype.itemsize, stored)
        return np.load(path, allow_pickle=False)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. InputError as for :func:`load_npy`."""
    stored = check_regular(path)
    with reading(path, "numpy file"):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        names = [m.filename for m in members]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: holds several arrays of one name, {listed(names)}")
        check_claim(path, (sum(m.file_size for m in members),), 1, stored, "arrays")
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}


def image_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The images of an .npy or .npz file (key "images"), with subjects, mask and noise_std where it has them;
    and notes."""
    if path.suffix.lower() == ".npy":
        return {"images": to_numpy(load_npy(path), str(path))}, []
    arrays = load_npz(path)
    known = ("subjects", "mask", "noise_std")
    pictures = [n for n, a in arrays.items() if a.dtype.kind in "fciub" and a.ndim >= 2 and n not in known]
    chosen = "images" if "images" in arrays else pictures[0] if len(pictures) == 1 else None
    if chosen is None:
        raise InputError(f"{path}: expected an array named 'images' or a single array, got {sorted(arrays)}")
    found = {n: arrays[n] for n in known if n in arrays} | {"images": to_numpy(arrays[chosen], str(path))}
    others = sorted(set(arrays) - set(known) - {chosen})
    return found, [f"not read: {listed(others, 8)}"] if others else []


def stated_noise(arrays: dict[str, np.ndarray], path: Path, num: int) -> np.ndarray | float | None:
    """``noise_std`` of an npz: a number, or one an image. InputError for anything else."""
    if "noise_std" not in arrays:
        return None
    levels = to_numpy(arrays["noise_std"], f"{path}: noise_std")
    if levels.dtype.kind == "c" or levels.shape not in ((), (1,), (num,)):
        raise InputError(
            f"{path}: noise_std: expected one number or {num}, got {levels.dtype} {levels.shape}"
        )
    return float(levels.ravel()[0]) if levels.size == 1 else levels.astype(np.float64)


# -- k-space in arrays

#: k-space has this share of its energy in a square of `_CENTRE` of its entries, images do not.
_SHARE, _CENTRE = 0.5, 0.05


def refuse_kspace(array: np.ndarray, path: Path | None) -> None:
    """InputError for complex numbers whose energy lies in the middle (or the corners) of their last two axes.

    Args:
        array: what was given as images.
        path: its file, if it has one, for the commands that are spelled out.
    """
    if array.dtype.kind != "c" or array.ndim < 2 or min(array.shape[-2:]) < 8 or not np.isfinite(array).all():
        return
    energy = (np.abs(array.astype(np.complex128)) ** 2).reshape(-1, *array.shape[-2:]).sum(axis=0)
    sides = [max(1, round(math.sqrt(_CENTRE) * n)) for n in energy.shape]

    def middle(values: np.ndarray) -> float:
        starts = [n // 2 - side // 2 for n, side in zip(values.shape, sides, strict=True)]
        inner = values[starts[0] : starts[0] + sides[0], starts[1] : starts[1] + sides[1]]
        return float(inner.sum() / max(values.sum(), 1e-300))

    place, share = "middle", middle(energy)
    if share < _SHARE:
        place, share = "corners", middle(np.fft.fftshift(energy))
    if share < _SHARE:
        return
    part = 100 * sides[0] * sides[1] / energy.size
    shift = "" if place == "middle" else ", after np.fft.fftshift over the last two axes"
    if path is None:
        ways = f"kind='kspace'{shift} or kind='images'"
    else:
        command = f"ambient-sci import {path} --out M.h5 --kind"
        ways = f"`{command} kspace [--mask FILE]`{shift}, or `{command} images`"
    raise InputError(
        f"{path or 'array'}: complex numbers {array.shape} with {100 * share:.0f} % of their energy in "
        f"{part:.0f} % "
        f"of the entries, in the {place}: k-space, or images of a small bright object? expected {ways}"
    )


def read_array_scan(kspace: np.ndarray, path: Path, mask: np.ndarray | None) -> RawScan:
    """Centred k-space (S, N, H, W), (S, H, W) or (H, W), and where it was measured, (S, H, W), (H, W) or
    (W,).

    Raises: InputError for other shapes, or axes that may be confused.
    """
    what = "slices, coils, height, width"
    if kspace.dtype.kind != "c" or kspace.ndim not in (2, 3, 4) or kspace.size == 0:
        raise InputError(
            f"{path}: expected complex k-space ({what}), without coils or for one slice fewer axes, got "
            f"{kspace.dtype} {kspace.shape}"
        )
    if kspace.ndim == 4 and kspace.shape[-1] < min(16, *kspace.shape[1:3]):
        raise InputError(f"{path}: k-space {kspace.shape} is read as ({what}); are the coils last?")
    given = kspace.shape
    kspace = kspace[None, None] if kspace.ndim == 2 else kspace[:, None] if kspace.ndim == 3 else kspace
    scan = RawScan(
        kspace, path.stem, str(path), mask=_mask({"mask": mask}, kspace, path) if mask is not None else None
    )
    if len(given) == 3:
        scan.notes.append(
            f"{given} read as {given[0]} slices of one coil; for coils of one slice give (1, coils, H, W)"
        )
    return scan


# -- raw scans in npz files

_SCAN = ("kspace", "mask", "coil_maps", "noise", "noise_std", "subject")


def read_npz_scan(path: Path) -> RawScan:
    """npz with kspace (S, N, H, W) or (S, H, W) complex; optional mask, coil_maps, noise, noise_std, subject.

    Raises: InputError for other shapes, or coils and slices that may be confused.
    """
    content = load_npz(path)
    kspace = to_numpy(content["kspace"], f"{path}: kspace")
    if kspace.dtype.kind != "c" or kspace.ndim not in (3, 4) or kspace.size == 0:
        raise InputError(
            f"{path}: expected complex kspace (slices, coils, H, W) or (slices, H, W), got {kspace.dtype} "
            f"{kspace.shape}"
        )
    maps = None if "coil_maps" not in content else to_numpy(content["coil_maps"], f"{path}: coil_maps")
    if kspace.ndim == 3 and maps is not None and maps.shape == kspace.shape and len(kspace) > 1:
        raise InputError(
            f"{path}: kspace {kspace.shape} is read as (slices, H, W), but coil_maps has these axes as "
            "(coils, H, W)"
        )
    if kspace.ndim == 4 and kspace.shape[-1] < min(16, *kspace.shape[1:3]):
        raise InputError(
            f"{path}: kspace {kspace.shape} is read as (slices, coils, H, W), a width of "
            f"{kspace.shape[-1]}; are the coils last?"
        )
    kspace = kspace if kspace.ndim == 4 else kspace[:, None]
    levels = stated_noise(content, path, 1)
    noise = None if "noise" not in content else to_numpy(content["noise"], f"{path}: noise")
    scan = RawScan(
        kspace,
        str(content.get("subject", path.stem)),
        str(path),
        mask=_mask(content, kspace, path),
        noise=noise,
        noise_std=None if levels is None else float(levels),
        coil_maps=maps,
    )
    others = sorted(set(content) - set(_SCAN))
    if others:
        scan.notes.append(f"not read: {listed(others, 8)}")
    return scan


def _mask(content: dict[str, np.ndarray], kspace: np.ndarray, path: Path) -> np.ndarray | None:
    if "mask" not in content:
        return None
    mask = to_numpy(content["mask"], f"{path}: mask")
    try:
        return np.broadcast_to(mask != 0, (len(kspace), *kspace.shape[2:]))
    except ValueError:
        raise InputError(f"{path}: the mask {mask.shape} does not fit kspace {kspace.shape}") from None
