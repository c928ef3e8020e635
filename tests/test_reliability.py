"""Files of the library's own that were damaged, mixed up or cut off: refused by name, in one line."""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import in_child
from safetensors.torch import load_file, save_file

from ambient_sci import cli, whole_files
from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile, ReferenceFile, write_images, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.evaluation import features_of
from ambient_sci.operators import MRI, normalise_maps
from ambient_sci.priors import GaussianPrior, LoraPrior, NetworkConfig, NetworkPrior, load_prior
from ambient_sci.sampling import Reconstruction, ResultFile, reconstruct_to_file
from ambient_sci.sampling.parts import Parts
from ambient_sci.training import EMConfig, RunFolder, TrainConfig, em_report, fit
from ambient_sci.training.draws import Draws

SHAPE = (1, 4, 4)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior() -> GaussianPrior:
    root = torch.randn(16, 16, generator=rng(1)) / 4
    return GaussianPrior(torch.zeros(SHAPE), root @ root.T + 0.1 * torch.eye(16))


def scans(path: Path, seed: int = 0, masked: bool = True) -> Path:
    """Measurements of the same images and noise; only the masks depend on the seed."""
    mask = (
        (torch.rand(8, *SHAPE, generator=rng(10 + seed)) < 0.6).float() if masked else torch.ones(8, *SHAPE)
    )
    mask[:, :, 0] = 1
    y = mask * (prior().sample(8, rng(3)) + 0.1 * torch.randn(8, *SHAPE, generator=rng(4)))
    options = {"mask": mask if masked else None, "operator": "masking" if masked else "identity"}
    return write_measurements(path, measurements=y, noise_std=0.1, image_shape=SHAPE, **options)


def settings(**changes) -> TrainConfig:
    small = {"batch_size": 4, "device": "cpu", "network": NetworkConfig(kind="mlp", channels=(8,))}
    return TrainConfig(**{**small, "max_steps": 2, **changes})


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Two files of scans, a result of the first, a prior, a run, a run of expectation maximisation."""
    folder = tmp_path_factory.mktemp("work")
    em = EMConfig(
        laps=1,
        steps=1,
        sampler_steps=2,
        held_out=4,
        held_out_draws=2,
        initial_samples=8,
        initial_iterations=2,
    )
    prior().save(folder / "prior")
    for seed in (1, 2):
        scans(folder / f"m{seed}.h5", seed)
    scans(folder / "full.h5", masked=False)
    options: dict = {"noise_std": 0.1, "subjects": list("aabbccdd"), "scale": np.arange(1.0, 9.0)}
    mask = (torch.rand(8, *SHAPE, generator=rng(11)) < 0.6).float()
    mask[:, :, 0] = 1
    stored = (mask * 200).to(torch.uint8)
    write_measurements(
        folder / "mask8.h5", measurements=stored, mask=mask, operator="masking", image_shape=SHAPE, dtype="uint8",
        **options,
    )  # fmt: skip
    maps = normalise_maps(torch.randn(1, 2, 4, 4, dtype=torch.complex64, generator=rng(12)))
    lines = torch.ones(8, 1, 4, 4)
    lines[4:, ..., 0] = 0
    y = MRI(lines, maps).A(torch.randn(8, 2, 4, 4, generator=rng(13)))
    write_measurements(
        folder / "kspace.h5", measurements=y, mask=lines, operator="mri", image_shape=(2, 4, 4), coil_maps=maps,
        geometry={"volumes": []}, **options,
    )  # fmt: skip
    write_images(folder / "images.h5", images=IMAGES, labels=torch.arange(8), history="by hand")
    features_of(IMAGES, "pixels", folder / "features", batch_size=3)
    network = NetworkPrior(SHAPE, 1.0, network=NetworkConfig(kind="mlp", channels=(8,)))
    network.save(folder / "base")
    LoraPrior(load_prior(folder / "base"), rank=1, source=str(folder / "base")).save(folder / "lora")
    fit(folder / "full.h5", settings(), out=folder / "run", progress=False)
    fit(folder / "full.h5", settings(max_steps=None, em=em), out=folder / "em", progress=False)
    with MeasurementFile(folder / "m1.h5") as file:
        options = {"samples": 2, "steps": 3, "generator": rng()}
        reconstruct_to_file(prior(), file, folder / "r.h5", **options)
    return folder


# -- flipped bits --------------------------------------------------------------------------------------------


def state_of_prior(path: Path) -> object:
    return {k: v.tolist() for k, v in load_prior(path.parent).saved_tensors().items()}


def state_of_checkpoint(path: Path) -> object:
    tensors, values = RunFolder(path.parent.parent).load_checkpoint("ambient") or ({}, {})
    return {k: v.tolist() for k, v in tensors.items()}, values


def state_of_result(path: Path) -> object:
    found = Reconstruction.load(path)
    values = [t.tolist() for t in (found.mean, found.std, found.samples)]
    return [*values, found.report, found.subjects, found.scale, found.geometry, found.source]


def state_of_run(path: Path) -> object:
    return RunFolder(path.parent).read_json(path.name)


def state_of_settings(path: Path) -> object:
    folder, data = RunFolder(path.parent), path.parents[1] / "full.h5"
    fit(data, None, out=folder.path, resume=True, progress=False)
    return folder.config.to_dict()


def state_of_measurements(path: Path) -> object:
    with MeasurementFile(path) as file:
        maps, rows = file.coil_maps(), file.measurements()
        values = [
            rows,
            file.sigma(),
            file.mask(),
            torch.zeros(0) if maps is None else torch.view_as_real(maps),
        ]
        about = [
            file.subjects,
            np.asarray(file.scale).tolist(),
            file.history,
            file.geometry,
            file.design_dict,
        ]
        return [v.tolist() for v in values], about, file.operator_name, file.image_shape, file.design_status


def state_of_images(path: Path) -> object:
    with ReferenceFile(path) as file:
        labels = file.labels()
        assert labels is not None
        return [
            file.images().tolist(),
            labels.tolist(),
            file.subjects,
            file.scale,
            file.history,
            file.geometry,
        ]


def state_of_features(path: Path) -> object:
    return features_of(IMAGES, "pixels", path.parent, batch_size=3).tolist()


IMAGES = torch.rand(8, *SHAPE, generator=rng(7))
KINDS = {
    "full.h5": (state_of_measurements, 30),
    "mask8.h5": (state_of_measurements, 30),
    "kspace.h5": (state_of_measurements, 40),
    "images.h5": (state_of_images, 40),
    "features/KEY.npy": (state_of_features, 40),
    "features/KEY.sums": (state_of_features, 20),
    "lora/prior.json": (state_of_prior, 30),
    "lora/weights.safetensors": (state_of_prior, 50),
    "em/laps/00/prior/weights.safetensors": (state_of_prior, 20),
    "prior/prior.json": (state_of_prior, 100),
    "prior/weights.safetensors": (state_of_prior, 100),
    "run/prior/prior.json": (state_of_prior, 50),
    "run/prior/weights.safetensors": (state_of_prior, 50),
    "run/checkpoint/ambient.safetensors": (state_of_checkpoint, 100),
    "r.h5": (state_of_result, 100),
    "run/run.json": (state_of_run, 100),
    "em/em.json": (state_of_run, 100),
}
#: Whatever a bit does to these, nothing is computed from them.
HARMLESS = {
    "config.json": "people edit it; a resumed run compares it with run.json",
    "log.jsonl": "for people; a resumed run drops lines that are none",
    "KEY.json": "for people: what the features are of is in their name",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(name, work, tmp_path):
    """A bit that nothing is read from (a space between two words of JSON, a gap in an HDF5 file) is no harm;
    every other one is refused, in one line with the name of the file."""
    state, flips = KINDS[name]
    name = name.replace("KEY", next((work / "features").glob("*.npy")).stem)
    top = Path(name).parts[0]
    (shutil.copytree if (work / top).is_dir() else shutil.copy)(work / top, tmp_path / top)
    path, generator, harmless = tmp_path / name, random.Random(0), 0
    whole, good = path.read_bytes(), state(path)
    for _ in range(flips):
        place, bit = generator.randrange(len(whole)), generator.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        try:
            found = state(path)
        except InputError as error:
            assert str(path) in str(error) or str(path.parent) in str(error), error
            assert "\n" not in str(error)
        else:
            assert found == good, (place, bit)
            harmless += 1
    assert harmless < flips / 2 if path.suffix != ".h5" else harmless < flips


def test_every_file_of_ours_is_of_a_kind_that_was_tried(work):
    """1,000 flips in all; what people or only the disk of the machine look at is named."""
    key = next((work / "features").glob("*.npy")).stem
    names = {str(p.relative_to(work)).replace(key, "KEY") for p in work.rglob("*") if p.is_file()}
    kinds = {(Path(name).name, Path(name).suffix) for name in KINDS}
    of_result = {"r.h5", "m1.h5", "m2.h5"}  # of the kinds of r.h5 and mask8.h5
    for name in names - of_result:
        stem = (Path(name).name, Path(name).suffix)
        assert stem in kinds or Path(name).name in HARMLESS or stem[1] == ".safetensors", name
    assert sum(flips for _, flips in KINDS.values()) >= 1000


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_files_for_people_do_no_harm(name, work, tmp_path, capsys):
    """Refused by name, or the run goes on as it is."""
    run, generator = shutil.copytree(work / "run", tmp_path / "run"), random.Random(1)
    whole, weights = (run / name).read_bytes(), (run / "prior" / "weights.safetensors").read_bytes()
    for _ in range(12):
        place, bit = generator.randrange(len(whole)), generator.randrange(8)
        (run / name).write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
        status = main(["train", str(work / "full.h5"), "--out", str(run), "--resume"])
        said = capsys.readouterr().err
        assert status == 0 or (status == 2 and str(run) in said and said.count("\n") == 1), said
        assert (run / "prior" / "weights.safetensors").read_bytes() == weights


def test_damaged_draws_and_parts_of_features_are_made_again(tmp_path):
    class Alone:
        is_main_process = True
        wait_for_everyone = staticmethod(lambda: None)

    generator = random.Random(2)
    draws, rows = Draws(tmp_path, (8, *SHAPE), Alone()), torch.arange(8)  # type: ignore[arg-type]
    draws.add(0, rows, IMAGES)
    for _ in range(30):
        path = generator.choice([tmp_path / "draws.npy", tmp_path / "drawn" / "0"])
        whole = path.read_bytes()
        place = generator.randrange(128 if path.suffix else 0, len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert not Draws(tmp_path, (8, *SHAPE), Alone()).has(0, rows)  # type: ignore[arg-type]
        path.write_bytes(whole)
        assert Draws(tmp_path, (8, *SHAPE), Alone()).has(0, rows)  # type: ignore[arg-type]

    cache = tmp_path / "features"
    good = np.array(features_of(IMAGES, "pixels", cache, batch_size=3))
    (whole,), (sums,) = cache.glob("*.npy"), cache.glob("*.sums")
    content, known = whole.read_bytes(), sums.read_bytes()
    for _ in range(30):
        whole.unlink(missing_ok=True)
        part, cut = whole.with_suffix(".part"), 128 + 6 * 16 * 4
        place = generator.randrange(cut)
        part.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 : cut])
        sums.write_bytes(known)
        assert np.array_equal(features_of(IMAGES, "pixels", cache, batch_size=3), good), place


def test_numbers_that_were_changed_by_hand_are_refused(work, tmp_path):
    """Whole files that are valid in themselves: tensors, descriptions and states of others."""
    shutil.copytree(work / "run", tmp_path / "run")
    run, path = RunFolder(tmp_path / "run"), tmp_path / "run" / "prior" / "weights.safetensors"
    tensors = load_file(path)
    save_file({k: v + 1 for k, v in tensors.items()}, path)
    with pytest.raises(InputError, match="weights.safetensors|prior.json"):
        load_prior(path.parent)
    checkpoint = run.path / "checkpoint" / "ambient.safetensors"
    tensors, metadata = whole_files.read_tensors(checkpoint)
    save_file({k: v + 1 if v.is_floating_point() else v for k, v in tensors.items()}, checkpoint, metadata)
    with pytest.raises(InputError, match="ambient.safetensors.*digest"):
        run.load_checkpoint("ambient")
    with pytest.raises(InputError, match="ambient.safetensors.*digest"):
        fit(work / "full.h5", out=run.path, resume=True, progress=False)


def test_files_of_before_there_were_digests_are_read(work, tmp_path):
    run = RunFolder(shutil.copytree(work / "em", tmp_path / "em"))
    good, laps = load_prior(run.prior).saved_tensors(), em_report(run.path)
    for path in (run.prior, run.path / "laps" / "00" / "prior"):
        description = json.loads((path / "prior.json").read_text())
        description.pop("tensors")
        (path / "prior.json").write_text(json.dumps(description))
        save_file(load_file(path / "weights.safetensors"), path / "weights.safetensors")
    for name in ("run.json", "em.json"):
        value = run.read_json(name)
        value.pop("settings", None)
        (run.path / name).write_text(json.dumps(value))
    found = load_prior(run.prior).saved_tensors()
    assert all(torch.equal(found[k], good[k]) for k in good)
    assert em_report(run.path) == laps
    fit(work / "full.h5", out=run.path, resume=True, progress=False)

    run = RunFolder(shutil.copytree(work / "run", tmp_path / "run"))
    path = run.path / "checkpoint" / "ambient.safetensors"
    tensors, values = run.load_checkpoint("ambient") or ({}, {})
    save_file(tensors, path, {"state": json.dumps(values)})
    assert run.load_checkpoint("ambient") is not None


def test_a_damaged_part_is_made_again(work, tmp_path, monkeypatch):
    """A part of an interrupted reconstruction that lost a bit is not joined into the result."""
    options = {"samples": 2, "steps": 3, "images_at_once": 4}
    with MeasurementFile(work / "m1.h5") as file:
        reconstruct_to_file(prior(), file, tmp_path / "whole.h5", generator=rng(), **options)
        with monkeypatch.context() as patch:
            patch.setattr(Parts, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                reconstruct_to_file(prior(), file, tmp_path / "r.h5", generator=rng(), **options)
        (part, *_) = sorted(tmp_path.glob(".r.h5.parts-*/*.h5"))
        samples = ResultFile(part).samples(slice(None)).numpy().astype("<f4")
        content, first = part.read_bytes(), samples[0, 0].tobytes()
        assert content.count(first) == 1
        part.write_bytes(content.replace(first, bytes([first[0] ^ 64]) + first[1:]))
        with pytest.raises(InputError, match="damaged"):
            ResultFile(part).check()
        reconstruct_to_file(prior(), file, tmp_path / "r.h5", generator=rng(), **options)
    assert state_of_result(tmp_path / "r.h5") == state_of_result(tmp_path / "whole.h5")


# -- what belongs together -----------------------------------------------------------------------------------


def test_a_result_is_judged_by_the_scans_it_was_made_from(work, tmp_path, capsys):
    """The same people, images and noise; other masks."""
    command = ["evaluate", str(work / "r.h5"), "--out", str(tmp_path / "e"), "--calibration"]
    assert main([*command, str(work / "m2.h5")]) == 2
    said = capsys.readouterr().err
    assert "m2.h5" in said and "m1.h5" in said and said.count("\n") == 1
    assert not (tmp_path / "e").exists()
    shutil.copy(work / "m1.h5", tmp_path / "elsewhere.h5")  # by content, whatever its name
    assert main([*command, str(tmp_path / "elsewhere.h5")]) == 0


def test_a_result_keeps_its_source(work, tmp_path):
    found = Reconstruction.load(work / "r.h5")
    assert found.source["name"] == "m1.h5" and found.source["samples"] == 8
    found.save(tmp_path / "again.h5")
    assert Reconstruction.load(tmp_path / "again.h5").source == found.source


def test_a_result_that_does_not_know_its_source_says_so(work, tmp_path, capsys):
    """Of an earlier version, or made in memory: evaluate and inspect say that nothing was checked."""
    found = Reconstruction.load(work / "r.h5")
    found.source = {}
    found.save(tmp_path / "r.h5")
    assert main(["evaluate", str(tmp_path / "r.h5"), "--calibration", str(work / "m2.h5")]) == 0
    assert "was not checked" in capsys.readouterr().out
    assert "was not checked" in (tmp_path / "r_evaluation" / "report.json").read_text()
    for path, said in (
        (tmp_path / "r.h5", "cannot be checked"),
        (work / "r.h5", "m1.h5 ("),
    ):
        assert main(["inspect", str(path), "--out", str(tmp_path / f"{said[0]}.png")]) == 0
        assert said in capsys.readouterr().out


GEOMETRY = {"name": "a", "affine": np.eye(4).tolist(), "shape": [4, 4, 8], "axis": 2, "first": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"affine": [[1.0]]},
        {"affine": None},
        {"shape": [4, 4, 10**10]},
        {"shape": [4, 4]},
        {"axis": 3},
        {"axis": "x"},
        {"first": 1},
        {"first": -1},
        {"slices": [0, 0, 1, 2, 3, 4, 5, 6]},
        {"slices": [0, 1, 2, 3, 4, 5, 6, 8]},
        {"slices": []},
        {"slices": [0.5]},
        {"name": 5},
    ],
)
def test_geometry_that_loses_or_moves_slices_is_refused(change, work, tmp_path, capsys):
    """By whatever reads it: two slices at one place would be one, in silence."""
    found = Reconstruction.load(work / "r.h5")
    found.geometry = {"volumes": [{**GEOMETRY, "slices": list(range(8))}]}
    found.save(tmp_path / "good.h5")
    assert main(["export", str(tmp_path / "good.h5"), "--out", str(tmp_path / "good.nii.gz")]) == 0
    found.geometry = {"volumes": [{**GEOMETRY, "slices": list(range(8)), **change}]}
    found.save(tmp_path / "r.h5")
    assert main(["export", str(tmp_path / "r.h5"), "--out", str(tmp_path / "r.nii.gz")]) == 2
    assert "geometry" in capsys.readouterr().err
    with pytest.raises(InputError, match="geometry"):
        write_images(tmp_path / "t.h5", images=IMAGES, geometry=found.geometry)
    assert not (tmp_path / "t.h5").exists()


# -- the end of a command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(28, "No space left on device"), PermissionError(13, "no")]
)
def test_the_machine_gives_out(error, monkeypatch, capsys):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "parse", fail)
    assert main(["inspect", "x.h5"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ambient-sci: error: ") and said.count("\n") == 1 and len(said) > 24


COMMANDS = {
    "train": ["train", "full.h5", "--out", "out/run", "--config", "c.json"],
    "train --resume": ["train", "full.h5", "--out", "run", "--resume", "--max-steps", "4"],
    "em": ["train", "full.h5", "--out", "out/em", "--config", "em.json"],
    "reconstruct": ["reconstruct", "prior", "m1.h5", "--out", "out/r.h5", "--samples", "2", "--steps", "3"],
    "generate": ["generate", "prior", "--num", "40", "--steps", "2", "--out", "out/s.h5"],
    "simulate": [
        "simulate",
        "x.npy",
        "--operator",
        "identity",
        "--noise-std",
        "0.1",
        "--out",
        "out/m.h5",
        "--reference",
        "out/t.h5",
    ],
    "export": ["export", "r.h5", "--out", "out/r.nii.gz"],
    "evaluate": ["evaluate", "r.h5", "--calibration", "m1.h5", "--out", "out/e"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("limit", [0, 500, 3000, 9000])
def test_a_disk_that_takes_no_more_ends_in_one_line(name, limit, work, tmp_path, monkeypatch):
    """A limit on the size of a file acts like a full disk: status 2 and one line, no part left behind; with
    room the same command then works, as if nothing had been."""
    for part in ("prior", "run"):
        shutil.copytree(work / part, tmp_path / part)
    for part in ("m1.h5", "full.h5", "r.h5"):
        shutil.copy(work / part, tmp_path / part)
    settings().save(tmp_path / "c.json")
    RunFolder(work / "em").config.save(tmp_path / "em.json")
    np.save(tmp_path / "x.npy", torch.rand(8, 4, 4, generator=rng()).numpy())
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return main(COMMANDS[name])

    status, said = in_child(limited)
    lines = [line for line in said.splitlines() if line.startswith("ambient-sci: error: ")]
    assert status in (0, 2) and len(lines) == bool(status) and "Traceback" not in said, said
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith((".part", ".old"))]
    load_prior(tmp_path / "run")
    more = ([], ["--resume"]) if name in ("train", "em") else ([], ["--overwrite"])
    if status == 2:
        assert any(main([*COMMANDS[name], *extra]) == 0 for extra in more)


def test_samples_that_are_no_numbers_are_not_exported(tmp_path, capsys):
    samples = torch.randn(3, 2, *SHAPE, generator=rng())
    samples[1, 0, 0, 2, 2] = float("nan")
    Reconstruction.from_samples(samples, {"sampler": "mmps"}).save(tmp_path / "r.h5")
    for what in ("mean", "std", "samples"):
        command = [
            "export",
            str(tmp_path / "r.h5"),
            "--out",
            str(tmp_path / "v" / "r.nii.gz"),
            "--what",
            what,
        ]
        assert main(command) == 2
        assert "finite" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["r.h5"]
