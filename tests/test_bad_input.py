"""Bad input ends in one clear line and exit status 2, and nothing is written.

One table: what is wrong, the commands that meet it, and what their line must say; and one test of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile, write_measurements
from ambient_sci.errors import ConditioningError, IdentifiabilityError, InputError
from ambient_sci.priors import load_prior
from ambient_sci.sampling import Reconstruction, ResultFile, generate, reconstruct
from ambient_sci.training import TrainConfig, fit

Change = Callable[[h5py.File], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and runs with nothing wrong: scans of one and of several coils, masked images, priors of both kinds."""
    folder = tmp_path_factory.mktemp("good")
    images = np.random.default_rng(0).random((4, 16, 16)).astype(np.float32)
    np.save(folder / "images.npy", images)
    np.save(folder / "large.npy", images.repeat(2, 1).repeat(2, 2))
    kinds = {
        "scans": ("images.npy", "mri", "--acceleration", "2"),
        "coils": ("images.npy", "mri", "--acceleration", "2", "--coils", "3"),
        "full": ("images.npy", "mri"),
        "large": ("large.npy", "mri"),
        "masked": ("images.npy", "masking", "--keep", ".5", "--phase", "smooth"),
        "equispaced": ("images.npy", "mri", "--acceleration", "2", "--design", "equispaced"),
    }
    for name, (source, operator, *options) in kinds.items():
        out = (
            "--noise-std",
            ".1",
            "--out",
            str(folder / f"{name}.h5"),
            "--reference",
            str(folder / f"{name}_ref.h5"),
        )
        assert main(["simulate", str(folder / source), "--operator", operator, *options, *out]) == 0
    settings = {"batch_size": 2, "network": {"channels": [8, 8], "norm_groups": 4, "head_channels": 8}}
    (folder / "tiny.json").write_text(json.dumps(settings))
    for name in ("full", "scans"):
        options = ("--config", str(folder / "tiny.json"), "--max-steps", "1")
        assert (
            main(["train", str(folder / f"{name}.h5"), "--out", str(folder / f"{name}_run"), *options]) == 0
        )
    options = ("--samples", "2", "--steps", "2", "--out", str(folder / "result.h5"))
    assert main(["reconstruct", str(folder / "full_run"), str(folder / "scans.h5"), *options]) == 0
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the good files to spoil, as the working directory."""
    folder = tmp_path / "place"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    yield folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder, hidden files too. A lock comes and goes, so the times of folders say nothing."""
    files = sorted(p for p in folder.rglob("*"))
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) if p.is_file() else (0, b"")
        for p in files
    }


# -- what can be wrong with a measurement file -------------------------------------------------------------------------------


def put(name: str, value: Any, dtype: Any = None) -> Change:
    """Replace a dataset; ``value`` may be a function of what was there."""

    def change(file: h5py.File) -> None:
        old = file[name][()] if name in file else None
        if name in file:
            del file[name]
        new = value(old) if callable(value) else value
        if new is not None:
            file[name] = np.asarray(new, dtype=dtype)

    return change


def at(value: complex) -> Callable[[np.ndarray], np.ndarray]:
    """One value of sample 2 spoiled, inside the mask (its centre line is always measured)."""

    def change(old: np.ndarray) -> np.ndarray:
        old[2, ..., 8, 8] = value
        return old

    return change


def zero_sample(old: np.ndarray) -> np.ndarray:
    old[1] = 0
    return old


def attribute(name: str, value: Any) -> Change:
    def change(file: h5py.File) -> None:
        file.attrs[name] = value

    return change


def foreign(file: h5py.File) -> None:
    for name in list(file.attrs):
        del file.attrs[name]


SPOILED: dict[str, tuple[str, Change, str]] = {
    "foreign": ("scans", foreign, "expected ambient_sci measurements, got a foreign HDF5 file"),
    "no measurements": ("scans", put("measurements", None), "the dataset 'measurements' is missing"),
    "wrong type": (
        "scans",
        put("measurements", lambda y: y, np.complex128),
        "measurements: expected complex64 or float32 or float16 or uint8, got complex128",
    ),
    "real k-space": (
        "scans",
        put("measurements", np.abs, np.float32),
        "MRI k-space must be complex64, got real numbers",
    ),
    "wrong shape": (
        "scans",
        put("measurements", lambda y: y[:, :, :12]),
        "measurements: expected shape (N, 16, 16)",
    ),
    "no sample": (
        "scans",
        put("measurements", lambda y: y[:0]),
        "expected (N, ...) with N >= 1, got shape (0, 16, 16)",
    ),
    "NaN": ("scans", put("measurements", at(np.nan)), "measurements: NaN or infinite values in sample 2"),
    "infinity": (
        "scans",
        put("measurements", at(np.inf)),
        "measurements: NaN or infinite values in sample 2",
    ),
    "mask of 0, 1 and 2": ("scans", put("mask", at(2)), "mask: expected only 0 and 1, got 2"),
    "mask of zeros": ("scans", put("mask", zero_sample), "mask: all zero for sample 1"),
    "mask type": ("scans", put("mask", lambda m: m, np.float32), "mask: expected uint8, got float32"),
    "mask shape": ("scans", put("mask", lambda m: m[..., :8]), "mask: expected shape"),
    "mask number": (
        "scans",
        put("mask", lambda m: m[:3]),
        "mask: expected 1 or 4 masks, got shape (3, 16, 16)",
    ),
    "no mask": ("scans", put("mask", None), "the dataset 'mask' is missing"),
    "mask that contradicts": (
        "scans",
        put("measurements", lambda y: np.ones_like(y)),
        "non-zero values outside the mask in sample 0",
    ),
    "maps of other coils": ("coils", put("coil_maps", lambda s: s[:, :2]), "coil_maps: expected (3, 16, 16)"),
    "maps of other size": (
        "coils",
        put("coil_maps", lambda s: s[..., :8]),
        "coil_maps: expected (3, 16, 16)",
    ),
    "maps of zeros": ("coils", put("coil_maps", np.zeros_like), "coil_maps: all zero for sample 0"),
    "maps with NaN": ("coils", put("coil_maps", lambda s: s * np.nan), "coil_maps: NaN or infinite values"),
    "no maps": ("coils", put("coil_maps", None), "coil_maps"),
    "negative noise": (
        "scans",
        put("noise_std", lambda s: -s),
        "noise_std: expected finite levels >= 0, got -0.1",
    ),
    "noise NaN": (
        "scans",
        put("noise_std", lambda s: s * np.nan),
        "noise_std: expected finite levels >= 0, got nan",
    ),
    "noise number": (
        "scans",
        put("noise_std", lambda s: s[:3]),
        "noise_std: expected one number or (4,), got shape (3,)",
    ),
    "no noise": ("scans", put("noise_std", None), "noise_std: the noise level is absent"),
    "operator": (
        "scans",
        attribute("operator", "ct"),
        "operator: expected one of identity, masking, mri, got 'ct'",
    ),
    "image shape": (
        "scans",
        attribute("image_shape", [2, 8, 8]),
        "for image shape (2, 8, 8), got (N, 16, 16)",
    ),
    "subjects": ("scans", attribute("subjects", ["ann"]), "subjects: expected 4, one a sample, got 1"),
    "scale": ("scans", attribute("scale", -1.0), "scale: expected one positive number"),
    "design": ("scans", attribute("design", "{"), "design: expected JSON"),
    "version": ("scans", attribute("format_version", 99), "expected format version 1 or 2, got 99"),
}


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        name: of the case.
        arguments: of the command, in a folder of good files.
        fragments: what its line must say.
        prepare: spoils something first.
        call: the same from Python; must raise ``error``.
    """

    name: str
    arguments: str
    fragments: tuple[str, ...]
    prepare: Callable[[], Any] | None = None
    call: Callable[[], Any] | None = None
    error: type[InputError] = InputError


def file_cases() -> Iterator[Case]:
    """Everything that can be wrong with a file, met by each command that reads one."""
    commands = {
        "inspect": "inspect {}.h5",
        "train": "train {}.h5 --out new --max-steps 1 --config tiny.json",
        "reconstruct": "reconstruct full_run {}.h5 --out new.h5 --steps 2 --samples 1",
    }

    def spoil(name: str, change: Change) -> Callable[[], None]:
        def prepare() -> None:
            with h5py.File(f"{name}.h5", "a") as file:
                change(file)

        return prepare

    whole = {
        "truncated": (lambda: truncate(Path("scans.h5")), "truncated or damaged"),
        "not HDF5": (lambda: Path("scans.h5").write_text("kspace"), "not an HDF5 file"),
        "missing": (lambda: os.remove("scans.h5"), "no such file"),
    }
    for command, template in commands.items():
        for what, (name, change, fragment) in SPOILED.items():
            yield Case(
                f"{command}: {what}",
                template.format(name),
                (f"{name}.h5", fragment),
                spoil(name, change),
                lambda name=name: MeasurementFile(f"{name}.h5"),
            )
        for what, (prepare, fragment) in whole.items():
            call = lambda: MeasurementFile("scans.h5")  # noqa: E731
            yield Case(f"{command}: {what}", template.format("scans"), ("scans.h5", fragment), prepare, call)
        if command != "inspect":
            expected = (
                "clean_ref.h5",
                "expected ambient_sci measurements, got a file of format 'ambient_sci images'",
            )
            move = lambda: os.rename("scans_ref.h5", "clean_ref.h5")  # noqa: E731
            call = lambda: MeasurementFile("clean_ref.h5")  # noqa: E731
            yield Case(f"{command}: clean images", template.format("clean_ref"), expected, move, call)


# -- what can be wrong with a run, an option, an output ------------------------------------------------------------------------

RECONSTRUCT = "--steps 2 --samples 1 --out new.h5"
SIMULATE = "simulate {} --operator mri --out new.h5 --reference new_ref.h5"


def draw(run: str) -> Any:
    return generate(load_prior(run), 1, steps=2)


def sample(run: str, file: str, **options: Any) -> Any:
    with MeasurementFile(file) as f:
        return reconstruct(
            load_prior(run), f.operator(), f.measurements(), f.sigma(), samples=1, steps=2, **options
        )


def array(value: Any) -> Callable[[], None]:
    return lambda: np.save("images.npy", value)


def write(path: str, text: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(text) and None


def touch(*paths: str) -> Callable[[], None]:
    return lambda: [Path(p).touch() for p in paths] and None


def point_estimate() -> None:
    """point.h5: what one-step makes of scans.h5."""
    result = Reconstruction.load(Path("result.h5"))
    Reconstruction.from_samples(result.samples[:1], {**result.report, "sampler": "one-step"}).save("point.h5")


CASES = [
    *file_cases(),
    # images
    Case(
        "simulate: no images",
        SIMULATE.format("none.npy --noise-std 1"),
        ("none.npy", "no such file or folder"),
    ),
    Case(
        "simulate: NaN",
        SIMULATE.format("images.npy --noise-std 1"),
        ("NaN",),
        array(np.full((2, 16, 16), np.nan)),
    ),
    Case(
        "simulate: axes",
        SIMULATE.format("images.npy --noise-std 1"),
        ("expected images (N, H, W)", "(2, 2, 2, 16, 16)"),
        array(np.zeros((2, 2, 2, 16, 16))),
    ),
    Case(
        "simulate: text", SIMULATE.format("images.npy --noise-std 1"), ("images.npy",), array(np.array(["a"]))
    ),
    Case(
        "simulate: noise",
        SIMULATE.format("images.npy --noise-std -1"),
        ("noise_std: expected finite levels >= 0, got -1",),
    ),
    Case("simulate: no noise", SIMULATE.format("images.npy"), ("--noise-std",)),
    Case(
        "simulate: option of another operator",
        SIMULATE.format("images.npy --noise-std 1 --keep .5"),
        ("mri: keep has no meaning here",),
    ),
    Case(
        "simulate: acceleration",
        SIMULATE.format("images.npy --noise-std 1 --acceleration .5"),
        ("above 1, got 0.5",),
    ),
    Case("simulate: seed", SIMULATE.format("images.npy --noise-std 1 --seed -1"), ("--seed", "got -1")),
    Case("import: nothing", "import none --out new.h5", ("none", "no such file or folder")),
    Case("import: ours", "import scans.h5 --out new.h5", ("scans.h5", "is a measurement file already")),
    Case(
        "import: noise",
        "import images.npy --out new.h5 --noise-std -1",
        ("noise_std: expected finite levels >= 0",),
    ),
    # configurations
    Case(
        "train: unknown setting",
        "train full.h5 --out new --config odd.json",
        ("odd.json", "stepz: unknown setting"),
        write("odd.json", '{"stepz": 1}'),
        lambda: TrainConfig.load("odd.json"),
    ),
    Case("train: not a configuration", "train full.h5 --out new --config full.h5", ("full.h5", "expected")),
    Case(
        "train: no steps",
        "train full.h5 --out new --max-steps 0",
        ("max_steps: expected a value > 0, got 0",),
        None,
        lambda: TrainConfig(max_steps=0),
    ),
    Case(
        "train: masks that supervise nothing",
        "train equispaced.h5 --out new --config tiny.json",
        ("enumerated", "12 of 16 columns are never measured outside the kept ones"),
        None,
        lambda: fit("equispaced.h5", TrainConfig(max_steps=1)),
        IdentifiabilityError,
    ),
    # runs
    Case(
        "resume: other data",
        "train scans.h5 --out full_run --max-steps 2 --resume",
        ("resume full_run: the run was trained on other data",),
        None,
        lambda: fit("scans.h5", None, "full_run", resume=True, progress=False),
    ),
    Case(
        "resume: other settings",
        "train full.h5 --out full_run --max-steps 2 --resume --seed 1",
        ("resume full_run: the run was configured otherwise in seed",),
    ),
    Case(
        "resume: nothing",
        "train full.h5 --out new --max-steps 2 --resume",
        ("new", "expected a run to resume"),
    ),
    Case(
        "reconstruct: images of other channels",
        f"reconstruct full_run grey.h5 {RECONSTRUCT}",
        ("full_run: expected a prior for images (1, 16, 16)", "got one for (2, 16, 16)"),
        lambda: write_measurements(
            "grey.h5",
            measurements=torch.zeros(1, 1, 16, 16),
            mask=None,
            noise_std=0.1,
            operator="identity",
            image_shape=(1, 16, 16),
        ),
        lambda: sample("full_run", "grey.h5"),
    ),
    Case(
        "reconstruct: larger images and a mask-conditional prior",
        "reconstruct scans_run large.h5 --sampler one-step --out new.h5",
        ("tiles: expected an unconditional prior, got one that is mask-conditional",),
        None,
        lambda: sample("scans_run", "large.h5", sampler="one-step"),
        ConditioningError,
    ),
    Case(
        "reconstruct: a run of another operator",
        "reconstruct scans_run masked.h5 --sampler one-step --out new.h5",
        ("masked.h5: expected measurements by mri", "got masking"),
    ),
    Case(
        "reconstruct: a mask-conditional prior",
        f"reconstruct scans_run scans.h5 {RECONSTRUCT}",
        ("mmps needs an unconditional prior, got a mask-conditional one", "one-step"),
        None,
        lambda: sample("scans_run", "scans.h5"),
        ConditioningError,
    ),
    Case(
        "generate: a mask-conditional prior",
        "generate scans_run --num 1 --out new.h5",
        ("generate needs an unconditional prior, got a mask-conditional one",),
        None,
        lambda: draw("scans_run"),
        ConditioningError,
    ),
    Case(
        "reconstruct: an unconditional prior",
        "reconstruct full_run scans.h5 --sampler one-step --out new.h5",
        ("needs a mask-conditional prior", "got an unconditional one"),
        None,
        lambda: sample("full_run", "scans.h5", sampler="one-step"),
        ConditioningError,
    ),
    Case(
        "generate: no run",
        "generate none --num 1 --out new.h5",
        ("none: expected a prior or a training run",),
    ),
    Case(
        "generate: truncated weights",
        "generate full_run --num 1 --out new.h5",
        ("full_run", "expected a readable prior"),
        lambda: truncate(Path("full_run/prior/weights.safetensors")),
        lambda: load_prior("full_run"),
    ),
    Case(
        "generate: foreign description",
        "generate full_run --num 1 --out new.h5",
        ("prior.json: expected a prior of format",),
        write("full_run/prior/prior.json", "[1]"),
        lambda: load_prior("full_run"),
    ),
    # numbers
    Case("generate: none", "generate full_run --num 0 --out new.h5", ("--num: expected at least 1, got 0",)),
    Case(
        "generate: steps",
        "generate full_run --num 1 --steps 0 --out new.h5",
        ("--steps: expected at least 1",),
    ),
    Case(
        "generate: batch",
        "generate full_run --num 1 --batch-size 0 --out new.h5",
        ("--batch-size: expected at least 1",),
    ),
    Case(
        "generate: level",
        "generate full_run --num 1 --out new.h5 --sigma-min -1",
        ("expected 0 < sigma_min < sigma_max, got -1",),
        None,
        lambda: generate(load_prior("full_run"), 1, sigma_min=-1),
    ),
    Case(
        "generate: level NaN",
        "generate full_run --num 1 --out new.h5 --sigma-min nan",
        ("--sigma-min: expected a finite number, got nan",),
    ),
    Case(
        "reconstruct: sampler",
        f"reconstruct full_run scans.h5 {RECONSTRUCT} --sampler magic",
        ("sampler: expected one of mmps", "magic"),
        None,
        lambda: sample("full_run", "scans.h5", sampler="magic"),
    ),
    Case(
        "reconstruct: samples",
        "reconstruct full_run scans.h5 --samples 0 --out new.h5",
        ("--samples: expected at least 1",),
    ),
    Case(
        "reconstruct: tolerance",
        f"reconstruct full_run scans.h5 {RECONSTRUCT} --tolerance 0",
        ("--tolerance: expected",),
    ),
    Case(
        "reconstruct: iterations",
        f"reconstruct full_run scans.h5 {RECONSTRUCT} --max-iterations 0",
        ("--max-iterations: expected at least 1",),
    ),
    Case(
        "reconstruct: an option that would do nothing",
        "reconstruct scans_run scans.h5 --sampler one-step --samples 9 --out new.h5",
        ("point estimate", "--samples"),
    ),
    # results
    Case(
        "evaluate: truncated",
        "evaluate result.h5 --reference scans_ref.h5",
        ("result.h5", "truncated"),
        lambda: truncate(Path("result.h5")),
        lambda: ResultFile("result.h5"),
    ),
    Case(
        "evaluate: foreign",
        "evaluate scans.h5 --reference scans_ref.h5",
        ("scans.h5", "expected a result file"),
        None,
        lambda: ResultFile("scans.h5"),
    ),
    Case(
        "evaluate: missing",
        "evaluate none.h5 --reference scans_ref.h5",
        ("none.h5", "expected a result file"),
    ),
    Case(
        "evaluate: nothing to compare with",
        "evaluate result.h5",
        ("expected a reference or a measurement file",),
    ),
    Case("evaluate: no reference", "evaluate result.h5 --reference none.h5", ("none.h5", "no such file")),
    Case(
        "evaluate: scans for clean images",
        "evaluate result.h5 --reference scans.h5",
        ("scans.h5", "ambient_sci images"),
    ),
    Case(
        "evaluate: images of another shape",
        "evaluate result.h5 --reference large_ref.h5",
        ("large_ref.h5", "(16, 16)", "(32, 32)"),
    ),
    Case(
        "evaluate: keep",
        "evaluate result.h5 --calibration scans.h5 --prior full_run --keep 1",
        ("--keep", "got 1.0"),
    ),
    Case(
        "evaluate: an option that would do nothing",
        "evaluate result.h5 --reference scans_ref.h5 --keep .5",
        ("--prior RUN",),
    ),
    Case(
        "evaluate: a point estimate has no error bars to test",
        "evaluate point.h5 --calibration scans.h5",
        ("point estimate", "'one-step'"),
        point_estimate,
    ),
    Case(
        "evaluate: scans for generated images",
        "evaluate scans_ref.h5 --reference scans_ref.h5 --calibration scans.h5",
        ("reference only", "measurement file"),
    ),
    Case(
        "evaluate: a mask-conditional prior",
        "evaluate result.h5 --calibration scans.h5 --prior scans_run",
        ("needs an unconditional prior",),
    ),
    # outputs
    Case(
        "simulate: output exists",
        SIMULATE.format("images.npy --noise-std 1"),
        ("new.h5", "exists"),
        touch("new.h5"),
    ),
    Case(
        "simulate: second output exists",
        SIMULATE.format("images.npy --noise-std 1"),
        ("exists",),
        touch("new_ref.h5"),
    ),
    Case(
        "simulate: one output for both",
        "simulate images.npy --operator identity --noise-std 1 --out new.h5 --reference ./new.h5",
        ("two files",),
    ),
    Case(
        "simulate: output is the input",
        "simulate full_ref.h5 --operator identity --noise-std 1 --out full_ref.h5 --reference new.h5 --overwrite",
        ("full_ref.h5", "the same file"),
    ),
    Case("import: output exists", "import images.npy --out scans.h5", ("scans.h5", "exists", "--overwrite")),
    Case(
        "inspect: output exists",
        "inspect scans.h5 --out sheet.png",
        ("sheet.png", "exists"),
        touch("sheet.png"),
    ),
    Case("inspect: a folder", "inspect .", (".: expected an HDF5 file, got a folder",)),
    Case("inspect: no picture", "inspect scans.h5 --out sheet.txt", ("sheet.txt", ".png")),
    Case(
        "train: output exists",
        "train full.h5 --out full_run --max-steps 1",
        ("full_run", "expected a new or empty folder"),
    ),
    Case("train: output is a file", "train full.h5 --out full.h5 --max-steps 1", ("full.h5", "got a file")),
    Case(
        "train: output is another folder",
        "train full.h5 --out odd --overwrite --max-steps 1",
        ("odd", "folder without config.json"),
        lambda: shutil.copytree("full_run/prior", "odd"),
    ),
    Case(
        "generate: output exists",
        "generate full_run --num 1 --out new.h5",
        ("new.h5", "exists"),
        touch("new.h5"),
    ),
    Case(
        "generate: picture exists",
        "generate full_run --num 1 --out new.h5",
        ("new.png", "exists"),
        touch("new.png"),
    ),
    Case(
        "reconstruct: output exists",
        "reconstruct full_run scans.h5 --out new.h5",
        ("new.h5", "exists"),
        touch("new.h5"),
    ),
    Case(
        "reconstruct: output is a folder",
        "reconstruct full_run scans.h5 --out full_run",
        ("full_run", "got a folder"),
    ),
    Case(
        "reconstruct: output is the input",
        "reconstruct full_run scans.h5 --out scans.h5 --overwrite",
        ("scans.h5", "the same file"),
    ),
    Case(
        "reconstruct: output below a file",
        "reconstruct full_run scans.h5 --out full.h5/new.h5",
        ("full.h5/new.h5", "folder"),
    ),
    Case(
        "evaluate: output exists",
        "evaluate result.h5 --reference scans_ref.h5 --out new",
        ("new/report.json", "exists"),
        lambda: (os.mkdir("new"), Path("new/report.json").touch()),
    ),
    Case(
        "evaluate: output is a file",
        "evaluate result.h5 --reference scans_ref.h5 --out full.h5",
        ("full.h5", "expected a folder", "got a file"),
    ),
    Case("quickstart: output exists", "quickstart --out full_run", ("full_run", "empty or new folder")),
]
if not torch.cuda.is_available():
    CASES.append(
        Case(
            "generate: no CUDA",
            "generate full_run --num 1 --out new.h5 --device cuda",
            ("CUDA", "auto or cpu"),
        )
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: Case, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case.prepare is not None:
        case.prepare()
    before = contents(place)
    status = main(case.arguments.split())
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.startswith("ambient-sci: error: ") and said.count("\n") == 1 and said.endswith("\n"), said
    for fragment in case.fragments:
        assert fragment in said
    assert contents(place) == before
    if case.call is not None:
        with pytest.raises(case.error) as raised:
            case.call()
        assert "\n" not in str(raised.value)
        assert contents(place) == before
