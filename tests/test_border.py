"""What users hand in: seeds, devices, arrays, paths, one measurement, a physics with its noise; and wrong calls, in one line."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import deepinv
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ambient_sci as asci
from ambient_sci.data import MeasurementArrays, MeasurementFile, write_images, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.evaluation import evaluate
from ambient_sci.operators import MRI, Identity, Masking
from ambient_sci.priors import GaussianPrior
from ambient_sci.sampling import POSTERIOR_SAMPLERS, Reconstruction, reconstruct_to_file
from ambient_sci.sampling.border import as_device, as_generator
from ambient_sci.sampling.checks import sampler_options
from ambient_sci.sampling.subset import check_indices, parse_indices

SHAPE, SIGMA = (1, 4, 4), 0.3
FAST = {"samples": 2, "steps": 4}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def prior() -> GaussianPrior:
    return GaussianPrior(torch.zeros(SHAPE), torch.eye(16))


@pytest.fixture
def y() -> Tensor:
    return torch.randn(3, *SHAPE, generator=seeded(7))


def same(a: Reconstruction, b: Reconstruction) -> bool:
    return torch.equal(a.samples, b.samples) and torch.equal(a.mean, b.mean)


# -- what is accepted ------------------------------------------------------------------------------------------


def test_a_seed_is_the_generator_of_that_seed(prior, y):
    a = asci.reconstruct(prior, Identity(SHAPE), y, SIGMA, seed=3, **FAST)
    assert same(a, asci.reconstruct(prior, Identity(SHAPE), y, SIGMA, generator=seeded(3), **FAST))
    assert not same(a, asci.reconstruct(prior, Identity(SHAPE), y, SIGMA, seed=4, **FAST))
    draws = [
        asci.generate(prior, 2, steps=4, **how)
        for how in ({"seed": 1}, {"generator": seeded(1)}, {"seed": 2})
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_numpy_arrays_are_the_tensors_of_their_numbers(prior, y):
    expected = asci.reconstruct(prior, Identity(SHAPE), y, SIGMA, seed=0, **FAST)
    for array in (y.numpy(), y.numpy().astype(">f4"), np.asfortranarray(y.numpy())):
        assert same(asci.reconstruct(prior, Identity(SHAPE), array, SIGMA, seed=0, **FAST), expected)
    frozen = y.numpy().copy()
    frozen.flags.writeable = False
    levels = np.full(3, SIGMA, np.float32)
    assert same(asci.reconstruct(prior, Identity(SHAPE), frozen, levels, seed=0, **FAST), expected)


@pytest.mark.parametrize(
    "operator", [Identity(SHAPE), Masking(torch.ones(4, 4)), deepinv.physics.Denoising()]
)
def test_one_measurement_without_a_batch_is_a_batch_of_one(prior, y, operator):
    one = asci.reconstruct(prior, operator, y[0], SIGMA, seed=0, **FAST)
    assert one.mean.shape == (1, *SHAPE)
    assert same(one, asci.reconstruct(prior, operator, y[:1], SIGMA, seed=0, **FAST))
    entries = torch.full(SHAPE, SIGMA)
    expected = asci.reconstruct(prior, operator, y[:1], entries[None], seed=0, **FAST)
    assert same(asci.reconstruct(prior, operator, y[0], entries, seed=0, **FAST), expected)


def test_an_unbatched_foreign_measurement_of_another_shape_than_the_image(prior, y):
    physics = deepinv.physics.Downsampling(img_size=SHAPE, factor=2, filter=None)
    low = physics.A(y)
    assert same(
        asci.reconstruct(prior, physics, low[0], SIGMA, seed=0, **FAST),
        asci.reconstruct(prior, physics, low[:1], SIGMA, seed=0, **FAST),
    )


def test_the_level_of_the_operators_own_noise(prior, y):
    expected = asci.reconstruct(prior, Identity(SHAPE), y, SIGMA, seed=0, **FAST)
    assert same(asci.reconstruct(prior, Identity(SHAPE, noise_std=SIGMA), y, seed=0, **FAST), expected)
    noise = deepinv.physics.GaussianNoise(SIGMA)
    foreign = asci.reconstruct(prior, deepinv.physics.Denoising(noise), y, seed=0, **FAST)
    assert torch.allclose(foreign.mean, expected.mean, atol=1e-5)
    assert (
        asci.reconstruct(None, deepinv.physics.Denoising(noise), y, sampler="zero-filled").mean.shape
        == y.shape
    )


def test_priors_by_their_place(prior, y, tmp_path):
    prior.save(tmp_path / "p")
    expected = asci.reconstruct(prior, Identity(SHAPE), y, SIGMA, seed=0, **FAST)
    for place in (tmp_path / "p", str(tmp_path / "p")):
        assert same(asci.reconstruct(place, Identity(SHAPE), y, SIGMA, seed=0, **FAST), expected)
    assert asci.generate(tmp_path / "p", 2, steps=3, seed=0).shape == (2, *SHAPE)
    assert asci.generate("pretrained:brain64", 1, steps=1, seed=0).shape == (1, 2, 64, 64)


def measurement_file(folder: Path, count: int = 5) -> tuple[Path, Tensor]:
    y = torch.randn(count, *SHAPE, generator=seeded(9))
    mask = (torch.rand(count, 1, 4, 4, generator=seeded(2)) < 0.7).float()
    mask[..., 0, 0] = 1
    path = folder / "m.h5"
    write_measurements(
        path, measurements=(y * mask).numpy(), mask=mask.numpy(), noise_std=SIGMA, operator="masking", image_shape=SHAPE,
        subjects=[f"s{k}" for k in range(count)],
    )  # fmt: skip
    return path, y * mask


def test_measurements_by_the_path_of_their_file(prior, tmp_path):
    path, y = measurement_file(tmp_path)
    with MeasurementFile(path) as file:
        expected = asci.reconstruct(prior, file.operator(), file.measurements(), file.sigma(), seed=0, **FAST)
        arrays = MeasurementArrays(file.operator(), file.measurements(), file.sigma())
        found = [
            asci.reconstruct(prior, source, seed=0, **FAST) for source in (path, str(path), file, arrays)
        ]
    assert all(same(one, expected) for one in found)
    assert found[0].subjects == [f"s{k}" for k in range(5)] and found[0].source["samples"] == 5


def test_nothing_handed_in_is_changed(prior, y):
    operator = Masking(torch.ones(1, 4, 4))
    before = (y.clone(), operator.mask.clone(), {k: t.clone() for k, t in prior.state_dict().items()})
    asci.reconstruct(prior, operator, y, SIGMA, seed=0, device="cpu", **FAST)
    assert torch.equal(y, before[0]) and torch.equal(operator.mask, before[1])
    assert all(torch.equal(t, before[2][k]) for k, t in prior.state_dict().items())


VIRTUAL = """
import sys; sys.path.insert(0, {device!r}); sys.path.insert(0, {root!r})
import torch, deepinv
import ambient_sci as asci
from ambient_sci.operators import MRI, Masking
from ambient_sci.priors import GaussianPrior
from virtual_device import DEVICE, virtual_device
make = lambda: GaussianPrior(torch.zeros(2, 4, 4), torch.eye(32))
y = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
mask = torch.ones(4, 4); mask[:, 1] = 0
operators = [MRI(mask), Masking(mask), deepinv.physics.Inpainting((2, 4, 4), mask=mask.expand(2, 4, 4))]
with virtual_device():
    here, there = make(), make().to(DEVICE)
    for operator in operators:
        for sigma in (0.3, torch.full((2,), 0.3)):
            options = dict(seed=0, samples=2, steps=4)
            expected = asci.reconstruct(here, operator, y, sigma, **options)
            for prior, device in ((there, None), (here, DEVICE), (there, "cpu")):
                found = asci.reconstruct(prior, operator, y, sigma, device=device, **options)
                assert found.mean.device == found.samples.device == y.device, found.mean.device
                assert torch.allclose(found.mean, expected.mean, atol=1e-4), (type(operator), device)
        assert next(operator.buffers()).device.type == "cpu", operator
    assert next(here.buffers()).device.type == "cpu" and next(there.buffers()).device.type == "vgpu"
    assert asci.generate(here, 2, steps=3, seed=0, device=DEVICE).device.type == "vgpu"
print("fine")
"""


def test_operator_and_measurements_go_to_the_priors_device_and_the_result_comes_back():
    """On a pretended accelerator, in a process of its own (see tests/device)."""
    here = Path(__file__).parent
    code = VIRTUAL.format(device=str(here / "device"), root=str(here.parent))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-2000:]


# -- settings are visible --------------------------------------------------------------------------------------


def test_every_setting_of_every_sampler_is_a_keyword_with_a_type():
    parameters = inspect.signature(asci.reconstruct).parameters
    for name in POSTERIOR_SAMPLERS:
        for option in sampler_options(name):
            assert parameters[option].annotation not in (inspect.Parameter.empty, "Any"), (name, option)
            assert parameters[option].default is None
            assert f"{option}" in (asci.reconstruct.__doc__ or "")
    assert parameters["unknown"].annotation == "Never"


def test_typing_says_which_samplers_there_are():
    from typing import get_args

    from ambient_sci.baselines import BASELINES
    from ambient_sci.sampling.api import SamplerName

    assert set(get_args(SamplerName)) == {*POSTERIOR_SAMPLERS, *BASELINES}


# -- wrong calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"generator": 0}, ["torch.Generator", "got int", "seed=0"]),
        ({"generator": seeded(0), "seed": 0}, ["got both"]),
        ({"seed": -1}, ["whole number from 0", "-1"]),
        ({"seed": 0.5}, ["whole number", "0.5"]),
        ({"seed": True}, ["whole number", "True"]),
        ({"device": "gpu0"}, ["auto, cpu, cuda", "gpu0"]),
        ({"prior": torch.zeros(1)}, ["expected a prior", "Tensor"]),
        ({"prior": None}, ["expected a prior", "NoneType"]),
        ({"prior": nn.Linear(2, 2)}, ["expected a prior", "Linear", "DeepinvPrior"]),
        ({"prior": "nowhere"}, ["nowhere", "found none"]),
        ({"prior": "pretrained:nobody"}, ["brain64", "nobody"]),
        ({"operator": lambda x: x}, ["linear operator", "function"]),
        ({"operator": "nowhere.h5", "y": None, "sigma_y": None}, ["nowhere.h5"]),
        ({"operator": "nowhere.h5"}, ["nowhere.h5"]),
        ({"y": None}, ["expected measurements y", "None"]),
        ({"y": [[1.0]]}, ["tensor or a NumPy array", "list"]),
        ({"y": np.zeros((3, *SHAPE), complex)}, ["complex numbers as two channels", "complex128"]),
        ({"y": np.zeros((3, *SHAPE), np.uint8)}, ["floating-point", "uint8"]),
        ({"y": np.array(["a"])}, ["real numbers", "<U1"]),
        ({"sigma_y": None}, ["noise level", "got None"]),
        ({"sigma_y": None, "operator": deepinv.physics.Denoising(deepinv.physics.PoissonNoise())}, ["GaussianNoise", "PoissonNoise"]),
        ({"sigma_y": None, "operator": deepinv.physics.Denoising(deepinv.physics.UniformNoise())}, ["GaussianNoise", "UniformNoise"]),
        ({"tolerence": 0.1}, ["tolerance", "tolerence"]),
        ({"particles": 4}, ["mmps", "particles"]),
        ({"sampler": "mcmc"}, ["mmps", "mcmc"]),
        ({"indices": [0]}, ["only with a measurement file"]),
    ],
)  # fmt: skip
def test_wrong_calls_end_in_one_line_that_says_what_was_expected(prior, y, change, fragments):
    given = {"prior": prior, "operator": Identity(SHAPE), "y": y, "sigma_y": SIGMA, **FAST, **change}
    with pytest.raises(InputError) as error:
        asci.reconstruct(
            given.pop("prior"), given.pop("operator"), given.pop("y"), given.pop("sigma_y"), **given
        )
    said = str(error.value)
    assert "\n" not in said and len(said) < 400
    for fragment in fragments:
        assert fragment in said


@pytest.mark.parametrize(
    ("given", "num", "options", "fragment"),
    [
        ("nowhere", 2, {}, "nowhere"),
        (np.zeros(3), 2, {}, "expected a prior"),
        (None, 2.0, {}, "whole number"),
        (None, 2, {"generator": 1}, "seed=1"),
        (None, 2, {"sampler": "dpm"}, "multistep"),
    ],
)
def test_wrong_calls_of_generate(prior, given, num, options, fragment):
    with pytest.raises(InputError, match=fragment):
        asci.generate(prior if given is None else given, num, **options)


def test_devices_and_seeds_by_themselves():
    assert as_device(None) is None and as_device("cpu") == torch.device("cpu")
    assert as_device("auto") in (torch.device("cpu"), torch.device("cuda"))
    assert as_generator(None, None, "x") is None
    assert as_generator(None, np.int64(5), "x").initial_seed() == 5  # type: ignore[union-attr]
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="machine with CUDA"):
            as_device("cuda")


# -- some samples of a file ------------------------------------------------------------------------------------


def test_lists_of_samples():
    assert parse_indices("0:3,7, 5") == [0, 1, 2, 5, 7]
    assert parse_indices("0:9:4,4") == [0, 4, 8]
    for wrong in ("", "a", "3:", "-1", "1.5", "2:2", "0:4:0", "1;2"):
        with pytest.raises(InputError, match="indices"):
            parse_indices(wrong)
    assert check_indices(None, 4) == range(4) and check_indices([2, 1], 4) == range(1, 3)
    assert check_indices([3, 0], 4) == [0, 3]
    for wrong in ([], [4], [-1, 0], [1, 1]):
        with pytest.raises(InputError, match="from 0 to 3"):
            check_indices(wrong, 4)


def test_a_result_of_some_samples_says_which_and_is_compared_with_theirs(prior, tmp_path):
    path, _ = measurement_file(tmp_path)
    truth = torch.rand(5, *SHAPE, generator=seeded(4))
    write_images(tmp_path / "clean.h5", images=truth.numpy(), subjects=[f"s{k}" for k in range(5)])
    some = asci.reconstruct(prior, path, indices=[4, 1], seed=0, samples=4, steps=4)
    assert some.subjects == ["s1", "s4"] and some.source["indices"] == [1, 4]
    with MeasurementFile(path) as file:
        reconstruct_to_file(
            prior, file, tmp_path / "r.h5", indices=[4, 1], samples=4, steps=4, generator=seeded(0)
        )
        by_hand = asci.reconstruct(
            prior,
            file.operator([1, 4]),
            file.measurements([1, 4]),
            file.sigma([1, 4]),
            seed=0,
            samples=4,
            steps=4,
        )
    assert same(some, by_hand)
    stored = Reconstruction.load(tmp_path / "r.h5")
    assert stored.source["indices"] == [1, 4] and stored.subjects == ["s1", "s4"]
    for kind in (
        {"reference": tmp_path / "clean.h5"},
        {"calibration": path, "prior": prior, "held_out_images": 2},
    ):
        report = evaluate(tmp_path / "r.h5", tmp_path / "e", overwrite=True, **kind)
        assert report["text"]
    report = evaluate(stored, tmp_path / "e", overwrite=True, reference=tmp_path / "clean.h5", peak=1.0)
    expected = 10 * np.log10(1 / float((stored.mean - truth[[1, 4]]).square().mean((1, 2, 3))[0]))
    assert report["scores"]["people"] == ["s1", "s4"] and np.isfinite(expected)
    shorter = write_images(tmp_path / "two.h5", images=truth[:2].numpy(), subjects=["s0", "s1"])
    assert shorter is None or shorter
    with pytest.raises(InputError, match="expected the people of the result"):
        evaluate(stored, tmp_path / "e", overwrite=True, reference=tmp_path / "two.h5")


def test_mri_without_a_batch_and_its_complex_form(tmp_path):
    prior = GaussianPrior(torch.zeros(2, 4, 4), torch.eye(32))
    maps = torch.full((3, 4, 4), 3**-0.5, dtype=torch.complex64)
    y = torch.randn(2, 3, 4, 4, generator=seeded(1))
    one = asci.reconstruct(prior, MRI(torch.ones(4, 4), maps), y, SIGMA, seed=0, **FAST)
    assert one.mean.shape == (1, 2, 4, 4)
    with pytest.raises(InputError, match=r"view_as_real\(y\)\.movedim\(-1, 1\)"):
        asci.reconstruct(prior, MRI(torch.ones(4, 4), maps), torch.complex(y[:1], y[1:]), SIGMA, **FAST)
