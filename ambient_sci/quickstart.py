r"""The main job, end to end, on real anatomy: from noisy scans to a prior, and from undersampled scans to
images with error bars.

    1  Colin27, one person, 64 x 64 px, random smooth phase -> *noisy, fully sampled* complex scans,
       sigma_y = 0.05 per real channel
    2  a diffusion prior from those noisy scans alone (Ambient loss); the clean slices stay in a file that the
       trainer is never given
    3  three *other* people, R = 2.5 undersampled, same noise -> posterior samples by MMPS: mean and standard
       deviation
    4  a table and a figure beside zero-filled, L1-wavelet and total variation, whose weights are chosen with
       the truth in hand, for each slice by itself

Real anatomy, simulated acquisition: phase, noise and undersampling are ours.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ambient_sci.errors import InputError
from ambient_sci.progress import say, track
from ambient_sci.whole_files import write_json

#: What ``--pretrained`` loads; its card is in ``ambient_sci/priors/assets``.
PRETRAINED = "pretrained:brain64"


@dataclass(frozen=True)
class Settings:
    """What the quickstart does; the defaults are what the README reports.

    Attributes:
        noise_std: sigma_y per real channel; images have peak 1.
        acceleration: R of the scans to reconstruct.
        slices_per_person: test slices of each person, evenly spaced (the third person has one).
        samples: posterior samples for each slice.
        steps, max_iterations, sigma_max: noise levels of the posterior sampler, Jacobian products a solve,
            highest level.
        train_steps, batch_size, channels: of the training; limited by steps, so that the result is
            reproducible.
    """

    noise_std: float = 0.05
    acceleration: float = 2.5
    slices_per_person: int = 3
    samples: int = 16
    steps: int = 16
    max_iterations: int = 3
    sigma_max: float = 10.0
    train_steps: int = 1300
    batch_size: int = 8
    learning_rate: float = 2e-3
    channels: tuple[int, ...] = (24, 48, 48)


def run(
    out: str | Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = False,
    pretrained: bool = False,
    device: str = "auto",
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Run the quickstart in the folder ``out`` and return its report (also written to ``out/report.json``).

    Args:
        out: folder to work in: train.h5, train_clean.h5, test.h5, test_clean.h5, run/ (the prior),
            reconstruction.h5, report.json, figure.png.
        seed: decides phases, noise, masks, initial weights and samples.
        overwrite: start anew in a folder that is not empty.
        resume: continue an interrupted training.
        pretrained: train nothing and take the prior that ships with the library (`PRETRAINED`); no training
            scans are made.
        device: "auto", "cpu" or "cuda".

    Raises:
        InputError: a folder that is not empty, without ``overwrite`` or ``resume``.
    """
    out, settings = Path(out), settings or Settings()
    if out.exists() and any(out.iterdir()) and not (overwrite or resume):
        raise InputError(
            f"{out}: expected an empty or new folder; give --overwrite to start anew or --resume to go on"
        )
    out.mkdir(parents=True, exist_ok=True)
    if overwrite and not resume:
        _start_anew(out)
    clock = _Clock()
    if not (resume and (out / "run").exists()):
        say("quickstart: simulating scans")
        make_scans(out, settings, seed, overwrite or resume, train=not pretrained)
        clock.lap("simulate")
    if pretrained:
        prior = shipped(device)
    else:
        say("quickstart: training")
        prior = train(out, settings, seed, resume and (out / "run").exists(), overwrite, device)
    clock.lap("train")
    say("quickstart: classic reconstructions, at the best of many weights")
    estimates, baselines = reconstruct_classically(out)
    clock.lap("baselines")
    say(f"quickstart: {settings.samples} posterior samples of each scan")
    report = reconstruct_and_compare(out, prior, estimates, settings, seed, device)
    clock.lap("reconstruct")
    report = {
        "settings": asdict(settings),
        "seed": seed,
        "prior": PRETRAINED if pretrained else "run",
        "seconds": clock.laps,
        "baselines": baselines,
        **report,
    }
    write_json(out / "report.json", report)
    report = json.loads((out / "report.json").read_text())
    print(
        f"\n{report['text']}\n\nfigure: {out / 'figure.png'}   report: {out / 'report.json'}   "
        f"{clock.total():.0f} s in all"
    )
    return report


def _start_anew(out: Path) -> None:
    """Remove what an earlier quickstart concluded and trained: interrupted, the new one is not mixed with
    it."""
    from ambient_sci.training import RunFolder

    for name in ("report.json", "figure.png", "reconstruction.h5"):
        (out / name).unlink(missing_ok=True)
    if (out / "run").exists():
        run = RunFolder(out / "run")
        run.check_free(overwrite=True)
        with run.alone():
            shutil.rmtree(run.path)


class _Clock:
    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 1), now

    def total(self) -> float:
        return time.monotonic() - self.start


def make_scans(out: Path, settings: Settings, seed: int, overwrite: bool, *, train: bool = True) -> None:
    """Steps 1 and 3: training scans of one person (unless ``train`` is false), test scans of three others."""
    import numpy as np

    from ambient_sci.data import brains, simulate, write_images

    images, subjects = brains("train")
    common = {"noise_std": settings.noise_std, "phase": "smooth", "overwrite": overwrite}
    magnitudes = out / "magnitudes.h5"
    parts: list[tuple[str, Any, list[str], dict[str, Any]]] = [("train", images, subjects, {})]
    images, subjects = brains("test")
    chosen: list[int] = []
    for person in dict.fromkeys(subjects):
        rows = [i for i, s in enumerate(subjects) if s == person]
        # The outermost slices hold little more than scalp: evenly spaced ones between them.
        spread = np.linspace(0.2, 0.85, settings.slices_per_person) * (len(rows) - 1)
        chosen += sorted({rows[round(k)] for k in spread})
    parts.append(
        ("test", images[chosen], [subjects[i] for i in chosen], {"acceleration": settings.acceleration})
    )
    for k, (name, images, subjects, options) in enumerate(parts):
        if name == "train" and not train:
            continue
        write_images(magnitudes, images=images, subjects=subjects, overwrite=True)
        simulate(
            magnitudes,
            "mri",
            out / f"{name}.h5",
            out / f"{name}_clean.h5",
            seed=2 * seed + k,
            **common,
            **options,
        )
    os.unlink(magnitudes)


def shipped(device: str) -> Any:
    """The prior of ``--pretrained``."""
    from ambient_sci.priors import load_prior
    from ambient_sci.training import make_accelerator

    return load_prior(PRETRAINED, make_accelerator(device).device)


def train(out: Path, settings: Settings, seed: int, resume: bool, overwrite: bool, device: str) -> Any:
    """Step 2: the prior, from out/train.h5 and nothing else."""
    from ambient_sci.precision import native_bfloat16
    from ambient_sci.priors import NetworkConfig
    from ambient_sci.training import LevelConfig, TrainConfig, fit, make_accelerator

    config = TrainConfig(
        seed=seed,
        max_steps=settings.train_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=50,
        ema_decay=0.999,
        centre=False,
        precision="bf16" if native_bfloat16(make_accelerator(device).device) else "fp32",
        # Exact for white noise; a prior from one person has to be told that others differ in pose, brightness
        # and phase.
        augmentations=("flip-vertical", "flip-horizontal", "transpose", "phase", "gain"),
        network=NetworkConfig(channels=settings.channels),
        levels=LevelConfig(kind="log-normal", mean=-0.2, std=1.2, sigma_max=100.0),
        device=device,
    )
    return fit(out / "train.h5", config, out / "run", resume=resume, overwrite=overwrite)


def reconstruct_classically(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Baselines on out/test.h5; each sparse one at the weight of best PSNR against the truth for each slice,
    an oracle's choice in its favour."""
    import torch

    from ambient_sci.data import MeasurementFile, ReferenceFile
    from ambient_sci.evaluation import sweep, zero_filled

    with MeasurementFile(out / "test.h5") as scans, ReferenceFile(out / "test_clean.h5") as clean:
        operator, y, truth = scans.operator(), scans.measurements(), clean.images()
    estimates, notes = {"zero-filled": zero_filled(operator, y)}, {}
    for name, method in track((("L1-wavelet", "l1-wavelet"), ("TV", "tv")), "classic reconstructions"):
        each = [
            sweep(method, operator[k : k + 1], y[k : k + 1], truth[k : k + 1], peak=1.0)
            for k in range(len(y))
        ]
        estimates[name] = torch.cat([best.image for best in each])
        notes[name] = {
            "weights": [best.weight for best in each],
            "interior": all(best.interior for best in each),
            "converged": all(best.converged for best in each),
            "sweeps": [best.table for best in each],
        }
    return estimates, notes


def reconstruct_and_compare(
    out: Path, prior: Any, estimates: dict[str, Any], settings: Settings, seed: int, device: str
) -> dict[str, Any]:
    """Steps 3 and 4: posterior samples of out/test.h5, scores, figure."""
    from ambient_sci.data import ReferenceFile
    from ambient_sci.evaluation import format_table, reconstruction_table, std_over_error
    from ambient_sci.sampling import Reconstruction

    sampling, subjects = sample(out, prior, settings, seed)
    result = Reconstruction.load(out / "reconstruction.h5")
    with ReferenceFile(out / "test_clean.h5") as clean:
        truth = clean.images()
    figure(out / "figure.png", result, truth, estimates, subjects)
    table = reconstruction_table(
        {**estimates, "ours (posterior mean)": result.mean}, truth, subjects, peaks=1.0
    )
    spread = std_over_error(result, truth, subjects)
    each = ", ".join(f"{person} {ratio:.2f}" for person, ratio in spread["people"].items())
    text = (
        f"{format_table(table)}\nours: standard deviation / error = {spread['mean']:.2f} over people "
        f"({each}; all slices pooled {spread['pooled']:.2f}); 1 means error bars as large as the errors"
    )
    return {"table": table, "std_over_error": spread, "sampling": sampling, "text": text}


def sample(out: Path, prior: Any, settings: Settings, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Posterior samples of out/test.h5 as out/reconstruction.h5: the report, and who the images are of."""
    import torch

    from ambient_sci.data import MeasurementFile
    from ambient_sci.sampling import reconstruct_to_file

    with MeasurementFile(out / "test.h5") as scans:
        report = reconstruct_to_file(
            prior,
            scans,
            out / "reconstruction.h5",
            samples=settings.samples,
            steps=settings.steps,
            max_iterations=settings.max_iterations,
            sigma_max=settings.sigma_max,
            precision="auto",
            generator=torch.Generator().manual_seed(seed),
            overwrite=True,
            progress=True,
            device=next(prior.parameters()).device,
        )
        return report, list(scans.subjects)


def figure(path: Path, result: Any, truth: Any, estimates: dict[str, Any], subjects: list[str]) -> None:
    """The middle slice of each person: truth, baselines, posterior mean, standard deviation and error."""
    from ambient_sci.evaluation import reconstruction_figure, tissue_white

    rows = [subjects.index(s) + (subjects.count(s) // 2) for s in dict.fromkeys(subjects)]

    def upright(x: Any) -> Any:
        return x[rows].rot90(1, (-2, -1))

    reconstruction_figure(
        path,
        upright(truth),
        {name: upright(images) for name, images in estimates.items()},
        mean=upright(result.mean),
        std=upright(result.std),
        labels=[subjects[r] for r in rows],
        peak=1.0,
        white=tissue_white(truth[rows]),
    )
