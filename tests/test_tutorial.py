"""The tutorials run as they stand, in miniature: shorter trainings, coarser sampling, tiny pictures."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from matplotlib.image import imread
from PIL import Image
from test_fastmri import kspace_of, line_mask, save

from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile
from ambient_sci.sampling import POSTERIOR_SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "docs" / "tutorials"
SHORTER = {"--max-minutes": ("--max-steps", "2"), "--samples": ("--samples", "2")}
SMALL_EM = {
    "laps": 1, "steps": 1, "sampler_steps": 2, "max_iterations": 1, "initial_iterations": 1,
    "held_out": 2, "held_out_draws": 2,
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (TUTORIALS / page).read_text(), flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    return [
        shlex.split(line, comments=True)
        for block in blocks(page, "sh")
        for line in block.strip().splitlines()
    ]


def shortened(words: list[str]) -> list[str]:
    """A command with a tiny budget in place of the one it names."""
    found = list(words)
    for option, instead in SHORTER.items():
        if option in found:
            k = found.index(option)
            found[k : k + 2] = instead
    if found[0] == "reconstruct":
        found += ["--steps", "3", "--max-iterations", "1"]
    if "--resume" in found:  # the limit counts from the beginning of the run
        found[found.index("--max-steps") + 1] = "3"
    return found


def test_the_way_from_own_scans_to_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        save(Path("scans") / f"{k}.h5", kspace_of(2, seed=k))
        save(Path("new") / f"{k}.h5", kspace_of(2, seed=5 + k), mask=line_mask())
    for words in commands("own_scans.md"):
        if words[0] == "echo":
            assert json.loads(words[1])["em"]["laps"] > 0 and words[2:] == [">", "em.json"]
            Path("em.json").write_text(json.dumps({"em": SMALL_EM, "batch_size": 2}))
            continue
        assert words[0] == "ambient-sci"
        assert main(shortened(words[1:])) in (0, None), words
    assert json.loads(Path("result_evaluation/report.json").read_text())["held_out_rows"]["verdict"]
    for folder in ("means", "spreads"):
        volumes = [nibabel.load(p) for p in sorted(Path(folder).glob("*.nii*"))]
        assert len(volumes) == 2 and all(np.isfinite(v.get_fdata()).all() for v in volumes)


def test_microscopy_from_pictures_to_grey_levels(tmp_path, monkeypatch, capsys) -> None:
    """The whole page: practice pictures, commands, figure; a stack of large pages by patches and back as a whole."""
    monkeypatch.chdir(tmp_path)
    look, truth, trace = blocks("microscopy.md", "python")
    for words in commands("microscopy.md"):
        if words[0] == "python":
            large = "--stack" in words
            for option, most in (("--num", 2 if large else 8), ("--size", 70)):
                if option in words:
                    k = words.index(option) + 1
                    words[k] = str(min(int(words[k]), most))
            words += [] if large else ["--size", "16"]
            subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]], check=True)
        else:
            assert main(shortened(words[1:])) in (0, None), words
    names: dict = {}
    exec(compile(look, "microscopy.md", "exec"), names)
    assert imread("denoised.png").shape[1] > 300
    assert 65535 * 0.1 < float(names["original"].mean()) < 65535 * 0.9
    found = sorted(p.name for p in Path("denoised").iterdir())
    assert found == [f"{k:04d}_mean.tif" for k in range(8)]
    with Image.open("denoised/0003_mean.tif") as picture:
        assert picture.mode == "I;16" and picture.size == (16, 16)
    assert Path("result.png").is_file() and Path("result_samples.tif").is_file()
    capsys.readouterr()
    exec(compile(truth, "microscopy.md", "exec"), {})
    before, after, ratio = (float(x) for x in re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert before == pytest.approx(16.5, abs=0.2) and after > 0 and ratio > 0
    exec(compile(trace, "microscopy.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    # Patches of 32 every 24 pixels: 2 rows of 2 in 70 x 70; the sixth is the second of the second page.
    assert said[0] == "patch 5: noisy.tif, page 1, upper left pixel 0, 24 of 70 x 70"
    assert said[1].startswith("images are 70 x 70, the prior's 32 x 32: 9 tiles with an overlap of 8 pixels")
    stack, mean, std = (
        tifffile.imread(f) for f in ("fields/noisy.tif", "fields_result_mean.tif", "fields_result_std.tif")
    )
    assert stack.shape == mean.shape == std.shape == (2, 70, 70)
    assert stack.dtype == mean.dtype == np.uint16 and std.dtype.kind == "f" and std.min() > 0
    assert 0.7 < np.corrcoef(stack.ravel(), mean.ravel())[0, 1]
    with MeasurementFile("patches.h5") as file:
        assert len(file) == 2 * 2 * 2
        patch = file.measurements([5])[0, 0].numpy() * 65535
    assert np.abs(patch - stack[1, 0:32, 24:56]).max() < 0.02


def test_any_physics(monkeypatch, capsys) -> None:
    """As it stands, with three noise levels instead of fourteen: both means beat what they start from."""
    fewer = dataclasses.replace(POSTERIOR_SAMPLERS["mmps"], steps=3)
    monkeypatch.setitem(POSTERIOR_SAMPLERS, "mmps", fewer)
    names: dict = {}
    for block in blocks("your_physics.md", "python"):
        exec(compile(block, "your_physics.md", "exec"), names)
    printed = [
        [float(x) for x in re.findall(r"0\.\d+", line)] for line in capsys.readouterr().out.splitlines()
    ]
    assert len(printed) == 2 and all(line[1] < line[0] for line in printed)
    assert torch.isfinite(names["result"].samples).all()
