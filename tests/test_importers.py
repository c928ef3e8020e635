"""Imports: files as other packages write them, with known contents, come out as measurements that say the
same."""

from __future__ import annotations

import math
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ambient_sci.data import (
    MeasurementFile,
    import_source,
    open_source,
    write_images,
    write_measurements,
    write_nifti,
)
from ambient_sci.data.kspace import calibration_width, estimate_maps, prepare
from ambient_sci.data.raw import RawScan, centred_fft
from ambient_sci.data.readers.bart import read_cfl
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, Independent

SLICES, COILS, SIZE = 2, 3, 32
FIXTURES = Path(__file__).parent / "fixtures"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def complex_noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard deviation 1 per real channel."""
    g = rng(seed)
    return (g.standard_normal(shape) + 1j * g.standard_normal(shape)).astype(np.complex64)


def head(slices: int = SLICES, size: int = SIZE) -> np.ndarray:
    """Smoothed ellipses, (S, size, size), largest value about 2: little signal at the highest frequencies."""
    v, u = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    one = 1.0 * (v**2 / 0.6 + u**2 / 0.4 < 1) + 1.0 * ((v - 0.2) ** 2 / 0.05 + (u + 0.1) ** 2 / 0.03 < 1)
    smooth = gaussian_filter(one, 1.3)
    return np.stack([smooth * (1 - 0.2 * (k % 4)) for k in range(slices)])


def coils(number: int = COILS, size: int = SIZE) -> np.ndarray:
    """Smooth complex sensitivities (N, size, size), sum of squares 1."""
    v, u = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    angles = 2 * np.pi * np.arange(number) / number
    maps = np.stack([np.exp(-((v - np.cos(a)) ** 2 + (u - np.sin(a)) ** 2) / 2 + 1j * a) for a in angles])
    return maps / np.sqrt((np.abs(maps) ** 2).sum(0))


def fft2(images: np.ndarray) -> np.ndarray:
    return centred_fft(centred_fft(images, axis=-1), axis=-2)


def multi_coil_kspace(noise: float = 0.0, seed: int = 0) -> np.ndarray:
    clean = fft2(head()[:, None] * coils()[None])
    return (clean + noise * complex_noise(*clean.shape, seed=seed)).astype(np.complex64)


def oversample(kspace: np.ndarray) -> np.ndarray:
    """The readout (axis -2) of a field of view twice as large, the object in its middle."""
    image = centred_fft(kspace, axis=-2, inverse=True)
    pad = [(0, 0)] * (image.ndim - 2) + [(SIZE // 2, SIZE // 2), (0, 0)]
    return centred_fft(np.pad(image, pad), axis=-2)


def line_mask(acs: int = 10, step: int = 2) -> np.ndarray:
    """Every ``step``-th column and the central ones, (SIZE,)."""
    mask = np.zeros(SIZE, bool)
    mask[::step] = True
    mask[SIZE // 2 - acs // 2 : SIZE // 2 + acs // 2] = True
    return mask


# ---------------------------------------------------------------------------------------------- images


def test_arrays_get_an_estimated_noise_level(tmp_path: Path):
    images = 5 + head(40)[:, None] + 0.3 * rng().standard_normal((40, 1, SIZE, SIZE))
    np.save(tmp_path / "a.npy", images)
    file = MeasurementFile(import_source(tmp_path / "a.npy", tmp_path / "m.h5"))
    assert file.operator_name == "identity" and file.image_shape == (1, SIZE, SIZE)
    assert np.allclose(file.measurements().numpy(), images, atol=1e-6)
    assert 0.29 < float(file.noise_std[0]) < 0.32 and 0 < float(file.attributes["noise_std_error"]) < 0.01
    assert "magnitude" not in file.attributes and "estimated" in file.history
    stated = MeasurementFile(
        import_source(tmp_path / "a.npy", tmp_path / "n.h5", noise_std=0.25, subject="me")
    )
    assert stated.noise_std[0] == 0.25 and "noise_std_error" not in stated.attributes
    assert set(stated.subjects) == {"me"}


def save_picture(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_picture_folders_and_zips_by_person(tmp_path: Path):
    pictures = rng().integers(0, 256, (4, 12, 10), dtype=np.uint8)
    names = ["s1/1.pgm", "s1/2.png", "s2/1.png", "s2/2.bmp"]
    for name, picture in zip(names, pictures, strict=True):
        save_picture(tmp_path / "faces" / name, picture)
    (tmp_path / "faces" / "README.txt").write_text("not a picture")
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "faces" / name, name)
    for source in ("faces", "faces.zip"):
        out = import_source(
            tmp_path / source, tmp_path / f"{source}.h5", noise_std=25.5, noise_units="original"
        )
        file = MeasurementFile(out)
        assert file.subjects == ["s1", "s1", "s2", "s2"] and file.scale == 255
        assert np.allclose(file.measurements()[:, 0].numpy() * 255, pictures, atol=1e-4)
        assert float(file.noise_std[0]) == pytest.approx(0.1)


def test_colours_palettes_and_sixteen_bits(tmp_path: Path):
    from PIL import Image

    colour = rng().integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save_picture(tmp_path / "rgb.png", colour)
    assert np.allclose(
        open_source(tmp_path / "rgb.png").images(np.array([0]))[0], colour.transpose(2, 0, 1) / 255
    )
    Image.fromarray(colour).quantize(8).save(tmp_path / "palette.png")
    assert open_source(tmp_path / "palette.png").image_shape == (3, 8, 8)
    deep = rng().integers(0, 65536, (8, 8), dtype=np.uint16)
    save_picture(tmp_path / "deep.png", deep)
    assert np.allclose(
        open_source(tmp_path / "deep.png").images(np.array([0]))[0, 0], deep / 65535, atol=1e-6
    )


def test_mixed_pictures_are_refused_unless_resized(tmp_path: Path):
    save_picture(tmp_path / "d" / "a.png", np.zeros((8, 8), np.uint8) + 9)
    save_picture(tmp_path / "d" / "b.png", np.zeros((8, 9), np.uint8) + 9)
    with pytest.raises(InputError, match="mixed pictures"):
        import_source(tmp_path / "d", tmp_path / "m.h5")
    assert not (tmp_path / "m.h5").exists()
    assert len(MeasurementFile(import_source(tmp_path / "d", tmp_path / "m.h5", size=8, noise_std=0))) == 2
    save_picture(tmp_path / "d" / "c.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="mixed pictures, a.png has 1 channels and c.png 3"):
        import_source(tmp_path / "d", tmp_path / "n.h5", size=8, noise_std=0)


def save_volume(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def test_nifti_volumes_become_ras_slices_and_go_back(tmp_path: Path):
    volume = (rng().random((6, 7, 5)) * 900).astype(np.float32)  # RAS
    affine = np.array([[2.0, 0, 0, -5], [0, 2, 0, -6], [0, 0, 3, 7], [0, 0, 0, 1]])
    stored = nibabel.Nifti1Image(volume, affine).as_reoriented(np.array([[1, -1], [0, 1], [2, -1]]))
    assert nibabel.aff2axcodes(stored.affine) != ("R", "A", "S")
    nibabel.save(stored, tmp_path / "scan.nii.gz")
    with pytest.warns(UserWarning, match="Rician"):
        out = import_source(
            tmp_path / "scan.nii.gz", tmp_path / "m.h5", noise_std=9.0, noise_units="original"
        )
    file = MeasurementFile(out)
    top = np.percentile(volume, 99.9)
    assert file.image_shape == (1, 6, 7) and len(file) == 5 and set(file.subjects) == {"scan"}
    assert np.allclose(file.measurements()[:, 0].numpy(), np.moveaxis(volume, 2, 0) / top, atol=1e-6)
    assert file.scale == pytest.approx(top) and float(file.noise_std[0]) == pytest.approx(9 / top)
    assert file.attributes["magnitude"] and file.orientation == "RAS"
    (back,) = write_nifti(tmp_path / "back", file.measurements(), geometry=file.geometry, scale=file.scale)
    image = nibabel.load(back)
    assert np.allclose(image.get_fdata(), volume, rtol=1e-5) and np.allclose(image.affine, affine)
    with pytest.raises(InputError, match="exists"):
        write_nifti(tmp_path / "back", file.measurements(), geometry=file.geometry)
    with pytest.raises(InputError, match="of 5 slices, got 4"):
        write_nifti(tmp_path / "other", file.measurements([0, 1, 2, 3]), geometry=file.geometry)


@pytest.mark.filterwarnings("ignore:.*Rician")
def test_folders_of_volumes_keep_people_planes_and_scales_apart(tmp_path: Path):
    folder = tmp_path / "d"
    folder.mkdir()
    for k, name in enumerate(("anna", "bert")):
        volume = np.zeros((8, 6, 6), np.float32)
        volume[2:6, 1:5, 1:4] = 10.0 ** (k + 1)
        save_volume(folder / f"{name}.nii", volume, np.eye(4))
    file = MeasurementFile(
        import_source(folder, tmp_path / "m.h5", plane="coronal", min_foreground=0.1, noise_std=0.01)
    )
    assert file.subjects == ["anna"] * 4 + ["bert"] * 4 and file.image_shape == (1, 8, 6)
    assert np.allclose(np.asarray(file.scale)[[0, 4]], [10, 100]) and float(file.measurements().max()) == 1
    first, second = write_nifti(
        tmp_path, file.measurements(), geometry=file.geometry, scale=file.scale, suffix="_back"
    )
    assert first.name == "anna_back.nii.gz"
    assert np.array_equal(nibabel.load(second).get_fdata(), nibabel.load(folder / "bert.nii").get_fdata())
    save_volume(folder / "carl.nii", np.ones((8, 7, 7), np.float32), np.eye(4))
    with pytest.raises(InputError, match="mixed volumes"):
        import_source(folder, tmp_path / "n.h5")


def test_exports_without_geometry_and_of_complex_images(tmp_path: Path):
    images = torch.from_numpy(np.stack((head(3), 2 * head(3)), axis=1).astype(np.float32))
    paths = write_nifti(tmp_path, images, subjects=["a", "a", "b/c"], scale=2.0)
    assert [p.name for p in paths] == ["a.nii.gz", "b_c.nii.gz"]
    assert np.allclose(nibabel.load(paths[0]).get_fdata()[..., 1], 2 * math.sqrt(5) * head(3)[1], rtol=1e-5)
    (whole,) = write_nifti(tmp_path, images, magnitude=False)
    assert np.allclose(np.asarray(nibabel.load(whole).dataobj)[..., 0], head(3)[0] * (1 + 2j))


def save_dicom(path: Path, pixels: np.ndarray, position: float, **tags) -> None:
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    image.PatientID, image.SeriesInstanceUID, image.Modality = "p17", "1.2.3", "MR"
    image.Rows, image.Columns = pixels.shape
    image.PixelSpacing, image.SliceThickness = [2.0, 3.0], 4.0
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.ImagePositionPatient = [-10.0, -20.0, position]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
    image.RescaleSlope, image.RescaleIntercept = 0.5, 1.0
    image.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(image, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, image)


def test_dicom_series_are_sorted_rescaled_and_turned(tmp_path: Path):
    pytest.importorskip("pydicom")
    pixels = rng().integers(1, 2000, (3, 5, 6))  # slice, row (towards posterior), column (towards left)
    for k, name in ((2, "a"), (0, "b"), (1, "c")):
        save_dicom(tmp_path / "d" / name, pixels[k], position=4.0 * k)
    (tmp_path / "d" / "notes.txt").write_text("not DICOM")
    with pytest.warns(UserWarning, match="Rician"):
        file = MeasurementFile(import_source(tmp_path / "d", tmp_path / "m.h5", noise_std=0.1))
    assert file.subjects == ["p17"] * 3 and file.image_shape == (1, 6, 5)
    values = file.measurements()[:, 0].numpy() * float(np.asarray(file.scale))
    expected = (pixels * 0.5 + 1)[:, ::-1, ::-1].swapaxes(
        1, 2
    )  # axes (slice, towards right, towards anterior)
    assert np.allclose(values, expected, rtol=1e-5)
    affine = np.asarray(file.geometry["volumes"][0]["affine"])
    # The pixel of the last row and column is voxel (0, 0, 0): LPS (-10 + 5 * 3, -20 + 4 * 2, 0), in RAS
    # negated.
    assert np.allclose(affine[:3, 3], [-5, 12, 0]) and np.allclose(np.diag(affine), [3, 2, 4, 1])


BAD_DICOM: dict[str, tuple[Callable[[Path], None], str]] = {
    "mixed shapes": (lambda d: save_dicom(d / "b", np.ones((4, 6)), 4.0), "mixed shapes"),
    "mixed orientations": (
        lambda d: save_dicom(d / "b", np.ones((5, 6)), 4.0, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]),
        "mixed orientations",
    ),
    "two echoes": (lambda d: save_dicom(d / "b", np.ones((5, 6)), 0.0), "several images at one position"),
    "no pixels": (lambda d: save_dicom(d / "b", np.ones((5, 6)), 4.0, PixelData=b"12"), "cannot be decoded"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_DICOM.values(), ids=list(BAD_DICOM))
def test_bad_dicom_series_are_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str):
    pytest.importorskip("pydicom")
    save_dicom(tmp_path / "d" / "a", np.ones((5, 6)), 0.0)
    spoil(tmp_path / "d")
    with pytest.raises(InputError, match=message):
        import_source(tmp_path / "d", tmp_path / "m.h5")
    assert not (tmp_path / "m.h5").exists()


def test_masked_images_need_their_noise_level(tmp_path: Path):
    mask = (rng().random((10, 8, 8)) > 0.5).astype(np.uint8)
    mask[:, 0, 0] = 1
    images = rng().random((10, 8, 8)) * mask
    np.savez(tmp_path / "a.npz", images=images, mask=mask, noise_std=0.2)
    file = MeasurementFile(import_source(tmp_path / "a.npz", tmp_path / "m.h5"))
    assert file.operator_name == "masking" and torch.equal(file.mask()[:, 0], torch.from_numpy(mask).float())
    assert float(file.noise_std[0]) == pytest.approx(0.2) and file.design_status == "estimated"
    assert isinstance(file.design, Independent)
    np.savez(tmp_path / "b.npz", images=images, mask=mask)
    with pytest.raises(InputError, match="cannot be estimated"):
        import_source(tmp_path / "b.npz", tmp_path / "n.h5")
    np.savez(tmp_path / "c.npz", images=images + 1, mask=mask)
    with pytest.raises(InputError, match="contradicts the data"):
        import_source(tmp_path / "c.npz", tmp_path / "n.h5", noise_std=0.1)


# ---------------------------------------------------------------------------------------------- raw scans


def header(encoded: tuple[int, int, int], recon: tuple[int, int, int], patient: str = "") -> str:
    """An ISMRMRD header as fastMRI files carry it; 1 mm pixels."""

    def space(name: str, size: tuple[int, int, int]) -> str:
        matrix = "".join(f"<{a}>{n}</{a}>" for a, n in zip("xyz", size, strict=True))
        return f"<{name}><matrixSize>{matrix}</matrixSize><fieldOfView_mm>{matrix}</fieldOfView_mm></{name}>"

    subject = f"<subjectInformation><patientID>{patient}</patientID></subjectInformation>" if patient else ""
    return (
        f'<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">{subject}<encoding>'
        f"{space('encodedSpace', encoded)}{space('reconSpace', recon)}<trajectory>cartesian</trajectory>"
        "</encoding></ismrmrdHeader>"
    )


def save_fastmri(
    path: Path, kspace: np.ndarray, mask: np.ndarray | None = None, readout: int | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace if mask is None else kspace * mask
        if mask is not None:
            file["mask"] = mask.astype(np.float32)
        rows, columns = kspace.shape[-2:]
        file["ismrmrd_header"] = header((rows, columns, 1), (readout or rows, columns, 1))
        file.attrs["patient_id"] = path.stem + "-person"
        file.attrs["acquisition"] = "AXT2"
    return path


def combined(file: MeasurementFile) -> np.ndarray:
    """Magnitude of the coil-combined image in the original units, (S, H, W)."""
    x = file.operator().A_adjoint(file.measurements())
    return x.square().sum(1).sqrt().numpy() * np.asarray(file.scale)


def test_multi_coil_fastmri_is_whitened_cropped_calibrated_and_scaled(tmp_path: Path):
    sigma = 0.02
    kspace = oversample(multi_coil_kspace()) + sigma * complex_noise(SLICES, COILS, 2 * SIZE, SIZE)
    path = save_fastmri(tmp_path / "scan.h5", kspace, readout=SIZE)
    file = MeasurementFile(import_source(path, tmp_path / "m.h5"))
    assert file.measurement_shape == (2, COILS, SIZE, SIZE) and file.subjects == ["scan-person"] * SLICES
    assert (
        bool((file.mask() == 1).all()) and "removed, 64 to 32" in file.history and "ESPIRiT" in file.history
    )
    # The level is estimated from the corners, where little signal is left: within 15 %.
    level = float(file.noise_std[0]) * float(np.asarray(file.scale))
    assert sigma * 0.93 < level < sigma * 1.15
    maps = file.coil_maps()
    power = maps.abs().square().sum(1)
    inside = power > 0.5
    assert torch.allclose(power[inside], torch.ones(()), atol=1e-4) and not power[~inside].any()
    assert bool(inside.numpy()[head() > 0.5].all())
    # The coil-combined image is the object, up to noise, within the support of the maps.
    error = combined(file) - head()
    assert np.sqrt((error[head() > 0.5] ** 2).mean()) < 4 * sigma
    # What the operator cannot explain is the noise of the two directions that combining three coils averages
    # out.
    operator, y = file.operator(), file.measurements()
    residual = (y - operator.A(operator.A_adjoint(y))).std() * float(np.asarray(file.scale))
    assert float(residual) < 2.5 * sigma


def test_undersampled_fastmri_keeps_its_mask(tmp_path: Path):
    mask = line_mask()
    kspace = multi_coil_kspace(0.02)
    kspace[..., 0] = 0  # an edge column that the scanner never acquired, though the mask counts it
    assert mask[0]
    file = MeasurementFile(
        import_source(save_fastmri(tmp_path / "s.h5", kspace, mask), tmp_path / "m.h5", noise_std=0.01)
    )
    found = file.mask()[:, 0, 0, 5]
    assert (
        torch.equal(found[:, 1:], torch.from_numpy(mask[1:]).float().expand(SLICES, -1))
        and not found[:, 0].any()
    )
    assert (
        float(file.noise_std[0]) == pytest.approx(0.01)
        and file.design is None
        and file.design_status == "unknown"
    )
    scaled = file.measurements()[:, 0].numpy() * np.asarray(file.scale)
    assert np.allclose(scaled, (kspace * mask).real, atol=1e-4)


def test_single_coil_fastmri(tmp_path: Path):
    kspace = fft2(head()) + 0.02 * complex_noise(SLICES, SIZE, SIZE)
    file = MeasurementFile(import_source(save_fastmri(tmp_path / "s.h5", kspace), tmp_path / "m.h5"))
    assert file.measurement_shape == (2, SIZE, SIZE) and file.coil_maps() is None
    assert np.abs(combined(file) - head()).mean() < 0.04
    level = float(file.noise_std[0]) * float(np.asarray(file.scale))
    assert 0.018 < level < 0.03 and "corners" in file.history


def test_folders_hold_one_person_a_file_and_one_shape(tmp_path: Path):
    for k in range(2):
        save_fastmri(tmp_path / "d" / f"{k}.h5", multi_coil_kspace(0.02, seed=k) * (k + 1))
    file = MeasurementFile(import_source(tmp_path / "d", tmp_path / "m.h5"))
    assert file.subjects == ["0-person"] * 2 + ["1-person"] * 2
    assert np.asarray(file.scale)[2] == pytest.approx(2 * np.asarray(file.scale)[0], rel=0.05)
    assert [v["first"] for v in file.geometry["volumes"]] == [0, 2]
    save_fastmri(tmp_path / "d" / "2.h5", multi_coil_kspace(0.02)[:, :2])
    with pytest.raises(InputError, match="mixed shapes"):
        import_source(tmp_path / "d", tmp_path / "n.h5")
    assert not (tmp_path / "n.h5").exists()
    with pytest.raises(InputError, match="measurement file already"):
        import_source(tmp_path / "m.h5", tmp_path / "n.h5")


def test_hdf5_files_that_are_no_scans_are_left_out_of_a_folder(tmp_path: Path):
    """Our own outputs beside the scans, and somebody's tables; alone they are refused, damaged ones always."""
    (tmp_path / "d").mkdir()
    with h5py.File(tmp_path / "d" / "table.h5", "w") as table:
        table["ages"] = [1.0, 2.0]
    with pytest.raises(InputError, match="table.h5: expected raw scans"):
        import_source(tmp_path / "d", tmp_path / "m.h5")
    save_fastmri(tmp_path / "d" / "0.h5", multi_coil_kspace(0.02))
    import_source(tmp_path / "d" / "0.h5", tmp_path / "d" / "m.h5")
    with pytest.warns(UserWarning, match="left out: m.h5 .a measurement file already., table.h5"):
        file = MeasurementFile(import_source(tmp_path / "d", tmp_path / "n.h5"))
    assert set(file.subjects) == {"0-person"} and "no raw scans are left out: m.h5" in file.history
    (tmp_path / "d" / "1.h5").write_bytes((tmp_path / "d" / "0.h5").read_bytes()[:600])
    with pytest.raises(InputError, match="1.h5"):
        import_source(tmp_path / "d", tmp_path / "o.h5")


def test_different_masks_give_an_estimated_design(tmp_path: Path):
    for k in range(9):
        mask = line_mask() | (rng(k).random(SIZE) > 0.5)
        save_fastmri(
            tmp_path / "d" / f"{k}.h5", fft2(head(1)) + 0.02 * complex_noise(1, SIZE, SIZE, seed=k), mask
        )
    file = MeasurementFile(import_source(tmp_path / "d", tmp_path / "m.h5"))
    assert file.design_status == "estimated" and file.design is not None and file.design.layout == "columns"


def test_coil_noise_is_whitened_with_the_noise_scan(tmp_path: Path):
    mixing = 0.02 * (np.eye(COILS) + 0.5 * complex_noise(COILS, COILS, seed=5))
    noise = np.einsum("mn,snhw->smhw", mixing, complex_noise(SLICES, COILS, SIZE, SIZE, seed=6))
    scan = (mixing @ complex_noise(COILS, 5000, seed=7)).astype(np.complex64)
    clean = multi_coil_kspace()
    maps = coils().astype(np.complex64)
    for name, kspace in (("noisy", clean + noise), ("clean", clean)):
        np.savez(
            tmp_path / f"{name}.npz",
            kspace=kspace.astype(np.complex64),
            noise=scan,
            coil_maps=maps,
            subject="p",
        )
        import_source(tmp_path / f"{name}.npz", tmp_path / f"{name}.h5")
    noisy, without = MeasurementFile(tmp_path / "noisy.h5"), MeasurementFile(tmp_path / "clean.h5")
    residual = noisy.measurements() * float(np.asarray(noisy.scale)) - without.measurements() * float(
        np.asarray(without.scale)
    )
    level = float(noisy.noise_std[0]) * float(np.asarray(noisy.scale))
    values = torch.complex(residual[:, 0], residual[:, 1]).movedim(1, 0).reshape(COILS, -1) / level
    covariance = (values @ values.mH / values.shape[1]).numpy()
    # Complex variance 2 (1 per real channel), no correlation; 1152 samples: standard error 2 / 34.
    assert np.allclose(covariance, 2 * np.eye(COILS), atol=0.25)
    expected = math.sqrt((np.abs(mixing) ** 2).sum() * 2 / COILS / 2)
    assert level == pytest.approx(expected, rel=0.03)
    # Maps are whitened like the data, so clean whitened data are still explained by them.
    operator, y = without.operator(), without.measurements()
    assert isinstance(operator, MRI) and operator.isometry
    assert float((y - operator.A(operator.A_adjoint(y))).std()) < 2e-3 * float(y.std())


def test_coil_compression_keeps_image_and_noise(tmp_path: Path):
    sigma = 0.02
    path = save_fastmri(tmp_path / "s.h5", multi_coil_kspace(sigma))
    file = MeasurementFile(import_source(path, tmp_path / "m.h5", compress=2))
    assert file.coils == 2 and "3 coils compressed to 2" in file.history
    level = float(file.noise_std[0]) * float(np.asarray(file.scale))
    assert 0.93 * sigma < level < 1.3 * sigma
    with pytest.raises(InputError, match="at least 1 coil"):
        import_source(path, tmp_path / "n.h5", compress=0)
    # Three coils that mix two lose nothing.
    mixing = complex_noise(COILS, 2, seed=4)
    redundant = np.einsum("mn,snhw->smhw", mixing, fft2(head()[:, None] * coils(2)[None]))
    ready = prepare(RawScan(redundant, "p", "scan"), noise_std=0.1, compress=2)
    assert "(100.00 % of the energy)" in " ".join(ready.notes)
    assert np.linalg.norm(ready.kspace) * ready.scale == pytest.approx(np.linalg.norm(redundant), rel=1e-4)


def test_scans_of_a_partial_echo_keep_their_oversampling():
    kspace = oversample(multi_coil_kspace(0.02))
    kspace[:, :, :6] = 0
    ready = prepare(RawScan(kspace, "p", "scan", readout_size=SIZE), noise_std=0.1)
    assert ready.kspace.shape[-2] == 2 * SIZE and any("partial echo" in n for n in ready.notes)


def test_slices_of_pure_air_are_left_out():
    kspace = np.concatenate([multi_coil_kspace(0.01), 0.01 * complex_noise(1, COILS, SIZE, SIZE)])
    scan = RawScan(
        kspace, "p", "scan", coil_maps=np.concatenate([np.stack([coils()] * SLICES), 0 * coils()[None]])
    )
    with pytest.warns(UserWarning, match="1 slices without signal"):
        ready = prepare(scan)
    assert ready.slices.tolist() == [0, 1] and len(ready.kspace) == len(ready.mask) == 2


def test_calibration_regions():
    mask = np.zeros((2, 12, 16), bool)
    mask[:, :, 3:13] = True
    assert calibration_width(mask) == 10
    mask[1, :, 10] = False
    assert calibration_width(mask) == 4 and calibration_width(np.ones((1, 8, 9), bool)) == 8
    with pytest.raises(InputError, match="at least 8 samples a side for ESPIRiT, got 4"):
        estimate_maps(complex_noise(2, COILS, 12, 16), mask)


def save_ismrmrd(path: Path, kspace: np.ndarray, noise: np.ndarray, averages: int = 1, lines=None) -> Path:
    """As the ISMRMRD package writes it: oversampled readouts, one a line, in two slices; noise readouts
    first."""
    ismrmrd = pytest.importorskip("ismrmrd")
    rows, columns = kspace.shape[-2:]
    data = ismrmrd.Dataset(str(path), "dataset", create_if_needed=True)
    data.write_xml_header(header((rows, columns, 1), (SIZE, columns, 1), patient="anna").encode())
    readout = ismrmrd.Acquisition.from_array(noise)
    readout.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    readout.sample_time_us = 5.0
    data.append_acquisition(readout)
    for average in range(averages):
        for k in range(len(kspace)):
            for column in range(columns) if lines is None else np.flatnonzero(lines):
                line = np.ascontiguousarray(kspace[k, :, :, column])
                backwards = column % 2 == 1
                readout = ismrmrd.Acquisition.from_array(
                    np.ascontiguousarray(line[:, :: -1 if backwards else 1])
                )
                if backwards:
                    readout.set_flag(ismrmrd.ACQ_IS_REVERSE)
                readout.idx.kspace_encode_step_1, readout.idx.slice, readout.idx.average = (
                    int(column),
                    k,
                    average,
                )
                readout.center_sample, readout.sample_time_us = rows // 2, 5.0
                readout.position[:] = (10.0, 20.0, 4.0 * k)
                readout.read_dir[:], readout.phase_dir[:], readout.slice_dir[:] = (
                    (1, 0, 0),
                    (0, 1, 0),
                    (0, 0, 1),
                )
                data.append_acquisition(readout)
    data.close()
    return path


@pytest.mark.parametrize("averages", [1, 2])
def test_ismrmrd_acquisitions_are_sorted_into_kspace(tmp_path: Path, averages: int):
    kspace = oversample(multi_coil_kspace(0.01)).astype(np.complex64)
    noise = 0.02 * complex_noise(COILS, 4000, seed=3)
    path = save_ismrmrd(tmp_path / "s.h5", kspace, noise, averages, lines=line_mask())
    file = MeasurementFile(import_source(path, tmp_path / "m.h5", coil_maps=coils().astype(np.complex64)))
    assert file.subjects == ["anna"] * SLICES
    plain = MeasurementFile(import_source(path, tmp_path / "n.h5"))
    assert plain.measurement_shape == (2, COILS, SIZE, SIZE) and "noise scan" in plain.history
    assert torch.equal(plain.mask()[0, 0, 0], torch.from_numpy(line_mask()).float().expand(SIZE, -1))
    level = float(plain.noise_std[0]) * float(np.asarray(plain.scale))
    assert level == pytest.approx(0.02 / math.sqrt(averages), rel=0.05)  # the noise scan decides
    # Noise that is white already is whitened by nearly the identity: k-space is that of the head, every line in its place.
    y = plain.measurements() * float(np.asarray(plain.scale))
    expected = multi_coil_kspace() * line_mask()
    assert np.linalg.norm((y[:, 0] + 1j * y[:, 1]).numpy() - expected) < 0.1 * np.linalg.norm(expected)
    affine = np.asarray(plain.geometry["volumes"][0]["affine"])
    # LPS (10, 20) is RAS (-10, -20), at the centre (16, 16) of 1-mm pixels; slices are 4 mm apart.
    assert np.allclose(affine @ [16, 16, 1, 1], [-10, -20, 4, 1]) and np.allclose(
        np.abs(np.diag(affine)), [1, 1, 4, 1]
    )


def test_bart_files_written_by_bart():
    kspace = read_cfl(FIXTURES / "bart_phantom.cfl")
    assert kspace.shape == (16, 16, 1, 2, *[1] * 12) and kspace.dtype == np.complex64
    # The phantom is centred: its image is where its k-space peaks, at index n // 2 of both axes.
    peak = np.unravel_index(np.abs(kspace).sum(3).argmax(), (16, 16))
    assert peak == (8, 8)


def test_bart_phantoms_import(tmp_path: Path):
    file = MeasurementFile(import_source(FIXTURES / "bart_phantom.cfl", tmp_path / "m.h5", noise_std=0.01))
    assert file.measurement_shape == (2, 2, 16, 16) and file.subjects == ["bart_phantom"]
    scaled = file.measurements()[0].numpy() * np.asarray(file.scale)
    expected = read_cfl(FIXTURES / "bart_phantom").squeeze().transpose(2, 0, 1)
    assert np.allclose(scaled[0] + 1j * scaled[1], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")
def test_bart_round_trip(tmp_path: Path):
    for command in ("phantom -x32 -k -s4 k", "fft -u -i 3 k image", "rss 8 image rss"):
        subprocess.run(["bart", *command.split()], cwd=tmp_path, check=True)
    file = MeasurementFile(import_source(tmp_path / "k.cfl", tmp_path / "m.h5", noise_std=0.0))
    truth = np.abs(read_cfl(tmp_path / "rss").squeeze())
    inside = combined(file)[0] > 0
    assert np.allclose(combined(file)[0][inside], truth[inside], atol=0.05 * truth.max())


def save_cfl(path: Path, array: np.ndarray) -> None:
    path.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, array.shape)) + "\n")
    array.astype(np.complex64).ravel(order="F").tofile(path.with_suffix(".cfl"))


def test_bart_slices_maps_noise_and_three_dimensions(tmp_path: Path):
    kspace = multi_coil_kspace()
    stacked = kspace.transpose(2, 3, 1, 0).reshape(SIZE, SIZE, 1, COILS, *[1] * 9, SLICES)
    save_cfl(tmp_path / "k.cfl", stacked)
    save_cfl(tmp_path / "maps.cfl", coils().transpose(1, 2, 0)[:, :, None])
    save_cfl(tmp_path / "noise.cfl", 0.01 * complex_noise(COILS, 300).T.reshape(300, 1, 1, COILS))
    file = MeasurementFile(
        import_source(
            tmp_path / "k.cfl",
            tmp_path / "m.h5",
            coil_maps=tmp_path / "maps.cfl",
            noise_scan=tmp_path / "noise.cfl",
        )
    )
    assert len(file) == SLICES and float(file.noise_std[0]) * float(np.asarray(file.scale)) == pytest.approx(
        0.01, rel=0.1
    )
    assert np.allclose(combined(file), head(), atol=0.1)
    # The same head as a 3-D scan with x as the readout: SIZE slices (y, z).
    volume = np.moveaxis(head(), 0, -1)[None] * coils()[..., None]
    spectrum = centred_fft(centred_fft(centred_fft(volume, 1), 2), 3)
    save_cfl(tmp_path / "k3.cfl", spectrum.transpose(1, 2, 3, 0))
    with pytest.raises(InputError, match="ESPIRiT"):  # two partitions are no calibration region
        import_source(tmp_path / "k3.cfl", tmp_path / "n.h5", noise_std=0.01)
    ready_maps = np.broadcast_to(coils().transpose(1, 0, 2)[..., None], (SIZE, COILS, SIZE, SLICES))
    import_source(tmp_path / "k3.cfl", tmp_path / "n.h5", noise_std=0.01, coil_maps=ready_maps)
    three = MeasurementFile(tmp_path / "n.h5")
    assert len(three) == SIZE and np.allclose(combined(three), head().transpose(1, 2, 0), atol=1e-3)


# ---------------------------------------------------------------------------------------------- bad raw files


def _bad_fastmri(change: Callable[[h5py.File], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = save_fastmri(folder / "s.h5", multi_coil_kspace(0.01), line_mask())
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    return make


def _replace(name: str, convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], Path]:
    def change(file: h5py.File) -> None:
        new = convert(np.asarray(file[name]))
        del file[name]
        file[name] = new

    return _bad_fastmri(change)


def _truncated(folder: Path) -> Path:
    path = save_fastmri(folder / "s.h5", multi_coil_kspace(0.01))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def _swapped_axes(folder: Path) -> Path:
    path = save_fastmri(folder / "s.h5", oversample(multi_coil_kspace(0.01)), readout=SIZE)
    with h5py.File(path, "r+") as file:
        swapped = np.asarray(file["kspace"]).swapaxes(-1, -2)
        del file["kspace"]
        file["kspace"] = swapped
    return path


def _npz(**content) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "s.npz", **{"kspace": multi_coil_kspace(0.01), **content})
        return folder / "s.npz"

    return make


def _cfl(header_text: str, values: int = 8) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "k.hdr").write_text(header_text)
        np.ones(values, np.complex64).tofile(folder / "k.cfl")
        return folder / "k.cfl"

    return make


def _nan(array: np.ndarray) -> np.ndarray:
    array[0, 0, 0, SIZE // 2] = np.nan
    return array


def _ismrmrd(text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with h5py.File(folder / "s.h5", "w") as file:
            file["dataset/xml"], file["dataset/data"] = text, np.zeros(3)
        return folder / "s.h5"

    return make


SPIRAL = header((8, 8, 1), (8, 8, 1)).replace("cartesian", "spiral")
BAD_RAW: dict[str, tuple[Callable[[Path], Path], str]] = {
    "truncated": (_truncated, "truncated"),
    "foreign HDF5": (_bad_fastmri(lambda f: f.move("kspace", "data")), "expected fastMRI"),
    "real k-space": (_replace("kspace", lambda a: a.real.copy()), "expected complex kspace"),
    "k-space of two axes": (_replace("kspace", lambda a: a[0, 0].copy()), "expected complex kspace"),
    "axes in the wrong order": (_swapped_axes, "order of axes"),
    "NaN": (_replace("kspace", _nan), "NaN or infinite"),
    "empty": (_replace("kspace", lambda a: 0 * a), "k-space is all zero"),
    "mask of another size": (_replace("mask", lambda a: a[:-1].copy()), "mask of 32 columns"),
    "mask that contradicts": (
        _replace("mask", lambda a: a * (np.arange(SIZE) != 12)),
        "contradicts the data",
    ),
    "header that is no XML": (_ismrmrd("<x"), "not XML"),
    "header without matrix": (_ismrmrd("<ismrmrdHeader/>"), "encoded matrix size"),
    "spiral": (_ismrmrd(SPIRAL), "Cartesian trajectory, got spiral"),
    "few calibration lines": (
        lambda d: save_fastmri(d / "s.h5", multi_coil_kspace(0.01), line_mask(acs=4, step=3)),
        "for ESPIRiT",
    ),
    "zero maps": (_npz(coil_maps=0j * coils()), "not all zero"),
    "maps of other coils": (_npz(coil_maps=coils()[:2]), "expected complex coil maps"),
    "real maps": (_npz(coil_maps=np.abs(coils())), "expected complex coil maps"),
    "dead coil": (_npz(noise=complex_noise(COILS, 500) * np.array([[1], [0], [1]])), "dead"),
    "noise of other coils": (_npz(noise=complex_noise(2, 500)), "noise of 3 coils"),
    "too little noise": (_npz(noise=complex_noise(COILS, 5)), "at least 12 samples"),
    "npz mask that does not fit": (_npz(mask=np.ones(7)), "does not fit"),
    "npz mask that contradicts": (_npz(mask=line_mask()), "contradicts the data"),
    "npz of real k-space": (_npz(kspace=np.ones((2, 8, 8))), "expected complex kspace"),
    "cfl without header": (_cfl(""), "not a readable BART"),
    "cfl of another size": (_cfl("# Dimensions\n4 4 1 2\n"), "expected 32 values .* got 8"),
    "cfl with map sets": (_cfl("# Dimensions\n2 2 1 1 2\n"), r"in dimensions \[4\]"),
    "missing file": (lambda d: d / "none.h5", "no such file"),
}


@pytest.mark.parametrize(("make", "message"), BAD_RAW.values(), ids=list(BAD_RAW))
def test_bad_raw_files_are_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Path], message: str):
    with pytest.raises(InputError, match=message) as caught:
        import_source(make(tmp_path), tmp_path / "m.h5")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.h5").exists() and not list(tmp_path.glob(".*"))


def test_zero_padding_around_a_fully_sampled_kspace_is_cut_off(tmp_path: Path):
    """Publishers pad k-space with columns of zeros, which nothing can supervise. The field of view, and so every place, stays."""
    kspace = multi_coil_kspace(0.01)
    kspace[..., :2] = kspace[..., -3:] = 0
    path = save_fastmri(tmp_path / "d" / "a.h5", kspace)
    file = MeasurementFile(import_source(path, tmp_path / "m.h5"))
    assert (
        file.image_shape == (2, SIZE, SIZE - 4)
        and "zero padding of k-space cut off, 32 to 28 columns" in file.history
    )
    assert (
        bool((file.mask()[..., :-1] == 1).all()) and not file.mask()[..., -1].any()
    )  # the third column on the right
    affine = np.asarray(file.geometry["volumes"][0]["affine"])
    assert np.allclose(affine @ [SIZE // 2, SIZE // 2 - 2, 0, 1], [16, 16, 0, 1]) and affine[
        1, 1
    ] == pytest.approx(32 / 28)
    kept = MeasurementFile(import_source(path, tmp_path / "n.h5", keep_padding=True))
    assert kept.image_shape == (2, SIZE, SIZE)
    # In a folder as many columns are cut off as all files can spare, so that shapes stay alike.
    wider = multi_coil_kspace(0.01)
    wider[..., :1] = wider[..., -1:] = 0
    save_fastmri(tmp_path / "d" / "b.h5", wider)
    both = MeasurementFile(import_source(tmp_path / "d", tmp_path / "o.h5"))
    assert both.image_shape == (2, SIZE, SIZE - 2)


def test_columns_that_no_scan_measured_are_named(tmp_path: Path):
    kspace = multi_coil_kspace(0.01)
    kspace[..., :6] = 0
    with pytest.warns(UserWarning, match="columns 0, 1, 2, 3, 4, 5 of k-space are never measured"):
        import_source(save_fastmri(tmp_path / "a.h5", kspace), tmp_path / "m.h5")


def test_errors_name_the_file_of_a_folder(tmp_path: Path):
    for k in range(3):
        scan = multi_coil_kspace(0.01, seed=k)
        if k == 1:
            scan[:, 1] = 0
        save_fastmri(tmp_path / "d" / f"scan{k}.h5", scan)
    with pytest.raises(InputError, match="scan1.h5: .*a coil is dead"):
        import_source(tmp_path / "d", tmp_path / "m.h5")


def test_slices_that_are_zero_in_every_coil_are_left_out(tmp_path: Path):
    kspace = multi_coil_kspace(0.01)
    kspace = np.concatenate([kspace[:1], 0 * kspace[:1], kspace[1:]])
    path = save_fastmri(tmp_path / "s.h5", kspace)
    with pytest.warns(UserWarning, match="slices 1 of k-space are all zero and are left out"):
        file = MeasurementFile(import_source(path, tmp_path / "m.h5"))
    assert len(file) == 2 and file.geometry["volumes"][0]["slices"] == [0, 2]
    assert file.geometry["volumes"][0]["shape"] == [SIZE, SIZE, 3] and "all zero" in file.history


BAD_OPTIONS = {
    "negative noise": ({"noise_std": -1.0}, "levels >= 0"),
    "units": ({"noise_units": "grey"}, "'scaled' or 'original'"),
    "maps for images": ({"coil_maps": coils()}, "coil_maps has no meaning"),
    "compression of images": ({"compress": 4}, "compress has no meaning"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=list(BAD_OPTIONS))
def test_options_that_contradict_are_refused(tmp_path: Path, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        import_source(np.ones((2, 8, 8)), tmp_path / "m.h5", **options)


def test_own_files(tmp_path: Path):
    own = write_measurements(
        tmp_path / "m.h5",
        measurements=np.ones((1, 1, 8, 8)),
        mask=None,
        noise_std=0.1,
        operator="identity",
        image_shape=(1, 8, 8),
    )
    with pytest.raises(InputError, match="measurement file already"):
        import_source(own, tmp_path / "n.h5")
    images = write_images(
        tmp_path / "r.h5", images=rng().random((3, 1, 8, 8)), subjects=list("abc"), scale=3.0
    )
    file = MeasurementFile(import_source(images, tmp_path / "n.h5", noise_std=0.1))
    assert file.subjects == ["a", "b", "c"] and file.scale == 3.0
