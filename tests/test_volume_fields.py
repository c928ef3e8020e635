"""DICOM and NIfTI: every header field that says where a voxel lies or what its value means, changed one at a time: used, or refused by name."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_foreign_files import at, originals
from test_importers import save_dicom

from ambient_sci.data import MeasurementFile, import_source, write_nifti
from ambient_sci.errors import InputError

ROWS, COLUMNS = 5, 6
PIXELS = np.random.default_rng(0).integers(1, 2000, (4, ROWS, COLUMNS))
TURN = Rotation.from_euler("xyz", [25, -40, 70], degrees=True).as_matrix()


def imported(source: Path, **options: Any) -> MeasurementFile:
    out = source.parent.parent / f"{source.parent.name}.{source.name}.h5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MeasurementFile(import_source(source, out, **{"noise_std": 0.1, "overwrite": True, **options}))


# -- DICOM


def series(folder: Path, positions: Any = (0.0, 4.0, 8.0), **tags: Any) -> Path:
    """Slices of PIXELS at these heights (or positions); ``tags`` of all of them, a list one each."""
    pytest.importorskip("pydicom")
    for k, position in enumerate(positions):
        own = {n: v[k] if isinstance(v, list) and len(v) == len(positions) else v for n, v in tags.items()}
        if np.ndim(position):
            own["ImagePositionPatient"] = [float(p) for p in position]
        save_dicom(folder / f"{k}.dcm", PIXELS[k], float(np.ravel(position)[-1]), **own)
    return folder


def value(k: int, row: int, column: int) -> float:
    return 0.5 * PIXELS[k, row, column] + 1


def check_places(
    file: MeasurementFile,
    positions: Any,
    row: Any = (1, 0, 0),
    column: Any = (0, 1, 0),
    spacing: Any = (2, 3),
) -> None:
    """Every corner of every slice at its millimetre."""
    for k, position in enumerate(positions):
        for r, c in ((0, 0), (0, COLUMNS - 1), (ROWS - 1, 0), (2, 3)):
            lps = (
                np.array(position, float) + np.array(row) * spacing[1] * c + np.array(column) * spacing[0] * r
            )
            assert at(file, 0, lps * [-1, -1, 1]) == pytest.approx(value(k, r, c), rel=1e-5)


PLACES = {
    "in order": [(-10, -20, z) for z in (0, 4, 8)],
    "descending": [(-10, -20, z) for z in (8, 4, 0)],
    "shuffled": [(-10, -20, z) for z in (4, 12, 0, 8)],
    "one slice missing": [(-10, -20, z) for z in (0, 4, 12)],
    "sheared (gantry tilt)": [(-10, -20 + 1.5 * k, 4.0 * k) for k in range(3)],
    "overlapping": [(-10, -20, 0.5 * k) for k in range(3)],
}


@pytest.mark.parametrize("positions", PLACES.values(), ids=list(PLACES))
def test_slices_lie_where_image_position_says(tmp_path: Path, positions: Any) -> None:
    file = imported(series(tmp_path / "d", positions))
    check_places(file, positions)
    (path,) = write_nifti(tmp_path / "out", file.measurements(), geometry=file.geometry, scale=file.scale)
    image = nibabel.load(path)
    for k, position in enumerate(positions):
        place = np.array(position) * [-1, -1, 1]
        index = np.linalg.solve(image.affine, [*place, 1])[:3]
        assert np.abs(index - np.rint(index)).max() < 1e-4
        assert image.get_fdata()[tuple(np.rint(index).astype(int))] == pytest.approx(value(k, 0, 0), rel=1e-5)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_every_orientation(tmp_path: Path, turn: int, plane: str) -> None:
    """Axial, sagittal and oblique series, cut into slices of any plane."""
    row, column = [((1, 0, 0), (0, 1, 0)), ((0, 1, 0), (0, 0, -1)), (TURN[:, 0], TURN[:, 1])][turn]
    normal = np.cross(row, column)
    positions = [np.array([5.0, -7, 11]) + 4 * k * normal for k in range(3)]
    orientation = [float(v) for v in (*row, *column)]
    file = imported(series(tmp_path / "d", positions, ImageOrientationPatient=orientation), plane=plane)
    check_places(file, positions, row, column)


def test_missing_slices_have_whole_images_in_their_own_plane_only(tmp_path: Path) -> None:
    folder = series(tmp_path / "d", PLACES["one slice missing"])
    with pytest.warns(UserWarning, match="1 of 4 slices of the series are missing"):
        file = MeasurementFile(import_source(folder, tmp_path / "m.h5", noise_std=0.1))
    assert file.geometry["volumes"][0]["slices"] == [0, 1, 3] and "missing" in file.history
    with pytest.raises(InputError, match="give plane axial"):
        imported(folder, plane="coronal")


def spatial(**tags: Any) -> Callable[[Path], Path]:
    return lambda folder: series(folder, **tags)


def grey(expected: np.ndarray) -> Callable[[MeasurementFile], bool]:
    """The stored volume, back in rows and columns, holds these values."""
    return lambda file: np.allclose(
        originals(file)[:, 0, ::-1, ::-1].swapaxes(1, 2), expected, rtol=1e-5, atol=1e-3
    )


STORED = PIXELS[:3]
DICOM_USED: dict[str, tuple[Callable[[Path], Path], Callable[[MeasurementFile], bool]]] = {
    "RescaleSlope": (spatial(RescaleSlope=2.0), grey(2.0 * STORED + 1)),
    "RescaleSlope of each slice": (spatial(RescaleSlope=[1.0, 2.0, 3.0]), grey(STORED * np.array([1, 2, 3])[:, None, None] + 1.0)),
    "RescaleIntercept": (spatial(RescaleIntercept=-1024.0), grey(0.5 * STORED - 1024)),
    "no rescaling": (spatial(RescaleSlope=None, RescaleIntercept=None), grey(STORED)),
    "MONOCHROME1": (spatial(PhotometricInterpretation="MONOCHROME1"), grey(0.5 * (65535 - STORED) + 1)),
    "MONOCHROME1 of 12 bits": (spatial(PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11), grey(0.5 * (4095 - STORED) + 1)),
    "BitsStored": (spatial(BitsStored=8, HighBit=7), grey(0.5 * (STORED & 255) + 1)),
    "PixelRepresentation": (spatial(BitsStored=11, HighBit=10, PixelRepresentation=1), grey(0.5 * np.where(STORED >= 1024, STORED - 2048, STORED) + 1)),
    "PixelSpacing": (spatial(PixelSpacing=[1.5, 0.5]), lambda f: np.allclose(np.diag(f.geometry["volumes"][0]["affine"]), [0.5, 1.5, 4, 1])),
    "SliceThickness is not the spacing": (spatial(SliceThickness=3.0), lambda f: np.allclose(np.diag(f.geometry["volumes"][0]["affine"]), [3, 2, 4, 1])),
    "SliceThickness of one slice": (lambda d: series(d, (0.0,), SliceThickness=7.0), lambda f: np.asarray(f.geometry["volumes"][0]["affine"])[2, 2] == 7),
    "SpacingBetweenSlices": (lambda d: series(d, (0.0,), SpacingBetweenSlices=8.0), lambda f: np.asarray(f.geometry["volumes"][0]["affine"])[2, 2] == 8),
    "PixelPaddingValue": (spatial(PixelPaddingValue=int(STORED[0, 0, 0])), lambda f: "1 pixels hold the padding value" in f.history),
    "PatientID": (spatial(PatientID="p3"), lambda f: set(f.subjects) == {"p3"}),
    "no PatientID, a name": (spatial(PatientID="", PatientName="Ann"), lambda f: set(f.subjects) == {"Ann"}),
    "Modality": (spatial(Modality="CT"), lambda f: "magnitude" not in f.attributes),
    "EchoTime": (lambda d: series(d, (0.0, 4.0, 0.0, 4.0), EchoTime=[5.0, 5.0, 9.0, 9.0]), lambda f: [v["name"] for v in f.geometry["volumes"]] == ["p17_EchoTime5.0", "p17_EchoTime9.0"]),
    "TemporalPositionIdentifier": (lambda d: series(d, (0.0, 4.0, 0.0, 4.0), TemporalPositionIdentifier=[1, 1, 2, 2]), lambda f: len(f.geometry["volumes"]) == 2 and len(f) == 4),
    "SeriesInstanceUID": (lambda d: series(d, (0.0, 4.0, 0.0, 4.0), SeriesInstanceUID=["1.1", "1.1", "1.2", "1.2"]), lambda f: len(f.geometry["volumes"]) == 2),
    "no position": (spatial(ImagePositionPatient=None, InstanceNumber=[2, 3, 1]), lambda f: "volumes" not in f.geometry and np.allclose(originals(f)[:, 0], 0.5 * STORED[[2, 0, 1]] + 1)),
}  # fmt: skip


@pytest.mark.parametrize(("make", "check"), DICOM_USED.values(), ids=list(DICOM_USED))
def test_dicom_fields_that_are_used(tmp_path: Path, make: Callable, check: Callable) -> None:
    assert check(imported(make(tmp_path / "d")))


DICOM_REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "RescaleSlope 0": (spatial(RescaleSlope=0.0), "RescaleSlope that is not 0"),
    "HighBit": (spatial(BitsStored=12, HighBit=13), "HighBit 13"),
    "PhotometricInterpretation": (spatial(PhotometricInterpretation="HSV"), "HSV"),
    "PixelSpacing 0": (spatial(PixelSpacing=[0, 1]), "PixelSpacing above 0"),
    "PixelSpacing of one number": (spatial(PixelSpacing=[1.0]), "2 finite numbers for PixelSpacing"),
    "mixed PixelSpacing": (spatial(PixelSpacing=[[1, 1], [1, 1], [1, 2]]), "mixed pixel spacings"),
    "position of two numbers": (spatial(ImagePositionPatient=[[1, 2], [1, 3], [1, 4]]), "3 finite numbers for ImagePositionPatient"),
    "position of some": (spatial(ImagePositionPatient=[[0, 0, 0], [0, 0, 4], None]), "only 2 of 3 images"),
    "orientation": (spatial(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "right angles"),
    "uneven gaps": (lambda d: series(d, (0.0, 4.0, 9.5)), "uneven distances, 4 to 5.5 mm"),
    "nothing tells echoes apart": (lambda d: series(d, (0.0, 4.0, 0.0)), "nothing in the headers tells them apart"),
    "Rows of a bomb": (spatial(Rows=65535, Columns=65535, NumberOfFrames=100), "limit|bomb"),
    "NumberOfFrames": (spatial(NumberOfFrames=-1), "frames|NumberOfFrames"),
    "BitsAllocated": (spatial(BitsAllocated=3), "cannot be decoded"),
    "grid offsets": (spatial(GridFrameOffsetVector=[0.0, 1.0], NumberOfFrames=3), "GridFrameOffsetVector has 2"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), DICOM_REFUSED.values(), ids=list(DICOM_REFUSED))
def test_dicom_fields_that_are_refused(tmp_path: Path, make: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        imported(make(tmp_path / "d"))
    assert "\n" not in str(refused.value) and ".dcm" in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_palettes_and_colours(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    folder = series(tmp_path / "d", (0.0,))
    header = pydicom.dcmread(folder / "0.dcm")
    table = np.random.default_rng(1).integers(0, 65536, (3, 256)).astype("<u2")
    header.PhotometricInterpretation, header.BitsAllocated, header.BitsStored, header.HighBit = (
        "PALETTE COLOR",
        8,
        8,
        7,
    )
    indices = (PIXELS[0] % 256).astype(np.uint8)
    header.PixelData = indices.tobytes()
    for k, name in enumerate(("Red", "Green", "Blue")):
        header.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, 16])
        setattr(header, f"{name}PaletteColorLookupTableData", table[k].tobytes())
    header.save_as(folder / "0.dcm")
    file = imported(folder)
    assert file.image_shape == (3, ROWS, COLUMNS) and np.allclose(
        originals(file)[0], table[:, indices], rtol=1e-5
    )
    assert "positions are not kept" in file.history


def test_enhanced_multi_frame_files(tmp_path: Path) -> None:
    """Frames lie, and are scaled, as their functional groups say."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def group(name: str, **tags: Any) -> tuple[str, Sequence]:
        item = Dataset()
        for key, tag in tags.items():
            setattr(item, key, tag)
        return name, Sequence([item])

    folder = series(tmp_path / "d", (0.0,))
    header = pydicom.dcmread(folder / "0.dcm")
    for name in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(header, name)
    header.NumberOfFrames, header.PixelData = 4, PIXELS.astype("<u2").tobytes()
    shared, frames = Dataset(), []
    for name, sequence in (
        group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        group("PixelMeasuresSequence", PixelSpacing=[2, 3], SliceThickness=4),
    ):
        setattr(shared, name, sequence)
    heights = (8.0, 0.0, 4.0, 12.0)
    for k in range(4):
        frame = Dataset()
        for name, sequence in (
            group("PlanePositionSequence", ImagePositionPatient=[-10, -20, heights[k]]),
            group("PixelValueTransformationSequence", RescaleSlope=0.5, RescaleIntercept=1, RescaleType="US"),
        ):
            setattr(frame, name, sequence)
        frames.append(frame)
    header.SharedFunctionalGroupsSequence, header.PerFrameFunctionalGroupsSequence = (
        Sequence([shared]),
        Sequence(frames),
    )
    header.save_as(folder / "0.dcm")
    check_places(imported(folder), [(-10, -20, z) for z in heights])


def spoil_empty(folder: Path) -> None:
    (folder / "1.dcm").write_bytes(b"")


def spoil_cut(folder: Path) -> None:
    (folder / "1.dcm").write_bytes((folder / "1.dcm").read_bytes()[:100])


def spoil_report(folder: Path) -> None:
    save_dicom(
        folder / "9.dcm", PIXELS[0], 0.0, Rows=None, Columns=None, SeriesInstanceUID="9", Modality="SR"
    )


def spoil_localizer(folder: Path) -> None:
    for k, o in enumerate(([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1])):
        save_dicom(
            folder / f"loc{k}",
            PIXELS[k],
            0.0,
            ImageOrientationPatient=o,
            SeriesInstanceUID="7",
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        )


def spoil_scout(folder: Path) -> None:
    for k, o in enumerate(([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1])):
        save_dicom(folder / f"scout{k}", PIXELS[k], 0.0, ImageOrientationPatient=o, SeriesInstanceUID="7")


def spoil_picture(folder: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "preview.jpg")


def spoil_copy(folder: Path) -> None:
    shutil.copy(folder / "1.dcm", folder / "copy.dcm")


def spoil_hidden(folder: Path) -> None:
    (folder / "._1.dcm").write_bytes(b"Mac OS X" * 30)
    (folder / ".DS_Store").write_bytes(b"x")


MIXED: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "empty file": (spoil_empty, "1 damaged DICOM files .* left out: 1.dcm", 2),
    "truncated file": (spoil_cut, "1 damaged DICOM files .* left out: 1.dcm", 2),
    "report": (spoil_report, r"1 DICOM files without an image are left out: 9.dcm \(SR\)", 3),
    "localizer": (spoil_localizer, "1 localizer series left out", 3),
    "scout that does not say so": (spoil_scout, "a series is left out: .*mixed orientations", 3),
    "preview picture": (spoil_picture, "1 other files are left out: preview.jpg", 3),
    "copy of a file": (spoil_copy, "1 copies of files are left out", 3),
}


@pytest.mark.parametrize(("spoil", "message", "count"), MIXED.values(), ids=list(MIXED))
@pytest.mark.filterwarnings("ignore:.*Rician", "ignore:.*missing")
def test_folders_with_something_else_in_them(
    tmp_path: Path, spoil: Callable, message: str, count: int
) -> None:
    """What is no slice of the series is left out, and it is said; the slices that are there keep their places."""
    spoil(series(tmp_path / "d", (0.0, 4.0, 8.0)))
    with pytest.warns(UserWarning, match=message):
        file = MeasurementFile(import_source(tmp_path / "d", tmp_path / "m.h5", noise_std=0.1))
    assert len(file) == count and set(file.subjects) == {"p17"} and "left out" in file.history
    kept = [0, 2] if count == 2 else [0, 1, 2]
    for k in kept:
        assert at(file, 0, np.array([10, 20, 4.0 * k])) == pytest.approx(value(k, 0, 0), rel=1e-5)


def test_files_that_systems_leave_behind_are_no_slices(tmp_path: Path) -> None:
    spoil_hidden(series(tmp_path / "d"))
    file = imported(tmp_path / "d")
    assert len(file) == 3 and "2 hidden files left out" in file.history


def test_volumes_and_dicom_in_one_folder_are_refused(tmp_path: Path) -> None:
    series(tmp_path / "d")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), tmp_path / "d" / "x.nii")
    with pytest.raises(InputError, match="1 volumes .x.nii. and 3 DICOM files"):
        imported(tmp_path / "d")


def test_another_image_of_the_same_uid_is_refused(tmp_path: Path) -> None:
    series(tmp_path / "d", SOPInstanceUID="1.2.3.4.5")
    with pytest.raises(InputError, match="another image of the same SOPInstanceUID"):
        imported(tmp_path / "d")


# -- NIfTI

VOLUME = np.random.default_rng(3).integers(1, 900, (5, 6, 4)).astype(np.int16)
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN * [2.0, 1.5, 3.0]
AFFINE[:3, 3] = [4, -9, 30]


def save(
    path: Path,
    volume: np.ndarray = VOLUME,
    change: Callable[[Any], None] | None = None,
    kind: Any = nibabel.Nifti1Image,
) -> Path:
    image = kind(volume, AFFINE)
    if change is not None:
        change(image)
    nibabel.save(image, path)
    return path


def check_nifti(
    file: MeasurementFile, affine: np.ndarray, values: np.ndarray = VOLUME, volume: int = 0
) -> None:
    for voxel in ((0, 0, 0), (4, 5, 3), (1, 4, 2)):
        place = (affine @ [*voxel, 1])[:3]
        assert at(file, volume, place) == pytest.approx(float(values[voxel]), rel=1e-5)


MOVED, MILLI = AFFINE.copy(), np.diag([1e-3, 1e-3, 1e-3, 1])
MOVED[0, 3] += 5
NIFTI_USED: dict[str, tuple[Callable[[Any], None], np.ndarray, str]] = {
    "sform": (lambda i: (i.set_sform(MOVED, 1), i.set_qform(AFFINE, 1)), MOVED, "sform and qform differ"),
    "sform_code 0": (lambda i: (i.set_sform(MOVED, 0), i.set_qform(AFFINE, 1)), AFFINE, ""),
    "qform_code": (lambda i: (i.set_sform(None, 0), i.set_qform(MOVED, 2)), MOVED, ""),
    "qform_code 0": (lambda i: (i.set_sform(MOVED, 4), i.set_qform(AFFINE, 0)), MOVED, ""),
    "units of metres": (lambda i: (i.set_sform(MILLI @ AFFINE, 1), i.header.set_xyzt_units("meter")), AFFINE, "meter"),
    "units of micrometres": (lambda i: (i.set_sform(np.linalg.inv(MILLI) @ AFFINE, 1), i.header.set_xyzt_units("micron")), AFFINE, "micron"),
    "no units": (lambda i: i.header.set_xyzt_units("unknown"), AFFINE, "unit of length not stated"),
    "intent": (lambda i: i.header.set_intent("t test", (2,)), AFFINE, "intent 't test'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "affine", "said"), NIFTI_USED.values(), ids=list(NIFTI_USED))
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti_fields_that_are_used(
    tmp_path: Path, change: Callable, affine: np.ndarray, said: str, kind: Any
) -> None:
    file = imported(save(tmp_path / "x.nii.gz", change=change, kind=kind))
    check_nifti(file, affine)
    assert said in file.history


def test_nifti_without_codes_is_said_to_lie_nowhere(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", change=lambda i: (i.set_sform(None, 0), i.set_qform(None, 0)))
    with pytest.warns(UserWarning, match="sform_code and qform_code are 0"):
        file = MeasurementFile(import_source(path, tmp_path / "m.h5", noise_std=0.1))
    assert file.geometry["volumes"][0]["positioned"] is False
    (back,) = write_nifti(tmp_path / "out", file.measurements(), geometry=file.geometry)
    assert int(nibabel.load(back).header["sform_code"]) == int(nibabel.load(back).header["qform_code"]) == 0


@pytest.mark.parametrize(("slope", "inter"), [(2.5, -7.0), (0.0, 3.0), (float("nan"), 3.0)])
def test_nifti_slope_and_intercept(tmp_path: Path, slope: float, inter: float) -> None:
    """0 and NaN mean that there is no scaling (the standard)."""
    path = save(tmp_path / "x.nii")
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([slope, inter], "<f4").tobytes()
    path.write_bytes(bytes(raw))
    expected = VOLUME * slope + inter if slope > 0 else VOLUME
    check_nifti(imported(path), AFFINE, expected)


def test_nifti_time_points_are_volumes_of_their_own(tmp_path: Path) -> None:
    series4d = np.stack([VOLUME, 2 * VOLUME, 0 * VOLUME, 3 * VOLUME], axis=-1)
    path = save(tmp_path / "bold.nii.gz", series4d)
    with pytest.warns(UserWarning, match="1 of 4 volumes are all zero and are left out: 2"):
        file = MeasurementFile(import_source(path, tmp_path / "m.h5", noise_std=0.1))
    assert [v["name"] for v in file.geometry["volumes"]] == ["bold_0", "bold_1", "bold_3"]
    assert set(file.subjects) == {"bold"} and len(file) == 12
    for number, factor in enumerate((1, 2, 3)):
        check_nifti(file, AFFINE, factor * VOLUME, number)


def vector(image: Any) -> None:
    image.header.set_intent("vector")


def raw(offset: int, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        new = np.atleast_1d(value).tobytes()
        data[offset : offset + len(new)] = new
        path.write_bytes(bytes(data))

    return change


NIFTI_REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dim[5]": (lambda p: save(p, np.ones((4, 4, 4, 1, 3), np.float32)), "a fifth axis of 3"),
    "intent vector": (lambda p: save(p, change=vector), "'vector'"),
    "colours": (lambda p: nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"]), AFFINE), p), "colours"),
    "NaN": (lambda p: save(p, np.where(VOLUME == VOLUME[1, 1, 1], np.nan, VOLUME).astype(np.float32)), "NaN or infinite values in"),
    "all zero": (lambda p: save(p, 0 * VOLUME), "all zero"),
    "dim of a bomb": (lambda p: (save(p), raw(40, np.array([3, 32767, 32767, 32767], "<i2"))(p)), "x.nii"),
    "dim below 0": (lambda p: (save(p), raw(42, np.array([-5], "<i2"))(p)), "x.nii"),
    "dim[0]": (lambda p: (save(p), raw(40, np.array([200], "<i2"))(p)), "x.nii"),
    "vox_offset": (lambda p: (save(p), raw(108, np.array([1e30], "<f4"))(p)), "x.nii"),
    "datatype": (lambda p: (save(p), raw(70, np.array([7777], "<i2"))(p)), "x.nii"),
    "sform of NaN": (lambda p: (save(p), raw(280, np.array([np.nan] * 4, "<f4"))(p)), "affine"),
    "sform of no volume": (lambda p: (save(p), raw(280, np.zeros(12, "<f4"))(p)), "invertible"),
    "truncated": (lambda p: p.write_bytes(save(p).read_bytes()[:-40]), "x.nii"),
    "another file": (lambda p: p.write_bytes(b"hello" * 100), "not a readable volume"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), NIFTI_REFUSED.values(), ids=list(NIFTI_REFUSED))
def test_nifti_fields_that_are_refused(tmp_path: Path, make: Callable, message: str) -> None:
    make(tmp_path / "x.nii")
    with pytest.raises(InputError, match=message) as refused:
        imported(tmp_path / "x.nii")
    assert "x.nii" in str(refused.value) and "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.nii"]


def test_checksums_of_gzip_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii.gz")
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="x.nii.gz: not a readable gzip file .*CRC"):
        imported(path)


@pytest.mark.parametrize("kind", [nibabel.MGHImage, nibabel.Nifti1Pair, nibabel.Spm99AnalyzeImage])
def test_other_formats_that_nibabel_reads(tmp_path: Path, kind: Any) -> None:
    suffix = {"MGHImage": "x.mgz", "Nifti1Pair": "x.hdr", "Spm99AnalyzeImage": "x.img"}[kind.__name__]
    (tmp_path / "d").mkdir()
    nibabel.save(kind(VOLUME, AFFINE), tmp_path / "d" / suffix)
    for source in (tmp_path / "d" / suffix, tmp_path / "d"):
        file = imported(source)
        check_nifti(file, nibabel.load(tmp_path / "d" / suffix).affine)
        assert len(file) == np.prod(file.geometry["volumes"][0]["shape"]) // np.prod(file.image_shape)


PEOPLE = {
    "a folder each, one name": (["p1/T1w.nii.gz", "p2/T1w.nii.gz", "p3/T1w.nii.gz"], ["p1", "p2", "p3"]),
    "one folder": (["anna.nii", "bert.nii"], ["anna", "bert"]),
    "BIDS": (["sub-1/anat/sub-1_T1w.nii", "sub-1/ses-2/sub-1_T2w.nii", "sub-2/anat/sub-2_T1w.nii"], ["sub-1", "sub-1", "sub-2"]),
    "BIDS in one folder": (["sub-1_T1w.nii", "sub-1_T2w.nii", "sub-2_T1w.nii"], ["sub-1", "sub-1", "sub-2"]),
    "sessions below a person": (["p1/day1/x.nii", "p1/day2/x.nii", "p2/day1/x.nii"], ["p1", "p1", "p2"]),
    "a folder around all": (["all/p1/x.nii", "all/p2/x.nii"], ["p1", "p2"]),
}  # fmt: skip


@pytest.mark.parametrize(("names", "people"), PEOPLE.values(), ids=list(PEOPLE))
def test_people_are_told_apart_by_their_folders(tmp_path: Path, names: list[str], people: list[str]) -> None:
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / "d" / name)
    found = imported(tmp_path / "d").subjects
    assert found[:: len(found) // len(names)] == people
