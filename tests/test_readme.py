"""What the README promises runs: its Python example as it stands, the quickstart in miniature, the benchmark script."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ambient_sci.errors import InputError
from ambient_sci.quickstart import Settings, run

ROOT = Path(__file__).resolve().parent.parent
TINY = Settings(
    slices_per_person=1, samples=2, steps=3, max_iterations=1, train_steps=2, batch_size=2, channels=(16, 16)
)


def test_python_example_of_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert "torch.Size([4, 1, 16, 16])" in capsys.readouterr().out


def test_readme_names_only_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    from ambient_sci.cli import parse

    for command in set(re.findall(r"^ambient-sci (\w+)", text, flags=re.MULTILINE)):
        with pytest.raises(SystemExit) as stop:
            parse([command, "--help"])
        assert stop.value.code == 0, command


def test_quickstart_in_miniature(tmp_path, capsys):
    report = run(tmp_path / "q", settings=TINY)
    made = {p.name for p in (tmp_path / "q").iterdir()}
    assert made == {
        "train.h5", "train_clean.h5", "test.h5", "test_clean.h5", "run", "reconstruction.h5", "report.json", "figure.png",
    }  # fmt: skip
    assert report == json.loads((tmp_path / "q" / "report.json").read_text())
    assert list(report["table"]["methods"]) == ["zero-filled", "L1-wavelet", "TV", "ours (posterior mean)"]
    assert all(b["interior"] and b["converged"] for b in report["baselines"].values())
    people = {"train": "colin27", "test": set(report["table"]["people"])}
    assert len(people["test"]) == 3 and not any("colin" in p.lower() for p in people["test"])
    assert "ours (posterior mean)" in capsys.readouterr().out
    with pytest.raises(InputError, match="--overwrite"):
        run(tmp_path / "q", settings=TINY)


def test_pretrained_quickstart_trains_nothing(tmp_path):
    report = run(tmp_path / "q", pretrained=True, settings=TINY)
    made = {p.name for p in (tmp_path / "q").iterdir()}
    assert made == {"test.h5", "test_clean.h5", "reconstruction.h5", "report.json", "figure.png"}
    assert report["prior"] == "pretrained:brain64"


def test_quickstart_trains_on_the_noisy_file_alone(tmp_path, monkeypatch):
    """The trainer is handed a path to the measurements; were it to look for clean images, they are not there to be found."""
    from ambient_sci import quickstart

    quickstart.make_scans(tmp_path, TINY, seed=0, overwrite=False)
    (tmp_path / "train_clean.h5").unlink()
    assert quickstart.train(tmp_path, TINY, 0, False, False, "cpu").conditioning == "unconditional"


def test_benchmark_of_the_ambient_step_runs(tmp_path):
    out = tmp_path / "b.json"
    options = ["--size", "16", "--batch", "2", "--repeats", "1", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "recipes.benchmarks.ambient_step", *options], cwd=ROOT, check=True)
    assert set(json.loads(out.read_text())["cases"]) == {"identity", "masking", "mri, 8 coils"}
