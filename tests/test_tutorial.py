"""The commands of docs/tutorials/own_scans.md, on a few tiny scans in fastMRI's layout and with shorter trainings."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import nibabel
import numpy as np
import pytest
from test_fastmri import kspace_of, line_mask, save

from ambient_sci.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "own_scans.md"
SHORTER = {"--max-minutes": ("--max-steps", "2"), "--samples": ("--samples", "2")}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.strip().splitlines()]


def shortened(words: list[str]) -> list[str]:
    found = list(words)
    for option, instead in SHORTER.items():
        if option in found:
            k = found.index(option)
            found[k : k + 2] = instead
    if found[0] == "reconstruct":
        found += ["--steps", "3", "--max-iterations", "1"]
    return found


def test_the_way_from_own_scans_to_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for k in range(2):
        save(Path("scans") / f"{k}.h5", kspace_of(2, seed=k))
        save(Path("new") / f"{k}.h5", kspace_of(2, seed=5 + k), mask=line_mask())
    for words in commands():
        if words[0] == "echo":
            assert json.loads(words[1])["em"]["laps"] > 0 and words[-1] == "em.json"
            em = {"laps": 1, "steps": 1, "sampler_steps": 2, "max_iterations": 1, "initial_iterations": 1}
            em |= {"held_out": 2, "held_out_draws": 2}
            Path("em.json").write_text(json.dumps({"em": em, "batch_size": 2}))
            continue
        assert words[0] == "ambient-sci"
        assert main(shortened(words[1:])) in (0, None), words
    assert json.loads(Path("result_evaluation/report.json").read_text())["held_out_rows"]["verdict"]
    for folder in ("means", "spreads"):
        volumes = [nibabel.load(p) for p in sorted(Path(folder).glob("*.nii*"))]
        assert len(volumes) == 2 and all(np.isfinite(v.get_fdata()).all() for v in volumes)
