r"""Features of many images, batch by batch, on disk: kept under a hash of the data, the extractor and the
preparation, and resumable.

A cache is a folder. ``KEY.npy`` holds finished features, ``KEY.json`` says what they are of, ``KEY.sums`` has
a checksum of each row; ``KEY.part`` grows by whole batches, and an interrupted run goes on where it ended.
What does not fit its checksum is computed anew while it is a part, and refused afterwards. The key is the
SHA-256 of the pixels, of what identifies the extractor (weights and preparation), and of the number type:
change any, and features are computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data import ReferenceFile
from ambient_sci.data.checksums import row_checksums
from ambient_sci.errors import InputError
from ambient_sci.evaluation.extractors import Extractor, Range, get_extractor, natural_range
from ambient_sci.progress import track
from ambient_sci.sampling.parts import Parts, process_share
from ambient_sci.whole_files import whole_file, write_json

Images = Tensor | np.ndarray | ReferenceFile | str | os.PathLike[str]
Number = Literal["float16", "float32"]
BLOCK = 1024
#: What numpy raises for the header of a damaged .npy.
DAMAGE = (ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError)
#: A warning is given where more than this share of the values lies outside the range by more than that part
#: of it.
CLIPPED_WORTH_SAYING, CLIPPED_BY = 0.01, 0.05


def features_of(
    images: Images,
    extractor: str | Extractor | Callable[[Tensor], Tensor],
    cache: str | os.PathLike[str] | None = None,
    *,
    value_range: Range | None = None,
    dtype: Number = "float32",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> np.memmap:
    """Features of every image, (N, d), as a read-only memory map.

    Args:
        images: (N, C, H, W), or a file of images (`ReferenceFile` or its path), which is read batch by batch.
        extractor: see `get_extractor`.
        cache: folder to keep features in and to resume from; None: a temporary file that goes with the memory
            map.
        value_range: what black and white are, for extractors that see 8-bit RGB; default: `natural_range` of
            the first images. Give it where sets are compared that might be told apart by it.
        dtype: "float32", or "float16" for half the disk and a rounding of 5e-4 of each value.
        batch_size: images at a time.
        device: where the network computes.
        progress: show a progress bar.

    Raises:
        InputError: no images, an unknown extractor, a function without fingerprint and a cache, features that
            are not (B, d) or not finite, or features that another process is computing.
    """
    if dtype not in ("float16", "float32") or batch_size < 1:
        raise InputError(
            f"features: expected float16 or float32 and batch_size >= 1, got {dtype!r} and {batch_size}"
        )
    with _opened(images) as source:
        found = get_extractor(extractor).to(device)
        if found.rgb and value_range is None:
            value_range = natural_range(source(0, min(len(source), BLOCK)))
        if value_range is not None and not value_range[0] < value_range[1]:
            raise InputError(f"features: expected a range low < high, got {value_range}")
        work = _Work(
            source, found, value_range if found.rgb else None, np.dtype(dtype), batch_size, device, progress
        )
        if cache is None:
            with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as sums:
                work.fill(file, sums)
                return _mapped(file)
        return _cached(work, Path(cache))


def share_features(
    images: str | os.PathLike[str],
    extractor: str | Extractor,
    cache: str | os.PathLike[str],
    *,
    value_range: Range | None = None,
    dtype: Number = "float32",
    batch_size: int = 64,
    images_at_once: int = 1024,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> np.memmap:
    """`features_of` a file, by all processes of one ``torchrun`` together.

    Interrupted, it goes on where it was; by one process it is `features_of`.

    Args:
        images: the file of images.
        extractor, cache, value_range, dtype, batch_size, progress: see `features_of`.
        images_at_once: images of one part: what an interruption can lose, and what is shared out.
        device: where this process computes.

    Raises:
        InputError: as `features_of`.
    """
    device = torch.device(device)
    settings: dict[str, Any] = {"value_range": value_range, "dtype": dtype, "batch_size": batch_size}
    if process_share(device)[1] > 1:
        with _opened(images) as source:
            found = get_extractor(extractor).to(device)
            if found.rgb and value_range is None:
                value_range = natural_range(source(0, min(len(source), BLOCK)))
                settings["value_range"] = value_range
            kept_range = value_range if found.rgb else None
            work = _Work(source, found, kept_range, np.dtype(dtype), batch_size, device, False)
            _by_parts(work, Path(cache), images_at_once, device, progress)
    return features_of(images, extractor, cache, device=device, progress=progress, **settings)


def _by_parts(work: _Work, folder: Path, images_at_once: int, device: torch.device, progress: bool) -> None:
    """Fill the cache from parts that the processes share."""
    whole, description = _place(work, folder)
    if whole.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(work.source), images_at_once)
    with Parts(whole, whole.stem[:12], len(starts), device, ".npy") as parts:
        missing = parts.missing(lambda p: contextlib.nullcontext(np.load(p, mmap_mode="r")))
        for k in track(missing, f"features ({work.extractor.name})", enabled=progress and parts.main):
            block = work.rows(starts[k], min(starts[k] + images_at_once, len(work.source)))
            with whole_file(parts.paths[k]) as part, part.open("wb") as file:
                np.save(file, block)
        parts.wait()
        if parts.main:
            with whole_file(whole) as part, part.open("wb") as file:
                for k, path in enumerate(parts.paths):
                    block = np.load(path, mmap_mode="r")
                    if k == 0:
                        work.write_header(file, block.shape[1])
                    file.write(block.tobytes())
            write_json(whole.with_suffix(".json"), description)
            parts.remove()
        parts.wait()


class _Source:
    """Images in memory or in a file, as blocks (B, C, H, W)."""

    def __init__(self, read: Callable[[int, int], Tensor], count: int) -> None:
        self.read, self.count = read, count

    def __len__(self) -> int:
        return self.count

    def __call__(self, start: int, stop: int) -> Tensor:
        block = self.read(start, stop)
        return block if block.is_floating_point() else block.float()

    def fingerprint(self) -> str:
        """Hash of the pixels as float32, whatever they are stored in."""
        digest = hashlib.sha256()
        for start in range(0, len(self), BLOCK):
            block = self(start, min(start + BLOCK, len(self))).detach().cpu().float().contiguous()
            digest.update(f"{tuple(block.shape)}".encode())
            digest.update(block.numpy().tobytes())
        return digest.hexdigest()


@contextlib.contextmanager
def _opened(images: Images) -> Iterator[_Source]:
    if isinstance(images, (str, os.PathLike)):
        with ReferenceFile(images) as file:
            yield _Source(lambda a, b: file.images(slice(a, b)), len(file))
    elif isinstance(images, ReferenceFile):
        yield _Source(lambda a, b: images.images(slice(a, b)), len(images))
    else:
        x = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0 or x.is_complex():
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"features: expected real images (N, C, H, W), N >= 1, or a file of them, got {got}"
            )
        yield _Source(lambda a, b: x[a:b], len(x))


class _Work:
    """Features of a source, appended to a file as a .npy array whose size says how far it is."""

    def __init__(
        self,
        source: _Source,
        extractor: Extractor,
        value_range: Range | None,
        dtype: np.dtype,
        batch_size: int,
        device: str | torch.device,
        progress: bool,
    ) -> None:
        self.source, self.extractor, self.value_range, self.dtype = source, extractor, value_range, dtype
        self.batch_size, self.device, self.progress = batch_size, device, progress

    def description(self) -> dict[str, Any]:
        """What decides the features."""
        return {
            "images": len(self.source),
            "images_sha256": self.source.fingerprint(),
            "extractor": self.extractor.name,
            "fingerprint": self.extractor.fingerprint,
            "value_range": self.value_range,
            "dtype": self.dtype.name,
        }

    def fill(self, file: IO[bytes], sums: IO[bytes]) -> None:
        """Append what is missing, and a checksum of each row."""
        done = self._done(file, sums)
        starts = range(done, len(self.source), self.batch_size)
        clipped = entries = 0
        for start in track(starts, f"features ({self.extractor.name})", enabled=self.progress):
            images = self.source(start, min(start + self.batch_size, len(self.source)))
            if self.value_range is not None and images.shape[1] != 2:
                slack = CLIPPED_BY * (self.value_range[1] - self.value_range[0])
                outside = (images < self.value_range[0] - slack) | (images > self.value_range[1] + slack)
                clipped, entries = clipped + int(outside.sum()), entries + images.numel()
            block = self._features(images, start)
            if start == 0:
                self.write_header(file, block.shape[1])
            file.write(block.tobytes())
            sums.write(row_checksums(block).tobytes())
        file.flush()
        sums.flush()
        if clipped > CLIPPED_WORTH_SAYING * max(entries, 1):
            warnings.warn(
                f"features ({self.extractor.name}): {clipped / entries:.1%} of the values lay well outside "
                f"{self.value_range} "
                "and were clipped",
                stacklevel=4,
            )

    def write_header(self, file: IO[bytes], dim: int) -> None:
        """Begin the .npy file of all features, ``dim`` each."""
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (len(self.source), dim)}
        np.lib.format.write_array_header_1_0(file, header)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Features of some images."""
        starts = range(start, stop, self.batch_size)
        blocks = [self._features(self.source(a, min(a + self.batch_size, stop)), a) for a in starts]
        return np.concatenate(blocks)

    def _features(self, images: Tensor, start: int) -> np.ndarray:
        found = self.extractor(images.to(self.device), self.value_range)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"{self.extractor.name}: expected features ({len(images)}, d), got {got}")
        with np.errstate(over="ignore"):
            block = found.detach().cpu().float().numpy().astype(self.dtype)
        if not np.isfinite(block).all():
            raise InputError(
                f"{self.extractor.name}: expected finite features that fit {self.dtype.name}, got others "
                f"in images {start} "
                f"to {start + len(images) - 1}"
            )
        return block

    def _done(self, file: IO[bytes], sums: IO[bytes]) -> int:
        """Images whose features are in ``file``, which is cut back to whole batches of undamaged ones, as are
        their checksums; both are left open at their ends."""
        file.seek(0)
        sums.seek(0)
        count, dim = self._header(file)
        begin, row = file.tell(), dim * self.dtype.itemsize
        text = sums.read()
        known = np.frombuffer(text[: len(text) // 8 * 8], np.uint64)
        rows = min((file.seek(0, os.SEEK_END) - begin) // row, len(known), len(self.source))
        done = rows if rows == len(self.source) else rows - rows % self.batch_size
        file.seek(begin)
        for start in range(0, done, self.batch_size):
            some = min(self.batch_size, done - start)
            block = np.frombuffer(file.read(some * row), self.dtype).reshape(some, dim)
            if not np.array_equal(row_checksums(block), known[start : start + some]):
                done = start
                break
        if count != len(self.source) or done <= 0:
            done, begin = 0, 0
        file.truncate(begin + done * row)
        sums.truncate(8 * done)
        file.seek(0, os.SEEK_END)
        sums.seek(0, os.SEEK_END)
        return done

    def _header(self, file: IO[bytes]) -> tuple[int, int]:
        """Images and numbers for each that a part says it is of; no image where it is not one of ours."""
        try:
            np.lib.format.read_magic(file)
            (count, dim), order, dtype = np.lib.format.read_array_header_1_0(file)
        except DAMAGE:
            return 0, 1
        return (count, dim) if dim > 0 and not order and dtype == self.dtype else (0, 1)


def _place(work: _Work, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of finished features in a cache, and what they are of."""
    if not work.extractor.fingerprint:
        raise InputError(
            f"features: {work.extractor.name!r} expected a fingerprint to be kept in a cache; give "
            "Extractor(name, function, fingerprint), or no cache"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: expected a folder for features, got a file")
    description = work.description()
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]
    return folder / f"{key}.npy", description


def _cached(work: _Work, folder: Path) -> np.memmap:
    whole, description = _place(work, folder)
    part = whole.with_suffix(".part")
    if whole.exists():
        return _read(whole, len(work.source), work.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with open(part, "a+b") as file, open(whole.with_suffix(".sums"), "a+b") as sums:
        _lock(file, part)
        if whole.exists():  # by a process that held the lock until just now
            part.unlink()
        else:
            work.fill(file, sums)
            os.fsync(file.fileno())
            os.fsync(sums.fileno())
            write_json(whole.with_suffix(".json"), description)
            os.replace(part, whole)
    return _read(whole, len(work.source), work.dtype)


def _lock(file: IO[bytes], path: Path) -> None:
    """Hold the file against other processes until it is closed, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(
            f"{path}: expected features that nobody is computing, got a file in use; try again later"
        ) from None


def _read(path: Path, count: int, dtype: np.dtype) -> np.memmap:
    """Finished features, compared with their checksums; those of earlier versions have none."""
    again = "delete it and try again"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        sums = path.with_suffix(".sums")
        known = np.frombuffer(sums.read_bytes(), np.uint64) if sums.exists() else None
    except (OSError, *DAMAGE) as error:
        raise InputError(
            f"{path}: expected features, got a damaged file ({' '.join(str(error).split())}); {again}"
        ) from None
    if found.ndim != 2 or len(found) != count or found.dtype != dtype or not found.flags.c_contiguous:
        raise InputError(
            f"{path}: expected {dtype} features of {count} images, got {found.dtype} {found.shape}; {again}"
        )
    if path.stat().st_size != found.offset + found.nbytes:
        raise InputError(f"{path}: expected features of {found.nbytes} bytes, got another size; {again}")
    for start in range(0, count if known is not None else 0, BLOCK):
        rows = slice(start, start + BLOCK)
        if known is not None and not np.array_equal(row_checksums(found[rows]), known[rows]):
            raise InputError(
                f"{path}: expected the features that were computed, got others (their checksums differ): the "
                f"file is damaged; {again}"
            )
    return found


def _mapped(file: IO[bytes]) -> np.memmap:
    file.seek(0)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
