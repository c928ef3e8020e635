"""A training run that is killed, and several processes: the same loss trace and the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ambient_sci.data import write_measurements
from ambient_sci.operators import make_design
from ambient_sci.priors import NetworkConfig
from ambient_sci.training import TrainConfig, fit

STEPS = 150
TRAIN = "import sys; from ambient_sci.training import fit; fit(sys.argv[1], out=sys.argv[2], resume=True, progress=False)"


def configuration(**changes) -> TrainConfig:
    network = NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8)
    return TrainConfig(
        **{
            "max_steps": STEPS,
            "batch_size": 4,
            "log_interval": 7,
            "checkpoint_minutes": 0.003,
            "device": "cpu",
            "network": network,
            **changes,
        }
    )


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    design = make_design("lines-variable", image_shape=(2, 8, 8), acceleration=2, acs=2)
    mask = design.sample(20, generator)
    y = mask * torch.randn(20, 2, 8, 8, generator=generator)
    return write_measurements(
        tmp_path / "scans.h5",
        measurements=torch.complex(y[:, 0], y[:, 1]),
        mask=mask[:, 0],
        noise_std=0.1,
        operator="mri",
        image_shape=(2, 8, 8),
        design=design,
    )


def trace(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.parametrize("aim", [7, 56, 105])
def test_killed_and_resumed(tmp_path, scans, aim):
    """SIGKILL leaves no time for anything. The kill falls wherever the process is once it has got past the aim."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(scans, configuration(), out=whole, progress=False)
    killed.mkdir()
    configuration().save(killed / "config.json")
    (killed / "run.json").write_text((whole / "run.json").read_text())
    (killed / "checkpoint").mkdir()

    process = subprocess.Popen([sys.executable, "-c", TRAIN, str(scans), str(killed)], env=environment())
    log, deadline = killed / "log.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and 7 * log.read_text().count("\n") >= aim:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = trace(killed)[-1]["step"]
    assert aim <= reached < STEPS

    fit(scans, out=killed, resume=True, progress=False)
    assert trace(killed) == trace(whole), f"aimed at {aim}, killed after {reached}"
    for name in ("prior/weights.safetensors", "checkpoint/ambient.safetensors"):
        ours, theirs = load_file(killed / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"{name}: killed after {reached}"
    leftovers = [p for p in killed.rglob("*") if p.name.startswith(".")]
    assert not leftovers


MULTI = """
import sys, torch
from accelerate import Accelerator
from ambient_sci.training import TrainConfig, fit
prior = fit(sys.argv[1], TrainConfig.load(sys.argv[2]), out=sys.argv[3], progress=False)
accelerator = Accelerator(cpu=True)
flat = torch.cat([p.flatten() for p in prior.parameters()])
both = accelerator.gather(flat).reshape(accelerator.num_processes, -1)
assert accelerator.num_processes == 2 and torch.equal(both[0], both[1])
"""


def test_two_processes_share_a_batch_and_hold_the_same_weights(tmp_path, scans):
    (tmp_path / "multi.py").write_text(MULTI)
    configuration(max_steps=12).save(tmp_path / "config.json")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    names = ("multi.py", "config.json", "run")
    arguments = [str(tmp_path / names[0]), str(scans), *(str(tmp_path / n) for n in names[1:])]
    subprocess.run(
        [*launch, *arguments], env={**environment(), "OMP_NUM_THREADS": "1"}, check=True, timeout=300
    )
    assert [line["step"] for line in trace(tmp_path / "run")] == [7, 12]
