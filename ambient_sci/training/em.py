r"""Expectation maximisation: an unconditional prior from the measurements of any linear operator [Rozet et
al. 2024].

    lap 0    a Gaussian fitted to the measurements (`ambient_sci.training.gaussian_em`), or the network of the
             Ambient loss
    lap l    E-step   x_i ~ p_{l-1}(x | y_i) for every measurement, by moment matching posterior sampling
             M-step   denoising score matching on the x_i, from the weights of the lap before

Where rows are missing that network is mask-conditional: it has no posterior to draw from, and the x_i of lap
1 are its estimates E[x_0 | y_i].

With exact posterior draws the likelihood of the measurements rises from lap to lap; MMPS is exact for
Gaussian priors. How good a lap's prior is can be told without the truth: rows of y that are held out are
predicted from the others by posterior samples x_1 .. x_S, z_s = A_H x_s + sigma_y n_s, and scored by the
continuous ranked probability score, per entry

    CRPS = mean_s |z_s - y_H| - sum_{s<s'} |z_s - z_s'| / (S (S - 1)),

smallest in expectation for the true posterior. EM stops when it no longer falls; the prior of the best lap is
kept. A mask-conditional start is not compared with the laps after it: what is kept is an unconditional prior.

On disk, in the run folder: ``em.json`` (a report a lap), ``prior/`` (the best so far), ``laps/NN/`` with the
draws (streamed, a marker for each batch that is complete), the M-step's checkpoint and the lap's prior. A run
that is killed continues inside its lap, with the same draws and the same bits. Several processes share both
steps; what they must agree on, the score and whether to stop, the main one decides, and all go on from the
prior that it saved.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ambient_sci.data import MeasurementArrays
from ambient_sci.data.survey import spread
from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.noise import expand
from ambient_sci.operators import Identity, RowMaskedOperator
from ambient_sci.priors import GaussianPrior, NetworkPrior, Prior, StationaryGaussianPrior, load_prior
from ambient_sci.progress import track
from ambient_sci.randomness import seeded
from ambient_sci.sampling import Reconstruction, reconstruct
from ambient_sci.training.augment import exact_augmentations
from ambient_sci.training.auto import settle
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.draws import Draws
from ambient_sci.training.gaussian_em import LARGEST_FULL, fit_initial
from ambient_sci.training.loop import run_stage
from ambient_sci.training.report import Reporter
from ambient_sci.training.run_folder import RunFolder
from ambient_sci.training.selection import Selection
from ambient_sci.training.source import Measurements, Source, judge, open_measurements, survey_masks
from ambient_sci.training.stage_configs import EMConfig
from ambient_sci.training.stages import AmbientStage

# Streams of randomness, beside those of the other stages.
_INITIAL, _E_STEP, _HELD_OUT = 20, 21, 22


def em_report(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The laps of a run: ``lap``, ``crps`` of held-out rows (lower is better), seconds and solver counts.

    Raises:
        InputError: not the folder of an EM run.
    """
    laps = RunFolder(run).read_json("em.json").get("laps")
    if not isinstance(laps, list) or not all(
        isinstance(r, dict) and {"lap", "crps"} <= r.keys() for r in laps
    ):
        raise InputError(f"{Path(run) / 'em.json'}: expected a list of laps, got {str(laps)[:60]!r}")
    return laps


def run_em(
    measurements: Any,
    config: TrainConfig,
    folder: RunFolder | None,
    accelerator: Accelerator,
    reporter: Reporter,
    resume: bool,
    selection: Selection | None = None,
) -> Prior:
    """All laps; called by `fit` after it has checked the folder."""
    if folder is None:
        if accelerator.num_processes > 1:
            raise InputError("EM on several processes: expected a run folder, which they share, got none")
        with tempfile.TemporaryDirectory() as scratch:
            return run_em(measurements, config, RunFolder(scratch), accelerator, reporter, False, selection)
    data = open_measurements(measurements)
    fraction, _ = survey_masks(data)
    reason = (
        f"{len(data)} samples, operator {data.operator_name}, {100 * fraction:.0f} % of rows measured: "
        "expectation maximisation, an "
        "unconditional prior"
    )
    source = Source(data, complete=fraction == 1, design=data.design, reason=reason)
    choice = settle(config, source, accelerator)
    config = choice.config
    if config.em is not None and config.em.start == "ambient":
        # What it refuses is refused before anything is written.
        _source_of_start(data, config)
    if accelerator.is_main_process:
        stages = [{"name": "em", "reason": reason}]
        description = {"stages": stages, "data": source.fingerprint(), **choice.entry}
        folder.reopen(config, description) if resume else folder.create(config, description)
        if not (folder.path / "em.json").exists():  # also of a run that was killed before it
            folder.write_json("em.json", {"laps": []})
    accelerator.wait_for_everyone()
    for said in (reason, *choice.sentences):
        reporter.say(said)
    return Laps(data, config, folder, accelerator, reporter, selection).run()


@dataclass
class Laps:
    """An EM run: `initial` gives the prior of lap 0; `lap` an `e_step` and an `m_step` from one prior to the
    next; `held_out_score` scores it, `keep` writes it, `finished` says whether that was all.
    """

    data: Measurements
    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter
    selection: Selection | None = None

    @property
    def settings(self) -> EMConfig:
        assert self.config.em is not None
        return self.config.em

    def run(self) -> Prior:
        """Laps until the score stops falling; the best prior."""
        reports = self.agreed(em_report(self.folder.path))
        prior = self._prior(reports[-1]["lap"]) if reports else None
        if reports and self.accelerator.is_main_process:
            self.folder.settle_prior("em", self._prior(_best(reports)))
        while not self.finished(reports):
            lap = len(reports)
            begun = time.monotonic()
            prior, details = self.initial() if prior is None else self.lap(lap, prior)
            report = {"lap": lap, "crps": self.held_out_score(prior), **details}
            if self.selection is not None:
                report["score"] = self.selection(prior)
            report["seconds"] = round(time.monotonic() - begun, 2)
            reports = [*reports, self.agreed(report)]
            self.keep(prior, reports)
            # From disk: what every process, and a run that is resumed here, goes on from is then the same.
            prior = self._prior(lap)
        return self._prior(_best(reports)).eval()

    def agreed(self, value: Any) -> Any:
        """The main process's ``value``, on every process: in the last digits they may differ, and then one
        would wait for another for ever.
        """
        if self.accelerator.num_processes == 1:
            return value
        return broadcast_object_list([value], from_process=0)[0]

    def finished(self, reports: list[dict[str, Any]]) -> bool:
        """Whether the score has stopped falling, or all laps are done."""
        if not reports:
            return False
        best, since = float("inf"), 0
        for report in _candidates(reports):
            better = _score(report) < best * (1 - self.settings.improvement)
            best, since = (_score(report), 0) if better else (best, since + 1)
        return since >= self.settings.patience or len(reports) > self.settings.laps

    def keep(self, prior: Prior, reports: list[dict[str, Any]]) -> None:
        """Write what a lap has reached; its draws are no longer needed."""
        report = reports[-1]
        self.reporter.say(
            f"EM lap {report['lap']}: held-out CRPS {report['crps']:.5g}"
            + (", the best so far" if _best(reports) == report["lap"] else "")
        )
        if self.accelerator.is_main_process:
            prior.save(self._path(report["lap"]) / "prior")
            if _best(reports) == report["lap"]:
                prior.save(self.folder.prior)
            self.folder.write_json("em.json", {"laps": reports, "best": _best(reports)})
            steps = sum(r.get("steps", 0) for r in reports)
            seconds = round(sum(r["seconds"] for r in reports), 2)
            self.folder.append_log({"stage": "em", "step": steps, "loss": report["crps"], "seconds": seconds})
            Draws.remove(self._path(report["lap"]))
        self.accelerator.wait_for_everyone()

    def _path(self, lap: int) -> Path:
        return self.folder.path / "laps" / f"{lap:02d}"

    def _prior(self, lap: int) -> Prior:
        return load_prior(self._path(lap) / "prior", self.accelerator.device)

    # -- lap 0 -----------------------------------------------------------------------------------------------

    def initial(self) -> tuple[Prior, dict[str, Any]]:
        """What the first draws come from."""
        return self._gaussian() if self.settings.start == "gaussian" else self._ambient()

    def _gaussian(self) -> tuple[Prior, dict[str, Any]]:
        """The Gaussian; every process fits the same one."""
        indices = _rows(len(self.data), self.settings.initial_samples)
        generator = seeded(self.config.seed, _INITIAL)
        fit = fit_initial(self.data, indices, self.settings.initial_iterations, generator)
        details: dict[str, Any] = {"prior": type(fit.prior).__name__}
        if fit.noise_floor is not None:
            details["noise_floor"] = fit.noise_floor
        if fit.log_likelihood:
            details |= {"iterations": len(fit.log_likelihood), "log_likelihood": fit.log_likelihood[-1]}
        return fit.prior.to(self.accelerator.device), details

    def _ambient(self) -> tuple[Prior, dict[str, Any]]:
        """The network of the Ambient loss, with those augmentations that are exact for the measurements."""
        settings = self.settings
        steps = settings.start_steps or settings.first_steps or settings.steps
        source = _source_of_start(self.data, self.config)
        names = exact_augmentations(
            self.config.augmentations, source.image_shape, self.data.operator_name, source.design
        )
        config = replace(self.config, em=None, max_steps=steps, augmentations=names)
        stage = AmbientStage(source, config, self.accelerator)
        prior = self._trained(0, stage, config)
        details = {
            "prior": f"{stage.name}, {steps} steps",
            "steps": steps,
            "conditioning": prior.conditioning,
        }
        return prior, details

    # -- later laps ------------------------------------------------------------------------------------------

    def lap(self, lap: int, prior: Prior) -> tuple[Prior, dict[str, Any]]:
        """The prior of lap ``lap`` from that of the lap before, and what to report of it."""
        begun = time.monotonic()
        images, report = self.e_step(lap, prior)
        details = {"e_step_seconds": round(time.monotonic() - begun, 2), "e_step": report}
        details |= {"draws_mean": float(images.mean()), "draws_std": float(images.std())}
        if self.settings.m_step == "gaussian":
            return _gaussian_of(images).to(self.accelerator.device), details
        steps = (self.settings.first_steps if lap == 1 else None) or self.settings.steps
        return self.m_step(lap, images, prior, steps), {**details, "steps": steps}

    def e_step(self, lap: int, prior: Prior) -> tuple[Tensor, dict[str, Any]]:
        """A posterior draw for every measurement, (N, C, H, W) on disk, and what the solver reports of this
        process's last batch.
        """
        settings, device = self.settings, self.accelerator.device
        draws = Draws(self._path(lap), (len(self.data), *self.data.image_shape), self.accelerator)
        report: dict[str, Any] = {}
        chunks = torch.arange(len(self.data)).split(settings.sampler_batch)
        shown = self.reporter.enabled and self.accelerator.is_main_process
        for index in track(range(len(chunks)), f"EM lap {lap}, posterior draws", enabled=shown):
            rows = chunks[index]
            if index % self.accelerator.num_processes != self.accelerator.process_index or draws.has(
                index, rows
            ):
                continue
            operator, y = self.data.operator(rows).to(device), self.data.measurements(rows).to(device)
            generator = seeded(self.config.seed, _E_STEP, lap, index)
            result = self.drawn(prior, operator, y, self.data.sigma(rows), 1, generator)
            draws.add(index, rows, result.samples[0])
            kept = ("solve", "worst", "network", "direct")
            report = {k: v for k, v in result.report.items() if k.startswith(kept)}
        self.accelerator.wait_for_everyone()
        return draws.images, report

    def drawn(
        self,
        prior: Prior,
        operator: RowMaskedOperator,
        y: Tensor,
        sigma: Tensor,
        samples: int,
        generator: torch.Generator,
    ) -> Reconstruction:
        """Posterior draws by MMPS; the estimate E[x_0 | y] of a mask-conditional prior, which has none."""
        settings = self.settings
        if prior.conditioning == "mask-conditional":
            return reconstruct(prior, operator, y, sigma, sampler="one-step")
        return reconstruct(
            prior,
            operator,
            y,
            sigma,
            samples=samples,
            sampler="mmps",
            steps=settings.sampler_steps,
            integrator=settings.integrator,
            max_iterations=settings.max_iterations,
            tolerance=settings.tolerance,
            precision=settings.sampler_precision,
            batch_size=settings.sampler_batch,
            antithetic=False,  # draws are wanted here, and no mean
            generator=generator,
        )

    def m_step(self, lap: int, images: Tensor, prior: Prior, steps: int) -> Prior:
        """Denoising score matching on the draws. The first lap fixes data_std, so that weights can be handed
        on.
        """
        data = MeasurementArrays(Identity(tuple(self.data.image_shape)), images, 0.0)
        source = Source(data, complete=True, design=None, reason=f"EM lap {lap}", data_std=prior.data_std)
        config = replace(self.config, em=None, max_steps=steps, seed=self.config.seed + 1_000_003 * lap)
        stage = AmbientStage(source, config, self.accelerator)
        if isinstance(prior, NetworkPrior) and prior.conditioning == "unconditional":
            # The weights alone: an Ambient network ends at the noise of the data, and draws have none.
            stage.module.load_state_dict(prior.state_dict())
        return self._trained(lap, stage, config)

    def _trained(self, lap: int, stage: AmbientStage, config: TrainConfig) -> Prior:
        """What ``stage`` learns, in the folder of the lap; continued where it was interrupted."""
        folder = RunFolder(self._path(lap))
        if self.accelerator.is_main_process and not folder.begun:
            folder.create(config, {"stages": [{"name": stage.name, "reason": stage.reason}]})
        self.accelerator.wait_for_everyone()
        options: Any = {"folder": folder, "resume": True, "reporter": self.reporter}
        return run_stage(stage, config, accelerator=self.accelerator, **options).eval()

    # -- the score -------------------------------------------------------------------------------------------

    def held_out_score(self, prior: Prior) -> float:
        """Mean CRPS of held-out rows, the same rows and noise in every lap."""
        settings, device = self.settings, self.accelerator.device
        rows = _rows(len(self.data), settings.held_out)
        generator = seeded(self.config.seed, _HELD_OUT)
        operator, y, sigma = self.data.operator(rows), self.data.measurements(rows), self.data.sigma(rows)
        each = operator.with_mask(
            operator.mask.expand(len(y), *operator.mask.shape[1:]), design=operator.design
        )
        split = each.split(keep=settings.held_out_keep, generator=generator)
        seen = (y * split.kept.mask).to(device)
        kept = split.kept.on_device(device)
        samples = self.drawn(prior, kept, seen, sigma, settings.held_out_draws, generator).samples.cpu()
        if len(samples) == 1:  # an estimate stands for all draws; only their noise differs
            samples = samples.expand(settings.held_out_draws, *samples.shape[1:])
        y = y.cpu()
        predicted = torch.stack([split.held_out.A(x) for x in samples.to(y.dtype)])
        noise = torch.randn(predicted.shape, generator=generator, dtype=y.dtype)
        predicted = predicted + expand(sigma.cpu(), y) * noise
        mask = split.held_out.mask.expand(y.shape)
        if not bool(mask.any()):
            raise InputError(
                "em.held_out: expected measurements with rows to hold out, got none; give more of them"
            )
        score = float((crps(predicted, y) * mask).sum() / mask.sum())
        if not math.isfinite(score):
            raise InputError(
                f"EM: expected a finite score of held-out rows, got {score}: a prior that has diverged, or "
                "data of a size "
                "whose squares overflow"
            )
        return score


def crps(samples: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of samples (S, ...), S >= 2, entry by entry: unbiased in S; lower
    is better.
    """
    num = len(samples)
    ordered = samples.sort(0).values
    # sum_{s<s'} |z_s - z_s'| = sum_k (2 k - S + 1) z_(k), k = 0 .. S - 1
    rank = (2 * torch.arange(num, dtype=samples.dtype) - num + 1).reshape(-1, *([1] * truth.ndim))
    return (samples - truth).abs().mean(0) - (rank * ordered).sum(0) / (num * (num - 1))


def _gaussian_of(images: Tensor) -> Prior:
    """Mean and covariance of the draws (maximum likelihood); a spectrum for large images."""
    images = images.double()
    mean = images.mean(0)
    rest = images - mean
    if mean.numel() <= LARGEST_FULL:
        flat = rest.flatten(1)
        return GaussianPrior(mean.float(), (flat.mT @ flat / len(flat)).float())
    spectrum = torch.fft.fft2(rest, norm="ortho").abs().square().mean(0)
    return StationaryGaussianPrior(mean.float(), spectrum.float())


def _source_of_start(data: Measurements, config: TrainConfig) -> Source:
    """The measurements as the Ambient loss takes them; IdentifiabilityError names the way out if it
    cannot."""
    try:
        return judge(data, config)
    except IdentifiabilityError as error:
        raise IdentifiabilityError(
            f"em.start: expected gaussian for these masks, got ambient: {error}"
        ) from None


def _candidates(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The laps that may be kept: a mask-conditional start is not what EM promises, however well it scores."""
    return [r for r in reports if r.get("conditioning") != "mask-conditional"] or reports


def _best(reports: list[dict[str, Any]]) -> int:
    return min(_candidates(reports), key=_score)["lap"]


def _score(report: dict[str, Any]) -> float:
    """What a lap is judged by: the run's own selection, where it has one, else the CRPS of held-out rows."""
    return report.get("score", report["crps"])


def _rows(num: int, count: int) -> Tensor:
    """At most ``count`` different samples, evenly spread."""
    return torch.from_numpy(spread(num, count))
