r"""Results too large for memory: a measurement file reconstructed into a result file, images generated into a
file of images.

Both are cut into parts (`ambient_sci.sampling.parts`): repeated after an interruption they go on, and
processes of one ``torchrun`` share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ambient_sci.data import ImageWriter, ReferenceFile
from ambient_sci.data.sources import as_complex
from ambient_sci.priors.base import Prior
from ambient_sci.priors.given import Given, Labels
from ambient_sci.priors.tiled import TiledPrior
from ambient_sci.progress import track
from ambient_sci.sampling.notes import merge, notes
from ambient_sci.sampling.parts import Parts, fingerprint
from ambient_sci.sampling.result import ResultFile, ResultWriter
from ambient_sci.sampling.run import Run
from ambient_sci.sampling.samplers import POINT_ESTIMATES
from ambient_sci.sampling.sizes import fitted
from ambient_sci.sampling.subset import about, check_indices
from ambient_sci.sampling.unconditional import (
    Denoise,
    chain_seeds,
    chains,
    check_generation,
    generation_grid,
    require_generator,
    state_like,
    told,
)
from ambient_sci.whole_files import check_output, digest_of

#: What seeds mean: parts that another version of the samplers began are not gone on with.
STREAMS = 2
#: subjects, scale, geometry and source of a `Reconstruction`
About = tuple[Any, ...]


@torch.no_grad()
def reconstruct_to_file(
    prior: Prior,
    measurements: Any,
    out: str | Path,
    *,
    samples: int = 8,
    sampler: str = "mmps",
    images_at_once: int = 16,
    indices: Sequence[int] | None = None,
    overwrite: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
    device: str | torch.device = "cpu",
    tile_overlap: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Reconstruct a measurement file into a result file, at the memory of one batch of chains whatever the
    number of samples.

    Repeated with the same prior, measurements, settings and generator state after an interruption, it goes on
    where it was. Under ``torchrun`` each process takes its share of the images.

    Args:
        prior: as for `reconstruct`.
        measurements: an open `MeasurementFile`.
        out: result file to make.
        samples, sampler: as for `reconstruct`.
        images_at_once: images of one part: what an interruption can lose, and what is shared out to
            processes.
        indices: which images, in ascending order in the result; default all.
        overwrite: replace an existing result.
        generator: source of randomness; one seed is drawn from it for each part.
        progress: show a progress bar.
        device: where to compute.
        tile_overlap: for images larger than the prior's, see `Prior.at_shape`.
        **settings: further arguments of `reconstruct`.

    Returns:
        the report.

    Raises:
        InputError: as `reconstruct`; the output exists and ``overwrite`` is not set.
    """
    out, chosen = Path(out), check_indices(indices, len(measurements))
    check_output(out, overwrite, folder_exists=True)
    samples = 1 if sampler in POINT_ESTIMATES else samples
    starts = range(0, len(chosen), images_at_once)
    seeds = chain_seeds(len(starts), generator)
    request = {"samples": samples, "sampler": sampler, **settings}
    rows = {"first": chosen.start, "last": chosen.stop} if isinstance(chosen, range) else {"rows": chosen}
    plan = {**rows, "images_at_once": images_at_once, "seeds": seeds}
    plan["streams"] = STREAMS
    # The batch size decides speed, not samples.
    plan |= {k: v for k, v in request.items() if k != "batch_size"}
    device = torch.device(device)
    prior = fitted(prior, tuple(measurements.image_shape), tile_overlap)
    if isinstance(prior, TiledPrior):
        plan["tile_overlap"] = prior.overlap
    with Parts(out, fingerprint(prior, [*source_of(measurements), plan]), len(starts), device) as parts:
        missing, progress = parts.missing(lambda p: ResultFile(p).check()), progress and parts.main
        for k in track(missing, f"{sampler} reconstruction", enabled=progress and len(starts) > 1):
            index = list(chosen[starts[k] : starts[k] + images_at_once])
            run = prepare(prior, measurements, index, seeds[k], device, request)
            with ResultWriter(parts.paths[k], (samples, len(index), *prior.shape)) as writer:
                for chunk, draws in run.parts(progress=progress and len(starts) == 1):
                    writer.add(slice(chunk.images.start, chunk.images.stop), draws)
                writer.report = run.report(writer.spread())
            request["batch_size"] = run.batch_size  # what has fitted once is not tried out again
        parts.wait()
        if parts.main:
            shape = (samples, len(chosen), *prior.shape)
            join(parts.paths, out, shape, tuple(about(measurements, chosen).values()), prior, overwrite)
            parts.remove()
        parts.wait()
    with ResultFile(out) as result:
        return result.report


def source_of(measurements: Any) -> list[Any]:
    """What identifies a measurement file, without reading it."""
    path = Path(measurements.path)
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def prepare(
    prior: Prior,
    measurements: Any,
    index: list[int],
    seed: int,
    device: torch.device,
    request: dict[str, Any],
) -> Run:
    """The run of one part."""
    settings = dict(request)
    grid = tuple(settings.pop(k, None) for k in ("sigma_min", "sigma_max", "rho"))
    return Run.prepare(
        prior,
        measurements.operator(index).to(device),
        measurements.measurements(index).to(device),
        measurements.sigma(index),
        settings.pop("samples"),
        settings.pop("sampler"),
        settings.pop("steps", None),
        grid,  # type: ignore[arg-type]
        settings.pop("batch_size", None),
        torch.Generator().manual_seed(seed),
        settings,
    )


def join(
    parts: list[Path],
    out: Path,
    shape: tuple[int, ...],
    about: About,
    prior: Prior,
    overwrite: bool,
) -> None:
    """One result file from the parts', a few samples in memory at a time."""
    totals: dict[str, Any] = {}
    with ResultWriter(out, shape, *about, overwrite=overwrite) as writer:
        start, report = 0, {}
        for part in parts:
            with ResultFile(part) as file:
                every = slice(None)
                where = slice(start, start + len(file))
                writer.put(where, file.each_sample(), file.mean(every), file.std(every))
                start += len(file)
                report = file.report
                totals = merge(totals, {k: v for k, v in report.items() if k not in ("options", "notes")})
        totals = {**{k: v for k, v in report.items() if k != "notes"}, **totals}
        writer.report = {**totals, **notes(prior, totals)}


@torch.no_grad()
def generate_to_file(
    prior: Prior,
    num: int,
    out: str | Path,
    *,
    steps: int | None = None,
    sampler: str = "heun",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    batch_size: int = 64,
    images_at_once: int = 256,
    given: Given | None = None,
    guidance: float = 1.0,
    history: str = "",
    overwrite: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
    stale: Sequence[Path] = (),
) -> Path:
    """Generate images into a file of images, at the memory of one part whatever their number: those of
    `generate`, from the same generator.

    Repeated with the same prior, settings and generator state after an interruption, it goes on where it was.
    Under ``torchrun`` each process takes its share. Images of two channels are stored as complex ones, all in
    single precision.

    Args:
        prior: unconditional.
        num: number of images.
        out: file to make.
        steps, sampler, sigma_min, sigma_max, rho, batch_size, generator, progress: as for `generate`.
        images_at_once: images of one part: what an interruption can lose, and what is shared out to
            processes.
        given, guidance: as for `generate`; class labels go into the file.
        history: how the file was made, in words, to be stored in it.
        overwrite: replace an existing file.
        stale: files that were made from the one that is replaced (its contact sheet), removed with it.

    Returns:
        ``out``.

    Raises:
        InputError: as `generate`; the output exists and ``overwrite`` is not set.
    """
    require_generator(prior, "generate")
    check_generation("generate", num, sampler, min(batch_size, images_at_once))
    grid = generation_grid(prior, steps, sigma_min, sigma_max, rho)
    denoiser_of = None if given is None and guidance == 1 else told(prior, num, given, guidance)
    out = Path(out)
    check_output(out, overwrite)
    seeds, starts = chain_seeds(num, generator), range(0, num, images_at_once)
    plan = [images_at_once, seeds, grid.tolist(), sampler]
    if given is not None:
        told_what = {k: v for k, v in vars(given).items() if isinstance(v, torch.Tensor)}
        plan += [digest_of(told_what), guidance]
    key = fingerprint(prior, plan)
    labels = given.index.cpu() if isinstance(given, Labels) and bool((given.index >= 0).all()) else None
    with Parts(out, key, len(starts), state_like(prior).device) as parts:
        shown = progress and parts.main
        for k in track(parts.missing(ReferenceFile), "generating", enabled=shown and len(starts) > 1):
            some = seeds[starts[k] : starts[k] + images_at_once]
            alone = shown and len(starts) == 1
            own = None if denoiser_of is None else _shifted(denoiser_of, starts[k])
            images = chains(prior, some, grid, sampler, batch_size, denoiser_of=own, progress=alone)
            stored = as_complex(images.float().cpu()) if prior.shape[0] == 2 else images.float().cpu()
            classes = None if labels is None else labels[starts[k] : starts[k] + len(some)]
            with ImageWriter(parts.paths[k]) as writer:
                writer.append(stored, subjects="generated", labels=classes)
        parts.wait()
        if parts.main:
            join_images(parts.paths, out, history, overwrite, stale)
            parts.remove()
        parts.wait()
    return out


def _shifted(denoiser_of: Callable[[slice], Denoise], start: int) -> Callable[[slice], Denoise]:
    """The denoisers of a part's chains, numbered from its beginning."""
    return lambda some: denoiser_of(slice(start + some.start, start + some.stop))


def join_images(
    parts: list[Path], out: Path, history: str, overwrite: bool, stale: Sequence[Path] = ()
) -> None:
    """One file of images from the parts', one part in memory at a time."""
    with ImageWriter(out, history=history, overwrite=overwrite) as writer:
        writer.stale = stale
        for part in parts:
            with ReferenceFile(part) as file:
                images = file.images()
                stored = as_complex(images) if images.shape[1] == 2 else images
                writer.append(stored, subjects=file.subjects, labels=file.labels())
