"""What the README promises runs: its Python, every shell line, the quickstart in miniature, a benchmark."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image
from test_tutorial import shortened

from ambient_sci.cli import main
from ambient_sci.errors import InputError
from ambient_sci.quickstart import Settings, run
from ambient_sci.sampling import POSTERIOR_SAMPLERS, Reconstruction

ROOT = Path(__file__).resolve().parent.parent
TINY = Settings(
    slices_per_person=1, samples=2, steps=3, max_iterations=1, train_steps=2, batch_size=2, channels=(16, 16)
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    """As it stands, with two noise levels in place of fourteen; it leaves the picture that it promises."""
    fewer = dataclasses.replace(POSTERIOR_SAMPLERS["mmps"], steps=2)
    monkeypatch.setitem(POSTERIOR_SAMPLERS, "mmps", fewer)
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    result = names["result"]
    assert result.samples.shape == (8, 1, 2, 64, 64) and bool((result.std > 0).any())
    assert imread("result.png").shape[1] > 500


def test_the_home_page_shows_the_code_of_the_readme():
    """The same text in both, comments apart: what is tested here is what readers of either find."""
    home = (ROOT / "docs" / "index.md").read_text()

    def code(text: str) -> list[str]:
        return [line.partition("  #")[0].rstrip() for line in text.strip().splitlines()]

    for language in ("python", "sh"):
        shown = [code(block) for block in re.findall(rf"```{language}\n(.*?)```", home, flags=re.DOTALL)]
        assert shown == [code(block) for block in blocks(language)], language


def test_shell_lines_of_the_readme_run(tmp_path, monkeypatch):
    """Every line: pip's two are the known ones; commands run, on tiny pictures with two training steps."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    noise = np.random.default_rng(0).normal(120, 30, (6, 16, 16))
    for k, picture in enumerate(noise + 60 * (np.arange(16) > 8)):
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(f"pictures/{k}.png")
    lines = [
        shlex.split(line, comments=True) for block in blocks("sh") for line in block.strip().splitlines()
    ]
    assert [words[:3] for words in lines[:2]] == [["pip", "install", "torch"], ["pip", "install", "."]]
    assert [words[1] for words in lines[2:]] == ["import", "train", "reconstruct"]
    for words in lines[2:]:
        assert words[0] == "ambient-sci" and main(shortened(words[1:])) in (0, None), words
    found = Reconstruction.load("denoised.h5")
    assert found.samples.shape == (8, 6, 1, 16, 16)  # as many as the README says, nothing asked for


def test_the_readme_names_the_commands_of_the_makefile():
    text = (ROOT / "README.md").read_text()
    assert "`make quickstart`" in text and "`make test`" in text


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []


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
