r"""What a reconstruction is: posterior mean, standard deviation and samples, in memory (`Reconstruction`) and
on disk (`ResultFile`).

Mean and standard deviation are running ones (Welford), so a file holds as many samples as wanted at the
memory of one batch:

    mean_k = mean_{k-1} + (x_k - mean_{k-1}) / k,      M_k = M_{k-1} + (x_k - mean_{k-1})(x_k - mean_k),
    std = sqrt(M_S / (S - 1))
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.whole_files import Part, check_output

FORMAT = "ambient_sci reconstruction 1"


@dataclass
class Reconstruction:
    """Posterior samples and what follows from them.

    Attributes:
        mean: (B, C, H, W).
        std: (B, C, H, W) with S - 1 in the denominator; zero for a single sample or a point estimate.
        samples: (S, B, C, H, W).
        report: how it was made and how well the solves went; JSON types.
        subjects: who each image is of, if known.
        scale: factor that was divided out of the data, one or one for each image; multiply to get the
            original units.
        geometry: where the images lie in the volumes they come from, as in the measurement file; empty if
            that is not known.
    """

    mean: Tensor
    std: Tensor
    samples: Tensor
    report: dict[str, Any] = field(default_factory=dict)
    subjects: list[str] = field(default_factory=list)
    scale: float | np.ndarray = 1.0
    geometry: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_samples(cls, samples: Tensor, report: dict[str, Any]) -> Reconstruction:
        """From samples (S, B, C, H, W)."""
        std = samples.std(0) if len(samples) > 1 else torch.zeros_like(samples[0])
        return cls(samples.mean(0), std, samples, report)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write to an HDF5 file, whole or not at all."""
        shape = (*self.samples.shape[:2], *self.samples.shape[2:])
        about = (self.subjects, self.scale, self.geometry)
        with ResultWriter(path, shape, *about, overwrite=overwrite) as writer:
            writer.add(slice(0, shape[1]), self.samples)
            writer.report.update(self.report)

    @classmethod
    def load(cls, path: str | Path) -> Reconstruction:
        """Read a whole result file.

        Raises:
            InputError: not a result file, or a damaged one.
        """
        with ResultFile(path) as f:
            every = slice(None)
            found = (f.mean(every), f.std(every), f.samples(every))
            return cls(*found, f.report, f.subjects, f.scale, f.geometry)


class ResultFile:
    """A result on disk, read lazily: ``mean(indices)``, ``std(indices)`` (n, C, H, W), ``samples(indices)``
    (S, n, C, H, W).

    Raises:
        InputError: missing, truncated, foreign or incomplete file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{path}: expected a result file, found nothing")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError:
            raise InputError(
                f"{path}: expected a result file (HDF5), got something else or a truncated file"
            ) from None
        kind = self._file.attrs.get("format")
        missing = [k for k in ("mean", "std", "samples") if k not in self._file]
        if kind != FORMAT or missing:
            self._file.close()
            raise InputError(
                f"{path}: expected a result file ({FORMAT!r}), got {kind!r}"
                + (f", without {missing}" if missing else "")
            )
        self.shape = tuple(self._file["samples"].shape)
        self.report: dict[str, Any] = json.loads(self._file.attrs["report"])
        self.subjects: list[str] = json.loads(self._file.attrs["subjects"])
        scale = np.asarray(self._file.attrs["scale"])
        self.scale: float | np.ndarray = float(scale) if scale.ndim == 0 else scale
        # Results of before geometry was kept have none.
        self.geometry: dict[str, Any] = json.loads(self._file.attrs.get("geometry", "{}"))

    def __len__(self) -> int:
        return self.shape[1]

    def mean(self, indices: Any) -> Tensor:
        """Posterior means."""
        return self._finite("mean", torch.as_tensor(self._file["mean"][indices]))

    def std(self, indices: Any) -> Tensor:
        """Posterior standard deviations."""
        return self._finite("std", torch.as_tensor(self._file["std"][indices]))

    def samples(self, indices: Any) -> Tensor:
        """Posterior samples."""
        return self._finite("samples", torch.as_tensor(self._file["samples"][:, indices]))

    def each_sample(self) -> Iterator[Tensor]:
        """One sample of all images after the other, (n, C, H, W)."""
        for k in range(self.shape[0]):
            yield self._finite("samples", torch.as_tensor(self._file["samples"][k]))

    def _finite(self, name: str, values: Tensor) -> Tensor:
        if not bool(torch.isfinite(values).all()):
            raise InputError(f"{self.path}: expected finite {name}, got NaN or infinity")
        return values

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class ResultWriter:
    """Streams samples into a result file; the file appears under its name only when it is complete.

    Args:
        path: the file to make.
        shape: (S, N, C, H, W) of all samples.
        subjects, scale, geometry: as in `Reconstruction`.
        overwrite: replace an existing file.

    Raises:
        InputError: the file exists and ``overwrite`` is not set, or its folder does not exist.
        RuntimeError: on leaving, if samples are missing.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, ...],
        subjects: list[str] | None = None,
        scale: float | np.ndarray = 1.0,
        geometry: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = check_output(path, overwrite, folder_exists=True)
        self._part = Part(self.path)
        # Version 1.10 of the format stores attributes of more than 64 kB (the subjects of a large data set).
        self._file = h5py.File(self._part.path, "w", libver="v110", locking=False)
        self._file.create_dataset("samples", shape, np.float32, chunks=(1, 1, *shape[2:]))
        self._file.create_dataset("mean", shape[1:], np.float32, chunks=(1, *shape[2:]))
        self._file.create_dataset("std", shape[1:], np.float32, chunks=(1, *shape[2:]))
        self._file.attrs.update(format=FORMAT, scale=scale, subjects=json.dumps(subjects or []))
        self._file.attrs["geometry"] = json.dumps(geometry or {})
        self._moments: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._missing = shape[0] * shape[1]
        self.report: dict[str, Any] = {}

    def add(self, images: slice, samples: Tensor) -> None:
        """More samples (s, n, C, H, W) of the images ``images``; those of one image come in any number of
        parts.
        """
        data = samples.detach().to("cpu", torch.float64)
        self._missing -= data.shape[0] * data.shape[1]
        for k, image in enumerate(range(images.start, images.stop)):
            count, mean, square = self._moments.pop(
                image, (0, torch.zeros_like(data[0, k]), torch.zeros_like(data[0, k]))
            )
            self._file["samples"][count : count + len(data), image] = data[:, k].float().numpy()
            for x in data[:, k]:
                count += 1
                delta = x - mean
                mean = mean + delta / count
                square = square + delta * (x - mean)
            if count < self._file["samples"].shape[0]:
                self._moments[image] = (count, mean, square)
            else:
                self._file["mean"][image] = mean.float().numpy()
                self._file["std"][image] = (square / max(count - 1, 1)).sqrt().float().numpy()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self._file.attrs["report"] = json.dumps(self.report)
            self._file.close()
            if kind is None and self._missing == 0:
                self._part.commit()
        finally:
            self._file.close()
            self._part.discard()
        if kind is None and self._missing:
            raise RuntimeError(f"{self.path}: {self._missing} samples were never added, no file written")
