"""A training run that is killed, and several processes: the same loss trace and the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ambient_sci.data import write_measurements
from ambient_sci.operators import make_design
from ambient_sci.priors import NetworkConfig
from ambient_sci.training import JointConfig, StagedConfig, TrainConfig, fit

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


def scans_file(tmp_path: Path) -> Path:
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


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return scans_file(tmp_path)


def trace(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.mark.parametrize("aim", [7, 56, 105])
def test_killed_and_resumed(tmp_path, scans, aim):
    """SIGKILL leaves no time for anything. The kill falls wherever the process is once it has got past the
    aim.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(scans, configuration(), out=whole, progress=False)
    killed.mkdir()
    (killed / "config.json").write_text((whole / "config.json").read_text())
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


SHARED = """
import json, sys
from ambient_sci.training import TrainConfig, fit
for path, config, out, resume in json.load(open(sys.argv[1])):
    fit(path, TrainConfig.load(config), out=out, resume=resume, progress=False)
"""


def images(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    x = 0.6 * torch.randn(20, 1, 4, 4, generator=generator)
    y = x + 0.4 * torch.randn(x.shape, generator=generator)
    return write_measurements(
        tmp_path / "images.h5",
        measurements=y,
        mask=None,
        noise_std=0.4,
        operator="identity",
        image_shape=(1, 4, 4),
    )


MLP = {"network": NetworkConfig(kind="mlp", channels=(16,)), "betas": (0.9, 0.9)}
CASES = {
    "masked k-space": ({"augmentations": ("phase", "gain")}, scans_file),
    "images, parts": ({"micro_batches": 2, **MLP}, images),
    "staged": (
        {**MLP, "consistency": StagedConfig(max_steps=8, walk=(1, 2), margin=1.1, shrinkage=0.2)},
        images,
    ),
    "staged, replay": ({**MLP, "consistency": StagedConfig(max_steps=8, replay=True, gap=2.0)}, images),
    "joint": ({**MLP, "consistency": JointConfig(walk=(0, 2))}, images),
}


CHAINS = configuration(
    **MLP,
    max_steps=4,
    log_interval=2,
    schedule="constant",
    consistency=StagedConfig(max_steps=8, replay=True, gap=2.0),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Path, dict[str, tuple[Path, TrainConfig]]]:
    """All runs on two processes, one after the other in one launch: starting them is what takes time."""
    folder = tmp_path_factory.mktemp("shared")
    jobs, runs = [], {}
    files = {make: make(folder) for make in (scans_file, images)}

    def add(name: str, path: Path, config: TrainConfig, out: str, resume: bool = False) -> None:
        config.save(folder / f"{name}.json")
        jobs.append((str(path), str(folder / f"{name}.json"), str(folder / out), resume))
        runs[name] = (path, config)

    for name, (changes, data) in CASES.items():
        settings = {"max_steps": 8, "log_interval": 2, "warmup_steps": 1, **changes}
        add(name, files[data], configuration(**settings), name)
    shorter = replace(CHAINS, consistency=StagedConfig(max_steps=4, replay=True, gap=2.0))
    add("chains", files[images], CHAINS, "chains")
    add("shorter chains", files[images], shorter, "resumed chains")
    add("resumed chains", files[images], CHAINS, "resumed chains", True)
    (folder / "shared.py").write_text(SHARED)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(folder / "shared.py"), str(folder / "jobs.json")]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=600)
    return folder, runs


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_twice_the_parts(tmp_path, shared, name):
    """The same samples, levels, splits and noise, the mean gradient of all: weights and losses agree to
    rounding.

    Gradients are clipped, and AdamW divides by their size, so a sum in place of the mean would be hidden in
    the weights: the norm of the gradient, before clipping, is in the log.
    """
    folder, (path, config) = shared[0], shared[1][name]
    fit(path, replace(config, micro_batches=2 * config.micro_batches), out=tmp_path / "one", progress=False)
    check_same_run(tmp_path / "one", folder / name)
    # One part takes other draws: agreement is not for want of randomness.
    fit(path, replace(config, micro_batches=1), out=tmp_path / "other", progress=False)
    with pytest.raises(AssertionError):
        check_same_run(tmp_path / "one", tmp_path / "other")


def check_same_run(one: Path, two: Path) -> None:
    ours, theirs = trace(one), trace(two)
    assert [(a["stage"], a["step"]) for a in ours] == [(b["stage"], b["step"]) for b in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    a, b = (load_file(run / "prior" / "weights.safetensors") for run in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=2e-5) for k in a)


def test_two_processes_go_on_with_their_own_chains(shared):
    """Replayed chains are gathered when they are saved, and each process goes on with its own: the same
    bits.
    """
    whole, resumed = shared[0] / "chains", shared[0] / "resumed chains"
    for name in ("prior/weights.safetensors", "checkpoint/consistency.safetensors"):
        ours, theirs = load_file(resumed / name), load_file(whole / name)
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), name
    states = load_file(whole / "checkpoint" / "consistency.safetensors")["stage.states"]
    assert len(states) == 4 and not torch.allclose(states[:2], states[2:], atol=1e-2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message(tmp_path, victim):
    """Within a minute, by a sentence and not by a traceback; the checkpoint is there to go on from."""
    path, out = images(tmp_path), tmp_path / "run"
    configuration(**MLP, max_steps=10**6, log_interval=5).save(tmp_path / "config.json")
    script = (
        "import os, pathlib, sys\n"
        "from ambient_sci.cli import main\n"
        "pathlib.Path(sys.argv[1], 'pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    (tmp_path / "watched.py").write_text(script)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *(str(tmp_path / "watched.py"), str(tmp_path)),
        *("train", str(path), "--config", str(tmp_path / "config.json"), "--out", str(out)),
    ]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    log, deadline = out / "log.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 3 and (out / "checkpoint").exists():
            break
        time.sleep(0.01)
    os.kill(int((tmp_path / f"pid{victim}").read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    lines = [line for line in said.splitlines() if "another process of this run has ended" in line]
    assert len(lines) == 1 and f"process {1 - victim} of 2" in lines[0] and "resume" in lines[0], said
