"""`fit`: from measurements to a prior. Decides from data and configuration which stages run, says so, and
runs them.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from ambient_sci._version import __version__
from ambient_sci.errors import InputError
from ambient_sci.priors import NetworkConfig, Prior
from ambient_sci.sampling.border import PriorLike
from ambient_sci.training.auto import closing_line, settle
from ambient_sci.training.batches import Batches
from ambient_sci.training.below_noise import (
    ConsistencyStage,
    JointStage,
    second_stage_config,
    staged_levels,
    staged_reason,
)
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.distillation import DistillationStage
from ambient_sci.training.em import run_em
from ambient_sci.training.loop import run_stage
from ambient_sci.training.players import trainable_names
from ambient_sci.training.processes import Processes
from ambient_sci.training.report import Reporter
from ambient_sci.training.run_folder import RunFolder
from ambient_sci.training.selection import Selection
from ambient_sci.training.source import Source, open_source
from ambient_sci.training.stage_configs import DistillConfig, EMConfig, JointConfig, StagedConfig
from ambient_sci.training.stages import AmbientStage, check_start, padding_of, started_from
from ambient_sci.training.start import check_scale, prior_to_start_from, with_network
from ambient_sci.whole_files import digest_of


def fit(
    measurements: Any,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    initial: PriorLike | None = None,
    selection: Selection | None = None,
    *,
    seed: int | None = None,
    device: str | None = None,
    network: NetworkConfig | nn.Module | str | None = None,
    init_from: PriorLike | None = None,
) -> Prior:
    """Train a prior on measurements alone.

    Complete data (identity, or fully sampled MRI with normalised coil maps) give an unconditional prior, by
    the Ambient loss; incomplete data give a mask-conditional one, by the operator-aware Ambient loss with
    held-out rows. ``config.consistency`` adds a stage (or a loss) for what lies below the noise of the data;
    ``config.em`` gives an unconditional prior from any measurements. What runs is said on standard error and
    written to ``run.json``.

    Args:
        measurements: a measurement file or a list of them; (operator, y, sigma_y) with y (N, ...), a tensor
            or a NumPy array, and sigma_y a float, (N,), or of the shape of y, per real channel; (operator, y)
            where the operator's noise model says the level; a list of such pairs or triples, one for each
            measurement or for several; `MeasurementArrays`. The operator is one of this library, or deepinv's
            ``Denoising``, ``Inpainting``, ``MRI`` or ``MultiCoilMRI``; with ``config.em`` any
            ``LinearPhysics``.
        config: the run; default: `TrainConfig()`, or what the run was started with when resuming. What it
            leaves open is chosen, see `ambient_sci.training.auto`, or taken from the run when resuming.
        out: run folder, see `ambient_sci.training.run_folder`; nothing is written without one.
        resume: continue the run in ``out`` from its last checkpoint. Step-limited runs end with the same bits
            as if they had not been interrupted (CPU, same number of threads). Limits, device and intervals
            may be changed; nothing else.
        overwrite: replace an earlier run in ``out``.
        progress: show a progress bar, or lines where standard error is no terminal.
        initial: a prior to go on from instead of random weights: any that was trained or registered, a
            `LoraPrior` of one to train an adapter alone. It is copied; ``config.network`` is not used.
        selection: keep the state that scores best instead of the last one; of the last stage, or the laps of
            EM. To be given again with ``resume``.
        seed, device: in place of the configuration's; "auto", "cpu" or "cuda".
        network: in place of the configuration's: a `NetworkConfig`, the name of a backbone, or a module of
            your own, forward(x, level), which is copied. A module alone cannot be written to ``out``: see
            `ambient_sci.priors.backbones.register`.
        init_from: as ``initial``; a place is written to the configuration, as its ``init_from``.

    Returns:
        the prior with averaged weights, in evaluation mode, on the training device.

    Raises:
        InputError: unusable data or configuration, an occupied folder, a folder that another process trains
            in, or a run of other data or settings to resume.
        IdentifiabilityError: a mask design that leaves rows unsupervised.
        TrainingDiverged: loss or gradient not finite; names step and samples.
        ProcessLost: another process of the run has ended.
        TrainingInterrupted: SIGINT or SIGTERM; after the step at hand, with a checkpoint where ``out`` is
            given.
    """
    if resume and out is None:
        raise InputError("resume: expected a run folder, got none")
    folder = RunFolder(out) if out is not None else None
    if folder and not resume:
        folder.check_free(overwrite)
    if config is None:
        config = folder.config if folder and resume else TrainConfig()
    elif not isinstance(config, TrainConfig):
        raise InputError(f"config: expected a TrainConfig, got {type(config).__name__}")
    given = {"seed": seed, "device": device}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    config = with_network(config, network, saved=out is not None)
    config, start = prior_to_start_from(config, initial, init_from)
    accelerator = make_accelerator(config.device)
    with ExitStack() as held:
        if folder and accelerator.is_main_process:
            held.enter_context(folder.alone())
            if not resume:  # another process may have been here between the first look and the lock
                folder.check_free(overwrite)
        reporter = Reporter(progress and accelerator.is_main_process)
        return _fit(measurements, config, folder, resume, start, accelerator, reporter, selection)


def _fit(
    measurements: Any,
    config: TrainConfig,
    folder: RunFolder | None,
    resume: bool,
    initial: Prior | None,
    accelerator: Accelerator,
    reporter: Reporter,
    selection: Selection | None,
) -> Prior:
    """`fit` in a folder that is held."""
    if folder and resume:
        config = replace(config, **folder.chosen(config))
    if config.em is not None:
        if initial is not None:
            raise InputError(
                "initial: expected no prior to start from with em, whose laps start from one another, got one"
            )
        return run_em(measurements, config, folder, accelerator, reporter, resume, selection)
    source = _opened(measurements, config, folder if resume else None)
    choice = settle(config, source, accelerator, started=initial is not None)
    config = choice.config
    if config.distillation is not None:
        return _distil(source, config, folder, resume, initial, accelerator, reporter, selection)
    kind = JointStage if isinstance(config.consistency, JointConfig) else AmbientStage
    start = None if initial is None else started_from(initial, source, folder is not None)
    if start is not None:
        check_scale(start, source)
    first = kind(source, config, accelerator, start)
    reasons = {first.name: first.reason}
    staged = config.consistency if isinstance(config.consistency, StagedConfig) else None
    if staged:  # judged before anything runs, so that what is refused is refused now
        reasons["consistency"] = staged_reason(staged_levels(first.batches, staged)[0])
    fingerprint = source.fingerprint()
    if initial is not None:
        fingerprint["initial"] = digest_of(initial.saved_tensors())
    description = describe_run(reasons, fingerprint, first) | choice.entry
    if folder and accelerator.is_main_process:
        folder.reopen(config, description) if resume else folder.create(config, description)
    Processes(accelerator).wait()
    for reason in [*reasons.values(), *choice.sentences, padding_of(first.module)]:
        if reason:
            reporter.say(reason)
    options: Any = {"accelerator": accelerator, "folder": folder, "resume": resume, "reporter": reporter}
    try:
        prior = run_stage(first, config, selection=None if staged else selection, **options)
        if staged:
            second = ConsistencyStage(first.batches, prior, config, trainable_names(first.module))
            prior = run_stage(second, second_stage_config(config), selection=selection, **options)
    finally:
        first.batches.close()
    if initial is None and first.name in reporter.ended:
        reporter.say(closing_line(config, source, *reporter.ended[first.name]))
    return prior.eval()


def _distil(
    source: Source,
    config: TrainConfig,
    folder: RunFolder | None,
    resume: bool,
    teacher: Prior | None,
    accelerator: Accelerator,
    reporter: Reporter,
    selection: Selection | None,
) -> Prior:
    """`fit` with ``config.distillation``."""
    if teacher is None:
        raise InputError("distillation: expected the prior to distil (initial), got none")
    check_start(teacher, source, folder is not None)
    batches = Batches(source, config, accelerator)
    stage = DistillationStage(batches, teacher, config)
    fingerprint = {**source.fingerprint(), "initial": digest_of(teacher.saved_tensors())}
    description = describe_run({stage.name: stage.reason}, fingerprint, stage)
    if folder and accelerator.is_main_process:
        folder.reopen(config, description) if resume else folder.create(config, description)
    Processes(accelerator).wait()
    reporter.say(stage.reason)
    try:
        options: Any = {"accelerator": accelerator, "folder": folder, "resume": resume, "reporter": reporter}
        return run_stage(stage, config, selection=selection, **options).eval()
    finally:
        batches.close()


def distill(
    prior: Prior,
    measurements: Any,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Prior:
    """A generator that draws an image in one call, from a prior and the measurements it was learned from.

    `fit` with ``config.distillation``, which this sets to its defaults if it is None. See
    `ambient_sci.training.distillation` for the method.

    Args:
        prior: the teacher, saved or in memory; copied.
        measurements: as for `fit`. Their operators, noise levels and labels are used, not their values.
        config: the run.
        out: run folder.
        **options: ``resume``, ``overwrite``, ``progress``, ``selection`` of `fit`.

    Returns:
        a `OneStepPrior`, which `generate` calls once an image.

    Raises:
        InputError: as for `fit`; a prior of other images or another kind than the measurements need, or
            levels that it has not learned.
    """
    config = config or TrainConfig()
    config = config if config.distillation else replace(config, distillation=DistillConfig())
    return fit(measurements, config, out, initial=prior, **options)


def _opened(measurements: Any, config: TrainConfig, resumed: RunFolder | None) -> Source:
    """The data, judged: those of the run that is resumed. Others may not even allow what it was configured
    for."""
    source = open_source(measurements, config)
    if resumed and resumed.begun:
        fingerprint = source.fingerprint()
        resumed.check_data(fingerprint, fingerprint)
    return source


def explicit_config(
    measurements: Any,
    config: TrainConfig | None = None,
) -> tuple[TrainConfig, str]:
    """What `fit` would train with: ``config`` with nothing left to choose, and why, in a line.

    Args:
        measurements: as `fit` takes them.
        config: the run; default: `TrainConfig()`.

    Raises:
        InputError: unusable data or configuration.
    """
    config = config or TrainConfig()
    choice = settle(config, open_source(measurements, config), make_accelerator(config.device))
    return choice.config, choice.sentence


def fit_em(
    measurements: Any,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    *,
    seed: int | None = None,
    device: str | None = None,
    network: NetworkConfig | str | None = None,
) -> Prior:
    """An unconditional prior from measurements of any kind; `fit` with ``config.em``, which this sets to its
    defaults if it is None.

    Arguments and errors are those of `fit`; em.json in ``out`` has a report for each lap, see `em_report`.
    """
    config = config or TrainConfig()
    config = config if config.em else replace(config, em=EMConfig())
    options: Any = {"seed": seed, "device": device, "network": network}
    return fit(measurements, config, out, resume, overwrite, progress, **options)


def describe_run(
    reasons: dict[str, str], fingerprint: dict[str, Any], stage: AmbientStage | DistillationStage
) -> dict[str, Any]:
    """What ``run.json`` says: data, the stages that run and why."""
    network: Any = stage.module
    return {
        "ambient_sci": __version__,
        "torch": str(torch.__version__),
        "stages": [{"name": name, "reason": reason} for name, reason in reasons.items()],
        "data": fingerprint,
        "prior": {
            "conditioning": network.conditioning,
            "data_std": network.data_std,
            "sigma_min": network.sigma_min,
            "sigma_max": network.sigma_max,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    }


def make_accelerator(device: str) -> Accelerator:
    """An `Accelerator` for "auto", "cpu" or "cuda". Precision is the configuration's business, not the
    launcher's.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected a machine with CUDA for 'cuda', got one without; use auto or cpu")
    cpu = device == "cpu" or not torch.cuda.is_available()
    state: Any = PartialState._shared_state
    if state and state.get("_cpu") != cpu and state.get("num_processes") == 1:
        # accelerate keeps the device of a process's first run; a later one may ask for another.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision="no")
