"""Batches for training as a pure function of (seed, step).

The samples are visited in an endless stream of permutations, one an epoch; step s takes positions s B to (s +
1) B - 1 of it. Permutation e depends on (seed, e) alone and no state is kept, so a resumed run sees exactly
the batches that the interrupted one would have seen, and every sample is seen equally often.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.files import MeasurementFile
from ambient_sci.data.layout import check_noise_std
from ambient_sci.errors import InputError

#: Files that need less memory than this are read once and kept.
CACHE_BYTES = 1 << 30


class Batch(NamedTuple):
    """``y = operator.A(x) + noise`` of B samples, its noise level and which samples they are."""

    operator: Any
    y: Tensor
    sigma_y: Tensor
    indices: Tensor


class MeasurementArrays:
    """Measurements in memory with the interface of ``MeasurementFile`` that training needs.

    operator: RowMaskedOperator for all N samples (a mask of first axis 1 is shared); y: (N, ...) float32;
    sigma_y: float or (N,), per real channel.

    Raises: InputError when y is not finite, does not fit the operator, or the noise level is negative or of
    another length.
    """

    def __init__(
        self, operator: Any, y: Tensor, sigma_y: float | Tensor, subjects: Sequence[str] | None = None
    ):
        if not torch.is_tensor(y) or y.ndim < 2 or len(y) == 0 or y.is_complex():
            raise InputError("measurements: expected a real tensor (N, ...), complex numbers as two channels")
        if not torch.isfinite(y).all():
            raise InputError("measurements: NaN or infinite values")
        operator.A_adjoint(y[:1] if operator.batch_size == 1 else y)  # the operator refuses what does not fit
        self._operator = operator
        self._y = y
        self.noise_std = torch.from_numpy(check_noise_std(sigma_y, len(y))).to(y.device, y.dtype)
        self.operator_name: str = operator.name
        self.image_shape: tuple[int, ...] = tuple(operator.img_size)
        self.design = operator.design
        self.subjects = list(subjects) if subjects is not None else ["unknown"] * len(y)

    @classmethod
    def read(cls, file: MeasurementFile) -> MeasurementArrays:
        """All of a measurement file."""
        return cls(file.operator(), file.measurements(), file.noise_std, file.subjects)

    def __len__(self) -> int:
        return len(self._y)

    def _rows(self, indices: Any) -> Any:
        return slice(None) if indices is None else torch.as_tensor(indices, device=self._y.device).reshape(-1)

    def operator(self, indices: Any = None) -> Any:
        """The operator of these samples."""
        return self._operator if indices is None else self._operator[self._rows(indices)]

    def measurements(self, indices: Any = None) -> Tensor:
        """y (B, ...)."""
        return self._y[self._rows(indices)]

    def sigma(self, indices: Any = None) -> Tensor:
        """Noise level per real channel, (B,)."""
        return self.noise_std[self._rows(indices)]

    def to(self, device: torch.device | str) -> MeasurementArrays:
        """The same measurements on another device."""
        moved = MeasurementArrays.__new__(MeasurementArrays)
        moved.__dict__ = {**self.__dict__, "_y": self._y.to(device), "noise_std": self.noise_std.to(device)}
        # Indexing copies the module, so that the caller's operator stays where it is.
        moved._operator = self._operator[:].to(device)
        return moved


class MeasurementLoader:
    """Batches by step number.

    Args:
        data: a MeasurementFile (kept in memory when small, ``CACHE_BYTES``) or MeasurementArrays.
        batch_size: samples of a batch, of this process.
        seed: fixes every batch.
        samples: the samples to use (default: all), e.g. those of the training subjects.
        rank, num_processes: this process's share of each global batch of ``batch_size * num_processes``
        samples. device: where batches go.
    """

    def __init__(
        self,
        data: MeasurementFile | MeasurementArrays,
        batch_size: int,
        seed: int,
        samples: Sequence[int] | None = None,
        rank: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
    ):
        if batch_size < 1:
            raise InputError(f"batch size: expected at least 1, got {batch_size}")
        self.samples = np.arange(len(data)) if samples is None else np.asarray(samples, dtype=np.int64)
        if len(self.samples) == 0:
            raise InputError("loader: no sample is left to train on")
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self._rank, self._num_processes = rank, num_processes
        self._next: tuple[int, Future[Batch]] | None = None
        self._reader: ThreadPoolExecutor | None = None
        if isinstance(data, MeasurementFile) and data.nbytes < CACHE_BYTES:
            data = MeasurementArrays.read(data)
        if isinstance(data, MeasurementArrays):
            data = data.to(self.device)
        else:  # a large file: one thread reads the next batch while this one is trained on
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="measurement-loader")
        self.data = data
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))

    def indices(self, step: int) -> Tensor:
        """Sample numbers (B,) of a step, a pure function of (seed, step)."""
        first = (step * self._num_processes + self._rank) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), len(self.samples))
        chosen = [self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)]
        return torch.from_numpy(self.samples[chosen])

    def epoch(self, step: int) -> float:
        """Passes over the data completed before a step."""
        return step * self.batch_size * self._num_processes / len(self.samples)

    def _load(self, step: int) -> Batch:
        rows = self.indices(step)
        y, sigma_y = self.data.measurements(rows), self.data.sigma(rows)
        operator = self.data.operator(rows)
        if isinstance(self.data, MeasurementFile):
            y, sigma_y, operator = y.to(self.device), sigma_y.to(self.device), operator.to(self.device)
        return Batch(operator, y, sigma_y, rows)

    def batch(self, step: int) -> Batch:
        """The batch of a step. Asking for steps in order lets a large file be read ahead; any order gives the
        same."""
        if self._reader is None:
            return self._load(step)
        ahead = self._next
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self._load(step)
        self._next = (step + 1, self._reader.submit(self._load, step + 1))
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
