"""Batches for training as a pure function of (seed, step).

The samples are visited in an endless stream of permutations, one an epoch. Permutation e depends on (seed, e)
alone and no state is kept, so a resumed run sees exactly the batches that the interrupted one would have
seen, and every sample is seen equally often. Of P processes with m parts a step each, part k of process r is
virtual rank v = r m + k of V = P m:

    batch (s, v) takes positions (s V + v) B to (s V + v + 1) B - 1 of the stream,

so that m GPUs with one part and one GPU with m parts read the same samples.

Data stay where they are read: small ones (`CACHE_BYTES`) are kept, and moved to the device as a whole; larger
ones stay on disk or in host memory, and batches are read ahead by threads and moved without waiting. Who
reads a batch changes no bit of it. (Threads and not processes: handing a batch of float32 to another process
costs more than reading it.)
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
from ambient_sci.data.layout import check_noise_map, check_noise_std
from ambient_sci.data.many_files import MeasurementFiles
from ambient_sci.data.prompts import Prompts
from ambient_sci.errors import InputError
from ambient_sci.priors.given import Prompt

#: Data that need less memory than this are read once and kept, on the device that trains.
CACHE_BYTES = 1 << 30


class Batch(NamedTuple):
    """``y = operator.A(x) + noise`` of B samples, its noise level, which samples they are, their classes,
    their prompts."""

    operator: Any
    y: Tensor
    sigma_y: Tensor
    indices: Tensor
    labels: Tensor | None = None
    prompts: Prompt | None = None


class MeasurementArrays:
    """Measurements in memory with the interface of ``MeasurementFile`` that training needs.

    Args:
        operator: RowMaskedOperator for all N samples (a mask of first axis 1 is shared).
        y: (N, ...) real.
        sigma_y: noise level per real channel, a float or (N,), or (1 or N, ...) for noise that differs by
            entry.
        subjects: of each sample.
        labels: class of each sample (N,), whole numbers.
        prompts: those of the samples.

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
        prompts: Prompts | None = None,
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
        if prompts is not None and len(prompts) != len(y):
            raise InputError(f"prompts: expected {len(y)}, one a sample, got {len(prompts)}")
        if np.ndim(sigma_y) < 2:
            levels = check_noise_std(sigma_y, len(y))
        else:
            levels = check_noise_map(sigma_y, len(y), tuple(y.shape[1:]))
        self._fill(operator, y, torch.from_numpy(levels), subjects, labels, prompts)

    def _fill(
        self, operator: Any, y: Tensor, levels: Tensor, subjects: Any, labels: Any, prompts: Prompts | None
    ) -> None:
        self._operator = operator
        self._y = y
        self._levels = levels.to(y.device, y.dtype)  # (N,), or (1 or N, ...) as given
        largest = self._levels if levels.ndim == 1 else self._levels.flatten(1).amax(1)
        #: noise level of each sample (N,), the largest of its entries where they differ
        self.noise_std = largest.expand(len(y)) if len(largest) == 1 else largest
        self._labels = None if labels is None else labels.to(y.device, torch.int64)
        self._prompts = None if prompts is None else prompts.to(y.device)
        self.operator_name: str = operator.name
        self.image_shape: tuple[int, ...] = tuple(operator.img_size)
        self.design = operator.design
        self.subjects = list(subjects) if subjects is not None else ["unknown"] * len(y)
        self.checksum: str | None = None

    @classmethod
    def read(cls, file: MeasurementFile | MeasurementFiles) -> MeasurementArrays:
        """All of a measurement file, whose values were checked when it was written or opened."""
        new = cls.__new__(cls)
        new._fill(
            file.operator(),
            file.measurements(),
            file.sigma(),
            file.subjects,
            file.labels(),
            file.all_prompts(),
        )
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
        """Bytes of measurements, noise levels, masks, maps and prompts."""
        tensors = [self._y, self._levels, *self._operator.buffers()]
        told = 0 if self._prompts is None else self._prompts.nbytes
        return told + sum(t.numel() * t.element_size() for t in tensors)

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

    @property
    def noise_by_entry(self) -> bool:
        """Whether noise differs by entry."""
        return self._levels.ndim > 1

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

    def prompts(self, indices: Any = None) -> Prompt | None:
        """The prompt of each sample, or None."""
        return None if self._prompts is None else self._prompts[self._rows(indices)]

    def to(self, device: torch.device | str) -> MeasurementArrays:
        """The same measurements on another device."""
        moved = MeasurementArrays.__new__(MeasurementArrays)
        moved.__dict__ = {**self.__dict__}
        for name in ("_y", "_levels", "noise_std", "_labels", "_prompts"):
            value = getattr(self, name)
            setattr(moved, name, value if value is None else value.to(device))
        moved._operator = self._operator.on_device(device)  # a copy: the caller's stays where it is
        return moved


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num)


class _Batches:
    """The stream of batches by number, key = step m + part."""

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
        return Batch(
            data.operator(rows),
            data.measurements(rows),
            data.sigma(rows),
            rows,
            data.labels(rows),
            data.prompts(rows),
        )


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
        workers: threads that read ahead, one batch each, data too large to be kept; 0 reads a batch when it
            is asked for.

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
        workers: int = 1,
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
        self._readers: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[Batch]] = {}  # batches that are being read

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
        return self._moved(self._read_ahead(key) if self.workers else self._load_here(key))

    def _read_ahead(self, key: int) -> Batch:
        """A batch, whose reading has begun if batches are asked for in order; that of the next ones
        begins."""
        self._readers = self._readers or ThreadPoolExecutor(
            self.workers, thread_name_prefix="measurement-loader"
        )
        ready = self._ahead.pop(key, None)
        following = range(key + 1, key + 1 + self.workers)
        for stale in self._ahead.keys() - set(following):
            self._ahead.pop(stale).cancel()
        for other in following:
            if other not in self._ahead:
                self._ahead[other] = self._readers.submit(self._load_here, other)
        return self._load_here(key) if ready is None else ready.result()

    def _load_here(self, key: int) -> Batch:
        batch = self._batches.load(key)
        if not self._pinned:
            return batch
        return Batch(*(t if t is None else t.pin_memory() for t in batch))

    def _moved(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        y, sigma, labels = (
            t if t is None else t.to(self.device, non_blocking=True)
            for t in (batch.y, batch.sigma_y, batch.labels)
        )
        assert y is not None and sigma is not None
        told = None if batch.prompts is None else batch.prompts.to(self.device, non_blocking=True)
        return Batch(batch.operator.on_device(self.device), y, sigma, batch.indices, labels, told)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
        self._readers = None
        self._ahead.clear()
