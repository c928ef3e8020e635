"""Results in parts: shared by processes, continued after an interruption, and never mixed up with another run's."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch
from processes import launch

from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile, ReferenceFile, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.priors import GaussianPrior, NetworkConfig, NetworkPrior
from ambient_sci.sampling import (
    POSTERIOR_SAMPLERS,
    Reconstruction,
    generate,
    generate_to_file,
    reconstruct,
    reconstruct_to_file,
    streaming,
)
from ambient_sci.sampling.parts import Parts

SHAPE = (1, 4, 4)
CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianPrior:
    root = torch.randn(16, 16, generator=rng(1)) / 4
    return GaussianPrior(torch.zeros(SHAPE), root @ root.T + 0.1 * torch.eye(16))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a saved prior, one of NaN weights, and 20 masked measurements (two parts)."""
    gaussian().save(tmp_path / "prior")
    broken = NetworkPrior(SHAPE, 1.0, network=NetworkConfig(kind="mlp", channels=(8,)))
    for p in broken.parameters():
        torch.nn.init.constant_(p, float("nan"))
    broken.save(tmp_path / "broken")
    mask = (torch.rand(20, *SHAPE, generator=rng(2)) < 0.6).float()
    mask[:, :, 0] = 1
    y = mask * (gaussian().sample(20, rng(3)) + 0.1 * torch.randn(20, *SHAPE, generator=rng(4)))
    options = {"mask": mask, "noise_std": 0.1, "operator": "masking", "image_shape": SHAPE}
    write_measurements(tmp_path / "m.h5", measurements=y, **options)
    (tmp_path / "out").mkdir()
    return tmp_path


def run(work: Path, name: str, seed: int = 0, **settings) -> dict:
    options = {"samples": 2, "steps": 3, "images_at_once": 4, "generator": rng(seed), **settings}
    with MeasurementFile(work / "m.h5") as file:
        return reconstruct_to_file(gaussian(), file, work / "out" / name, **options)


def left(work: Path) -> list[str]:
    return sorted(p.name for p in (work / "out").iterdir())


# -- processes ---------------------------------------------------------------------------------------------------------------


def command(work: Path, what: str, out: str) -> list[str]:
    if what == "reconstruct":
        rest = [work / "m.h5", "--samples", 2, "--steps", 3]
    else:
        rest = ["--num", 300, "--steps", 3, "--sampler", "multistep"]
    return [what, *map(str, [work / "prior", *rest, "--out", work / "out" / out, "--device", "cpu"])]


@pytest.mark.parametrize("what", ["reconstruct", "generate"])
def test_processes_share_a_command(work, what):
    """Two processes end well, one speaks, and the file is the one that a single process makes."""
    done = launch("ambient_sci", *command(work, what, "two.h5"), module=True)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "two.h5" in line]) == 1
    assert "error" not in done.stderr.lower()
    assert main(command(work, what, "one.h5")) == 0
    if what == "reconstruct":
        one, two = (Reconstruction.load(work / "out" / f"{n}.h5") for n in ("one", "two"))
        assert torch.equal(one.samples, two.samples) and torch.equal(one.mean, two.mean)
        assert one.report == two.report
    else:
        with ReferenceFile(work / "out" / "one.h5") as one, ReferenceFile(work / "out" / "two.h5") as two:
            assert torch.equal(one.images(), two.images()) and len(two) == 300
    assert not [n for n in left(work) if "parts" in n]


SHARES = """
import os, sys, torch
from pathlib import Path
from ambient_sci.sampling.parts import Parts
with Parts(Path(sys.argv[1]) / "x.h5", "key", 5, torch.device("cpu")) as parts:
    mine = parts.missing(open)
    (Path(sys.argv[1]) / f"rank{os.environ['RANK']}").write_text(" ".join(map(str, mine)) + f" of {parts.processes}")
    parts.wait()
    parts.main and parts.remove()
    parts.wait()
"""


def test_every_part_is_made_once(tmp_path):
    (tmp_path / "shares.py").write_text(SHARES)
    launch(tmp_path / "shares.py", tmp_path).check_returncode()
    assert (tmp_path / "rank0").read_text() == "0 2 4 of 2" and (tmp_path / "rank1").read_text() == "1 3 of 2"


def test_a_command_that_does_not_share_is_done_once(work):
    """`evaluate` by two processes: one figure and one set of numbers, and neither process ends with an error."""
    assert main(command(work, "generate", "s.h5")) == 0
    sample = str(work / "out" / "s.h5")
    done = launch("ambient_sci", "evaluate", sample, "--reference", sample, module=True)
    assert done.returncode == 0, done.stderr


# -- interruption and neighbours ---------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_with_its_own_parts(work, monkeypatch):
    run(work, "whole.h5")
    plain, made = streaming.prepare, []

    def counted(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(streaming, "prepare", counted)
    with pytest.raises(KeyboardInterrupt):
        run(work, "cut.h5")
    assert len(list((work / "out").glob(".cut.h5.parts-*/0*.h5"))) == 3
    monkeypatch.setattr(streaming, "prepare", lambda *a: made.append(a) or plain(*a))
    run(work, "cut.h5")
    assert len(made) == 5
    whole, cut = (Reconstruction.load(work / "out" / f"{n}.h5") for n in ("whole", "cut"))
    assert torch.equal(whole.samples, cut.samples) and whole.report == cut.report
    assert left(work) == ["cut.h5", "whole.h5"]


def test_a_part_that_cannot_be_read_is_made_again(work, monkeypatch):
    run(work, "whole.h5")
    plain = streaming.join
    monkeypatch.setattr(streaming, "join", lambda *a: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="space"):
        run(work, "r.h5")
    part = next((work / "out").glob(".r.h5.parts-*/00000001.h5"))
    part.write_bytes(part.read_bytes()[:1000])
    monkeypatch.setattr(streaming, "join", plain)
    run(work, "r.h5")
    assert torch.equal(*(Reconstruction.load(work / "out" / f"{n}.h5").samples for n in ("whole", "r")))


def test_a_live_run_of_another_seed_is_refused_and_what_was_given_up_goes(work, monkeypatch):
    """While seed 1 is at work on an output seed 0 is refused; what seed 2 gave up is removed in the end."""
    plain = streaming.prepare
    (work / "out" / ".r.h5.parts-abandoned").mkdir()
    (work / "out" / ".r.h5.parts-abandoned" / "00000000.h5").touch()

    def meanwhile(*arguments):
        with pytest.raises(InputError, match=f"only process.*process {os.getpid()}"):
            run(work, "r.h5", seed=0)
        return plain(*arguments)

    monkeypatch.setattr(streaming, "prepare", meanwhile)
    run(work, "r.h5", seed=1, overwrite=True)
    assert left(work) == ["r.h5"]
    again = Reconstruction.load(work / "out" / "r.h5").samples
    monkeypatch.setattr(streaming, "prepare", plain)
    run(work, "s.h5", seed=1)
    assert torch.equal(again, Reconstruction.load(work / "out" / "s.h5").samples)


def test_the_same_run_twice_at_once_is_refused(work, monkeypatch):
    plain = streaming.prepare

    def twice(*arguments):
        with pytest.raises(InputError, match="only process"):
            run(work, "r.h5")
        return plain(*arguments)

    monkeypatch.setattr(streaming, "prepare", twice)
    run(work, "r.h5")
    assert left(work) == ["r.h5"]


def test_names_with_brackets(work):
    """A glob would take them for a pattern."""
    run(work, "r[1].h5")
    assert left(work) == ["r[1].h5"]


def test_a_lock_outlives_nothing(tmp_path):
    """The lock is the process's: it is free as soon as the context has ended, and taken as long as it has not."""
    with Parts(tmp_path / "x.h5", "key", 1, CPU) as parts:
        parts.paths[0].touch()
        handle = os.open(parts.folder / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


# -- images ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sampler", ["multistep", "heun", "ancestral"])
def test_a_file_of_images_is_what_generate_returns(tmp_path, channels, sampler):
    prior = GaussianPrior(torch.ones(channels, 4, 4), torch.rand(channels * 16, generator=rng()))
    settings = {"steps": 4, "sampler": sampler}
    whole = generate(prior, 11, generator=rng(5), **settings)
    for size, batch in ((3, 64), (64, 2)):
        path = tmp_path / f"{size}.h5"
        generate_to_file(
            prior,
            11,
            path,
            images_at_once=size,
            batch_size=batch,
            generator=rng(5),
            history="by hand",
            **settings,
        )
        with ReferenceFile(path) as file:
            assert torch.allclose(file.images(), whole, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3.h5", "64.h5"]


def test_generation_goes_on_where_it_was(tmp_path, monkeypatch):
    plain, made = streaming.chains, []

    def counted(prior, seeds, *arguments, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(len(seeds))
        return plain(prior, seeds, *arguments, **options)

    monkeypatch.setattr(streaming, "chains", counted)
    out = tmp_path / "s.h5"
    with pytest.raises(KeyboardInterrupt):
        generate_to_file(gaussian(), 10, out, steps=3, images_at_once=3, generator=rng(1))
    assert not out.exists()
    made[:] = [0] * 3
    generate_to_file(gaussian(), 10, out, steps=3, images_at_once=3, generator=rng(1))
    assert made[3:] == [3, 1]
    with ReferenceFile(out) as file:
        expected = generate(gaussian(), 10, steps=3, generator=rng(1))
        assert torch.allclose(file.images(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="exists"):
        generate_to_file(gaussian(), 10, out)


def test_no_more_than_a_part_is_in_memory(tmp_path, monkeypatch):
    largest, plain = [], streaming.chains
    monkeypatch.setattr(
        streaming, "chains", lambda p, s, *a, **k: largest.append(len(s)) or plain(p, s, *a, **k)
    )
    generate_to_file(gaussian(), 50, tmp_path / "s.h5", steps=2, images_at_once=8)
    assert max(largest) == 8 and sum(largest) == 50


def test_weights_that_are_no_numbers_end_a_command(work, capsys):
    """Exit status 2 and one line from every command that samples, and nothing left behind."""
    out = str(work / "out" / "x.h5")
    for arguments in (
        ["generate", str(work / "broken"), "--num", "2", "--steps", "2", "--out", out],
        ["reconstruct", str(work / "broken"), str(work / "m.h5"), "--steps", "2", "--out", out],
    ):
        assert main(arguments) == 2
        assert "finite" in capsys.readouterr().err
        assert left(work) == []


def test_a_result_with_samples_that_are_no_numbers_is_no_result(work, capsys):
    samples = torch.randn(3, 2, *SHAPE, generator=rng())
    samples[1, 0, 0, 2, 2] = float("nan")
    Reconstruction.from_samples(samples, {"sampler": "mmps"}).save(work / "out" / "r.h5")
    with pytest.raises(InputError, match="finite"):
        Reconstruction.load(work / "out" / "r.h5")
    assert main(["evaluate", str(work / "out" / "r.h5"), "--calibration", str(work / "m.h5")]) == 2
    assert "finite" in capsys.readouterr().err


# -- memory ------------------------------------------------------------------------------------------------------------------


def test_the_size_that_fitted_is_kept(work, monkeypatch):
    """A device that holds three chains: the first chunk finds that out, and none after it tries more, in this part or the next."""
    sampler, tried = POSTERIOR_SAMPLERS["daps"], []

    def limited(problem, **options):
        tried.append(len(problem.y))
        if len(problem.y) > 3:
            raise torch.OutOfMemoryError
        return sampler.run(problem, **options)

    prior, y = gaussian(), torch.randn(6, *SHAPE, generator=rng())
    from dataclasses import replace

    from ambient_sci.operators import Identity

    settings = {"samples": 4, "sampler": "daps", "steps": 3, "batch_size": 12}
    expected = reconstruct(prior, Identity(SHAPE), y, 0.1, generator=rng(), **settings).samples
    monkeypatch.setitem(POSTERIOR_SAMPLERS, "daps", replace(sampler, run=limited))
    found = reconstruct(prior, Identity(SHAPE), y, 0.1, generator=rng(), **settings).samples
    assert torch.allclose(found, expected, atol=1e-5)
    assert tried[:2] == [12, 6] and sum(n > 3 for n in tried) == 2
    tried.clear()
    run(work, "r.h5", sampler="daps", batch_size=8)
    assert sum(n > 3 for n in tried) == 2
