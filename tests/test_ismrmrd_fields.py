"""ISMRMRD: every field that says where a sample belongs or what it is worth, changed one at a time: it is used, or refused by name.

Also the situations of public reports: slices against slice_dir, junk to be discarded, kept oversampling, lines of other encodings,
reversed readouts, reference lines twice. Geometry is checked in millimetres, through import and export.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ambient_sci.data import MeasurementFile, import_source, write_nifti
from ambient_sci.data.raw import centred_fft
from ambient_sci.errors import InputError

ismrmrd = pytest.importorskip("ismrmrd")

X, Y, SLICES = 24, 18, 3  # encoded readout (twice the field of view), lines
RNG = np.random.default_rng(0)
OBJECT = np.zeros((X, Y), np.complex64)
OBJECT[8:16, 3:14] = RNG.uniform(1, 2, (8, 11)) + 1j * RNG.uniform(0, 1, (8, 11))
TRUTH = OBJECT[6:18]  # within the reconstructed field of view
KSPACE = centred_fft(centred_fft(OBJECT, 0), 1)

Acquisitions = list[Any]


def encoding(
    encoded: tuple[int, ...] = (X, Y, 1),
    recon: tuple[int, ...] = (X // 2, Y, 1),
    fov: tuple[float, ...] = (48.0, 27.0, 5.0),
    recon_fov: tuple[float, ...] = (24.0, 27.0, 5.0),
    center: int | None = Y // 2,
    trajectory: str = "cartesian",
    more: str = "",
) -> str:
    def triple(tag: str, values: Iterable[float]) -> str:
        return (
            f"<{tag}>" + "".join(f"<{a}>{v}</{a}>" for a, v in zip("xyz", values, strict=True)) + f"</{tag}>"
        )

    def space(name: str, size: Iterable[float], length: Iterable[float]) -> str:
        return f"<{name}>{triple('matrixSize', size)}{triple('fieldOfView_mm', length)}</{name}>"

    step = f"<kspace_encoding_step_1><minimum>0</minimum><maximum>{Y - 1}</maximum><center>{center}</center></kspace_encoding_step_1>"
    limits = "" if center is None else f"<encodingLimits>{step}</encodingLimits>"
    return (
        f"<encoding>{space('encodedSpace', encoded, fov)}{space('reconSpace', recon, recon_fov)}{limits}"
        f"<trajectory>{trajectory}</trajectory>{more}</encoding>"
    )


def header(*encodings: str, more: str = "") -> str:
    return f'<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">{more}{"".join(encodings) or encoding()}</ismrmrdHeader>'


def acquisition(samples: np.ndarray, line: int, slice_: int = 0, **fields: Any) -> Any:
    """One readout (samples,) of one coil."""
    a = ismrmrd.Acquisition.from_array(np.ascontiguousarray(samples[None].astype(np.complex64)))
    a.idx.kspace_encode_step_1, a.idx.slice = line, slice_
    a.center_sample, a.sample_time_us = len(samples) // 2, 5.0
    a.position[:], a.read_dir[:] = (1.0, 2.0, 6.0 * slice_), (1, 0, 0)
    a.phase_dir[:], a.slice_dir[:] = (0, 1, 0), (0, 0, 1)
    for name, value in fields.items():
        put(a, name, value)
    return a


def put(a: Any, name: str, value: Any) -> None:
    """A field, an ``idx_`` field or a flag of an acquisition."""
    if name == "flag":
        a.set_flag(value)
    elif name.startswith("idx_"):
        setattr(a.idx, name[4:], value)
    elif isinstance(value, tuple):
        getattr(a, name)[:] = value
    else:
        setattr(a, name, value)


def plain(slices: int = SLICES) -> Acquisitions:
    """Slice s holds (s + 1) times the object and lies at z = 6 s mm."""
    return [acquisition((s + 1) * KSPACE[:, n], n, s) for s in range(slices) for n in range(Y)]


def save(path: Path, acquisitions: Acquisitions, xml: str | None = None, name: str = "dataset") -> Path:
    data = ismrmrd.Dataset(str(path), name, create_if_needed=True)
    data.write_xml_header((xml or header()).encode())
    for a in acquisitions:
        data.append_acquisition(a)
    data.close()
    return path


def imported(
    folder: Path, acquisitions: Acquisitions, xml: str | None = None, **options: Any
) -> MeasurementFile:
    path = save(folder / "scan.h5", acquisitions, xml)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MeasurementFile(import_source(path, folder / "m.h5", **{"noise_std": 0.01, **options}))


def images(file: MeasurementFile) -> np.ndarray:
    """Complex images (N, H, W) in the units of the scan."""
    y = file.measurements().numpy()
    k = (y[:, 0] + 1j * y[:, 1]) * np.reshape(file.scale, (-1, 1, 1))
    return centred_fft(centred_fft(k, 1, inverse=True), 2, inverse=True)


def centres(file: MeasurementFile, x: int = X // 4, y: int = Y // 2) -> np.ndarray:
    """RAS millimetres of the voxel (x, y) of every slice."""
    return np.array(
        [np.array(v["affine"]) @ [x, y, n, 1] for v in file.geometry["volumes"] for n in v["slices"]]
    )[:, :3]


def same(file: MeasurementFile, factors: Iterable[float] = (1, 2, 3)) -> bool:
    return np.allclose(images(file), [f * TRUTH for f in factors], atol=1e-4)


# -- used

Check = Callable[[MeasurementFile], bool]
Change = Callable[[Acquisitions], Acquisitions]


def each(**fields: Any) -> Change:
    """Every acquisition with these fields; a function gets the acquisition."""

    def change(acquisitions: Acquisitions) -> Acquisitions:
        for a in acquisitions:
            for name, value in fields.items():
                put(a, name, value(a) if callable(value) else value)
        return acquisitions

    return change


def with_more(*more: Any) -> Change:
    return lambda acquisitions: [*acquisitions, *more]


def junk(**fields: Any) -> Any:
    return acquisition(99 * np.ones(X), 3, **fields)


def discarded(acquisitions: Acquisitions) -> Acquisitions:
    """4 samples of junk before and 2 behind each line."""
    lines = []
    for a in acquisitions:
        samples = np.r_[99 * np.ones(4), a.data[0], 99 * np.ones(2)]
        new = acquisition(samples, a.idx.kspace_encode_step_1, a.idx.slice, discard_pre=4, discard_post=2)
        new.center_sample = 4 + X // 2
        lines.append(new)
    return lines


def turned(count_backwards: bool, cut: int = 0) -> Change:
    """Every second line acquired from the other end; ``cut`` samples of each echo are missing at its beginning in k."""

    def change(acquisitions: Acquisitions) -> Acquisitions:
        lines = []
        for a in acquisitions:
            line, samples, centre = a.idx.kspace_encode_step_1, a.data[0][cut:], X // 2 - cut
            backwards = line % 2 == 1
            if backwards and count_backwards:
                centre = len(samples) - 1 - centre
            new = acquisition(samples[:: -1 if backwards else 1], line, a.idx.slice, center_sample=centre)
            if backwards:
                new.set_flag(ismrmrd.ACQ_IS_REVERSE)
            lines.append(new)
        return lines

    return change


def repeated(name: str) -> Change:
    def change(acquisitions: Acquisitions) -> Acquisitions:
        again = [acquisition(10 * a.data[0], a.idx.kspace_encode_step_1, a.idx.slice) for a in acquisitions]
        for a in again:
            setattr(a.idx, name, 1)
        return [*acquisitions, *again]

    return change


def two_volumes(name: str) -> Check:
    return lambda file: (
        same(file, (1, 2, 3, 10, 20, 30))
        and [v["name"] for v in file.geometry["volumes"]] == [f"scan_{name}0", f"scan_{name}1"]
        and set(file.subjects) == {"scan"}
        and np.allclose(centres(file)[:3], centres(file)[3:])
    )


def z_values(*z: float) -> Check:
    return lambda file: same(file, range(1, len(z) + 1)) and np.allclose(centres(file)[:, 2], z)


def half_lines(file: MeasurementFile) -> bool:
    return bool((file.mask()[0, 0, :, 0] == 0).all()) and bool((file.mask()[0, 0, :, 1:] == 1).all())


def noted(*words: str) -> Check:
    return lambda file: same(file) and all(w in file.history for w in words)


def partial_echo(file: MeasurementFile) -> bool:
    """Oversampling is kept, the first samples are unmeasured, and every image row is that of the whole readout."""
    mask = file.mask()[:, 0].numpy()
    k = KSPACE * (np.arange(X) >= 5)[:, None]
    expected = centred_fft(centred_fft(k, 0, inverse=True), 1, inverse=True)
    return (
        mask.shape[1] == X
        and not mask[:, :5].any()
        and mask[:, 5:].all()
        and np.allclose(images(file)[0], expected, atol=1e-4)
    )


BACK = Rotation.from_euler("xyz", [20, -30, 50], degrees=True).as_matrix()
USED: dict[str, tuple[Change | None, str | None, Check]] = {
    "nothing changed": (None, None, z_values(0, 6, 12)),
    "position": (each(position=lambda a: (7.0, -3.0, 5.0 * a.idx.slice)), None, z_values(0, 5, 10)),
    "position against slice_dir": (each(position=lambda a: (0.0, 0.0, -5.0 * a.idx.slice)), None, z_values(0, -5, -10)),
    "position out of order": (each(position=lambda a: (0.0, 0.0, (0.0, 8.0, 4.0)[a.idx.slice])), None, z_values(0, 8, 4)),
    "position with a gap": (each(position=lambda a: (0.0, 0.0, (0.0, 4.0, 12.0)[a.idx.slice])), None, z_values(0, 4, 12)),
    "position at uneven gaps": (each(position=lambda a: (0.0, 0.0, (0.0, 4.0, 9.5)[a.idx.slice])), None, z_values(0, 4, 9.5)),
    "idx.slice that is not there": (lambda a: [b for b in a if b.idx.slice != 1], None, lambda f: same(f, (1, 3)) and np.allclose(centres(f)[:, 2], [0, 12])),
    "order of acquisition": (lambda a: a[::-1], None, z_values(0, 6, 12)),
    "no directions": (
        each(read_dir=(0, 0, 0), phase_dir=(0, 0, 0), slice_dir=(0, 0, 0)),
        None,
        lambda f: same(f) and f.geometry["volumes"][0]["positioned"] is False,
    ),
    "discard_pre, discard_post": (discarded, None, z_values(0, 6, 12)),
    "reversed, centre as it lies": (turned(False), None, same),
    "reversed, centre counted backwards": (turned(True), None, same),
    "partial echo": (turned(False, 5), None, partial_echo),
    "partial echo reversed, centre counted backwards": (turned(True, 5), None, partial_echo),
    "center_sample not stated": (each(center_sample=0), None, same),
    "idx.segment": (each(idx_segment=lambda a: a.idx.kspace_encode_step_1 % 3), None, same),
    "idx.average": (repeated("average"), None, lambda f: same(f, (5.5, 11, 16.5))),
    "one line once more": (with_more(junk()), None, noted("1 of 55 lines were measured again")),
    "reference lines twice": (with_more(*[junk(flag=20) for _ in range(2)]), None, noted("2 of 56 lines")),
    "separate calibration": (
        with_more(junk(flag=20)), header(encoding(more="<parallelImaging><calibrationMode>separate</calibrationMode></parallelImaging>")), noted("separate calibration"),
    ),
    "encoding_space_ref": (
        with_more(*[junk(encoding_space_ref=1) for _ in range(3)]), header(encoding(), encoding((32, 32, 1))),
        noted("3 acquisitions of encoding space 1 left out"),
    ),
    "spiral beside the image": (with_more(junk(encoding_space_ref=1)), header(encoding(), encoding(trajectory="spiral")), noted("encoding space 1")),
    "flag last in measurement": (each(flag=ismrmrd.ACQ_LAST_IN_MEASUREMENT), None, same),
    "center of the limits": (lambda a: [each(idx_kspace_encode_step_1=b.idx.kspace_encode_step_1 - 1)([b])[0] for b in a if b.idx.kspace_encode_step_1], header(encoding(center=Y // 2 - 1)), half_lines),
    "encoded field of view": (None, header(encoding(fov=(96.0, 36.0, 5.0), recon_fov=(48.0, 36.0, 5.0))), lambda f: np.allclose(np.abs(np.diag(f.geometry["volumes"][0]["affine"])), [4, 2, 6, 1])),
    "reconstructed field of view": (None, header(encoding(recon=(16, Y, 1), recon_fov=(32.0, 27.0, 5.0))), lambda f: f.image_shape == (2, 16, Y) and np.allclose(centres(f, x=8)[0], [-1, -2, 0])),
    "larger reconstructed matrix": (None, header(encoding(recon=(64, 64, 1))), lambda f: f.image_shape == (2, 12, Y) and np.allclose(centres(f)[0], [-1, -2, 0])),
    "patientID": (None, header(encoding(), more="<subjectInformation><patientID>ann</patientID></subjectInformation>"), lambda f: set(f.subjects) == {"ann"}),
    "zero padding": (lambda a: [b for b in a if 2 <= b.idx.kspace_encode_step_1 < Y - 2], None, lambda f: f.image_shape == (2, 12, Y - 4) and "zero padding" in f.history and np.allclose(centres(f, y=Y // 2 - 2)[0], [-1, -2, 0]) and np.allclose(centres(f, y=0)[0][1], -2 + 7 * 27 / 14)),
    **{f"idx.{n}": (repeated(n), None, two_volumes(n)) for n in ("contrast", "phase", "repetition", "set")},
    **{f"flag {n}": (with_more(junk(flag=n)), None, noted("1 ", "acquisitions left out")) for n in (23, 24, 26, 27, 28, 29, 30, 31)},
}  # fmt: skip


@pytest.mark.parametrize(("change", "xml", "check"), USED.values(), ids=list(USED))
def test_fields_that_are_used(tmp_path: Path, change: Change | None, xml: str | None, check: Check) -> None:
    acquisitions = plain() if change is None else change(plain())
    assert check(imported(tmp_path, acquisitions, xml))


# -- refused

REFUSED: dict[str, tuple[Change | None, str | None, str]] = {
    "active_channels": (with_more(ismrmrd.Acquisition.from_array(np.ones((2, X), np.complex64))), None, "active_channels"),
    "channel_mask": (lambda a: [*each(channel_mask=tuple([1] + [0] * 15))(a[:1]), *each(channel_mask=tuple([2] + [0] * 15))(a[1:])], None, "channel_mask"),
    "sample_time_us": (lambda a: [*a[:-1], *each(sample_time_us=10.0)(a[-1:])], None, "sample_time_us"),
    "patient_table_position": (lambda a: [*a[:-1], *each(patient_table_position=(0, 0, 30.0))(a[-1:])], None, "patient_table_position"),
    "position within a slice": (lambda a: [*a[:-1], *each(position=(1, 2, 13.0))(a[-1:])], None, "differ in position"),
    "direction within a slice": (lambda a: [*a[:-1], *each(read_dir=(0, 1, 0))(a[-1:])], None, "differ in read_dir"),
    "directions that are skew": (each(phase_dir=(0.7, 0.7, 0)), None, "not orthonormal"),
    "kspace_encode_step_1": (with_more(acquisition(KSPACE[:, 0], Y)), None, f"line {Y}"),
    "kspace_encode_step_2": (with_more(acquisition(KSPACE[:, 0], 0, idx_kspace_encode_step_2=1)), None, "partition 1"),
    "number_of_samples": (with_more(acquisition(np.ones(X + 2), 0)), None, "lies outside the"),
    "center_sample": (lambda a: [*a[:-1], *each(center_sample=3)(a[-1:])], None, "center_sample 3"),
    "center_sample 0 of a short line": (with_more(acquisition(np.ones(X - 5), 0, center_sample=0)), None, "center_sample 0"),
    "discard all": (each(discard_pre=X), None, "leave nothing"),
    "encoding_space_ref": (with_more(junk(encoding_space_ref=2)), None, "encoding_space_ref 2"),
    "trajectory_dimensions": (lambda a: [_with_trajectory(b) for b in a], None, "trajectory of their own"),
    "compression": (each(flag=ismrmrd.ACQ_COMPRESSION1), None, "compressed"),
    "segment of repeated lines": (lambda a: [*a, *[_segment(b) for b in plain()]], None, "idx.segment"),
    "user index of repeated lines": (lambda a: [*a, *[_user(b) for b in plain()]], None, "idx.user"),
    "only noise": (each(flag=ismrmrd.ACQ_IS_NOISE_MEASUREMENT), None, "no imaging acquisition"),
    "trajectory": (None, header(encoding(trajectory="epi")), "Cartesian trajectory, got epi"),
    "multiband": (None, header(encoding(more="<parallelImaging><multiband><multiband_factor>2</multiband_factor></multiband></parallelImaging>")), "multiband"),
    "matrix of text": (None, header().replace(f"<x>{X}</x>", "<x>abc</x>", 1), "'abc'"),
    "matrix that is NaN": (None, header().replace(f"<x>{X}</x>", "<x>nan</x>", 1), "'nan'"),
    "matrix without end": (None, header().replace(f"<x>{X}</x>", "<x>1e400</x>", 1), "'1e400'"),
    "matrix below 0": (None, header().replace(f"<x>{X}</x>", "<x>-4</x>", 1), "'-4'"),
    "matrix of a bomb": (None, header(encoding((X, 60000, 60000), center=None)), "limit|bomb"),
    "no encoding": (None, "<ismrmrdHeader/>", "no encoding"),
}  # fmt: skip


def _with_trajectory(a: Any) -> Any:
    new = ismrmrd.Acquisition.from_array(np.ascontiguousarray(a.data), np.zeros((X, 2), np.float32))
    new.idx.kspace_encode_step_1, new.idx.slice = a.idx.kspace_encode_step_1, a.idx.slice
    new.position[:], new.center_sample, new.sample_time_us = a.position[:], X // 2, 5.0
    return new


def _segment(a: Any) -> Any:
    a.idx.segment, a.idx.average = 1, 1
    return a


def _user(a: Any) -> Any:
    a.idx.user[2], a.idx.average = 1, 1
    return a


@pytest.mark.parametrize(("change", "xml", "message"), REFUSED.values(), ids=list(REFUSED))
def test_fields_that_are_refused(
    tmp_path: Path, change: Change | None, xml: str | None, message: str
) -> None:
    acquisitions = plain() if change is None else change(plain())
    with pytest.raises(InputError, match=message) as refused:
        imported(tmp_path, acquisitions, xml)
    assert "scan.h5" in str(refused.value) and "\n" not in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["scan.h5"]


def test_two_data_sets_in_a_file_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "scan.h5", plain(), name="one")
    save(tmp_path / "scan.h5", plain(), name="two")
    with pytest.raises(InputError, match="expected one ISMRMRD data set, got /one, /two"):
        import_source(tmp_path / "scan.h5", tmp_path / "m.h5", noise_std=0.01)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.h5", [*plain(), junk()])
    with pytest.warns(UserWarning, match="measured again"):
        import_source(path, tmp_path / "m.h5", noise_std=0.01)


@pytest.mark.parametrize(
    ("dwell", "bandwidth", "averages", "factor"),
    [(5, 1, 1, 1), (20, 1, 1, 2), (5, 0.25, 1, 2), (5, 1, 4, 0.5)],
)
def test_noise_readouts_are_brought_to_the_image(
    tmp_path: Path, dwell: float, bandwidth: float, averages: int, factor: float
) -> None:
    """Variance goes as 1 / dwell time, the receiver's noise bandwidth, and 1 / averages."""
    noise = 0.1 * np.random.default_rng(1).standard_normal((2, 20000))
    lines = [
        acquisition(a.data[0], a.idx.kspace_encode_step_1, a.idx.slice, idx_average=n)
        for n in range(averages)
        for a in plain(1)
    ]
    first = acquisition(
        noise[0] + 1j * noise[1], 0, flag=ismrmrd.ACQ_IS_NOISE_MEASUREMENT, sample_time_us=float(dwell)
    )
    system = f"<acquisitionSystemInformation><relativeReceiverNoiseBandwidth>{bandwidth}</relativeReceiverNoiseBandwidth></acquisitionSystemInformation>"
    file = imported(tmp_path, [first, *lines], header(encoding(), more=system), noise_std=None)
    level = float(file.noise_std[0]) * float(np.asarray(file.scale))
    assert level == pytest.approx(0.1 * factor, rel=0.02)


# -- geometry


def rotated(slices: int, gap: float) -> Change:
    directions = {n: tuple(BACK[:, k]) for k, n in enumerate(("read_dir", "phase_dir", "slice_dir"))}
    return each(
        **directions, position=lambda a: tuple(np.array([3.0, -8, 20]) + gap * a.idx.slice * BACK[:, 2])
    )


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("gap", [7.5, -7.5])
def test_oblique_slices_lie_where_their_directions_say(tmp_path: Path, gap: float, remove: bool) -> None:
    """Voxel (x, y) of slice s, counted from the centre: position + read_dir 2 (x - c) + phase_dir 1.5 (y - c), LPS; through export, too."""
    file = imported(tmp_path, rotated(SLICES, gap)(plain()), remove_oversampling=remove)
    rows = X // 2 if remove else X
    values = np.abs(images(file))
    (path,) = write_nifti(
        tmp_path / "out", np.stack([images(file).real, images(file).imag], 1), geometry=file.geometry
    )
    exported = nibabel.load(path)
    for s in range(SLICES):
        for x, y in ((0, 0), (rows // 2, Y // 2), (rows // 2 + 3, 5)):
            lps = np.array([3.0, -8, 20]) + BACK @ [2 * (x - rows // 2), 1.5 * (y - Y // 2), gap * s]
            about = file.geometry["volumes"][0]
            place = np.array(about["affine"]) @ [x, y, about["slices"][s], 1]
            assert np.allclose(place[:3], lps * [-1, -1, 1], atol=1e-4)
            voxel = np.rint(np.linalg.solve(exported.affine, [*(lps * [-1, -1, 1]), 1])[:3]).astype(int)
            assert np.abs(exported.affine @ [*voxel, 1] - [*(lps * [-1, -1, 1]), 1]).max() < 1e-4
            assert exported.get_fdata()[tuple(voxel)] == pytest.approx(values[s, x, y], abs=1e-4)


def test_three_dimensional_scans_keep_their_place(tmp_path: Path) -> None:
    """A slab (x, y, z): the slices run along x, and voxel (y, z) of slice x lies at position + directions * steps."""
    depth = 6
    volume = np.zeros((X, Y, depth), np.complex64)
    volume[8:16, 3:14, 1:5] = np.random.default_rng(2).uniform(1, 2, (8, 11, 4))
    spectrum = centred_fft(centred_fft(centred_fft(volume, 0), 1), 2)
    lines = [
        acquisition(spectrum[:, n, z], n, idx_kspace_encode_step_2=z) for n in range(Y) for z in range(depth)
    ]
    lines = rotated(1, 0)(lines)
    xml = header(encoding((X, Y, depth), (X // 2, Y, depth), (48.0, 27.0, 24.0), (24.0, 27.0, 24.0)))
    for remove in (True, False):
        (tmp_path / "scan.h5").unlink(missing_ok=True)
        file = imported(tmp_path, lines, xml, remove_oversampling=remove, overwrite=True)
        found, (about,) = images(file), file.geometry["volumes"]
        assert len(file) == (X // 2 if remove else X)
        offset = X // 4 if remove else 0
        for x, y, z in ((8, 3, 1), (12, 9, 3), (15, 13, 4)):
            lps = np.array([3.0, -8, 20]) + BACK @ [
                2 * (x - X // 2),
                1.5 * (y - Y // 2),
                4 * (z - depth // 2),
            ]
            place = np.array(about["affine"]) @ [y, z, about["slices"][x - offset], 1]
            assert np.allclose(place[:3], lps * [-1, -1, 1], atol=1e-4)
            assert found[x - offset, y, z] == pytest.approx(volume[x, y, z], abs=1e-4)


# -- files that point elsewhere


def test_data_kept_in_another_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "other.h5", plain())
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["dataset"] = h5py.ExternalLink("other.h5", "/dataset")
    with pytest.raises(InputError, match="scan.h5"):
        import_source(tmp_path / "scan.h5", tmp_path / "m.h5", noise_std=0.1)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        group = file.create_group("dataset")
        group["xml"] = header()
        group["data"] = h5py.ExternalLink("other.h5", "/dataset/data")
    with pytest.raises(InputError, match="ExternalLink, which can read another file"):
        import_source(tmp_path / "scan.h5", tmp_path / "m.h5", noise_std=0.1)


@pytest.mark.parametrize("length", [0, 8, (1 << 64) - 16, 1 << 40])
def test_damaged_heaps_are_refused_before_hdf5_loops_in_them(tmp_path: Path, length: int) -> None:
    """Readouts lie in global heaps; HDF5 never comes back from some damaged ones. Free space of 0 bytes, objects larger than the heap."""
    path = save(tmp_path / "scan.h5", plain(1))
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + 16 : heap + 18] = bytes(2)  # index 0: free space
    data[heap + 24 : heap + 32] = length.to_bytes(8, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="scan.h5: damaged HDF5 file .an object of"):
        import_source(path, tmp_path / "m.h5", noise_std=0.1)


def test_sequences_longer_than_the_file_are_refused_before_they_are_allocated(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.h5", plain(1))
    with h5py.File(path) as file:
        data = file["dataset/data"]
        size = data.id.get_type().get_size()
        start = data.id.get_chunk_info(3).byte_offset + size - 16  # the last member, the samples
    raw = bytearray(path.read_bytes())
    assert int.from_bytes(raw[start : start + 4], "little") == 2 * X
    raw[start : start + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(bytes(raw))
    with pytest.raises(InputError, match="scan.h5: damaged HDF5 file .a sequence of 2147483647 values"):
        import_source(path, tmp_path / "m.h5", noise_std=0.1)


def test_a_header_without_a_field_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.h5", plain(1))
    path.write_bytes(path.read_bytes().replace(b"slice_dir", b"slice_dix"))
    with pytest.raises(InputError, match="scan.h5: not a readable ISMRMRD file .*slice_dir"):
        import_source(path, tmp_path / "m.h5", noise_std=0.1)
