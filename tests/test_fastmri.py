"""datasets/fastmri.py on small files of fastMRI's layout, and masks of fastMRI files through import, inspection and training."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_importers import coils, complex_noise, fft2, head, line_mask, rng, save_fastmri

from ambient_sci import fit
from ambient_sci.data import MeasurementFile, ReferenceFile, describe, import_source
from ambient_sci.data.raw import RawScan, centred_fft, crop_centre
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, make_design
from ambient_sci.priors import NetworkConfig
from ambient_sci.training import TrainConfig

ROOT = Path(__file__).parents[1]
SIZE, WIDE, TALL, COILS, SLICES = (24, 20), 32, 48, 5, 3
NOISE = 0.02


def load_script():
    spec = importlib.util.spec_from_file_location("fastmri_script", ROOT / "datasets" / "fastmri.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fastmri = load_script()


def pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Zeros around the centre (index n // 2) of the last two axes."""
    out = np.zeros((*image.shape[:-2], *size), image.dtype)
    top, left = (n // 2 - m // 2 for n, m in zip(size, image.shape[-2:], strict=True))
    out[..., top : top + image.shape[-2], left : left + image.shape[-1]] = image
    return out


def objects(slices: int = SLICES) -> np.ndarray:
    """Coil images of a head that fits into the crop, (S, N, 24, 20)."""
    maps = crop_centre(crop_centre(coils(COILS, 32), -2, SIZE[0]), -1, SIZE[1])
    inner = crop_centre(crop_centre(head(slices, 32), -2, SIZE[0]), -1, SIZE[1])
    v, u = np.meshgrid(np.linspace(-1, 1, SIZE[0]), np.linspace(-1, 1, SIZE[1]), indexing="ij")
    return (inner * np.clip(3 * (1 - v**2) * (1 - u**2), 0, 1))[:, None] * maps


def kspace_of(slices: int = SLICES, seed: int = 0) -> np.ndarray:
    """An oversampled scan, (S, N, 48, 32), with white noise."""
    return fft2(pad(objects(slices), (TALL, WIDE))) + NOISE * complex_noise(
        slices, COILS, TALL, WIDE, seed=seed
    )


def save(
    path: Path, kspace: np.ndarray | None = None, contrast: str = "AXT2", person: str = "", **options
) -> Path:
    save_fastmri(path, kspace_of() if kspace is None else kspace, **options)
    with h5py.File(path, "a") as file:
        file.attrs["acquisition"] = contrast
        file.attrs["patient_id"] = person or path.stem
    return path


def run(source: Path, out: Path, **options) -> None:
    fastmri.main((source,), out=out, size=SIZE, drop_last=1, **options)


# -- the script ---------------------------------------------------------------------------------------------------------------


def test_a_download_becomes_training_and_test_scans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Published folders decide the split; other contrasts, undersampled, small and short scans are left out, and the reasons counted."""
    download = tmp_path / "brain"
    save(download / "multicoil_train" / "a.h5")
    save(download / "multicoil_train" / "b.h5", 2 * kspace_of(seed=1))
    save(download / "multicoil_val" / "c.h5")
    save(download / "multicoil_train" / "t1.h5", contrast="AXT1")
    save(download / "multicoil_train" / "masked.h5", mask=line_mask())
    save(download / "multicoil_train" / "small.h5", kspace_of()[..., :16])
    save(download / "multicoil_train" / "short.h5", kspace_of(1))
    save(download / "multicoil_train" / "few.h5", kspace_of()[:, :3])
    out = tmp_path / "out"
    run(download, out)
    said = capsys.readouterr().out
    assert "train.h5: 2 volumes of 2 people" in said and "test.h5: 1 volumes of 1 people" in said
    for reason in (
        "of contrast AXT1",
        "undersampled",
        "smaller than 24 x 20",
        "of 1 slices or fewer",
        "of fewer than 4 coils",
    ):
        assert f"1 {reason}" in said
    train, test = MeasurementFile(out / "train.h5"), MeasurementFile(out / "test.h5")
    assert train.subjects == ["a", "a", "b", "b"] and test.subjects == ["c", "c"]
    assert train.measurement_shape == (2, 4, *SIZE) and bool((train.mask() == 1).all())
    assert "5 coils compressed to 4" in train.history and "slices 0 to 1" in train.history
    scale = np.asarray(train.scale)
    assert scale[2] == pytest.approx(2 * scale[0], rel=0.15)
    assert train.geometry["volumes"][1]["first"] == 2


def test_references_are_the_coil_combined_scans(tmp_path: Path) -> None:
    """A^H y of the measurement file, exactly; the object up to noise; in the same units."""
    for name in ("a", "b"):
        save(tmp_path / "d" / f"{name}.h5")
    run(tmp_path / "d", tmp_path / "out", test_fraction=0.5)
    for part in ("train", "test"):
        scans = MeasurementFile(tmp_path / "out" / f"{part}.h5")
        truth = ReferenceFile(tmp_path / "out" / f"{part}_reference.h5")
        x = scans.operator().A_adjoint(scans.measurements())
        assert torch.allclose(truth.images(), x, atol=1e-5)
        assert truth.subjects == scans.subjects and np.array_equal(truth.scale, scans.scale)
        assert truth.geometry == scans.geometry
        clean = np.sqrt((np.abs(objects()) ** 2).sum(1))[:2]
        found = x.square().sum(1).sqrt().numpy() * float(np.asarray(scans.scale))
        inside = clean > 0.4
        assert np.sqrt(((found - clean)[inside] ** 2).mean()) < 4 * NOISE
        # White noise keeps its level under the orthonormal crop; corners of so small a k-space hold some signal as well.
        level = float(scans.noise_std[0]) * float(np.asarray(scans.scale))
        assert 0.85 * NOISE < level < 1.4 * NOISE


def test_the_crop_is_the_crop_of_the_image() -> None:
    """And it keeps the variance of white noise."""
    kspace = complex_noise(4, COILS, TALL, WIDE)
    scan = fastmri.crop(
        RawScan(kspace.copy(), "a", "a"), fastmri.Selection(size=SIZE, drop_first=1, drop_last=1)
    )
    full = centred_fft(centred_fft(kspace[1:3], -1, inverse=True), -2, inverse=True)
    image = centred_fft(centred_fft(scan.kspace, -1, inverse=True), -2, inverse=True)
    assert np.allclose(image, crop_centre(crop_centre(full, -2, SIZE[0]), -1, SIZE[1]), atol=1e-5)
    assert np.asarray(scan.mask).all() and scan.kspace.real.var() == pytest.approx(1, abs=0.06)


def test_columns_that_were_not_acquired_stay_unmeasured() -> None:
    """Zero padding of a quarter of k-space on one side: the same quarter of the cropped one, and no signal invented there."""
    kspace = complex_noise(1, COILS, TALL, WIDE)
    kspace[..., :8] = 0
    scan = fastmri.crop(RawScan(kspace, "a", "a"), fastmri.Selection(size=SIZE, drop_last=0))
    measured = np.asarray(scan.mask)[0, 0]
    # Frequencies from -8 of 32 on are -5 of 20 and above: columns 5 to 19.
    assert measured.tolist() == [False] * 5 + [True] * 15
    assert not scan.kspace[..., :5].any() and scan.kspace[..., 5:].all()
    kspace[..., 20] = 0
    with pytest.raises(InputError, match="missing lines"):
        fastmri.crop(RawScan(kspace, "a", "a"), fastmri.Selection(size=SIZE, drop_last=0))


def test_padded_volumes_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "x.h5")
    assert isinstance(fastmri.select(path, fastmri.Selection(size=SIZE)), fastmri.Volume)
    with h5py.File(path, "r+") as file:
        file["kspace"][..., :3] = 0
    assert "zero-padded" in fastmri.select(path, fastmri.Selection(size=SIZE))
    kept = fastmri.select(path, fastmri.Selection(size=SIZE, keep_padded=True))
    assert isinstance(kept, fastmri.Volume)


def test_single_coil_knees(tmp_path: Path) -> None:
    for name in ("a", "b"):
        one = fft2(pad(np.abs(objects()).sum(1), (TALL, WIDE))) + NOISE * complex_noise(SLICES, TALL, WIDE)
        save(tmp_path / "d" / f"{name}.h5", one, contrast="CORPD_FBK")
    run(tmp_path / "d", tmp_path / "out", contrasts=("CORPD_FBK",), test_fraction=0.5)
    scans = MeasurementFile(tmp_path / "out" / "test.h5")
    assert scans.measurement_shape == (2, *SIZE) and scans.coil_maps() is None
    truth = ReferenceFile(tmp_path / "out" / "test_reference.h5").images()
    assert torch.allclose(truth, scans.operator().A_adjoint(scans.measurements()), atol=1e-5)


def test_no_person_is_in_both_parts() -> None:
    volumes = [fastmri.Volume(Path(f"{k}.h5"), f"person{k // 2}", None) for k in range(20)]
    parts = fastmri.split(volumes, 0.3, seed=0)
    people = {part: {v.person for v in chosen} for part, chosen in parts.items()}
    assert len(people["test"]) == 3 and not people["train"] & people["test"]
    assert fastmri.split(volumes, 0.3, seed=0) == parts != fastmri.split(volumes, 0.3, seed=1)
    contradicting = [fastmri.Volume(Path("a"), "p", "train"), fastmri.Volume(Path("b"), "p", "test")]
    with pytest.raises(InputError, match="same person in the training and validation folders: p"):
        fastmri.split(contradicting, 0.3, seed=0)


def _not_fastmri(folder: Path) -> None:
    with h5py.File(folder / "x.h5", "w") as file:
        file["reconstruction_rss"] = np.zeros(3)


def _truncated(folder: Path) -> None:
    data = save(folder / "x.h5").read_bytes()
    (folder / "x.h5").write_bytes(data[: len(data) // 2])


def _one_person(folder: Path) -> None:
    save(folder / "x.h5")


def _other_contrast(folder: Path) -> None:
    save(folder / "x.h5", contrast="AXFLAIR")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no fastMRI files"),
        (_not_fastmri, "x.h5: expected a fastMRI file with 'kspace', got .*reconstruction_rss"),
        (_truncated, "x.h5: not an HDF5 file, or truncated"),
        (_other_contrast, "no fully sampled volume of AXT2 among 1 files: 1 of contrast AXFLAIR"),
        (_one_person, "got none for testing .1 people."),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path: Path, make, message: str) -> None:
    (tmp_path / "d").mkdir()
    make(tmp_path / "d")
    with pytest.raises(InputError, match=message) as caught:
        run(tmp_path / "d", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# -- masks of undersampled files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undersampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine single-coil scans, each with lines drawn on top of a calibration region."""
    folder = tmp_path_factory.mktemp("masks") / "d"
    for k in range(9):
        mask = np.zeros(32, bool)
        mask[11:21] = True
        mask |= rng(k).random(32) > 0.5
        save_fastmri(folder / f"{k}.h5", fft2(head(1)) + NOISE * complex_noise(1, 32, 32, seed=k), mask)
    return folder


def test_estimated_designs_go_all_the_way_to_training(undersampled: Path, tmp_path: Path) -> None:
    """Labelled as estimated in the file and its description, given to operators and their splits, and used in a training."""
    path = import_source(undersampled, tmp_path / "m.h5")
    file = MeasurementFile(path)
    assert file.design_status == "estimated" and "estimated" in describe(path)
    operator = file.operator(range(4))
    assert operator.design is not None and operator.design.layout == "columns"
    split = operator.split(keep=0.7, generator=torch.Generator().manual_seed(0))
    held = split.held_out.mask > 0
    assert bool(held.any()) and bool((split.weights[held] >= 1).all()) and float(split.weights.max()) > 1
    network = NetworkConfig(channels=(8, 8), norm_groups=4, head_channels=8)
    config = TrainConfig(batch_size=2, max_steps=2, network=network)
    prior = fit(path, config)
    assert prior.conditioning == "mask-conditional"


def test_given_designs_are_labelled_as_given(undersampled: Path, tmp_path: Path) -> None:
    design = make_design("lines-uniform", image_shape=(2, 32, 32), acceleration=2, acs=10)
    path = import_source(undersampled, tmp_path / "m.h5", design=design)
    file = MeasurementFile(path)
    assert file.design_status == "given" and "given" in describe(path)
    assert isinstance(file.operator(), MRI) and file.operator().design.to_dict() == design.to_dict()
