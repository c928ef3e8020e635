"""The command line as a new user meets it: the whole way from images to scored reconstructions, at 16 px with a tiny network."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ambient_sci.cli import main
from ambient_sci.commands import COMMANDS
from ambient_sci.data import MeasurementFile, ReferenceFile
from ambient_sci.evaluation.report import evaluate
from ambient_sci.priors import load_prior
from ambient_sci.sampling import MMPS, POSTERIOR_SAMPLERS, ResultFile, reconstruct
from ambient_sci.training import RunFolder, TrainConfig

TINY = {
    "batch_size": 4,
    "log_interval": 1,
    "network": {"channels": [8, 8], "norm_groups": 4, "head_channels": 8},
}
IMAGES = 6


def images(folder: Path) -> Path:
    """Smooth 16-px images in [0, 1] of two people, as .npz."""
    y, x = np.mgrid[:16, :16] / 15
    centres = np.random.default_rng(0).uniform(0.3, 0.7, (IMAGES, 2, 1, 1))
    blobs = np.exp(-20 * ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2)).astype(np.float32)
    path = folder / "images.npz"
    np.savez(path, images=blobs, subjects=["ann"] * 3 + ["bob"] * 3)
    return path


def run(*arguments: object) -> None:
    """A command that must succeed."""
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands up to ``train`` make: scans, undersampled scans, and a prior from each."""
    folder = tmp_path_factory.mktemp("cli")
    source = images(folder)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    simulate = ("simulate", source, "--operator", "mri", "--noise-std", 0.1)
    run(*simulate, "--out", folder / "full.h5", "--reference", folder / "clean.h5")
    options = ("--acceleration", 2, "--seed", 1)
    run(*simulate, *options, "--out", folder / "under.h5", "--reference", folder / "under_clean.h5")
    for data, name in (("full.h5", "run"), ("under.h5", "conditional")):
        run(
            "train", folder / data, "--out", folder / name, "--config", folder / "tiny.json", "--max-steps", 3
        )
    return folder


# -- the commands, one after the other ---------------------------------------------------------------------------------------


def test_simulate_writes_measurements_and_clean_images_apart(work: Path) -> None:
    with MeasurementFile(work / "full.h5") as scans, ReferenceFile(work / "clean.h5") as clean:
        assert (scans.operator_name, scans.image_shape, len(scans)) == ("mri", (2, 16, 16), IMAGES)
        assert scans.subjects == clean.subjects == ["ann"] * 3 + ["bob"] * 3
        noise = scans.measurements() - scans.operator().A(clean.images())
        # 3072 independent values: the standard error of their spread is 1.3 %; this is 6 of them.
        assert abs(float(noise.std()) / 0.1 - 1) < 0.08


def test_simulate_is_decided_by_its_seed(work: Path, tmp_path: Path) -> None:
    def scans(seed: int) -> torch.Tensor:
        out = tmp_path / f"{seed}.h5"
        options = ("--operator", "mri", "--noise-std", 0.1, "--seed", seed)
        run("simulate", work / "images.npz", *options, "--out", out, "--reference", tmp_path / f"r{seed}.h5")
        with MeasurementFile(out) as file:
            return file.measurements()

    with MeasurementFile(work / "full.h5") as file:
        again = file.measurements()
    assert torch.equal(scans(0), again)
    assert not torch.allclose(scans(1), again, atol=0.01)


def test_inspect_says_what_is_in_a_file_and_draws_it(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("inspect", work / "under.h5", "--out", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    for words in (
        "mri",
        "0.1 per real channel",
        "ann (3), bob (3)",
        "acceleration 2",
        str(tmp_path / "sheet.png"),
    ):
        assert words in said
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_draws_beside_the_file_and_leaves_an_older_picture_alone(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("inspect", work / "clean.h5")
    picture = work / "clean.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"older")
    run("inspect", work / "clean.h5")
    assert picture.read_bytes() == b"older" and "exists already" in capsys.readouterr().out
    run("inspect", work / "clean.h5", "--overwrite")
    assert picture.read_bytes() != b"older"


def test_import_makes_measurements_of_noisy_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = np.random.default_rng(0).normal(0.5, 0.2, (4, 16, 16)).astype(np.float32)
    np.save(tmp_path / "noisy.npy", noisy)
    run("import", tmp_path / "noisy.npy", "--out", tmp_path / "a.h5", "--noise-std", 0.2, "--subject", "cat")
    run("import", tmp_path / "noisy.npy", "--out", tmp_path / "b.h5")
    with MeasurementFile(tmp_path / "a.h5") as given, MeasurementFile(tmp_path / "b.h5") as estimated:
        assert np.allclose(given.measurements()[:, 0], noisy) and given.subjects == ["cat"] * 4
        assert np.allclose(given.noise_std, 0.2)
        # White noise and nothing else; the estimate from 4 x 256 values has a standard error of about 4 %.
        assert np.allclose(estimated.noise_std, 0.2, rtol=0.25)
    assert "estimated with a standard error of" in capsys.readouterr().out


def test_train_makes_a_prior_of_the_kind_that_the_data_allow(work: Path) -> None:
    full, under = load_prior(work / "run"), load_prior(work / "conditional")
    assert (full.conditioning, under.conditioning) == ("unconditional", "mask-conditional")
    assert full.shape == (2, 16, 16) and full.sigma_min == pytest.approx(0.1)
    assert RunFolder(work / "run").config.network.channels == (8, 8)


def test_options_of_train_stand_in_front_of_the_configuration(work: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "max_steps": 50, "seed": 5}))
    options = ("--config", tmp_path / "config.json", "--max-steps", 2, "--seed", 7, "--device", "cpu")
    run("train", work / "full.h5", "--out", tmp_path / "run", *options)
    config = RunFolder(tmp_path / "run").config
    assert (config.max_steps, config.seed, config.device, config.batch_size) == (2, 7, "cpu", 4)
    run("train", work / "full.h5", "--out", tmp_path / "run", "--resume", "--max-steps", 4)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert RunFolder(tmp_path / "run").config == TrainConfig.from_dict({**config.to_dict(), "max_steps": 4})


def test_generate_writes_images_and_a_contact_sheet(work: Path, tmp_path: Path) -> None:
    def generate(name: str, *options: object) -> torch.Tensor:
        out = tmp_path / "made" / name
        run("generate", work / "run", "--num", 3, "--steps", 3, "--out", out, *options)
        assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        with ReferenceFile(out) as file:
            return file.images()

    first = generate("a.h5")
    assert first.shape == (3, 2, 16, 16)
    assert torch.allclose(first, generate("b.h5", "--batch-size", 2), atol=1e-4)
    for other in (("--seed", 1), ("--sampler", "ancestral"), ("--sigma-min", 0.5)):
        assert not torch.allclose(first, generate(f"{other[0]}.h5", *other), atol=1e-3)


def test_generate_says_where_it_stopped(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate", work / "run", "--num", 1, "--steps", 2, "--out", tmp_path / "s.h5")
    assert "noise level 0.1, the lowest the prior has learned" in capsys.readouterr().out
    run("generate", work / "run", "--num", 1, "--steps", 2, "--out", tmp_path / "t.h5", "--sigma-min", 0.01)
    assert "note" not in capsys.readouterr().out


def test_reconstruct_writes_mean_spread_and_samples(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reconstruct(name: str, *options: object) -> torch.Tensor:
        out = tmp_path / "deep" / "er" / name
        run(
            "reconstruct",
            work / "run",
            work / "under.h5",
            "--out",
            out,
            "--samples",
            2,
            "--steps",
            3,
            *options,
        )
        with ResultFile(out) as file:
            samples = file.samples(slice(None))
            mean, std = file.mean(slice(None)), file.std(slice(None))
            assert file.report["mean_of"] == "conditional means"
            # Not the mean of the draws, and as near to it as two draws are.
            assert 0.1 < (mean - samples.mean(0)).square().mean() / std.square().mean() < 1
            assert torch.allclose(std.square().mean(), samples.var(0).mean(), rtol=0.2)
            assert file.subjects == ["ann"] * 3 + ["bob"] * 3
        return samples

    first = reconstruct("a.h5")
    assert first.shape == (2, IMAGES, 2, 16, 16)
    assert "6 images, 2 samples, mean and standard deviation of each" in capsys.readouterr().out
    assert torch.allclose(first, reconstruct("b.h5", "--batch-size", 5), atol=1e-4)
    changes = (
        ("--seed", 1),
        ("--integrator", "ancestral"),
        ("--max-iterations", 1),
        ("--tolerance", 0.9),
        ("--sigma-min", 1),
    )
    for other in changes:
        assert not torch.allclose(first, reconstruct(f"{other[0]}.h5", *other), atol=1e-5), other


def test_a_few_samples_are_reconstructed_and_compared_with_theirs(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--indices and --num; the result says which, evaluate takes the same rows of the other files."""
    base = ("reconstruct", work / "run", work / "full.h5", "--samples", 2, "--steps", 3)
    with MeasurementFile(work / "full.h5") as file:
        count = len(file)
    run(*base, "--out", tmp_path / "a.h5", "--indices", f"0,{count - 1}")
    assert f"2 of {count} images" in capsys.readouterr().out
    run(*base, "--out", tmp_path / "b.h5", "--num", 2)
    run(*base, "--out", tmp_path / "c.h5", "--num", count + 5)
    a, b, c = (ResultFile(tmp_path / f"{name}.h5") for name in "abc")
    assert a.source["indices"] == [0, count - 1]
    assert b.source["indices"] == [count // 4, 3 * count // 4]
    assert "indices" not in c.source and len(c) == count
    capsys.readouterr()
    run(
        "evaluate",
        tmp_path / "a.h5",
        "--reference",
        work / "clean.h5",
        "--calibration",
        work / "full.h5",
        "--out",
        tmp_path / "e",
    )
    assert "PSNR" in capsys.readouterr().out
    run("info", tmp_path / "a.h5")
    assert f"2 of its {count} samples" in capsys.readouterr().out
    for extra, fragment in (
        (("--indices", "0", "--num", 1), "--indices or --num"),
        (("--num", 0), "at least 1"),
        (("--indices", "a"), "numbers and ranges like 0:8,12"),
        (("--indices", str(count)), f"from 0 to {count - 1}"),
    ):
        assert main([str(word) for word in (*base, "--out", tmp_path / "d.h5", *extra)]) == 2
        assert fragment in capsys.readouterr().err and not (tmp_path / "d.h5").exists()


def test_info_says_what_is_here(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("info")
    said = capsys.readouterr().out
    for expected in (
        "ambient_sci",
        "torch",
        "device",
        "GiB",
        "pretrained:brain64",
        "mmps",
        "zero-filled",
        "unet",
    ):
        assert expected in said
    for path, kind in (
        (work / "full.h5", "measurements"), (work / "clean.h5", "images"), (work / "run", "training run"), (work / "run" / "prior", "prior"),
        ("pretrained:brain64", "prior"),
    ):  # fmt: skip
        run("info", path)
        assert (
            f"kind{' ' * 0}" in (said := capsys.readouterr().out)
            and said.splitlines()[0].split(maxsplit=1)[1] == kind
        )
    (tmp_path / "text.h5").write_text("x")
    for path in (tmp_path / "nowhere", tmp_path / "text.h5", tmp_path):
        assert main(["info", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_training_goes_on_from_a_prior(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--config",
        work / "tiny.json",
        "--max-steps",
        3,
        "--out",
        tmp_path / "run",
        "--init-from",
        work / "run",
    )
    run("train", work / "full.h5", *options)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["init_from"] == str(work / "run")
    assert (
        main(
            [
                "train",
                str(work / "full.h5"),
                "--out",
                str(tmp_path / "x"),
                "--init-from",
                "pretrained:brain64",
            ]
        )
        == 2
    )
    assert "expected images" in capsys.readouterr().err


def test_one_step_is_for_mask_conditional_priors(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.h5"
    run("reconstruct", work / "conditional", work / "under.h5", "--sampler", "one-step", "--out", out)
    assert "a point estimate of each" in capsys.readouterr().out
    with ResultFile(out) as file:
        assert file.shape == (1, IMAGES, 2, 16, 16) and not file.std(slice(None)).any()


@pytest.fixture(scope="module")
def result(work: Path) -> Path:
    out = work / "result.h5"
    run("reconstruct", work / "run", work / "under.h5", "--out", out, "--samples", 3, "--steps", 3)
    return out


def test_evaluate_scores_a_result_against_clean_images(
    work: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("evaluate", result, "--reference", work / "under_clean.h5")
    said = capsys.readouterr().out
    folder = work / "result_evaluation"
    report = json.loads((folder / "report.json").read_text())
    assert report["scores"]["people"] == ["ann", "bob"]
    assert report["text"] in said and str(folder / "figure.png") in said
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    first = report["scores"]["methods"]["posterior mean"]["psnr"]["mean"]
    options = ("--reference", work / "under_clean.h5", "--overwrite")
    run("evaluate", result, *options, "--peak", 10 * report["scores"]["peak"]["ann"])
    report = json.loads((folder / "report.json").read_text())
    # Ten times the peak is 20 dB, up to the difference of the two people's own peaks.
    assert report["scores"]["methods"]["posterior mean"]["psnr"]["mean"] == pytest.approx(first + 20, abs=2)


def test_evaluate_judges_error_bars_without_truth(work: Path, result: Path, tmp_path: Path) -> None:
    def evaluate(name: str, *options: object) -> dict:
        run("evaluate", result, "--calibration", work / "under.h5", "--out", tmp_path / name, *options)
        return json.loads((tmp_path / name / "report.json").read_text())

    report = evaluate("a")
    assert "chi_squared" in report and "held_out_rows" not in report
    report = evaluate("b", "--prior", work / "run", "--held-out-images", 2, "--keep", 0.5)
    assert "held_out_rows" in report


def test_evaluate_compares_generated_images_with_real_ones(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate", work / "run", "--num", 5, "--steps", 2, "--out", tmp_path / "s.h5")
    run("evaluate", tmp_path / "s.h5", "--reference", work / "clean.h5", "--out", tmp_path / "deep" / "e")
    assert "5 samples against 6 references" in capsys.readouterr().out
    assert json.loads((tmp_path / "deep" / "e" / "report.json").read_text())["distances"]


def test_quickstart_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict = {}
    monkeypatch.setattr("ambient_sci.quickstart.run", lambda out, **options: given.update(out=out, **options))
    run("quickstart", "--out", tmp_path, "--seed", 3, "--overwrite", "--device", "cpu")
    expected = {"seed": 3, "overwrite": True, "resume": False, "pretrained": False, "device": "cpu"}
    assert given == {"out": tmp_path, **expected}
    run("quickstart", "--out", tmp_path, "--pretrained")
    assert given["pretrained"]


def test_pictures_beside_results_can_be_left_out(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R.png beside R.h5; one that is there is not replaced; with --no-picture there is none."""
    command = ["reconstruct", str(work / "run"), str(work / "under.h5"), "--samples", "2", "--steps", "2"]
    out = ["--out", str(tmp_path / "R.h5")]
    run(*command, *out, "--no-picture")
    assert [p.name for p in tmp_path.iterdir()] == ["R.h5"]
    run(*command, *out, "--overwrite")
    assert (tmp_path / "R.png").read_bytes().startswith(b"\x89PNG") and "picture:" in capsys.readouterr().out
    (tmp_path / "R.h5").unlink()
    assert main([*command, *out]) == 2 and "R.png" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "S.png")]) == 2
    run("generate", work / "run", "--num", 2, "--steps", 2, "--out", tmp_path / "g.h5", "--no-picture")
    assert not (tmp_path / "g.png").exists()


# -- signals -----------------------------------------------------------------------------------------------------------------


def test_interrupted_training_is_saved_and_says_how_to_go_on(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def interrupt() -> None:
        while not (out / "log.jsonl").exists():  # written after the first step
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    command = ["train", str(work / "full.h5"), "--out", str(out), "--config", str(work / "tiny.json")]
    assert main([*command, "--max-steps", "100000"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ambient-sci: training interrupted by SIGINT after step ") and said.endswith(
        "--resume"
    )
    steps = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert load_prior(out).shape == (2, 16, 16)
    run(*command, "--resume", "--max-steps", steps + 2)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == steps + 2


def test_an_interrupted_training_that_has_begun_says_how_to_go_on(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no step is at hand (between stages, say), what is on disk can be resumed all the same."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ambient_sci.training.trainer.run_stage", interrupted)
    command = [
        "train",
        str(work / "full.h5"),
        "--out",
        str(tmp_path / "run"),
        "--config",
        str(work / "tiny.json"),
    ]
    assert main([*command, "--overwrite"]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"ambient-sci: interrupted; continue with: ambient-sci {' '.join(command)} --resume"


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background and a shell has SIGINT ignored for them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_reconstruction_leaves_nothing(
    number: int,
    status: int,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(problem: object, **options: object) -> None:
        assert any(tmp_path.rglob("*R.h5*"))  # the unfinished file is there at this moment
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setitem(
        POSTERIOR_SAMPLERS, "mmps", replace(POSTERIOR_SAMPLERS["mmps"], run=interrupted, denoiser=None)
    )
    out = tmp_path / "new" / "R.h5"
    assert main(["reconstruct", str(work / "run"), str(work / "under.h5"), "--out", str(out)]) == status
    assert list(tmp_path.rglob("*")) == []
    assert len(capsys.readouterr().err.splitlines()) == 1


# -- help and usage ----------------------------------------------------------------------------------------------------------


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_and_usage_errors_load_no_torch() -> None:
    script = (
        "import sys; from ambient_sci.cli import main\n"
        "for name in [None, *sys.argv[1:]]:\n"
        "    try: main([name, '--help'] if name else ['--help'])\n"
        "    except SystemExit as exit: assert exit.code in (0, None)\n"
        "assert main(['train', '--no-such-option']) == 2\n"
        "heavy = {'torch', 'deepinv', 'monai', 'sigpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python("-c", script, *COMMANDS)
    assert done.returncode == 0, done.stderr


def test_help_stays_light() -> None:
    """What an answer within a second takes is few modules. Seconds are the machine's; the number of modules is ours (105)."""
    script = (
        "import sys; before = len(sys.modules); from ambient_sci.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(len(sys.modules) - before, file=sys.stderr)\n"
    )
    done = python("-c", script)
    assert done.returncode == 0 and int(done.stderr.split()[-1]) < 250, done.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "info"])  # which makes nothing
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert exit.value.code in (0, None)
    for option in ("--out", "--overwrite"):
        assert option in said
    # Where nothing is random, or nothing computed on a device, no option says so.
    fields = {field.name for field in dataclasses.fields(COMMANDS[name])}
    assert ("--seed" in said) == bool({"seed", "seeds"} & fields)
    assert ("--device {auto,cpu,cuda}" in said) == ("device" in fields)


def test_help_states_the_defaults_of_the_rooms() -> None:
    def default(function: Callable[..., object], name: str) -> object:
        return inspect.signature(function).parameters[name].default

    assert (default(reconstruct, "samples"), default(reconstruct, "steps")) == (8, None)
    assert POSTERIOR_SAMPLERS["mmps"].steps == 14
    assert (default(MMPS, "max_iterations"), default(MMPS, "tolerance")) == (5, 0.01)
    assert (default(evaluate, "held_out_images"), default(evaluate, "keep")) == (16, 0.8)
    assert (TrainConfig().step_limit, TrainConfig().seed, TrainConfig().device) == (20_000, 0, "auto")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr().out.startswith("ambient-sci 0.")


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ("", "Expected one of"),
        ("paint", "expected a command, one of simulate"),
        ("generate run", "--num"),
        ("generate run --num three --out s.h5", "--num"),
        ("generate run --num 3 --out s.h5 --overwrit", "--overwrit"),
        ("generate run --num 3 --out s.h5 --device tpu", "'auto', 'cpu', 'cuda'"),
        ("generate run --num 3 --out s.h5 --seed", "--seed"),
        ("train m.h5 --out run --resume --overwrite", "either --resume or --overwrite"),
    ],
)
def test_a_usage_error_is_one_line(
    arguments: str, fragment: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("ambient-sci: error: ") and fragment in lines[0]
