"""What `ambient-sci evaluate` runs: numbers as JSON, figures as PNG, a verdict in words.

    result R.h5 and references   scores over people, calibration against the truth, figure
    result R.h5 and scans M.h5   chi-squared of the residuals; with the prior, calibration on held-out rows
    images S.h5 and references   distances between the two distributions

Everything is computed before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.data import MeasurementFile, ReferenceFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation import figures
from ambient_sci.evaluation.calibration import hold_out, with_truth
from ambient_sci.evaluation.chi_squared import chi_squared
from ambient_sci.evaluation.distances import distribution_distances
from ambient_sci.evaluation.metrics import format_table, reconstruction_table
from ambient_sci.priors import Prior
from ambient_sci.sampling import POINT_ESTIMATES, Reconstruction, reconstruct
from ambient_sci.sampling.border import PriorLike, as_generator, as_prior
from ambient_sci.sampling.checks import sampler_options
from ambient_sci.sampling.result import made_from
from ambient_sci.sampling.subset import partners
from ambient_sci.whole_files import check_output, write_json
from ambient_sci.whole_sets import whole_set

ROWS_SHOWN = 4
#: What may be written; the report first.
OUTPUTS = ("report.json", "figure.png", "calibration.png")
UNKNOWN_SOURCE = (
    "the result does not record what it was made from (it is of an earlier version, or was made in memory): "
    "that these are its measurements was not checked"
)
FOUND_BY_DEFAULT = ("sampler", "steps", "sigma_min", "sigma_max", "tile_overlap")

Figure = tuple[str, Callable[[Path], Path]]


def evaluate(
    result: str | os.PathLike[str] | Reconstruction,
    out: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    prior: PriorLike | None = None,
    peak: float | None = None,
    held_out_images: int = 16,
    keep: float = 0.8,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluate a result, or generated images, and write ``report.json`` and figures into the folder ``out``.

    Args:
        result: a `Reconstruction` or its file, or a file of images (generated samples).
        out: folder to write into; made if need be.
        reference: file of the true images: of the same scans, in the same order (a result), or any from the
            distribution that the samples should have (images).
        calibration: measurement file that the result was made from.
        prior: the prior that made the result, or the folder of it. With it, up to ``held_out_images`` scans
            are sampled again from a fraction ``keep`` of their rows, and the others are predicted; without it
            the rows used are all that is tested.
        peak: full scale of PSNR and SSIM; default: the 99.9th percentile over each person's slices in
            ``reference``.
        seed: of the random choices (projections, split, p-values).
        overwrite: replace ``report.json`` and figures.

    Returns:
        What ``report.json`` holds, JSON-able; ``text`` is the summary to print.

    Raises:
        InputError: neither reference nor calibration, files that do not belong together, or outputs that
            exist.
    """
    if reference is None and calibration is None:
        raise InputError("evaluate: expected a reference or a measurement file to compare with, got neither")
    folder = Path(out)
    for name in OUTPUTS:
        check_output(folder / name, overwrite)
    generator = as_generator(None, seed, "evaluate")
    assert generator is not None
    prior = None if prior is None else as_prior(prior, "evaluate")
    if isinstance(result, Reconstruction) or not _is_image_file(result):
        found = result if isinstance(result, Reconstruction) else Reconstruction.load(Path(result))
        report, drawn = _of_result(
            found, reference, calibration, prior, peak, held_out_images, keep, generator
        )
    else:
        report, drawn = _of_images(result, reference, calibration, peak, generator), []
    report["text"] = _text(report)

    report["figures"] = [str(folder / name) for name, _ in drawn]
    # Figures of an earlier evaluation of something else would contradict the report.
    with whole_set(folder, OUTPUTS[0], stale=OUTPUTS[1:]) as part:
        for name, draw in drawn:
            draw(part / name)
        write_json(part / OUTPUTS[0], report)
    return report


def _of_result(
    result: Reconstruction,
    reference: str | os.PathLike[str] | None,
    calibration: str | os.PathLike[str] | None,
    prior: Prior | None,
    peak: float | None,
    held_out_images: int,
    keep: float,
    generator: torch.Generator,
) -> tuple[dict[str, Any], list[Figure]]:
    """Report and figures of a reconstruction."""
    report: dict[str, Any] = {}
    drawn: list[Figure] = []
    panels: dict[str, Any] = {}
    if reference is not None:
        _against_truth(report, drawn, panels, result, reference, peak, generator)
    if calibration is not None:
        _against_scans(report, panels, result, calibration, prior, held_out_images, keep, generator)
    if panels:
        drawn.append(("calibration.png", lambda path: figures.calibration_figure(path, panels)))
    return report, drawn


def _of_images(
    images: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None,
    calibration: str | os.PathLike[str] | None,
    peak: float | None,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Report of generated images."""
    if reference is None:
        raise InputError(f"{images}: expected a reference file to compare generated images with, got none")
    if calibration is not None or peak is not None:
        extra = "a measurement file" if calibration is not None else "a peak"
        raise InputError(f"{images}: generated images are compared with a reference only, got {extra}, too")
    return {"distances": _between_files(images, reference, generator)}


def _against_truth(
    report: dict[str, Any],
    drawn: list[Figure],
    panels: dict[str, Any],
    result: Reconstruction,
    reference: str | os.PathLike[str],
    peak: float | None,
    generator: torch.Generator,
) -> None:
    with ReferenceFile(reference) as file:
        rows = partners(result.source, len(result.mean), len(file))
        truth, subjects, turns = file.images(rows), list(file.subjects), int(file.orientation == "RAS")
        subjects = subjects if rows is None else [subjects[i] for i in rows]
    _check_pair(result, len(truth), subjects, reference)
    if result.mean.shape[-2:] != truth.shape[-2:]:
        raise InputError(
            f"{reference}: expected images {tuple(result.mean.shape[-2:])} like the result's, "
            f"got {tuple(truth.shape[-2:])}"
        )
    report["scores"] = reconstruction_table({"posterior mean": result.mean}, truth, subjects, peak)
    people = report["scores"]["people"]
    drawn.append(_images_figure(result, truth, subjects, report["scores"], turns))
    if len(result.samples) > 1 and result.samples.shape[1:] == truth.shape:
        by_people = subjects if len(people) > 1 else None
        report["with_truth"] = with_truth(result.samples, truth, subjects=by_people, generator=generator)
        panels["against the truth"] = report["with_truth"]


def _images_figure(
    result: Reconstruction, truth: Tensor, subjects: list[str], scores: dict[str, Any], turns: int
) -> Figure:
    """A few slices: truth, mean, error and, of several samples, standard deviation."""
    # The middle slice of each person, then evenly spaced ones, until there are enough rows.
    rows = [[i for i, s in enumerate(subjects) if s == p] for p in scores["people"]]
    shown = sorted({r[len(r) // 2] for r in rows[:ROWS_SHOWN]})
    spread = torch.linspace(0, len(truth) - 1, ROWS_SHOWN).round().int().tolist()
    shown = sorted({*shown, *[i for i in spread if i not in shown][: ROWS_SHOWN - len(shown)]})
    scale = torch.tensor([scores["peak"][subjects[i]] for i in shown])
    several = len(result.samples) > 1

    def upright(x: Tensor) -> Tensor:
        return x[shown].rot90(turns, (-2, -1))

    def draw(path: Path) -> Path:
        return figures.reconstruction_figure(
            path,
            upright(truth),
            {},
            mean=upright(result.mean),
            std=upright(result.std) if several else None,
            labels=[subjects[i] for i in shown],
            peak=scale,
        )

    return "figure.png", draw


def _against_scans(
    report: dict[str, Any],
    panels: dict[str, Any],
    result: Reconstruction,
    calibration: str | os.PathLike[str],
    prior: Prior | None,
    images: int,
    keep: float,
    generator: torch.Generator,
) -> None:
    with MeasurementFile(calibration) as file:
        rows = partners(result.source, len(result.mean), len(file)) or list(range(len(file)))
        _check_pair(result, len(rows), [file.subjects[i] for i in rows], calibration)
        _check_source(result, file, calibration)
        if not result.source:
            report["notes"] = [UNKNOWN_SOURCE]
        if tuple(file.image_shape) != tuple(result.mean.shape[1:]):
            raise InputError(
                f"{calibration}: expected scans of images {tuple(result.mean.shape[1:])} like the result's, "
                f"got {file.image_shape}"
            )
        if result.report.get("sampler") in POINT_ESTIMATES:
            raise InputError(
                f"{calibration}: calibration is of posterior samples; the result is the point estimate of "
                f"{result.report['sampler']!r}, whose residuals are no noise. "
                "Expected no measurement file with it"
            )
        report["chi_squared"] = chi_squared(
            result.samples, file.operator(rows), file.measurements(rows), file.sigma(rows)
        )
        chosen = torch.linspace(0, len(rows) - 1, min(images, len(rows))).round().int().tolist()
        some = [rows[i] for i in chosen]
        operator, y, sigma = file.operator(some), file.measurements(some), file.sigma(some)
    if prior is None or len(result.samples) < 2:
        return
    subjects = [result.subjects[i] for i in chosen] if len(set(result.subjects)) > 1 else None
    sample = _as_before(result, prior, sigma, generator)
    report["held_out_rows"] = hold_out(
        sample, operator, y, sigma, keep=keep, subjects=subjects, generator=generator
    )
    panels["held-out rows"] = report["held_out_rows"]


def _as_before(
    result: Reconstruction, prior: Prior, sigma: Tensor, generator: torch.Generator
) -> Callable[[Any, Tensor], Tensor]:
    """(operator, measurements) -> samples, with the settings that made ``result``."""
    settings = {k: result.report[k] for k in FOUND_BY_DEFAULT if k in result.report}
    settings |= result.report.get("options", {})
    if "antithetic" in sampler_options(settings.get("sampler", "mmps")):
        settings["antithetic"] = False  # it is for the mean; draws are all that is wanted
    where = next((tensor.device for tensor in prior.state_dict().values()), torch.device("cpu"))

    def sample(kept: Any, part: Tensor) -> Tensor:
        return reconstruct(
            prior,
            kept.to(where),
            part.to(where),
            sigma,
            samples=len(result.samples),
            generator=generator,
            progress=True,
            **settings,
        ).samples.cpu()

    return sample


def _between_files(
    samples: str | os.PathLike[str] | Reconstruction, reference: Any, generator: torch.Generator
) -> dict[str, Any]:
    with ReferenceFile(str(samples)) as a, ReferenceFile(reference) as b:
        x, y = a.images(), b.images()
    if x.shape[1:] != y.shape[1:]:
        raise InputError(
            f"{samples}: expected images {tuple(y.shape[1:])} like {reference}, got {tuple(x.shape[1:])}"
        )
    return distribution_distances(x, y, generator=generator)


def _check_pair(
    result: Reconstruction, count: int, subjects: list[str], path: str | os.PathLike[str]
) -> None:
    """Refuse a file that does not hold what the result was made from: number of images, people."""
    if len(result.mean) != count:
        raise InputError(f"{path}: expected {len(result.mean)} images, one a reconstruction, got {count}")
    if result.subjects and result.subjects != subjects:
        first = next(i for i, (a, b) in enumerate(zip(result.subjects, subjects, strict=True)) if a != b)
        raise InputError(
            f"{path}: expected the people of the result; image {first} is of {subjects[first]!r} here and "
            f"{result.subjects[first]!r} there"
        )


def _check_source(result: Reconstruction, file: MeasurementFile, path: str | os.PathLike[str]) -> None:
    """Refuse another measurement file than that which the result says it was made from."""
    then, now = result.source, made_from(file)
    other = [key for key in now if key != "name" and then and then.get(key) != now[key]]
    if other:
        raise InputError(
            f"{path}: expected the measurements that the result was made from ({then.get('name')}), got "
            f"others: {other[0]} was {then.get(other[0])!r}, is {now[other[0]]!r}"
        )


def _is_image_file(path: str | os.PathLike[str]) -> bool:
    """Is it a file of images, and not a result? Anything else is left to the readers to complain about."""
    import h5py

    from ambient_sci.data.files import IMAGE_FORMAT
    from ambient_sci.data.hdf5_file import format_of

    try:
        with h5py.File(path, "r") as file:
            return format_of(file) == IMAGE_FORMAT
    except OSError:
        return False


def _text(report: dict[str, Any]) -> str:
    lines: list[str] = []
    if "scores" in report:
        lines += [format_table(report["scores"]), ""]
    for key, title in (
        ("with_truth", "against the truth"),
        ("chi_squared", "residuals, no truth needed"),
        ("held_out_rows", "held-out rows, no truth needed"),
    ):
        if key in report:
            lines.append(f"{title}: {report[key]['verdict']}")
    if "distances" in report:
        lines += _distance_lines(report["distances"])
    lines += [f"note: {note}" for note in report.get("notes", [])]
    return "\n".join(lines).strip()


def _distance_lines(distances: dict[str, Any]) -> list[str]:
    floor = distances["between_halves_of_the_reference"]
    lines = [
        f"{distances['samples']} samples against {distances['references']} references "
        "(in brackets: its two halves)"
    ]
    for name, other in floor.items():
        value = distances[name]
        value, other = (v["mean"] if isinstance(v, dict) else v for v in (value, other))
        lines.append(f"  {name.replace('_', ' '):20s} {value:.4g} ({other:.4g})")
    return lines
