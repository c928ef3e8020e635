"""How one sample lies on disk and in memory, and what makes it valid.

Every measurement obeys ``y = M (T x + sigma_y n)``, so a sample is a pair (y, M) and, for MRI, coil maps:

==================  =====================  =====================  ============================
operator            measurements, on disk  mask, on disk          in memory (float32)
==================  =====================  =====================  ============================
identity, masking   float32 (C, H, W)      (1 or C, H, W), (H,W)  y (C, H, W), M (1 or C, H, W)
identity, masking   complex64 (H, W)       (1, H, W) or (H, W)    y (2, H, W), M (1, H, W)
mri, one coil       complex64 (H, W)       (H, W)                 y (2, H, W), M (1, H, W)
mri, N coils        complex64 (N, H, W)    (H, W)                 y (2, N, H, W), M (1, 1, H, W)
==================  =====================  =====================  ============================

Real images of one channel may be (H, W) on disk. Complex numbers become two real channels (real, imaginary),
deepinv's convention. Checks run on the memory layout, which is float32 whatever the disk holds:

- float16 halves the bytes of measurements; complex ones then have a last axis of 2 (real, imaginary);
- uint8 is for images that came with 8 bits: value = stored * step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.numbers import LARGEST

OPERATORS = ("identity", "masking", "mri")


def to_numpy(array: Any, name: str) -> np.ndarray:
    """Any array-like (tensors included) as a numpy array; InputError when it is not numeric."""
    if isinstance(array, Tensor):
        array = array.detach().cpu().resolve_conj().numpy()
    array = np.asarray(array)
    if array.dtype.kind not in "fciub":
        raise InputError(f"{name}: expected numbers, got dtype {array.dtype}")
    return array


def complex_to_channels(block: np.ndarray) -> Tensor:
    """(B, ...) complex to (B, 2, ...) float32: real and imaginary part as channels."""
    channels = np.empty((len(block), 2, *block.shape[1:]), np.float32)
    channels[:, 0], channels[:, 1] = block.real, block.imag
    return torch.from_numpy(channels)


def channels_to_complex(block: np.ndarray) -> np.ndarray:
    """(B, 2, ...) real to (B, ...) complex64, the inverse of :func:`complex_to_channels`."""
    return (block[:, 0] + 1j * block[:, 1]).astype(np.complex64)


def check_image_shape(image_shape: Any) -> tuple[int, int, int]:
    """(C, H, W) of positive integers, else InputError."""
    try:
        shape = tuple(int(n) for n in image_shape)
    except (TypeError, ValueError):
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(
            f"image shape: expected three positive sizes (channels, height, width), got {image_shape}"
        )
    return shape[0], shape[1], shape[2]


#: Types of numbers on disk.
NUMBERS = ("float32", "float16", "uint8")


@dataclass(frozen=True)
class Numbers:
    """How numbers lie on disk.

    Attributes:
        name: "float32" (complex64 for complex data), "float16" or "uint8".
        step, offset: value = stored * step + offset, for uint8.
    """

    name: str = "float32"
    step: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in NUMBERS:
            raise InputError(f"dtype: expected one of {', '.join(NUMBERS)}, got {self.name!r}")
        if not (np.isfinite(self.step) and self.step > 0):
            raise InputError(f"step: expected a positive number, got {self.step}")
        if not np.isfinite(self.offset):
            raise InputError(f"offset: expected a number, got {self.offset}")

    def dtype(self, is_complex: bool) -> np.dtype:
        """The type of a dataset."""
        if is_complex and self.name == "uint8":
            raise InputError("dtype: expected float32 or float16 for complex numbers, got uint8")
        return np.dtype(np.complex64 if is_complex and self.name == "float32" else self.name)

    def to_disk(self, block: np.ndarray, what: str) -> np.ndarray:
        """(B, ...) numbers as they are stored.

        Raises:
            InputError: values beyond float16, or values that are not offset + 0 to 255 steps.
        """
        is_complex = block.dtype.kind == "c"
        goal = self.dtype(is_complex)
        if self.name == "float32":
            return block.astype(goal, copy=False)
        if self.name == "float16":
            pairs = np.stack((block.real, block.imag), axis=-1) if is_complex else block
            with np.errstate(over="ignore"):
                half = pairs.astype(np.float16)
            if np.isinf(half).any() and np.isfinite(pairs).all():
                raise InputError(
                    f"{what}: float16 holds values up to 65504, got {np.abs(pairs).max():.4g}; scale them"
                )
            return half
        if block.dtype == np.uint8:
            return block
        steps = (block - np.float32(self.offset)) / self.step
        whole = np.rint(steps)
        if not np.isfinite(steps).all():
            raise InputError(f"{what}: NaN or infinite values")
        if whole.min() < 0 or whole.max() > 255 or np.abs(steps - whole).max() > 1e-2:
            from_where = f" from {self.offset:.6g}" if self.offset else ""
            raise InputError(
                f"{what}: expected multiples of {self.step:.6g}{from_where}, 0 to 255 times that, for uint8, "
                "got others"
            )
        return whole.astype(np.uint8)

    def from_disk(self, block: np.ndarray, is_complex: bool) -> Tensor:
        """(B, ...) float32; complex numbers as channels (B, 2, ...)."""
        if is_complex and self.name == "float16":
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(block, -1, 1), dtype=np.float32))
        if is_complex:
            return complex_to_channels(block)
        if self.name == "uint8":
            values = np.multiply(block, np.float32(self.step), dtype=np.float32)
            return torch.from_numpy(values + np.float32(self.offset) if self.offset else values)
        return torch.from_numpy(np.ascontiguousarray(block, dtype=np.float32))


@dataclass(frozen=True)
class Layout:
    """Shapes of one sample: ``stored_shape`` counts a complex number as one (see the table above)."""

    operator: str
    image_shape: tuple[int, int, int]
    stored_shape: tuple[int, ...]
    is_complex: bool
    numbers: Numbers = Numbers()

    @classmethod
    def infer(
        cls,
        operator: str,
        image_shape: Any,
        stored_shape: tuple[int, ...],
        is_complex: bool,
        numbers: Numbers = Numbers(),  # noqa: B008 - frozen
    ) -> Layout:
        """The layout, or InputError when operator, image shape and stored shape contradict one another."""
        if operator not in OPERATORS:
            raise InputError(f"operator: expected one of {', '.join(OPERATORS)}, got {operator!r}")
        c, h, w = check_image_shape(image_shape)
        stored = tuple(int(n) for n in stored_shape)
        if operator == "mri":
            if not is_complex:
                raise InputError("measurements: MRI k-space must be complex64, got real numbers")
            if c != 2:
                raise InputError(f"image shape: MRI images have 2 channels (real, imaginary), got {c}")
            fits = stored == (h, w) or (len(stored) == 3 and stored[1:] == (h, w) and stored[0] >= 1)
            expected = f"(N, {h}, {w}) or (N, coils, {h}, {w})"
        elif is_complex:
            fits, expected = (
                c == 2 and stored == (h, w),
                f"(N, {h}, {w}) complex for an image shape (2, {h}, {w})",
            )
        else:
            fits, expected = stored == (c, h, w) or (c == 1 and stored == (h, w)), f"(N, {c}, {h}, {w})"
        if not fits:
            got = ", ".join(["N", *map(str, stored)])
            raise InputError(
                f"measurements: expected shape {expected} for image shape {(c, h, w)}, got ({got})"
            )
        return cls(operator, (c, h, w), stored, is_complex, numbers)

    @property
    def coils(self) -> int | None:
        """Number of coils of a multi-coil measurement, None otherwise."""
        return self.stored_shape[0] if self.operator == "mri" and len(self.stored_shape) == 3 else None

    @property
    def dtype(self) -> np.dtype:
        """Type of the dataset."""
        return self.numbers.dtype(self.is_complex)

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """Shape of one measurement in memory."""
        if not self.is_complex:
            return self.image_shape
        return (2, *self.stored_shape)

    def measurements_to_memory(self, block: np.ndarray) -> Tensor:
        """What is on disk, (B, *stored_shape), to (B, *memory_shape) float32."""
        return self.numbers.from_disk(block, self.is_complex).reshape(len(block), *self.memory_shape)

    def mask_to_memory(self, block: np.ndarray) -> Tensor:
        """(B, ...) 0/1 to (B, 1 or C, H, W), or (B, 1, 1, H, W) for several coils, float32."""
        _, h, w = self.image_shape
        middle = (1, 1) if self.coils else (block.size // max(1, len(block) * h * w),)
        return torch.from_numpy(block.reshape(len(block), *middle, h, w).astype(np.float32))

    def check_mask_shape(self, shape: tuple[int, ...]) -> None:
        """InputError unless ``shape`` (without the sample axis) is one of the disk shapes of the table."""
        c, h, w = self.image_shape
        allowed = {(h, w), (1, h, w)}
        if self.operator != "mri" and not self.is_complex:
            allowed.add((c, h, w))
        if tuple(shape) not in allowed:
            want = " or ".join(str((1, *s)) for s in sorted(allowed))
            raise InputError(f"mask: expected shape {want}, the first axis 1 or N, got {(1, *shape)}")

    def check_coil_maps_shape(self, shape: tuple[int, ...]) -> None:
        """InputError unless coil maps (coils, H, W) match the measurements."""
        if self.coils is None:
            raise InputError(
                f"coil_maps: given, but {self.operator} measurements {self.stored_shape} have no coil axis"
            )
        want = (self.coils, *self.image_shape[1:])
        if tuple(shape) != want:
            raise InputError(f"coil_maps: expected {want} for each sample, got {tuple(shape)}")


#: Number of the first sample of a block, or the numbers of all.
Samples = int | np.ndarray


def _sample(samples: Samples, k: int) -> int:
    return samples + k if isinstance(samples, int) else int(samples[k])


def check_mask_values(mask: np.ndarray, first: Samples = 0) -> None:
    """InputError unless every mask of (B, ...) is 0/1 and keeps at least one row; it names the sample."""
    if not np.isin(mask, (0, 1)).all():
        bad = np.asarray(mask)[~np.isin(mask, (0, 1))].flat[0]
        raise InputError(f"mask: expected only 0 and 1, got {bad}")
    empty = np.flatnonzero(~mask.reshape(len(mask), -1).any(axis=1))
    if len(empty):
        raise InputError(
            f"mask: all zero for sample {_sample(first, int(empty[0]))}, nothing is measured there"
        )


def check_coil_map_values(maps: np.ndarray, first: Samples = 0) -> None:
    """InputError unless coil maps (B, coils, H, W) are finite and no sample's maps are all zero."""
    for k, sample in enumerate(maps):
        if not np.isfinite(sample).all():
            raise InputError(f"coil_maps: NaN or infinite values in sample {_sample(first, k)}")
        if not sample.any():
            raise InputError(f"coil_maps: all zero for sample {_sample(first, k)}")


def check_noise_std(noise_std: Any, num: int) -> np.ndarray:
    """Per-sample noise levels (num,) float32; InputError when absent, negative, not finite or of another
    length."""
    if noise_std is None:
        raise InputError("noise_std: absent; give the noise level per real channel (0 for noise-free data)")
    levels = to_numpy(noise_std, "noise_std").astype(np.float32)
    if levels.shape not in ((), (1,), (num,)):
        raise InputError(f"noise_std: expected one number or ({num},), got shape {levels.shape}")
    check_levels(levels)
    return np.broadcast_to(levels, (num,)).copy()


def check_levels(levels: np.ndarray) -> None:
    """InputError when a noise level is negative, not finite, or so large that its square is not."""
    good = (levels >= 0) & (levels <= LARGEST)
    if not good.all():
        bad = levels[~good].flat[0]
        most = f", of {LARGEST:g} at most" if np.isfinite(bad) and bad > 0 else ""
        raise InputError(f"noise_std: expected finite levels >= 0{most}, got {bad}")


def check_noise_map(noise_std: Any, num: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise levels that differ by entry, (1 or num, ...) float32: axes are 1 or those in memory.

    Raises:
        InputError: a shape that does not broadcast to measurements, or levels that are negative or not
            finite.
    """
    levels = to_numpy(noise_std, "noise_std").astype(np.float32)
    check_noise_map_shape(levels.shape, num, shape)
    check_levels(levels)
    return levels


def check_noise_map_shape(found: tuple[int, ...], num: int, shape: tuple[int, ...]) -> None:
    """InputError unless levels of this shape broadcast to ``num`` measurements of ``shape``."""
    fits = len(found) == len(shape) + 1 and found[0] in (1, num)
    if not fits or any(n not in (1, m) for n, m in zip(found[1:], shape, strict=True)):
        raise InputError(
            f"noise_std: expected one number, ({num},) or a level for each entry (1 or {num}, "
            f"{', '.join(map(str, shape))}), got shape {tuple(found)}"
        )


def check_values(y: Tensor, mask: Tensor | None, first: Samples = 0) -> None:
    """InputError when (B, ...) measurements hold NaN or infinities, or are non-zero where the mask is 0."""
    bad = ~torch.isfinite(y).flatten(1).all(1)
    if bad.any():
        k = int(bad.nonzero()[0, 0])
        raise InputError(f"measurements: NaN or infinite values in sample {_sample(first, k)}")
    if mask is None:
        return
    outside = (y.ne(0) & mask.eq(0)).flatten(1).sum(1)
    if outside.any():
        k = int(outside.nonzero()[0, 0])
        raise InputError(
            f"measurements: {int(outside[k])} non-zero values outside the mask in sample "
            f"{_sample(first, k)}; the mask contradicts the data"
        )
