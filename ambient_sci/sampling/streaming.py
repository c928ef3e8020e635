r"""Reconstructing a measurement file into a result file: in parts, by one process or several, and from where an earlier run stopped.

Images are worked off in groups. A finished group is a file of its own in a folder beside the result, named after a fingerprint of
everything that decides what is in it (prior, measurements, settings, seed); so a run that was interrupted continues when it is
repeated, and never with somebody else's parts. Processes of one `accelerate launch` share the groups out between them. The last step joins
the parts into the result, which appears under its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data.exporters import select_geometry
from ambient_sci.priors.base import Prior
from ambient_sci.progress import track
from ambient_sci.sampling.reconstruct import POINT_ESTIMATES, Run, merge, notes
from ambient_sci.sampling.result import ResultFile, ResultWriter
from ambient_sci.sampling.unconditional import chain_seeds
from ambient_sci.whole_files import check_output


@torch.no_grad()
def reconstruct_to_file(
    prior: Prior,
    measurements: Any,
    out: str | Path,
    *,
    samples: int = 8,
    sampler: str = "mmps",
    images_at_once: int = 16,
    indices: range | None = None,
    overwrite: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
    device: str | torch.device = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Reconstruct a measurement file into a result file, at the memory of one batch of chains whatever the number of samples.

    Repeated with the same prior, measurements, settings and generator state after an interruption, it goes on where it was. Under
    ``accelerate launch`` each process takes its share of the images.

    Args:
        prior: as for `reconstruct`.
        measurements: an open `MeasurementFile`.
        out: result file to make.
        samples, sampler: as for `reconstruct`.
        images_at_once: images of one part: what an interruption can lose, and what is shared out to processes.
        indices: which images, a range of step 1; default all.
        overwrite: replace an existing result.
        generator: source of randomness; one seed is drawn from it for each part.
        progress: show a progress bar.
        device: where to compute.
        **settings: further arguments of `reconstruct`.

    Returns:
        the report.

    Raises:
        InputError: as `reconstruct`; the output exists and ``overwrite`` is not set.
    """
    out, chosen = Path(out), range(len(measurements)) if indices is None else indices
    check_output(out, overwrite, folder_exists=True)
    samples = 1 if sampler in POINT_ESTIMATES else samples
    starts = range(0, len(chosen), images_at_once)
    seeds = chain_seeds(len(starts), generator)
    request = {"samples": samples, "sampler": sampler, **settings}
    plan = {"first": chosen.start, "last": chosen.stop, "images_at_once": images_at_once, "seeds": seeds}
    # The batch size decides speed, not samples.
    key = fingerprint(
        prior, measurements, {**plan, **{k: v for k, v in request.items() if k != "batch_size"}}
    )
    folder = out.parent / f".{out.name}.parts-{key}"
    rank, processes = process_share()

    parts = [folder / f"{start:08d}.h5" for start in starts]
    mine = [k for k in range(len(parts)) if k % processes == rank and not parts[k].exists()]
    for k in track(mine, f"{sampler} reconstruction", enabled=progress and len(parts) > 1):
        index = list(chosen[starts[k] : starts[k] + images_at_once])
        run = prepare(prior, measurements, index, seeds[k], torch.device(device), request)
        folder.mkdir(exist_ok=True)  # only now: a request that is refused leaves nothing behind
        shape = (samples, len(index), *prior.shape)
        try:
            with ResultWriter(parts[k], shape) as writer:
                for chunk, x in run.parts(progress=progress and len(parts) == 1):
                    writer.add(slice(chunk.images.start, chunk.images.stop), x)
                writer.report = run.report()
        except BaseException:
            with suppress(OSError):
                folder.rmdir()  # kept only if it holds finished parts, to go on from
            raise
    wait_for_everyone()
    if rank == 0:
        subjects = [measurements.subjects[i] for i in chosen] if measurements.subjects else []
        scale = np.asarray(measurements.scale)
        scale = scale if scale.ndim == 0 else scale[list(chosen)]
        about = (subjects, scale, select_geometry(measurements.geometry, chosen))
        join(parts, out, (samples, len(chosen), *prior.shape), about, prior, overwrite)
        for leftover in out.parent.glob(
            f".{out.name}.parts-*"
        ):  # this run's, and those of others that were given up
            shutil.rmtree(leftover)
    wait_for_everyone()
    with ResultFile(out) as result:
        return result.report


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
    about: tuple[list[str], float | np.ndarray, dict[str, Any]],
    prior: Prior,
    overwrite: bool,
) -> None:
    """One result file from the parts', a few samples in memory at a time. ``about``: subjects, scale and geometry."""
    totals: dict[str, Any] = {}
    with ResultWriter(out, shape, *about, overwrite=overwrite) as writer:
        start, report = 0, {}
        for part in parts:
            with ResultFile(part) as file:
                for sample in file.each_sample():
                    writer.add(slice(start, start + len(file)), sample[None])
                start += len(file)
                report = file.report
                totals = merge(totals, {k: v for k, v in report.items() if k not in ("options", "notes")})
        totals = {**{k: v for k, v in report.items() if k != "notes"}, **totals}
        writer.report = {**totals, **notes(prior, totals["sigma_min"], totals)}


def fingerprint(prior: Prior, measurements: Any, plan: dict[str, Any]) -> str:
    """A short hash of what decides the samples."""
    digest = hashlib.sha256()
    for name, tensor in sorted(prior.state_dict().items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().flatten().clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    path = Path(measurements.path)
    description = [
        str(path.resolve()),
        path.stat().st_size,
        path.stat().st_mtime_ns,
        type(prior).__name__,
        plan,
    ]
    digest.update(json.dumps(description, default=str, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def process_share() -> tuple[int, int]:
    """(rank, number) of the processes of this launch: (0, 1) unless one of `accelerate launch` or torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    state = PartialState()
    return state.process_index, state.num_processes


def wait_for_everyone() -> None:
    """A barrier, if there is anybody to wait for."""
    if process_share()[1] > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
