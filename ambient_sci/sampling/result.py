r"""What a reconstruction is: posterior mean, standard deviation and samples, in memory (`Reconstruction`) and
on disk (`ResultFile`).

How mean and standard deviation follow from samples, and from what a sampler knows besides them, is in
`ambient_sci.sampling.moments`. The sums are running ones, so a file holds as many samples as wanted at the
memory of one batch.

HDF5 keeps a checksum of every image (its Fletcher-32 filter) and of its own structures; the attribute
``verified`` is a digest of the attributes and of what datasets there are. ``source`` says what the result was
made from: the name of the measurement file and its fingerprint. Files of before any of these were kept have
none, and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ambient_sci import plotting
from ambient_sci.data.checksums import MARK
from ambient_sci.data.geometry import check_geometry
from ambient_sci.data.hdf5_file import one_line, parse_json, plain, scales_in_range
from ambient_sci.data.hdf5_output import Output
from ambient_sci.data.hdf5_safety import entries
from ambient_sci.data.survey import fingerprint
from ambient_sci.errors import InputError
from ambient_sci.numbers import check_numbers
from ambient_sci.sampling.moments import Moments, add_to
from ambient_sci.sampling.problem import Draws
from ambient_sci.whole_files import Part, check_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "ambient_sci reconstruction 1"
DATASETS = ("samples", "mean", "std")


@dataclass
class Reconstruction:
    """Posterior samples and what follows from them.

    Attributes:
        mean: posterior mean, (B, C, H, W): the average of "conditional means", or of "draws" where the
            sampler has no such means; ``report["mean_of"]`` says which.
        std: posterior standard deviation, (B, C, H, W); zero for a single sample or a point estimate.
        samples: (S, B, C, H, W).
        report: how it was made and how well the solves went; JSON types.
        subjects: who each image is of, if known.
        scale: factor that was divided out of the data, one or one for each image; multiply to get the
            original units.
        geometry: where the images lie in the volumes they come from, as in the measurement file; empty if
            that is not known.
        source: what it was made from, see `made_from`; empty if that is not known.
    """

    mean: Tensor
    std: Tensor
    samples: Tensor
    report: dict[str, Any] = field(default_factory=dict)
    subjects: list[str] = field(default_factory=list)
    scale: float | np.ndarray = 1.0
    geometry: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        images, size = len(self.mean), " x ".join(map(str, self.mean.shape[1:]))
        spread = f", mean std {float(self.std.mean()):.3g}" if len(self.samples) > 1 else ""
        sampler = self.report.get("sampler", "unknown sampler")
        return (
            f"Reconstruction({images} image{'s' * (images != 1)} {size}, {len(self.samples)} "
            f"sample{'s' * (len(self.samples) != 1)}, {sampler}{spread})"
        )

    def _repr_html_(self) -> str:
        spread = {"std": plotting.spread(self.std)} if len(self.samples) > 1 else {}
        return plotting.html_of(repr(self), {"mean": plotting.as_batch(self.mean, "mean"), **spread})

    def plot(
        self,
        *,
        truth: Tensor | np.ndarray | None = None,
        measured: Tensor | np.ndarray | None = None,
        samples: int = 2,
        rows: int = plotting.ROWS,
        indices: Sequence[int] | None = None,
    ) -> Figure:
        """A matplotlib figure, one row an image: truth and what was measured, where given, mean, standard
        deviation, samples, error.

        Complex images are shown as magnitudes; there std and error are sqrt(std_re^2 + std_im^2) and
        |mean - truth|, on one colour scale.

        Args:
            truth: images (B, C, H, W) to compare with.
            measured: images to show beside them: of the operator's adjoint, say, or the noisy ones.
            samples: samples shown at most.
            rows: images shown at most, evenly spread.
            indices: which images to show instead.

        Raises:
            InputError: another number of images than there are.
        """
        return plotting.plot_result(
            self, truth=truth, measured=measured, samples=samples, rows=rows, indices=indices
        )

    def to_numpy(self) -> dict[str, np.ndarray]:
        """mean, std (B, C, H, W) and samples (S, B, C, H, W) as NumPy arrays."""
        return {name: getattr(self, name).detach().cpu().numpy() for name in ("mean", "std", "samples")}

    @classmethod
    def from_samples(cls, samples: Tensor, report: dict[str, Any]) -> Reconstruction:
        """From samples alone, (S, B, C, H, W): their mean and their standard deviation (S - 1)."""
        std = samples.std(0) if len(samples) > 1 else torch.zeros_like(samples[0])
        return cls(samples.mean(0), std, samples, report)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write to an HDF5 file, whole or not at all."""
        about = (self.subjects, self.scale, self.geometry, self.source)
        with ResultWriter(path, tuple(self.samples.shape), *about, overwrite=overwrite) as writer:
            writer.put(slice(0, len(self.mean)), self.samples, self.mean, self.std)
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
            return cls(*found, f.report, f.subjects, f.scale, f.geometry, f.source)


def made_from(measurements: Any) -> dict[str, Any]:
    """What a result records of an open measurement file: its name, and its fingerprint in JSON types."""
    return {"name": Path(measurements.path).name, **fingerprint(measurements)}


class ResultFile:
    """A result on disk, read lazily: ``mean(indices)``, ``std(indices)`` (n, C, H, W), ``samples(indices)``
    (S, n, C, H, W).

    Raises:
        InputError: missing, truncated, foreign, damaged or incomplete file.
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
        try:
            self._load()
        except InputError as error:
            self._file.close()
            raise InputError(error if str(error).startswith(str(path)) else f"{path}: {error}") from None
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._file.close()
            raise InputError(
                f"{path}: expected a result file, got a damaged one ({one_line(error)})"
            ) from None

    def _load(self) -> None:
        attributes = {name: plain(value) for name, value in self._file.attrs.items()}
        kind = attributes.get("format")
        missing = [k for k in DATASETS if k not in self._file]
        if kind != FORMAT or missing:
            raise InputError(
                f"expected a result file ({FORMAT!r}), got {kind!r}"
                + (f", without {missing}" if missing else "")
            )
        datasets = entries(self._file, (), self.path.stat().st_size)
        if attributes.get(MARK, mark := _mark(attributes, datasets)) != mark:
            raise InputError(
                "expected the attributes that were written, got others (their digest differs): the file is "
                "damaged, or was edited"
            )
        self.shape = tuple(datasets["samples"].shape)
        if len(self.shape) != 5 or any(datasets[k].shape != self.shape[1:] for k in ("mean", "std")):
            raise InputError(f"expected samples (S, N, C, H, W), mean and std (N, C, H, W), got {self.shape}")
        self.report: dict[str, Any] = _json(attributes["report"], "report", dict)
        self.subjects: list[str] = _json(attributes["subjects"], "subjects", list)
        if len(self.subjects) not in (0, len(self)):
            raise InputError(f"expected {len(self)} subjects or none, got {len(self.subjects)}")
        scale = np.asarray(attributes["scale"], dtype=np.float64)
        if scale.shape not in ((), (len(self),)) or not scales_in_range(scale):
            raise InputError(f"expected a positive scale, or one for each of {len(self)} images")
        self.scale: float | np.ndarray = float(scale) if scale.ndim == 0 else scale
        # Results of before geometry and source were kept have none.
        self.geometry: dict[str, Any] = _json(attributes.get("geometry", "{}"), "geometry", dict)
        check_numbers(self.geometry, "geometry")
        check_geometry(self.geometry, len(self))
        self.source: dict[str, Any] = _json(attributes.get("source", "{}"), "source", dict)

    def __len__(self) -> int:
        return self.shape[1]

    def mean(self, indices: Any) -> Tensor:
        """Posterior means."""
        return self._read("mean", indices)

    def std(self, indices: Any) -> Tensor:
        """Posterior standard deviations."""
        return self._read("std", indices)

    def samples(self, indices: Any) -> Tensor:
        """Posterior samples."""
        return self._read("samples", (slice(None), indices))

    def each_sample(self) -> Iterator[Tensor]:
        """One sample of all images after the other, (n, C, H, W)."""
        for k in range(self.shape[0]):
            yield self._read("samples", k)

    def check(self) -> ResultFile:
        """Read everything, which compares it with its checksums.

        Raises:
            InputError: the file is damaged.
        """
        for k in range(len(self)):
            self.mean(slice(k, k + 1))
            self.std(slice(k, k + 1))
        for _ in self.each_sample():
            pass
        return self

    def _read(self, name: str, index: Any) -> Tensor:
        try:
            values = torch.as_tensor(self._file[name][index])
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: expected readable {name}, got a damaged file ({one_line(error)})"
            ) from None
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
        subjects, scale, geometry, source: as in `Reconstruction`.
        overwrite: replace an existing file.

    Raises:
        InputError: the file exists and ``overwrite`` is not set, its folder does not exist, or it cannot be
            written (the disk is full).
        RuntimeError: on leaving, if samples are missing.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, ...],
        subjects: list[str] | None = None,
        scale: float | np.ndarray = 1.0,
        geometry: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = check_output(path, overwrite, folder_exists=True)
        try:
            self._part = Part(self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({one_line(error)})") from None
        try:
            self._output = Output(self._part.path, self.path)
            self._file = self._output.file
            with self._output.at_work():
                for name, size in (("samples", shape), ("mean", shape[1:]), ("std", shape[1:])):
                    chunk = (*[1] * (len(size) - 3), *size[-3:])
                    self._file.create_dataset(name, size, np.float32, chunks=chunk, fletcher32=True)
                self._file.attrs.update(format=FORMAT, scale=scale, subjects=json.dumps(subjects or []))
                self._file.attrs.update(geometry=json.dumps(geometry or {}), source=json.dumps(source or {}))
        except BaseException:
            self._discard()
            raise
        self._moments: dict[int, Moments] = {}
        self._variances: list[float] = []
        self._missing = shape[0] * shape[1]
        self.report: dict[str, Any] = {}

    def add(self, images: slice, draws: Draws | Tensor) -> None:
        """More samples (s, n, C, H, W) of the images ``images``, alone or with their conditional means; those
        of one image come in any number of parts.
        """
        draws = draws if isinstance(draws, Draws) else Draws(draws)
        with self._output.at_work():
            self._add(images, draws.samples.detach().cpu())
            chosen = [self._moments.setdefault(i, Moments()) for i in range(images.start, images.stop)]
            add_to(chosen, draws)
            for image in range(images.start, images.stop):
                if self._moments[image].count == self._file["samples"].shape[0]:
                    done = self._moments.pop(image)
                    self._settle(slice(image, image + 1), done.mean(), done.std())

    def put(self, images: slice, samples: Iterable[Tensor], mean: Tensor, std: Tensor) -> None:
        """Images that are finished.

        Args:
            images: which.
            samples: all S of them, one (n, C, H, W) after the other.
            mean, std: (n, C, H, W).
        """
        with self._output.at_work():
            for k, sample in enumerate(samples):
                self._file["samples"][k, images] = sample.detach().cpu().float().numpy()
                self._missing -= len(sample)
            self._settle(images, mean.detach(), std.detach())

    def spread(self) -> float:
        """Root mean square of the standard deviations of images that are finished; 0 if there are none."""
        return (sum(self._variances) / max(len(self._variances), 1)) ** 0.5

    def _add(self, images: slice, samples: Tensor) -> None:
        """Samples behind those that there are."""
        self._missing -= samples.shape[0] * samples.shape[1]
        for k, image in enumerate(range(images.start, images.stop)):
            count = self._moments[image].count if image in self._moments else 0
            self._file["samples"][count : count + len(samples), image] = samples[:, k].float().numpy()

    def _settle(self, images: slice, mean: Tensor, std: Tensor) -> None:
        self._file["mean"][images] = mean.cpu().float().numpy()
        self._file["std"][images] = std.cpu().float().numpy()
        self._variances += std.double().square().flatten(1).mean(1).tolist()

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None and self._missing == 0:
                self._finish()
        finally:
            self._discard()
        if kind is None and self._missing:
            raise RuntimeError(f"{self.path}: {self._missing} samples were never added, no file written")

    def _finish(self) -> None:
        """Complete the file and give it its name."""
        with self._output.at_work():
            self._file.attrs["report"] = json.dumps(self.report)
            attributes = {name: plain(value) for name, value in self._file.attrs.items()}
            self._file.attrs[MARK] = _mark(attributes, {k: self._file[k] for k in DATASETS})
        self._output.finish()
        try:
            self._part.settle()
            self._part.commit()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({one_line(error)})") from None

    def _discard(self) -> None:
        try:
            if hasattr(self, "_output"):
                self._output.close()
        finally:
            self._part.discard()


def _mark(attributes: dict[str, Any], datasets: dict[str, Any]) -> str:
    """A digest of the attributes, and of names, types and shapes of the datasets."""
    kinds = {name: [dataset.dtype.str, list(dataset.shape)] for name, dataset in datasets.items()}
    texts = {name: value for name, value in attributes.items() if name != MARK}
    text = json.dumps([texts, kinds], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _json(text: str, name: str, kind: type) -> Any:
    """An attribute's JSON, an object or a list."""
    value = parse_json(text, name)
    if not isinstance(value, kind):
        raise InputError(f"{name}: expected JSON of type {kind.__name__}, got {str(text)[:60]!r}")
    return value
