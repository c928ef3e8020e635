"""No mixed devices, no CPU generator for noise of the device, and few waits: samplers, EM's E-step,
calibration.

On a pretended accelerator (`virtual_device`), in a process of its own: the registration of a device cannot be
undone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
OPERATORS = ["identity", "masking", "coils"]
SAMPLERS = ["mmps", "daps", "smc", "pnp-dm", "pigdm", "dps"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "jobs.py"), str(tmp_path_factory.mktemp("run"))],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def total(job: dict[str, Any], what: str = "waits") -> int:
    assert "error" not in job, job["error"]
    return sum(job[what].values())


@pytest.mark.parametrize("form", ["number", "entry"])
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_wait_once_an_iteration_of_a_solver(found, sampler, kind, form):
    """Four levels more cost a wait for each iteration of their solves and one for each solve, which is one a
    level; and no copy.
    """
    few, many = (found[f"{sampler} {kind} {form} {steps}"] for steps in (4, 8))
    iterations = many["report"].get("solver_iterations", 0) - few["report"].get("solver_iterations", 0)
    solves = {"smc": 3}.get(sampler, 1) * 4 if iterations else 0
    assert total(many) - total(few) <= iterations + solves, many["waits"]
    assert total(many, "copies") == total(few, "copies"), many["copies"]


@pytest.mark.parametrize("sampler", ["multistep", "heun", "ancestral"])
def test_generation_does_not_wait(found, sampler):
    few, many = (found[f"generate {sampler} {steps}"] for steps in (4, 8))
    assert total(many) == total(few) <= 1, many["waits"]
    assert total(many, "copies") == total(few, "copies") == 0, many["copies"]


def test_the_rest_of_a_run_is_a_few_waits(found):
    """Checks at the border, the check of samples, and the report: not for each chain and not for each level."""
    for name in ("dps identity number 8", "daps masking number 8", "pnp-dm identity entry 8"):
        assert total(found[name]) <= 8, found[name]["waits"]
        assert total(found[name], "copies") <= 3, found[name]["copies"]


def test_em_on_a_device(found):
    step = found["E-step"]
    assert total(step) <= step["report"]["solver_iterations"] + 30, step["waits"]
    assert total(found["held-out score"]) < 60, found["held-out score"]["waits"]


@pytest.mark.parametrize("name", ["with_truth", "held_out_rows", "chi_squared"])
def test_calibration_on_a_device(found, name):
    """Three measurements: what waits does so for a measurement, not for an entry or a sample."""
    assert total(found[name]) <= 60, found[name]["waits"]


@pytest.mark.parametrize(
    "stage",
    [
        *("identity", "identity, symmetries", "by entry", "masking", "k-space", "k-space, symmetries"),
        *("staged", "staged, replay", "staged, margin", "staged k-space", "joint"),
    ],
)
def test_training_waits_for_nothing_between_lines_of_the_log(found, stage):
    """Twenty steps more cost no wait at all: levels, masks and symmetries are looked at where they are drawn, on the host."""
    few, many = (found[f"train {stage} {steps}"] for steps in (4, 24))
    assert total(many) - total(few) <= {"staged, replay": 10}.get(stage, 0), (many["waits"], few["waits"])
