"""The parts of the experiment, and what is done in each: train, draw, score, beside the score of as many
draws of the truth (the floor)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from torch import Tensor

from ambient_sci.priors import Prior
from ambient_sci.training import em_report
from recipes.exactness import methods

HERE = Path(__file__).parent
MODULES = {
    "ring": "toy_part",
    "mixture": "toy_part",
    "digits": "digits_part",
    "masked": "masked_part",
    "masked-mixture": "masked_part",
}


@dataclass(frozen=True)
class Job:
    """A cell of the table.

    Attributes:
        run: what is trained.
        level: noise level of the data, or fraction of entries missing.
        size: number of measurements.
        seed: of everything drawn.
        settings: of the part, config.yaml.
    """

    run: str
    level: float
    size: int
    seed: int
    settings: dict[str, Any]


class Problem(NamedTuple):
    """What a cell needs.

    Attributes:
        data: measurements to learn from.
        score: (prior, samples) -> scores.
        floor: the scores of draws of the truth.
        kept: rows that samplers are shown.
        keep: (row of the table, samples), for who wants to see them.
    """

    data: Any
    score: Callable[[Prior, Tensor], dict[str, Any]]
    floor: Callable[[], Any]
    kept: Any = None
    keep: Callable[[str, Tensor], Any] | None = None


class Part:
    """A part of the experiment.

    Attributes:
        RUNS: what is trained.
        LEVELS: name of the setting that lists the levels of the data.
    """

    RUNS: ClassVar[tuple[str, ...]]
    LEVELS: ClassVar[str] = "sigma_n"

    def __init__(self, name: str) -> None:
        self.name = name

    def levels(self, settings: dict[str, Any]) -> list[float]:
        """Noise levels of the data, or fractions missing."""
        return settings[self.LEVELS]

    def seeds(self, settings: dict[str, Any], level: float) -> list[int]:
        """Seeds that are reported at a level."""
        return settings["seeds"]

    def problem(self, job: Job, folder: Path) -> Problem:
        """What a cell learns from and is scored by; ``folder`` keeps what the cells of the part share."""
        raise TypeError(f"{type(self).__name__} does not say its problem")

    def rows(self, job: Job, prior: Prior, problem: Problem) -> dict[str, dict[str, Any]]:
        """Rows of the table: sampled by Heun's method and scored."""
        return methods.rows(job.run, prior, job.level, job.settings, job.seed, problem.score, problem.keep)

    def run(self, job: Job, folder: Path, device: str) -> dict[str, Any]:
        """A cell; ``folder`` is its run folder, in the folder of the part."""
        problem = self.problem(job, folder.parent)
        prior, seconds = methods.train(problem.data, job.run, job.settings, job.seed, folder, device)
        found: dict[str, Any] = {
            "rows": self.rows(job, prior, problem),
            "floor": problem.floor(),
            "training_seconds": round(seconds, 1),
        }
        return {**found, "laps": em_report(folder)} if job.run == "em" else found


def load_part(name: str) -> Part:
    """A part by its name."""
    return importlib.import_module(f"recipes.exactness.{MODULES[name]}").Part(name)


def load_settings(profile: str, part: str) -> dict[str, Any]:
    """The settings of a part in a profile of config.yaml."""
    return yaml.safe_load((HERE / "config.yaml").read_text())[profile][part]
