"""Every file that pydicom and nibabel ship for their own tests goes in right, by the package's own reading, or is refused by name and reason."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ambient_sci.data import MeasurementFile, import_source
from ambient_sci.errors import InputError

NOT_READ = "expected .npy, .npz, .h5, a volume"


def imported(source: Path, folder: Path) -> MeasurementFile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MeasurementFile(import_source(source, folder / "m.h5", noise_std=0.1))


def originals(file: MeasurementFile) -> np.ndarray:
    """Stored values in original units, (N, C, H, W) float64."""
    scale = np.broadcast_to(np.asarray(file.scale), (len(file),))
    return file.measurements().double().numpy() * scale[:, None, None, None]


def at(file: MeasurementFile, volume: int, point: np.ndarray) -> float:
    """The value at a place in RAS millimetres, by the geometry of the file; NaN where no slice is."""
    about = file.geometry["volumes"][volume]
    index = np.linalg.solve(np.asarray(about["affine"]), [*point, 1])[:3]
    voxel = np.rint(index).astype(int)
    # The voxel's centre is there to 1e-4 mm (voxels below 40 mm).
    assert np.abs(np.asarray(about["affine"]) @ [*voxel, 1] - [*point, 1]).max() < 1e-4
    axis = about["axis"]
    if voxel[axis] not in about["slices"]:
        return float("nan")
    row = about["first"] + about["slices"].index(voxel[axis])
    return float(originals(file)[row, 0][tuple(np.delete(voxel, axis))])


# -- pydicom

#: Reasons; every other file of the folder goes in.
DICOM_REFUSED = {
    "ExplVR_BigEndNoMeta.dcm": "no DICM",
    "ExplVR_LitEndNoMeta.dcm": "no DICM",
    "JPEG-lossy.dcm": "cannot be decoded",
    "JPEG2000-embedded-sequence-delimiter.dcm": "cannot be decoded",
    "MR_truncated.dcm": "cannot be decoded",
    "UN_sequence.dcm": "no DICOM images",
    "badVR.dcm": "NumberOfFrames",
    "empty_charset_LEI.dcm": "no DICOM images",
    "liver_1frame.dcm": "functional groups of 3",
    "liver_expb_1frame.dcm": "functional groups of 3",
    "meta_missing_tsyntax.dcm": "no DICOM images",
    "nested_priv_SQ.dcm": "no DICOM images",
    "no_meta.dcm": "no DICM",
    "no_meta_group_length.dcm": "no DICOM images",
    "priv_SQ.dcm": "no DICOM images",
    "reportsi.dcm": r"no DICOM images in it, got reportsi.dcm \(SR\)",
    "reportsi_with_empty_number_tags.dcm": r"\(SR\)",
    "rtplan.dcm": r"\(RTPLAN\)",
    "rtplan_truncated.dcm": r"\(RTPLAN\)",
    "rtstruct.dcm": "no DICM",
    "test-SR.dcm": r"\(SR\)",
    "waveform_ecg.dcm": r"\(ECG\)",
    **dict.fromkeys(
        (
            "README.txt",
            "crayons.icc",
            "rtplan.dump",
            "rtstruct.dump",
            "test1.json",
            "test_PN.json",
            "zipMR.gz",
        ),
        NOT_READ,
    ),
}
#: Files whose decoder is an extra (JPEG, JPEG-LS, JPEG 2000).
DECODERS = ("jpeg", "JPEG", "JPG", "J2K", "j2k", "jp2", "jls", "SC_rgb_dcmtk", "gdcm_KY", "ybr_color", "693_")


def dicom_files() -> list[Path]:
    pydicom = pytest.importorskip("pydicom")
    return sorted(p for p in (Path(pydicom.__file__).parent / "data" / "test_files").iterdir() if p.is_file())


def by_pydicom(path: Path) -> tuple[object, np.ndarray]:
    """pydicom's own reading: frames (F, rows, columns[, 3]) in their units."""
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    header = pydicom.dcmread(path)
    pixels = header.pixel_array
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
    elif header.SamplesPerPixel == 1:
        pixels = apply_modality_lut(pixels, header)
    colour = header.SamplesPerPixel == 3 or header.PhotometricInterpretation == "PALETTE COLOR"
    return header, pixels.reshape(-1, header.Rows, header.Columns, *([3] if colour else []))


def check_dicom(path: Path, file: MeasurementFile) -> None:
    header, frames = by_pydicom(path)
    top = np.abs(frames.astype(float)).max()
    if "ImagePositionPatient" not in header or frames.ndim == 4:
        expected = np.moveaxis(frames, -1, 1) if frames.ndim == 4 else frames[:, None]
        assert np.allclose(originals(file), expected, atol=1e-6 * top) and "volumes" not in file.geometry
        return
    cosines = np.array(header.ImageOrientationPatient, float)
    position, spacing = np.array(header.ImagePositionPatient, float), [float(s) for s in header.PixelSpacing]
    offsets = list(header.get("GridFrameOffsetVector") or [0.0])[: len(frames)]
    assert len(file) == len(frames)
    g = np.random.default_rng(0)
    for _ in range(12):
        f, r, c = (int(g.integers(n)) for n in frames.shape)
        normal = np.cross(cosines[:3], cosines[3:])
        lps = position + cosines[:3] * spacing[1] * c + cosines[3:] * spacing[0] * r + normal * offsets[f]
        assert at(file, 0, lps * [-1, -1, 1]) == pytest.approx(float(frames[f, r, c]), abs=1e-5 * top)


def test_files_of_pydicom(tmp_path: Path) -> None:
    files = dicom_files()
    assert set(DICOM_REFUSED) <= {p.name for p in files}
    count = {"in": 0, "refused": 0}
    for path in files:
        folder = tmp_path / path.name
        folder.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                by_pydicom(path)
        except Exception:
            readable = False
        else:
            readable = True
        if path.name in DICOM_REFUSED or not readable:
            reason = DICOM_REFUSED.get(
                path.name, "decode" if any(d in path.name for d in DECODERS) else "nothing else"
            )
            with pytest.raises(InputError, match=reason) as refused:
                imported(path, folder)
            assert path.name in str(refused.value) and "\n" not in str(refused.value)
            assert not list(folder.iterdir())
            count["refused"] += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_dicom(path, imported(path, folder))
        count["in"] += 1
    assert count["in"] + count["refused"] == len(files) and count["in"] > 30


# -- nibabel

NIBABEL_REFUSED = {
    "analyze.hdr": "values are missing",
    "bad_attribute+orig.HEAD": "values are missing",
    "bad_datatype+orig.HEAD": "values are missing",
    "nifti1.hdr": "values are missing",
    "nifti2.hdr": "values are missing",
    "phantom_truncated.PAR": "Found 3 dynamic scan values, but expected 4",
    "phantom_truncated.REC": "Found 3 dynamic scan values, but expected 4",
    "resampled_anat_moved.nii": "NaN or infinite values in 153 voxels",
    "row_major.dconn.nii": "Cifti2 holds no volume on a grid",
}


def nibabel_files() -> list[Path]:
    return sorted(p for p in (Path(nibabel.__file__).parent / "tests" / "data").iterdir() if p.is_file())


def check_volume(path: Path, file: MeasurementFile) -> None:
    """Same values at the same millimetres as nibabel says, for every entry of a fourth axis that is not empty."""
    image = nibabel.load(path)
    values = np.asarray(image.dataobj)
    if values.ndim == 4 and type(image).__name__.startswith("Minc"):
        values = np.moveaxis(values, 0, -1)
    values = values[..., None] if values.ndim == 3 else values
    volumes = [v for v in np.moveaxis(values, -1, 0) if v.any()]
    assert len(file.geometry["volumes"]) == len(volumes)
    assert set(file.subjects) == {path.name.removesuffix(".gz").rsplit(".", 1)[0]}
    g = np.random.default_rng(0)
    for number, volume in enumerate(volumes):
        for _ in range(5):
            voxel = np.array([int(g.integers(n)) for n in volume.shape])
            place = (image.affine @ [*voxel, 1])[:3]
            assert at(file, number, place) == pytest.approx(
                float(volume[tuple(voxel)]), abs=1e-5 * float(np.abs(volume).max())
            )


@pytest.mark.filterwarnings("ignore")
def test_files_of_nibabel(tmp_path: Path) -> None:
    files = nibabel_files()
    suffixes = (".nii", ".nii.gz", ".mnc", ".mgz", ".PAR", ".REC", ".HEAD", ".BRIK", ".BRIK.gz", ".hdr")
    read = 0
    for path in files:
        folder = tmp_path / path.name
        folder.mkdir()
        missing = path.suffix == ".PAR" and not path.with_suffix(".REC").exists()
        reason = NIBABEL_REFUSED.get(path.name, "values are missing" if missing else None)
        if not path.name.endswith((*suffixes, ".dcm")):
            reason = NOT_READ
        if reason is not None:
            with pytest.raises(InputError, match=reason) as refused:
                imported(path, folder)
            assert Path(path.stem).stem in str(refused.value) and not list(folder.iterdir())
            continue
        file = imported(path, folder)
        check_dicom(path, file) if path.suffix == ".dcm" else check_volume(path, file)
        read += 1
    assert read >= 20
