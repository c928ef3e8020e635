"""The posterior draws of an E-step on disk: one image for each measurement, filled batch by batch by any
number of processes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor

from ambient_sci.whole_files import whole_file, write_text


class Draws:
    """One image for each measurement in a memory-mapped file, filled batch by batch, with a marker file for
    each complete batch, which holds a checksum of it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], accelerator: Accelerator) -> None:
        self._markers = path / "drawn"
        file = path / "draws.npy"
        if accelerator.is_main_process and not file.exists():
            self._markers.mkdir(parents=True, exist_ok=True)
            header = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": shape}
            with whole_file(file) as part, part.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, header)
                out.flush()
                # Writing to mapped memory that a full disk has no place for would kill the process.
                os.posix_fallocate(out.fileno(), out.tell(), 4 * int(np.prod(shape)))
        accelerator.wait_for_everyone()
        self._array = np.lib.format.open_memmap(file, "r+")

    def has(self, batch: int, rows: Tensor) -> bool:
        """Whether this batch is complete, and what was written; markers of earlier versions are empty."""
        marker = self._markers / str(batch)
        return marker.exists() and marker.read_text(errors="replace") in ("", self._checksum(rows))

    def add(self, batch: int, rows: Tensor, images: Tensor) -> None:
        """Write a batch, then its marker."""
        self._array[rows.numpy()] = images.float().cpu().numpy()
        self._array.flush()
        write_text(self._markers / str(batch), self._checksum(rows))

    def _checksum(self, rows: Tensor) -> str:
        return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(self._array[rows.numpy()]))

    @property
    def images(self) -> Tensor:
        """All draws, read from disk where they are looked at."""
        return torch.from_numpy(self._array)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete what an E-step has left in a lap's folder."""
        (path / "draws.npy").unlink(missing_ok=True)
        shutil.rmtree(path / "drawn", ignore_errors=True)
