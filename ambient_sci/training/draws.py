"""The posterior draws of an E-step on disk: one image for each measurement, filled batch by batch by any
number of processes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


class Draws:
    """One image for each measurement in a memory-mapped file, filled batch by batch, with a marker file for
    each complete batch.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], accelerator: Accelerator) -> None:
        self._markers = path / "drawn"
        file = path / "draws.npy"
        if accelerator.is_main_process and not file.exists():
            self._markers.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            np.lib.format.open_memmap(part, "w+", np.float32, shape).flush()
            os.replace(part, file)
        accelerator.wait_for_everyone()
        self._array = np.lib.format.open_memmap(file, "r+")

    def has(self, batch: int) -> bool:
        """Whether this batch is complete."""
        return (self._markers / str(batch)).exists()

    def add(self, batch: int, rows: Tensor, images: Tensor) -> None:
        """Write a batch, then its marker."""
        self._array[rows.numpy()] = images.float().cpu().numpy()
        self._array.flush()
        (self._markers / str(batch)).touch()

    @property
    def images(self) -> Tensor:
        """All draws, read from disk where they are looked at."""
        return torch.from_numpy(self._array)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete what an E-step has left in a lap's folder."""
        (path / "draws.npy").unlink(missing_ok=True)
        shutil.rmtree(path / "drawn", ignore_errors=True)
