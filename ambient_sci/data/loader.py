"""Batches for training as a pure function of (seed, step).

The samples are visited in an endless stream of permutations, one an epoch. Permutation e depends on (seed, e)
alone and no state is kept, so a resumed run sees exactly the batches that the interrupted one would have
seen, and every sample is seen equally often. Of P processes with m parts a step each, part k of process r is
virtual rank v = r m + k of V = P m:

    batch (s, v) takes positions (s V + v) B to (s V + v + 1) B - 1 of the stream,

so that m GPUs with one part and one GPU with m parts read the same samples.

Data stay where they are read: small ones (`CACHE_BYTES`) are kept, and moved to the device as a whole; larger
ones stay on disk or in host memory, and batches are read ahead, by a thread or by worker processes, and moved
without waiting. Who reads a batch changes no bit of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ambient_sci.data.files import MeasurementFile
from ambient_sci.data.hdf5_file import one_line
from ambient_sci.data.layout import check_noise_map, check_noise_std
from ambient_sci.data.many_files import MeasurementFiles
from ambient_sci.errors import InputError

#: Data that need less memory than this are read once and kept, on the device that trains.
CACHE_BYTES = 1 << 30


class Batch(NamedTuple):
    """``y = operator.A(x) + noise`` of B samples, its noise level, which samples they are, their classes."""

    operator: Any
    y: Tensor
    sigma_y: Tensor
    indices: Tensor
    labels: Tensor | None = None


class MeasurementArrays:
    """Measurements in memory with the interface of ``MeasurementFile`` that training needs.

    Args:
        operator: RowMaskedOperator for all N samples (a mask of first axis 1 is shared).
        y: (N, ...) real.
        sigma_y: noise level per real channel, a float or (N,), or (1 or N, ...) for noise that differs by
            entry.
        subjects: of each sample.
        labels: class of each sample (N,), whole numbers.

    Raises:
        InputError: y is not finite, does not fit the operator, or the noise level is negative or of another
            length.
    """

    def __init__(
        self,
        operator: Any,
        y: Tensor,
        sigma_y: float | Tensor,
        subjects: Sequence[str] | None = None,
        labels: Tensor | None = None,
    ):
        if not torch.is_tensor(y) or y.ndim < 2 or len(y) == 0 or y.is_complex():
            raise InputError("measurements: expected a real tensor (N, ...), complex numbers as two channels")
        if not torch.isfinite(y).all():
            raise InputError("measurements: NaN or infinite values")
        operator.A_adjoint(y[:1] if operator.batch_size == 1 else y)  # the operator refuses what does not fit
        if labels is not None and (labels.is_floating_point() or labels.shape != (len(y),)):
            raise InputError(
                f"labels: expected {len(y)} whole numbers, got {labels.dtype} {tuple(labels.shape)}"
            )
        if np.ndim(sigma_y) < 2:
            levels = check_noise_std(sigma_y, len(y))
        else:
            levels = check_noise_map(sigma_y, len(y), tuple(y.shape[1:]))
        self._fill(operator, y, torch.from_numpy(levels), subjects, labels)

    def _fill(self, operator: Any, y: Tensor, levels: Tensor, subjects: Any, labels: Any) -> None:
        self._operator = operator
        self._y = y
        self._levels = levels.to(y.device, y.dtype)  # (N,), or (1 or N, ...) as given
        largest = self._levels if levels.ndim == 1 else self._levels.flatten(1).amax(1)
        #: noise level of each sample (N,), the largest of its entries where they differ
        self.noise_std = largest.expand(len(y)) if len(largest) == 1 else largest
        self._labels = None if labels is None else labels.to(y.device, torch.int64)
        self.operator_name: str = operator.name
        self.image_shape: tuple[int, ...] = tuple(operator.img_size)
        self.design = operator.design
        self.subjects = list(subjects) if subjects is not None else ["unknown"] * len(y)
        self.checksum: str | None = None

    @classmethod
    def read(cls, file: MeasurementFile | MeasurementFiles) -> MeasurementArrays:
        """All of a measurement file, whose values were checked when it was written or opened."""
        new = cls.__new__(cls)
        new._fill(file.operator(), file.measurements(), file.sigma(), file.subjects, file.labels())
        new.checksum = file.checksum
        return new

    def __len__(self) -> int:
        return len(self._y)

    @property
    def shared_mask(self) -> bool:
        """True when one mask serves every sample."""
        return self._operator.mask.shape[0] == 1

    @property
    def nbytes(self) -> int:
        """Bytes of measurements, noise levels, masks and maps."""
        tensors = [self._y, self._levels, *self._operator.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _rows(self, indices: Any) -> Any:
        return slice(None) if indices is None else torch.as_tensor(indices, device=self._y.device).reshape(-1)

    def operator(self, indices: Any = None) -> Any:
        """The operator of these samples."""
        if indices is None:
            return self._operator
        taken, host = self._operator[self._rows(indices)], self._operator._host_mask
        if host is not None and len(host) > 1:
            host = host[torch.as_tensor(indices, device="cpu").reshape(-1)]
        taken._host_mask = host
        return taken

    def measurements(self, indices: Any = None) -> Tensor:
        """y (B, ...)."""
        return self._y[self._rows(indices)]

    def sigma(self, indices: Any = None) -> Tensor:
        """Noise level per real channel: (B,), or of the shape of y where it differs by entry."""
        if self._levels.ndim == 1:
            return self._levels[self._rows(indices)]
        count = len(self) if indices is None else len(self._rows(indices))
        levels = self._levels if len(self._levels) == 1 else self._levels[self._rows(indices)]
        return levels.expand(count, *self._y.shape[1:])

    def labels(self, indices: Any = None) -> Tensor | None:
        """Class of each sample (B,) int64, or None."""
        return None if self._labels is None else self._labels[self._rows(indices)]

    def to(self, device: torch.device | str) -> MeasurementArrays:
        """The same measurements on another device."""
        moved = MeasurementArrays.__new__(MeasurementArrays)
        moved.__dict__ = {**self.__dict__}
        for name in ("_y", "_levels", "noise_std", "_labels"):
            value = getattr(self, name)
            setattr(moved, name, value if value is None else value.to(device))
        moved._operator = self._operator.on_device(device)  # a copy: the caller's stays where it is
        return moved


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num)


class _Batches(Dataset):
    """The stream of batches by number, key = step m + part; a worker process holds a copy of it."""

    def __init__(
        self,
        data: Any,
        samples: np.ndarray,
        batch_size: int,
        seed: int,
        rank: int,
        processes: int,
        parts: int,
    ):
        self.data, self.samples, self.batch_size, self.seed = data, samples, batch_size, seed
        self.rank, self.processes, self.parts = rank, processes, parts

    def indices(self, key: int) -> Tensor:
        step, part = divmod(key, self.parts)
        virtual = self.rank * self.parts + part
        first = (step * self.processes * self.parts + virtual) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), len(self.samples))
        chosen = [
            _permutation(self.seed, int(e), len(self.samples))[p] for e, p in zip(epochs, places, strict=True)
        ]
        return torch.from_numpy(self.samples[chosen])

    def load(self, key: int) -> Batch:
        rows = self.indices(key)
        data = self.data
        return Batch(data.operator(rows), data.measurements(rows), data.sigma(rows), rows, data.labels(rows))

    def __getitem__(self, key: int) -> Batch | InputError:
        try:  # a worker hands the error over as it is: what DataLoader makes of one has many lines
            return self.load(key)
        except InputError as error:
            return error


class _From:
    """All numbers from ``first`` on."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def _as_it_is(batch: Any) -> Any:
    return batch


class MeasurementLoader:
    """Batches by step number.

    Args:
        data: measurements. Small ones (``CACHE_BYTES``) are kept in memory, on ``device``; larger ones are
            read batch by batch.
        batch_size: samples of a batch, of one part of this process.
        seed: fixes every batch.
        samples: the samples to use (default: all), e.g. those of the training subjects.
        rank: this process's number.
        num_processes: processes that share each step's ``batch_size * num_processes * parts`` samples.
        device: where batches go.
        parts: batches of a step of this process (micro-batches); see the equation of the module.
        workers: processes that read data too large to be kept; batch k is read by worker k mod workers. With
            0 a thread of this process reads one batch ahead.

    Raises:
        InputError: a batch size, number of parts or of workers that is none, or no sample.
    """

    def __init__(
        self,
        data: MeasurementFile | MeasurementFiles | MeasurementArrays,
        batch_size: int,
        seed: int,
        samples: Sequence[int] | None = None,
        rank: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
        parts: int = 1,
        workers: int = 0,
    ):
        if batch_size < 1:
            raise InputError(f"batch size: expected at least 1, got {batch_size}")
        if parts < 1 or workers < 0:
            raise InputError(f"loader: expected parts >= 1 and workers >= 0, got {parts} and {workers}")
        self.samples = np.arange(len(data)) if samples is None else np.asarray(samples, dtype=np.int64)
        if len(self.samples) == 0:
            raise InputError("loader: no sample is left to train on")
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.parts, self.workers = parts, workers
        self._num_processes = num_processes
        if not isinstance(data, MeasurementArrays) and data.nbytes < CACHE_BYTES:
            data = MeasurementArrays.read(data)
        self._resident = isinstance(data, MeasurementArrays) and data.nbytes < CACHE_BYTES
        if self._resident:
            assert isinstance(data, MeasurementArrays)
            data = data.to(self.device)
        self.data = data
        self._batches = _Batches(data, self.samples, batch_size, seed, rank, num_processes, parts)
        self._pinned = self.device.type == "cuda"
        self._last = -2  # key that was asked for last
        self._expected: int | None = None  # key that the workers or the thread deliver next
        self._stream: Iterator[Any] | None = None
        self._ahead: Future[Batch] | None = None
        self._reader: ThreadPoolExecutor | None = None

    def indices(self, step: int, part: int = 0) -> Tensor:
        """Sample numbers (B,) of a part of a step, a pure function of (seed, step, part)."""
        return self._batches.indices(self._key(step, part))

    def epoch(self, step: int) -> float:
        """Passes over the data completed before a step."""
        return step * self.batch_size * self._num_processes * self.parts / len(self.samples)

    def _key(self, step: int, part: int) -> int:
        if not 0 <= part < self.parts:
            raise InputError(f"loader: expected a part from 0 to {self.parts - 1}, got {part}")
        return step * self.parts + part

    def batch(self, step: int, part: int = 0) -> Batch:
        """The batch of a part of a step.

        Asking for parts and steps in order lets large data be read ahead; any order gives the same batches.
        """
        key = self._key(step, part)
        if self._resident:
            return self._batches.load(key)
        batch = self._from_workers(key) if self.workers else self._from_thread(key)
        self._last = key
        return self._moved(batch)

    def _from_thread(self, key: int) -> Batch:
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="measurement-loader")
        ready = self._ahead is not None and self._expected == key
        batch = self._ahead.result() if ready and self._ahead is not None else self._load_here(key)
        self._expected, self._ahead = key + 1, self._reader.submit(self._load_here, key + 1)
        return batch

    def _load_here(self, key: int) -> Batch:
        batch = self._batches.load(key)
        if not self._pinned:
            return batch
        return Batch(*(t if t is None else t.pin_memory() for t in batch))

    def _from_workers(self, key: int) -> Batch:
        if self._stream is None or (key != self._expected and key == self._last + 1):
            self._start(key)
        if key != self._expected:  # out of order: the workers go on with what they are at
            return self._batches.load(key)
        assert self._stream is not None
        self._expected = key + 1
        try:
            batch = next(self._stream)
        except RuntimeError as error:
            raise InputError(f"loader: a worker process ended ({one_line(error)})") from None
        if isinstance(batch, InputError):
            raise batch
        return batch

    def _start(self, key: int) -> None:
        """Worker processes that read from batch ``key`` on, round and round."""
        if not isinstance(self.data, MeasurementArrays):
            self.data.close()  # a process opens its own handle, and inherits none
        self._stream = iter(
            DataLoader(
                self._batches,
                sampler=_From(key),  # pyright: ignore[reportArgumentType] - endless, so without a length
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                pin_memory=self._pinned,
                generator=torch.Generator(),  # or the global one would move
            )
        )
        self._expected = key

    def _moved(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        y, sigma, labels = (
            t if t is None else t.to(self.device, non_blocking=True)
            for t in (batch.y, batch.sigma_y, batch.labels)
        )
        assert y is not None and sigma is not None
        return Batch(batch.operator.on_device(self.device), y, sigma, batch.indices, labels)

    def close(self) -> None:
        """Stop reading ahead."""
        self._stream = self._expected = None
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = self._ahead = None
