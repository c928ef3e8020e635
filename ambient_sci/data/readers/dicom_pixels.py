"""What the values of a DICOM image mean: stored bits, palettes, inverted grey, rescaling, padding.

    value = slope * stored + intercept        or the modality look-up table; MONOCHROME1: stored is counted
    from the top

Windows and other look-up tables are for display and are not applied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.data.readers.guard import check_claim, one_line, reading
from ambient_sci.errors import InputError

_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "PALETTE COLOR")


def is_colour(header: Any) -> bool:
    """Several samples a pixel, or indices into a palette."""
    return int(header.get("SamplesPerPixel", 1) or 1) > 1 or _photometric(header) == "PALETTE COLOR"


def _photometric(header: Any) -> str:
    return str(header.get("PhotometricInterpretation", "MONOCHROME2"))


def decode(header: Any, path: Path) -> np.ndarray:
    """Stored values of every frame, (F, rows, columns) or (F, rows, columns, 3): grey counted upwards,
    palettes looked up, YBR as RGB.

    Raises: InputError for pixels that cannot be decoded, or whose meaning is not known.
    """
    from pydicom.pixels import apply_color_lut

    photometric, frames = _photometric(header), _number(header, "NumberOfFrames", path, 1)
    rows, columns = _number(header, "Rows", path, 0), _number(header, "Columns", path, 0)
    samples = _number(header, "SamplesPerPixel", path, 1)
    if photometric not in (*_GREY, *_COLOUR) or (photometric in _GREY) != (
        samples == 1 and photometric != "PALETTE COLOR"
    ):
        raise InputError(
            f"{path}: PhotometricInterpretation {one_line(photometric, 40)} of {samples} samples is not read"
        )
    stored, high = header.get("BitsStored"), header.get("HighBit")
    if stored is not None and high is not None and high != stored - 1:
        raise InputError(
            f"{path}: HighBit {high} with BitsStored {stored}; only values in the lowest bits are read"
        )
    check_claim(path, (frames, rows, columns, samples), 8, path.stat().st_size, "pixels")
    try:
        pixels = header.pixel_array
    except Exception as error:  # pydicom raises many kinds for transfer syntaxes it cannot decode
        syntax = getattr(getattr(header, "file_meta", None), "TransferSyntaxUID", None)
        name = getattr(syntax, "name", "unknown transfer syntax")
        hint = (
            "; decoders: pip install 'ambient-sci[io]'"
            if "missing" in str(error) or "plugin" in str(error)
            else ""
        )
        raise InputError(
            f"{path}: the DICOM pixels cannot be decoded ({name}: {one_line(error, 120)}){hint}"
        ) from None
    if photometric == "PALETTE COLOR":
        with reading(path, "palette"):
            pixels = apply_color_lut(pixels, header)
    pixels = pixels.reshape(frames, rows, columns, *([3] if is_colour(header) else []))
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    if pixels.dtype.kind in "iu" and photometric in _GREY and not getattr(syntax, "is_compressed", False):
        pixels = _stored_bits(pixels, int(stored or 8 * pixels.dtype.itemsize), path)
    if photometric == "MONOCHROME1":
        pixels = _from_the_top(pixels, int(stored or 0), path)
    return pixels


def _number(header: Any, name: str, path: Path, default: int) -> int:
    with reading(path, f"DICOM file, {name}"):
        value = header.get(name)
        number = default if value in (None, "") else int(value)
    if number < 1:
        raise InputError(f"{path}: expected {name} >= 1, got {number}")
    return number


def _stored_bits(pixels: np.ndarray, bits: int, path: Path) -> np.ndarray:
    """The lowest ``bits`` of each value, signed ones extended: higher bits may hold overlays."""
    allocated = 8 * pixels.dtype.itemsize
    if not 1 <= bits <= allocated:
        raise InputError(f"{path}: expected BitsStored from 1 to {allocated}, got {bits}")
    if bits == allocated:
        return pixels
    native = pixels.astype(pixels.dtype.newbyteorder("="))
    if native.dtype.kind == "u":
        return native & native.dtype.type((1 << bits) - 1)
    return (native << (allocated - bits)) >> (allocated - bits)


def _from_the_top(pixels: np.ndarray, bits: int, path: Path) -> np.ndarray:
    """MONOCHROME1: the lowest value is white. Counted from the top, as MONOCHROME2 is."""
    if pixels.dtype.kind not in "iu" or bits < 1:
        raise InputError(f"{path}: MONOCHROME1 of {pixels.dtype} values is not read")
    wide = pixels.astype(np.int64)
    return (1 << bits) - 1 - wide if pixels.dtype.kind == "u" else -1 - wide


def rescaled(stored: np.ndarray, header: Any, groups: dict[str, Any], path: Path) -> np.ndarray:
    """Stored values of one frame in the units of its modality, float64. ``groups``: functional groups of the
    frame.

    Raises: InputError for a slope that is zero or not finite.
    """
    if "ModalityLUTSequence" in header:
        from pydicom.pixels import apply_modality_lut

        with reading(path, "modality look-up table"):
            return np.asarray(apply_modality_lut(stored, header), np.float64)
    with reading(path, "DICOM file, RescaleSlope"):
        slope, intercept = (
            float(default if (value := groups.get(name, header.get(name))) in (None, "") else value)
            for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise InputError(
            f"{path}: expected a finite RescaleSlope that is not 0, got slope {slope:g}, intercept "
            f"{intercept:g}"
        )
    return stored * slope + intercept


def padded(stored: np.ndarray, header: Any) -> int:
    """Pixels that hold the padding value, where nothing was measured."""
    value, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if not isinstance(value, (int, float)) or is_colour(header):
        return 0
    low, high = sorted((value, limit if isinstance(limit, (int, float)) else value))
    return int(((stored >= low) & (stored <= high)).sum())
