r"""Settings that are "auto": chosen when a run begins, from data, limit and the speed of this machine.

    augmentations    every symmetry that is exact for operator and masks and that the images do not contradict
                     (`ambient_sci.training.orientation`): reflections, transposition, phases of complex
                     images. None that mirrors where samples have class labels: a mirrored b is a d. Of MRI, a
                     phase and a gain in any case: scanners choose both.
    network          "small" for small or few images and for short runs, "medium" and "large" for more, see
                     `suited` and `affordable`
    batch_size       16, or the next number that processes and micro_batches can share
    levels           log-normal about 0.6 d (as Karras et al. 2022), d the standard deviation of the images;
                     about 0.37 d where their noise is more than that, so that levels just above it are common
    learning_rate    0.096 patch / width for a U-Net of that width at its first level (0.006 "small", 0.003
                     "medium", 0.0015 "large"), but 0.006 at most; 0.001 for other networks
    warmup_steps     a twentieth of the run, 50 at most
    centre           true: the network works around the mean of the images
    ema_decay        0.9999: the average then spans the last ninth of the run, whatever its length

The length of a run is its ``max_steps``; where only time limits it, the number of steps that fit, by the time
of a few steps of candidate networks on this machine, in its own precision and threads. That is the only
choice that depends on the machine. What was chosen is written into ``config.json`` as explicit settings, and
into ``run.json`` with its reason: a resumed run, and one that is repeated from its ``config.json`` elsewhere,
chooses nothing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ambient_sci.priors.backbones import build
from ambient_sci.priors.config import NetworkConfig
from ambient_sci.priors.network import call_network
from ambient_sci.priors.presets import PRESETS, preset
from ambient_sci.training.augment import exact_augmentations
from ambient_sci.training.config import AUGMENTATIONS, LevelConfig, TrainConfig
from ambient_sci.training.orientation import SYMMETRIES, contradicted
from ambient_sci.training.source import Source

#: Steps below which a network of this name does worse than the next smaller one in the same time.
LEAST_STEPS = {"small": 0, "medium": 8_000, "large": 40_000}
#: Pixels, of all images together, below which it learns the noise of the images as well.
LEAST_PIXELS = {"small": 0, "medium": 2_000_000, "large": 20_000_000}
_BATCH, _WARMUP, _EMA, _RATE = 16, 50, 0.9999, 0.096
_TIMED = 3
_IMAGES_SEEN = 32_000


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        config: the run, with nothing left to choose.
        sentence: what was chosen and why, in a line; empty where nothing was left to choose.
        record: the same for ``run.json``: ``settings`` (names), ``because``, and ``seconds_per_step`` where
            time was measured.
    """

    config: TrainConfig
    sentence: str = ""
    record: dict[str, Any] | None = None

    @property
    def sentences(self) -> list[str]:
        """The sentence, if there is one."""
        return [self.sentence] if self.sentence else []

    @property
    def entry(self) -> dict[str, Any]:
        """What is written to ``run.json``."""
        return {"chosen": self.record} if self.record else {}


def settle(config: TrainConfig, source: Source, accelerator: Accelerator, started: bool = False) -> Choice:
    """Choose what ``config`` leaves open; the main process of several does so for all.

    Args:
        config: the run.
        source: its data, judged.
        accelerator: device and processes.
        started: the run goes on from a prior, and ``config.network`` is not used.
    """
    if not config.open_settings:
        return Choice(config)
    choice = _choose(config, source, accelerator, started) if accelerator.is_main_process else None
    if accelerator.num_processes > 1:
        choice = broadcast_object_list([choice], from_process=0)[0]
    assert choice is not None
    return choice


def _choose(config: TrainConfig, source: Source, accelerator: Accelerator, started: bool) -> Choice:
    shares = accelerator.num_processes * config.micro_batches
    names, said = symmetries(config, source)
    chosen: dict[str, Any] = {
        "augmentations": names,
        "batch_size": math.ceil(_BATCH / shares) * shares,
        "ema_decay": _EMA,
        "centre": True,
        "levels": levels(source),
    }
    left = config.open_settings
    config = _with(config, chosen)
    if started:
        network, seconds, reason = NetworkConfig(), None, "network of the prior it starts from"
    else:
        network, seconds, reason = choose_network(config, source, accelerator.device)
    chosen |= {"network": network, "learning_rate": 1e-3 if started else learning_rate(network)}
    chosen["warmup_steps"] = max(1, min(_WARMUP, run_length(config, seconds) // 20))
    settled = _with(config, chosen)
    rest = {
        "learning_rate": f"learning rate {settled.learning_rate:g}",
        "batch_size": f"batches of {settled.batch_size}",
        "augmentations": said,
    }
    because = "; ".join([reason, *(words for key, words in rest.items() if key in left)])
    record: dict[str, Any] = {"settings": left, "because": because}
    if seconds is not None:
        record["seconds_per_step"] = float(f"{seconds:.3g}")
    return Choice(settled, f"chosen: {because}", record)


def _with(config: TrainConfig, chosen: dict[str, Any]) -> TrainConfig:
    """``config`` with those of ``chosen`` that it leaves open."""
    return replace(config, **{k: v for k, v in chosen.items() if config.is_open(k)})


# -- symmetries ----------------------------------------------------------------------------------------------


def symmetries(config: TrainConfig, source: Source) -> tuple[tuple[str, ...], str]:
    """Augmentations for these data, and why, in words."""
    data = source.measurements
    # The M-steps of EM train on images, whatever the measurements are.
    on_images = config.em is not None
    operator, design = ("identity", None) if on_images else (data.operator_name, source.design)
    exact = exact_augmentations(AUGMENTATIONS, source.image_shape, operator, design)
    labelled = data.labels(range(1)) is not None or data.prompts([0]) is not None
    always = {"phase", "gain"} if data.operator_name == "mri" else set()
    if data.noise_by_entry:
        exact = tuple(name for name in exact if name != "phase")
    asked = tuple(n for n in exact if n in SYMMETRIES and n not in always and (n == "phase" or not labelled))
    against = contradicted(data, source.complete, asked)
    names = tuple(n for n in exact if n in always or (n in asked and n not in against))
    said = f"augmentations {', '.join(names) or 'none'}"
    if against:
        said += f" (not {', '.join(against)}: the images tell them apart)"
    elif labelled:
        said += " (no mirrored images: classes may differ by them)"
    return names, f"{said}, --augmentations none turns them off" if names else said


def levels(source: Source) -> LevelConfig:
    """Noise levels to train at, relative to the standard deviation of the images; see the module."""
    lowest = float(source.noise_std.min()) / source.data_std  # nan where EM has yet to find the images
    return LevelConfig(mean=-1.0 if lowest > math.exp(-1) else -0.5)


# -- network -------------------------------------------------------------------------------------------------


def suited(num: int, height: int, width: int) -> tuple[str, ...]:
    """Networks by name that suit ``num`` images of this size, from small to large: what a run may take that
    has time enough. Of few images a large network learns the noise."""
    pixels = num * height * width
    return tuple(name for name in PRESETS if pixels >= LEAST_PIXELS[name])


def choose_network(
    config: TrainConfig, source: Source, device: torch.device
) -> tuple[NetworkConfig, float | None, str]:
    """The network, the seconds that a step of it takes where that was measured, and why, in words."""
    height, width = source.image_shape[1:]
    if not config.is_open("network"):
        network = config.network
        return network, _timed(config, network, source, device), "network as given"
    if config.network != "auto":
        name = str(config.network)
        network = preset(name, height, width)
        return network, _timed(config, network, source, device), _described(name, network, "as asked for")
    num = len(source.measurements)
    names = suited(num, height, width)
    facts = f"{num} images of {height} x {width}"
    if _limited_by_time(config):
        return _affordable(names, facts, config, source, device)
    steps = run_length(config, None)
    name = max((n for n in names if LEAST_STEPS[n] <= steps), key=PRESETS.index)
    network = preset(name, height, width)
    return network, None, _described(name, network, f"for {steps:,} steps on {facts}")


def _affordable(
    names: tuple[str, ...], facts: str, config: TrainConfig, source: Source, device: torch.device
) -> tuple[NetworkConfig, float, str]:
    """The largest network that makes the steps it needs in the time there is."""
    height, width = source.image_shape[1:]
    found: tuple[str, NetworkConfig, float, int] | None = None
    for name in names:
        # A larger network takes longer: where this one has no time for the next, none has to be timed.
        if found is not None and found[3] < LEAST_STEPS[name]:
            break
        network = preset(name, height, width)
        seconds = step_seconds(config, network, source, device)
        steps = run_length(config, seconds)
        if found is None or steps >= LEAST_STEPS[name]:
            found = (name, network, seconds, steps)
    assert found is not None
    name, network, seconds, steps = found
    reason = f"about {steps:,} steps of {seconds:.2g} s fit into {config.max_minutes:g} min, {facts}"
    return network, seconds, _described(name, network, reason)


def _described(name: str, network: NetworkConfig, why: str) -> str:
    folded = f", patch {network.patch}" if network.patch > 1 else ""
    return f"network {name} (channels {', '.join(map(str, network.channels))}{folded}; {why})"


def _limited_by_time(config: TrainConfig) -> bool:
    return config.max_minutes is not None and config.em is None


def run_length(config: TrainConfig, seconds: float | None) -> int:
    """Steps that a run makes, where ``seconds`` is the time of one."""
    if config.em is not None:
        return config.em.steps
    limits = [config.step_limit] if config.step_limit is not None else []
    if config.max_minutes is not None and seconds is not None:
        limits.append(max(1, int(60 * config.max_minutes / seconds)))
    return min(limits, default=1_000)


def learning_rate(network: NetworkConfig) -> float:
    """Learning rate for a network; see the module."""
    if network.kind != "unet":
        return 1e-3
    return float(f"{min(_RATE * network.patch / network.channels[0], 6e-3):.3g}")


# -- time ----------------------------------------------------------------------------------------------------


def _timed(config: TrainConfig, network: NetworkConfig, source: Source, device: torch.device) -> float | None:
    """Seconds of a step, where something depends on it: how long the warm-up is."""
    matters = _limited_by_time(config) and config.is_open("warmup_steps")
    return step_seconds(config, network, source, device) if matters else None


def step_seconds(config: TrainConfig, network: NetworkConfig, source: Source, device: torch.device) -> float:
    """Seconds of a training step of this process: the fastest of a few, forward, backward and optimiser.

    Noise in the place of data: what is measured is the network's time, which is nearly all of it.
    """
    channels, height, width = source.image_shape
    extra = 0 if source.complete else (source.design.unit_shape[0] if source.design else 1)
    generator = torch.Generator().manual_seed(0)
    module = build(network, (channels, height, width), extra, generator).to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), fused=device.type in ("cpu", "cuda"))
    part = max(1, config.batch_size // config.micro_batches)
    x = torch.randn(part, channels + extra, height, width, generator=generator).to(device)
    level = torch.ones(part, device=device)
    best = math.inf
    for _ in range(_TIMED):
        _synchronise(device)
        begun = time.perf_counter()
        for _ in range(config.micro_batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                answer = call_network(module, x, level)
            answer.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronise(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- was it enough -------------------------------------------------------------------------------------------


def steps_needed(num: int, batch_size: int, height: int, width: int) -> int:
    """Steps after which more of them buy little: a rule of thumb, see `recipes.benchmarks.first_hour`.

    Two thousand batches of 16 for a few hundred images of 32 x 32 pixels. More images have more to be learned
    from, with the square root of their number; so have larger ones, with the root of their sides.
    """
    images = _IMAGES_SEEN * math.sqrt(max(1.0, num / 300)) * math.sqrt(max(1.0, max(height, width) / 32))
    return _rounded(images / batch_size)


def closing_line(config: TrainConfig, source: Source, steps: int, seconds: float) -> str:
    """Whether the steps of a run that has ended were enough, and how to go on.

    Args:
        config: the run, explicit.
        source: its data.
        steps: that it made.
        seconds: that it took.
    """
    num, (height, width) = len(source.measurements), source.image_shape[1:]
    needed = steps_needed(num, config.batch_size, height, width)
    what = f"{num:,} images of {height} x {width}"
    if steps >= needed:
        return f"{steps:,} steps are enough for {what}, of which about {needed:,} are needed"
    go_on = "--resume"
    if config.max_minutes is not None:
        minutes = _rounded(1.1 * needed * seconds / max(steps, 1) / 60)
        go_on += f" --max-minutes {max(minutes, math.ceil(config.max_minutes + 1))}"
    if config.max_minutes is None or (config.max_steps is not None and config.max_steps < needed):
        go_on += f" --max-steps {needed}"
    return f"{steps:,} steps are few for {what}: about {needed:,} are needed; go on with {go_on}"


def _rounded(value: float) -> int:
    """Upwards, to two digits."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return math.ceil(value / unit) * unit
