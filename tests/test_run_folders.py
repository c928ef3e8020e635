"""Run folders: whatever moment a process dies at the run goes on, and one process at a time works in one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from crashes import killed

from ambient_sci.cli import main
from ambient_sci.data import write_measurements
from ambient_sci.errors import InputError
from ambient_sci.priors import NetworkConfig, load_prior
from ambient_sci.training import EMConfig, RunFolder, StagedConfig, TrainConfig, fit


def settings(**changes) -> TrainConfig:
    network = NetworkConfig(kind="mlp", channels=(8,))
    small = {"max_steps": 2, "batch_size": 4, "log_interval": 1, "checkpoint_minutes": 1e-9, "device": "cpu"}
    return TrainConfig(**{**small, "network": network, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Two files of noisy images."""
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    paths = []
    for name in ("a.h5", "b.h5"):
        y = torch.randn(12, 1, 4, 4, generator=generator)
        options = {"mask": None, "noise_std": 0.4, "operator": "identity", "image_shape": (1, 4, 4)}
        paths.append(write_measurements(folder / name, measurements=y, **options))
    return paths


def weights(run: Path) -> bytes:
    return (run / "prior" / "weights.safetensors").read_bytes()


def goes_on(images: Path, config: TrainConfig, run: Path) -> str:
    """Go on by --resume or else by the plain command; what it took."""
    try:
        fit(images, out=run, resume=True, progress=False)
        return "resume"
    except InputError:
        fit(images, config, out=run, progress=False)
        return "plain"


def assert_whole(run: Path, expected: bytes) -> None:
    assert weights(run) == expected
    load_prior(run)
    assert not [p for p in run.rglob("*") if p.name.startswith(".") or p.name == "lock"]


def every_kill(tmp_path: Path, work, check, start=None, stride: int = 1) -> int:
    """``check(run, k)`` after a death before every ``stride``-th operation of ``work(run)``; their number."""
    for k in range(1, 1000, stride):
        run = tmp_path / f"run{k}"
        if start is not None:
            shutil.copytree(start, run)
        died = killed(run, k, lambda run=run: work(run), bytes_too=False)
        check(run, k)
        shutil.rmtree(run)
        if not died:
            return k
    raise AssertionError("the work never ended")


KINDS = {
    "ambient": {},
    "staged": {"consistency": StagedConfig(max_steps=1)},
    "em": {
        "max_steps": None,
        "em": EMConfig(
            laps=1,
            steps=1,
            sampler_steps=2,
            held_out=4,
            held_out_draws=2,
            initial_samples=8,
            initial_iterations=2,
        ),
    },
}


@pytest.mark.parametrize(("kind", "stride"), [("ambient", 1), ("staged", 7), ("em", 11)])
def test_a_new_run_goes_on_whatever_moment_it_dies_at(kind, stride, images, tmp_path):
    config = settings(**KINDS[kind])
    fit(images[0], config, out=tmp_path / "whole", progress=False)
    expected, ways = weights(tmp_path / "whole"), set()

    def check(run: Path, k: int) -> None:
        ways.add(goes_on(images[0], config, run))
        assert_whole(run, expected)

    count = every_kill(
        tmp_path, lambda run: fit(images[0], config, out=run, progress=False), check, stride=stride
    )
    assert count > 15 and ways == {"resume", "plain"}, (count, ways)


def test_a_run_that_is_replaced_is_the_old_one_or_the_new_one(images, tmp_path):
    """Killed while it overwrites: resumed with the new data it is the new run or refused, never new data with
    old settings or weights; overwriting again always works."""
    old, new = settings(seed=1), settings(seed=2, max_steps=1)
    fit(images[0], old, out=tmp_path / "old", progress=False)
    fit(images[1], new, out=tmp_path / "new", progress=False)
    expected = weights(tmp_path / "new")

    cut_off = set()

    def check(run: Path, k: int) -> None:
        unfinished = RunFolder(run).read_json("run.json").get("unfinished", False)
        try:
            fit(images[1], out=run, resume=True, progress=False)
            cut_off.add((unfinished, "resumed"))
        except InputError:
            cut_off.add((unfinished, "refused"))
            fit(images[1], new, out=run, overwrite=True, progress=False)
        assert_whole(run, expected)

    def work(run: Path) -> None:
        fit(images[1], new, out=run, overwrite=True, progress=False)

    every_kill(tmp_path, work, check, start=tmp_path / "old", stride=2)
    assert {(True, "refused"), (True, "resumed"), (False, "resumed")} <= cut_off


def test_an_earlier_stage_leaves_the_prior_of_a_later_one(images, tmp_path):
    fit(images[0], settings(**KINDS["staged"]), out=tmp_path / "run", progress=False)
    fit(images[0], settings(), out=tmp_path / "other", progress=False)
    expected, other = weights(tmp_path / "run"), load_prior(tmp_path / "other")
    RunFolder(tmp_path / "run").settle_prior("ambient", other)
    assert weights(tmp_path / "run") == expected
    RunFolder(tmp_path / "run").settle_prior("consistency", other)
    assert weights(tmp_path / "run") == weights(tmp_path / "other")


def test_a_resumed_run_that_dies_goes_on(images, tmp_path):
    fit(images[0], settings(max_steps=1), out=tmp_path / "old", progress=False)
    fit(images[0], settings(), out=tmp_path / "whole", progress=False)

    def work(run: Path) -> None:
        fit(images[0], settings(), out=run, resume=True, progress=False)

    def check(run: Path, k: int) -> None:
        fit(images[0], settings(), out=run, resume=True, progress=False)
        assert_whole(run, weights(tmp_path / "whole"))

    every_kill(tmp_path, work, check, start=tmp_path / "old", stride=3)


@pytest.mark.parametrize("kind", ["ambient", "staged", "em"])
@pytest.mark.parametrize("harm", ["missing", "half", "no description", "of another step"])
def test_resuming_a_finished_run_writes_the_prior_of_its_checkpoint(kind, harm, images, tmp_path):
    run = tmp_path / "run"
    fit(images[0], settings(**KINDS[kind]), out=run, progress=False)
    expected = weights(run)
    if harm == "missing":
        shutil.rmtree(run / "prior")
    elif harm == "half":
        (run / "prior" / "weights.safetensors").write_bytes(expected[: len(expected) // 2])
    elif harm == "no description":
        (run / "prior" / "prior.json").unlink()
    else:
        fit(images[0], settings(max_steps=1), out=tmp_path / "other", progress=False)
        shutil.rmtree(run / "prior")
        shutil.copytree(tmp_path / "other" / "prior", run / "prior")
    fit(images[0], out=run, resume=True, progress=False)
    assert_whole(run, expected)


def test_em_that_died_before_its_first_report_goes_on(images, tmp_path):
    config = settings(**KINDS["em"])
    fit(images[0], config, out=tmp_path / "whole", progress=False)
    fit(images[0], config, out=tmp_path / "run", progress=False)
    (tmp_path / "run" / "em.json").unlink()
    shutil.rmtree(tmp_path / "run" / "laps")
    fit(images[0], out=tmp_path / "run", resume=True, progress=False)
    assert_whole(tmp_path / "run", weights(tmp_path / "whole"))


@pytest.mark.parametrize("left", [["checkpoint/"], ["checkpoint/", "run.json"], ["config.json"], ["lock"]])
def test_what_a_beginning_leaves_is_taken_over(left, images, tmp_path):
    """Also beginnings of before the order was changed: a folder for checkpoints and nothing else."""
    fit(images[0], settings(), out=tmp_path / "whole", progress=False)
    for overwrite in (False, True):
        run = tmp_path / f"run{overwrite}"
        run.mkdir()
        for name in left:
            if name.endswith("/"):
                (run / name).mkdir()
            elif name == "lock":
                (run / name).write_text("12345\n")
            else:
                shutil.copy(tmp_path / "whole" / name, run)
        fit(images[0], settings(), out=run, overwrite=overwrite, progress=False)
        assert_whole(run, weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["config.json", "run.json", "thesis.txt", "checkpoint/mine.txt"])
def test_somebody_elses_files_are_not_a_beginning(name, images, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"lines": 3}')
    with pytest.raises(InputError, match="content"):
        fit(images[0], settings(), out=tmp_path, progress=False)
    assert (tmp_path / name).read_text() == '{"lines": 3}'
    assert not (tmp_path / "lock").exists()


def test_settings_that_were_edited_are_refused(images, tmp_path):
    fit(images[0], settings(), out=tmp_path, progress=False)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, refused in (({"max_steps": 3}, False), ({"batch_size": 5}, True)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        if refused:
            with pytest.raises(InputError, match="batch_size"):
                fit(images[0], out=tmp_path, resume=True, progress=False)
        else:
            fit(images[0], out=tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("way", ["plain", "resume", "overwrite", "em", "laps"])
def test_a_second_process_is_refused(way, images, tmp_path, capsys):
    """Exit status 2, naming the folder and the process; nothing changes, and a dead holder holds nothing."""
    run = tmp_path / "run"
    if way in ("resume", "overwrite"):
        fit(images[0], settings(), out=run, progress=False)
    elif way == "laps":
        fit(images[0], settings(**KINDS["em"]), out=run, progress=False)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    config = tmp_path / "config.json"
    settings(**KINDS["em" if way in ("em", "laps") else "ambient"]).save(config)
    ready, child = os.pipe(), os.fork()
    if child == 0:
        with RunFolder(run).alone():
            os.write(ready[1], b"1")
            os.read(os.pipe()[0], 1)  # for ever
    assert os.read(ready[0], 1) == b"1"
    command = ["train", str(images[0]), "--out", str(run), "--config", str(config), "--device", "cpu"]
    command += {"resume": ["--resume"], "laps": ["--resume"], "overwrite": ["--overwrite"]}.get(way, [])
    try:
        assert main(command) == 2
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    said = capsys.readouterr().err
    assert str(run) in said and str(child) in said and said.count("\n") == 1
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "lock"} == before
    assert main(command) == 0
    assert not (run / "lock").exists()


def test_a_folder_made_for_a_run_that_is_refused_goes(images, tmp_path):
    with pytest.raises(InputError):
        fit(images[0], settings(**{"batch_size": 4}), out=tmp_path / "a" / "b", resume=True, progress=False)
    assert list(tmp_path.iterdir()) == []
