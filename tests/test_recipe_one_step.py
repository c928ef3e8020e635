"""The one-step recipe in miniature: both teachers, every row, cells made once."""

from __future__ import annotations

import json

import yaml

from recipes.exactness import parts
from recipes.one_step import run


def test_every_row_of_the_ring(tmp_path, monkeypatch, capsys):
    settings = yaml.safe_load((parts.HERE / "config.yaml").read_text())["two-core"]["ring"]
    settings |= {"steps": 4, "batch_size": 16, "samples": 50, "sampler_steps": 3, "sampler_batch": 50}
    settings |= {"network": {"kind": "mlp", "channels": [16]}, "points": [60]}
    settings["consistency"] = {**settings["consistency"], "max_steps": 2}
    own = yaml.safe_load((run.HERE / "config.yaml").read_text())["two-core"]["ring"]
    own |= {"steps": 5, "batch_size": 16, "judged": 20, "judge_every": 2}
    own["distillation"]["learning_rate"] = 1e-3
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"two-core": {"ring": own}}))
    monkeypatch.setattr(run, "load_settings", lambda profile, part: settings)
    monkeypatch.setattr(run, "HERE", tmp_path)
    arguments = ["--part", "ring", "--seeds", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]
    run.main(arguments)
    files = sorted((tmp_path / "out" / "two-core" / "ring").glob("*.json"))
    assert [p.name for p in files] == ["ambient-0.3-s3.json", "staged-0.3-s3.json"]
    for path in files:
        rows = json.loads(path.read_text())["rows"]
        assert set(rows) == {"teacher, many calls", "teacher, truncated", "generator, one call"}
        assert all(row["sliced_w2"] > 0 for row in rows.values())
    times = [p.stat().st_mtime_ns for p in files]
    run.main(arguments)
    assert [p.stat().st_mtime_ns for p in files] == times
    assert "| 0.3 | staged | generator, one call | 1 |" in capsys.readouterr().out
