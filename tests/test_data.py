"""Measurement and reference files, simulation, packaged slices, loader and inspection."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ambient_sci.data import (
    ImageWriter,
    MeasurementArrays,
    MeasurementFile,
    MeasurementFiles,
    MeasurementLoader,
    MeasurementWriter,
    ReferenceFile,
    brains,
    checksums,
    contact_sheet,
    describe,
    files,
    hdf5_file,
    hdf5_writer,
    loader,
    open_source,
    simulate,
    smooth_phase,
    survey,
    write_images,
    write_measurements,
)
from ambient_sci.data.checksums import KINDS
from ambient_sci.data.images import resize, slices, square_pad
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, FixedBudget, Identity, Independent, Masking
from ambient_sci.training import TrainConfig
from ambient_sci.training.source import open_source as open_measurements_source


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def kspace(*shape: int, seed: int = 0) -> np.ndarray:
    g = rng(seed)
    return (g.standard_normal(shape) + 1j * g.standard_normal(shape)).astype(np.complex64)


def column_masks(num: int, size: int = 8, seed: int = 0) -> np.ndarray:
    mask = np.repeat(rng(seed).random((num, 1, size)) > 0.5, size, axis=1)
    mask[..., size // 2] = True
    return mask.astype(np.uint8)


def write_mri(path: Path, num: int = 5, coils: int = 3, **changes) -> Path:
    mask = column_masks(num)
    maps = kspace(1, coils, 8, 8, seed=1)
    content = {
        "measurements": kspace(num, coils, 8, 8) * mask[:, None],
        "mask": mask,
        "noise_std": 0.1,
        "operator": "mri",
        "image_shape": (2, 8, 8),
        "coil_maps": maps / np.sqrt((abs(maps) ** 2).sum(1, keepdims=True)),
        "subjects": [f"p{k // 2}" for k in range(num)],
    }
    return write_measurements(path, **{**content, **changes})


# ---------------------------------------------------------------------------------------------- files: round
# trips


def test_multi_coil_kspace_comes_back_in_deepinv_layout(tmp_path: Path):
    mask, y = column_masks(5), kspace(5, 3, 8, 8) * column_masks(5)[:, None]
    file = MeasurementFile(
        write_mri(tmp_path / "m.h5", measurements=y, mask=mask, noise_std=np.arange(5) / 10, scale=7.0)
    )
    read = file.measurements([3, 1])
    assert read.dtype == torch.float32 and tuple(read.shape) == (2, 2, 3, 8, 8) == (
        2,
        *file.measurement_shape,
    )
    assert np.array_equal(read[:, 0].numpy(), y[[3, 1]].real) and np.array_equal(
        read[:, 1].numpy(), y[[3, 1]].imag
    )
    assert np.array_equal(file.mask([3, 1])[:, 0, 0].numpy(), mask[[3, 1]])
    assert torch.equal(file.sigma([3, 1]), torch.tensor([0.3, 0.1])) and file.noise_std.shape == (5,)
    maps = file.coil_maps([3, 1])
    assert maps is not None and tuple(maps.shape) == (1, 3, 8, 8) and maps.dtype == torch.complex64
    assert file.subjects == ["p0", "p0", "p1", "p1", "p2"] and file.scale == 7.0 and file.coils == 3
    with h5py.File(file.path) as raw:
        assert raw["measurements"].dtype == np.complex64 and raw["measurements"].chunks == (1, 3, 8, 8)
        assert raw["mask"].dtype == np.uint8 and raw["coil_maps"].shape == (1, 3, 8, 8)


def test_the_operator_of_a_file_explains_its_measurements(tmp_path: Path):
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.from_numpy(column_masks(4))
    maps = torch.from_numpy(kspace(4, 3, 8, 8, seed=1))
    design = Independent((2, 8, 8), "columns", 0.5)
    y = MRI(mask, maps).A(x)
    write_mri(tmp_path / "m.h5", measurements=y, mask=mask, coil_maps=maps, design=design, subjects=None)
    file = MeasurementFile(tmp_path / "m.h5")
    operator = file.operator([2, 0])
    assert torch.allclose(operator.A(x[[2, 0]]), file.measurements([2, 0]), atol=1e-5)
    assert isinstance(file.design, Independent) and file.design.to_dict() == design.to_dict()
    assert file.design_status == "given" and isinstance(operator.design, Independent)


@pytest.mark.parametrize(
    ("stored", "image_shape", "in_memory"),
    [
        (torch.randn(4, 3, 8, 6), (3, 8, 6), (3, 8, 6)),
        (np.ones((4, 8, 6), np.float32), (1, 8, 6), (1, 8, 6)),
        (kspace(4, 8, 6), (2, 8, 6), (2, 8, 6)),
        (np.ones((4, 8, 6), np.float64), (1, 8, 6), (1, 8, 6)),
    ],
)
def test_identity_layouts(tmp_path: Path, stored, image_shape, in_memory):
    path = tmp_path / "m.h5"
    write_measurements(
        path, measurements=stored, mask=None, noise_std=0.0, operator="identity", image_shape=image_shape
    )
    file = MeasurementFile(path)
    assert file.measurement_shape == in_memory and tuple(file.measurements([1]).shape) == (1, *in_memory)
    with h5py.File(path) as raw:
        assert raw["mask"].shape == (1, 1, 8, 6) and raw["mask"][()].all()
    assert file.operator([0, 1]).name == "identity" and file.design is None and not file.sigma().any()


def test_masks_may_be_shared_or_a_sample_each_and_per_channel(tmp_path: Path):
    y, mask = torch.randn(4, 3, 8, 8), (torch.rand(4, 3, 8, 8) > 0.5).float()
    mask[:, :, 0, 0] = 1
    common = {"noise_std": 0.1, "operator": "masking", "image_shape": (3, 8, 8)}
    own = MeasurementFile(write_measurements(tmp_path / "a.h5", measurements=y * mask, mask=mask, **common))
    assert torch.equal(own.mask([2, 3]), mask[2:]) and not own.shared_mask
    shared = MeasurementFile(
        write_measurements(tmp_path / "b.h5", measurements=y * mask[:1], mask=mask[:1], **common)
    )
    assert (
        torch.equal(shared.mask([2, 3]), mask[:1]) and shared.shared_mask and len(shared.operator().mask) == 1
    )


@pytest.mark.parametrize("indices", [2, [2], slice(2, 3), np.array([2]), torch.tensor([2]), -3])
def test_samples_are_chosen_as_arrays_are(tmp_path: Path, indices):
    file = MeasurementFile(write_mri(tmp_path / "m.h5"))
    assert torch.equal(file.measurements(indices), file.measurements()[2:3])
    with pytest.raises(IndexError):
        file.measurements([0, 5])


def test_handles_belong_to_their_process(tmp_path: Path):
    file = MeasurementFile(write_mri(tmp_path / "m.h5"))
    copy = pickle.loads(pickle.dumps(file))
    assert copy._handle is None and torch.equal(copy.measurements(1), file.measurements(1))
    inherited = file._open()
    file._owner = os.getpid() + 1  # as in a forked child: the handle was opened by another process
    assert torch.equal(file.measurements(1), copy.measurements(1)) and file._handle is not inherited
    with file:
        pass
    assert file._handle is None and len(file.measurements()) == 5


def test_writer_streams_blocks_and_keeps_many_subjects(tmp_path: Path):
    # 6000 variable-length names exceed the 64 kB that HDF5's compact attributes hold.
    y = rng().standard_normal((6000, 1, 2, 2)).astype(np.float32)
    with MeasurementWriter(tmp_path / "m.h5", operator="identity", image_shape=(1, 2, 2)) as writer:
        for start in range(0, 6000, 2500):
            block = y[start : start + 2500]
            names = [f"person{start + k:05d}" for k in range(len(block))]
            writer.append(block, noise_std=0.1, subjects=names, scale=1.0 + start)
    file = MeasurementFile(tmp_path / "m.h5")
    assert file.subjects[5999] == "person05999" and np.array_equal(file.measurements().numpy(), y)
    assert isinstance(file.scale, np.ndarray) and file.scale[[0, 2500, 5999]].tolist() == [
        1.0,
        2501.0,
        5001.0,
    ]


def test_reference_files(tmp_path: Path):
    real, comp = torch.randn(3, 3, 4, 5), kspace(3, 4, 5)
    assert torch.equal(
        ReferenceFile(write_images(tmp_path / "a.h5", images=real)).images([2, 0]), real[[2, 0]]
    )
    file = ReferenceFile(
        write_images(tmp_path / "b.h5", images=comp, subjects=list("abc"), scale=2.0, history="made")
    )
    assert file.image_shape == (2, 4, 5) and np.array_equal(file.images(1)[0, 1].numpy(), comp[1].imag)
    assert (
        file.subjects == ["a", "b", "c"] and file.scale == 2.0 and file.history == "made" and len(file) == 3
    )


def test_large_foreign_files_are_checked_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_mri(tmp_path / "m.h5")
    with h5py.File(path, "r+") as raw:
        del raw.attrs["verified"]
        raw["measurements"][3, 0, 0, 4] = np.nan
    with pytest.raises(InputError, match="sample 3"):
        MeasurementFile(path)
    monkeypatch.setattr(files, "FULL_SCAN_BYTES", 0)
    file = MeasurementFile(path)
    assert torch.isfinite(file.measurements([0, 1, 2])).all()
    with pytest.raises(InputError, match="m.h5: measurements: NaN or infinite values in sample 3"):
        file.measurements([1, 3])


# ---------------------------------------------------------------------------------------------- files: trust


def counted(monkeypatch: pytest.MonkeyPatch, name: str = "_read") -> list[str]:
    """The datasets that are read from here on."""
    seen: list[str] = []
    read = getattr(MeasurementFile, name)

    def spy(self, dataset, *rest):
        seen.append(dataset)
        return read(self, dataset, *rest)

    monkeypatch.setattr(MeasurementFile, name, spy)
    return seen


def test_a_file_of_the_library_is_opened_without_reading_its_samples(tmp_path, monkeypatch):
    """However many they are: masks, maps and measurements are read when somebody asks for them, and not
    looked at then.
    """
    path = write_mri(tmp_path / "m.h5", num=6)
    monkeypatch.setattr(hdf5_file, "FULL_CHECK_BYTES", 0)
    seen, looked = counted(monkeypatch), counted(monkeypatch, "_check_values")
    file = MeasurementFile(path)
    assert file.trusted and seen == []
    y, operator = file.measurements([4, 1]), file.operator([4, 1])
    assert sorted(seen) == ["coil_maps", "mask", "measurements"] and looked == []
    foreign = tmp_path / "f.h5"
    foreign.write_bytes(path.read_bytes())
    _edit(lambda raw: raw.attrs.__delitem__("verified"))(foreign)
    other = MeasurementFile(foreign)
    assert not other.trusted and set(looked) == {"mask", "coil_maps", "measurements"}
    assert torch.equal(other.measurements([4, 1]), y) and other.measured_fraction == file.measured_fraction
    assert operator.isometry and other.operator([4, 1]).isometry
    assert torch.equal(other.operator([4, 1]).A_adjoint(y), operator.A_adjoint(y))


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", ["measurements", "mask", "coil_maps"])
def test_a_changed_sample_is_refused_by_name(tmp_path, monkeypatch, name: str, small: bool):
    """One bit of one value, and a value that would be allowed: at once in a small file, when it is read in a
    large one.
    """
    path = write_mri(tmp_path / "m.h5", num=4, coil_maps=kspace(4, 3, 8, 8, seed=2))
    mask = MeasurementFile(path).mask()
    row, column = (int(i) for i in mask[2, 0, 0].nonzero()[0])
    where = {"measurements": (2, 1, row, column), "mask": (2, 3, column), "coil_maps": (2, 1, 0, 0)}[name]
    _edit(lambda raw: raw[name].__setitem__(where, 1 - raw[name][where]))(path)
    told = "m.h5: (mask: sample 2|measurements: 6 non-zero values outside the mask in sample 2|measurements: sample 2|coil_maps: sample 2)"
    if small:
        with pytest.raises(InputError, match=told):
            MeasurementFile(path)
        return
    monkeypatch.setattr(hdf5_file, "FULL_CHECK_ROWS", 0)
    file = MeasurementFile(path)
    assert len(file.measurements([0, 1, 3])) == 3 and file.operator([0, 1, 3]).batch_size == 3
    with pytest.raises(InputError, match=told):
        file.measurements([0, 2]), file.operator([0, 2])


def test_every_bit_of_a_file_is_guarded(tmp_path: Path):
    """A flipped bit is refused in one line, or lies where nothing of the file lies: what is read is what was
    written.
    """
    path, spoilt = (
        write_mri(tmp_path / "m.h5", num=2, scale=[1.0, 2.0], labels=[3, 1], history="x" * 50),
        tmp_path / "n.h5",
    )
    clean = MeasurementFile(path)
    content, generator = path.read_bytes(), rng(3)

    def facts(file: MeasurementFile) -> list:
        maps, labels = file.coil_maps(), file.labels()
        assert maps is not None and labels is not None
        tensors = [file.measurements(), file.mask(), maps, file.sigma(), labels]
        texts = {k: v for k, v in file.attributes.items() if k != "verified"}
        return [*(t.tolist() for t in tensors), np.asarray(file.scale).tolist(), file.subjects, texts]

    expected, refused = facts(clean), 0
    for place in generator.integers(0, len(content), 400):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        spoilt.write_bytes(damaged)
        try:
            with MeasurementFile(spoilt) as file:
                assert facts(file) == expected
        except InputError as error:
            assert "\n" not in str(error) and "n.h5" in str(error)
            refused += 1
    assert refused > 40


def test_an_edited_description_is_checked_like_a_foreign_one(tmp_path: Path):
    """Attributes may be edited by hand: the file is then no longer trusted, and read through."""
    path = write_mri(tmp_path / "m.h5")
    _edit(lambda raw: raw.attrs.__setitem__("history", "edited"))(path)
    file = MeasurementFile(path)
    assert not file.trusted and file.history == "edited" and len(file.measurements()) == 5
    file.close()
    _assign("mask", (1, 0, 4), 2)(path)
    with pytest.raises(InputError, match="mask: expected only 0 and 1"):
        MeasurementFile(path)


@pytest.mark.parametrize("kind", KINDS)
def test_checksums_tell_words_and_places_apart(kind: str):
    row_checksums = partial(checksums.row_checksums, kind=kind)
    block = rng(1).integers(0, 255, (50, 3, 7), dtype=np.uint8)
    sums = row_checksums(block)
    assert sums.dtype == np.uint64 and len(set(sums.tolist())) == 50
    assert np.array_equal(sums, row_checksums(np.asfortranarray(block))) and row_checksums(
        block[:0]
    ).shape == (0,)
    swapped = block.reshape(50, 21).copy()
    swapped[:, [0, 8]] = swapped[:, [8, 0]]
    changed = (swapped != block.reshape(50, 21)).any(1)
    assert ((row_checksums(swapped.reshape(block.shape)) != sums) == changed).all() and changed.sum() > 40
    shifted = np.frombuffer(b"x" + block.tobytes(), np.uint8)[1:].reshape(
        block.shape
    )  # memory of another alignment
    assert np.array_equal(row_checksums(shifted), sums)


def test_files_with_the_checksums_of_earlier_versions_are_trusted_and_checked(tmp_path: Path, monkeypatch):
    now = write_mri(tmp_path / "now.h5")
    sums = partial(checksums.row_checksums, kind="checksums")
    with monkeypatch.context() as patch:
        patch.setattr(hdf5_writer, "CHECKSUMS", "checksums")
        patch.setattr(hdf5_writer, "row_checksums", sums)
        path = write_mri(tmp_path / "m.h5")
    with h5py.File(path) as raw, MeasurementFile(path) as file, MeasurementFile(now) as newer:
        assert file.trusted and "xxh3_64" not in raw
        stored = raw["checksums/measurements"][()]
        assert np.array_equal(stored, sums(raw["measurements"][()]))
        assert torch.equal(file.measurements([2, 0]), newer.measurements([2, 0]))
        assert file.checksum != newer.checksum
    whole = path.read_bytes()
    with h5py.File(path) as raw:
        place = raw["measurements"].id.get_chunk_info(1).byte_offset + 5
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InputError, match="sample 1 is not what was written"):
        MeasurementFile(path)


VERSION_1 = {"format_version": 1, "subjects": ["a", "b", "a"], "scale": [1.0, 2.0, 3.0]}


def test_files_of_version_1_are_read(tmp_path: Path):
    """Subjects and scales are attributes there, and nothing is recorded: every value is looked at."""
    path = write_mri(tmp_path / "m.h5", num=3)

    def age(raw: h5py.File) -> None:
        for name in ("xxh3_64", "subject", "subject_names", "isometric"):
            del raw[name]
        for name in ("verified", "measured"):
            del raw.attrs[name]
        for name, value in VERSION_1.items():
            raw.attrs[name] = np.array(value, h5py.string_dtype()) if name == "subjects" else value

    _edit(age)(path)
    file = MeasurementFile(path)
    assert file.subjects == ["a", "b", "a"] and np.array_equal(file.scale, [1, 2, 3]) and not file.trusted
    assert file.subject_names == ["a", "b"] and file.labels() is None and file.operator().isometry
    file.close()
    _assign("mask", (1, 0, 4), 2)(path)
    with pytest.raises(InputError, match="only 0 and 1"):
        MeasurementFile(path)


def test_a_million_samples_cost_no_million_objects(tmp_path: Path):
    """Subjects are numbers until somebody asks for the names; long texts and names of any kind survive."""
    names = [f"naïve \n {k % 300}" for k in range(3000)]
    y = np.zeros((3000, 1, 1, 1), np.float32)
    long = "history " * 20_000
    path = write_measurements(
        tmp_path / "m.h5", measurements=y, mask=None, noise_std=0.1, operator="identity", image_shape=(1, 1, 1),
        subjects=names, history=long, attributes={"note": "n" * 70_000, "empty": ""},
    )  # fmt: skip
    file = MeasurementFile(path)
    assert file.trusted and file._subject_list is None and file.history == long
    assert file.attributes["note"] == "n" * 70_000 and file.attributes["empty"] == ""
    assert file.subject_codes.dtype == np.int32 and len(file.subject_names) == 300
    assert file.subjects == names


# -- what a file may not be


def _linked(kind: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        secret = path.with_name("secret.bin")
        with h5py.File(path, "r+") as raw:
            shape, dtype, values = (
                raw["measurements"].shape,
                raw["measurements"].dtype,
                raw["measurements"][()],
            )
            secret.write_bytes(values.tobytes())
            with h5py.File(path.with_name("secret.h5"), "w") as other:
                other["measurements"] = values
            del raw["measurements"]
            if kind == "external link":
                raw["measurements"] = h5py.ExternalLink("secret.h5", "measurements")
            elif kind == "external storage":
                raw.create_dataset(
                    "measurements", shape, dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
                )
            elif kind == "virtual":
                layout = h5py.VirtualLayout(shape, dtype)
                layout[...] = h5py.VirtualSource(str(path.with_name("secret.h5")), "measurements", shape)
                raw.create_virtual_dataset("measurements", layout)
            elif kind == "soft link":
                raw["elsewhere"] = values
                raw["measurements"] = h5py.SoftLink("/elsewhere")
            elif kind == "link to itself":
                raw["measurements"] = h5py.SoftLink("/measurements")
            elif kind == "group":
                raw.create_group("measurements")
            else:
                raw.create_dataset("measurements", (5, 3, 100_000, 100_000), dtype, chunks=(1, 1, 10, 10))

    return change


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("external link", "a link to another place"),
        ("external storage", "lie in other files"),
        ("virtual", "lie in other files"),
        ("soft link", "a link to another place"),
        ("link to itself", "a link to another place"),
        ("group", "missing"),
        ("sparse", "claims .* bytes"),
    ],
)
def test_a_file_is_no_way_to_other_files(tmp_path: Path, kind: str, message: str, mark: bool):
    path = write_mri(tmp_path / "m.h5")
    _linked(kind)(path)
    if not mark:
        _edit(lambda raw: raw.attrs.__delitem__("verified"))(path)
    with pytest.raises(InputError, match=message) as caught:
        MeasurementFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mask", "coil_maps", "noise_std", "subject", "checksums/mask", "foreign"])
def test_no_part_of_a_file_lies_elsewhere(tmp_path: Path, name: str):
    path = write_mri(tmp_path / "m.h5")

    def change(raw: h5py.File) -> None:
        if name in raw:
            del raw[name]
        raw[name] = h5py.ExternalLink("secret.h5", "x")

    _edit(change)(path)
    with pytest.raises(InputError, match="a link to another place"):
        MeasurementFile(path)


def test_a_mask_that_claims_more_than_the_file_can_hold(tmp_path: Path):
    path = write_mri(tmp_path / "m.h5", mask=np.ones((1, 8, 8), np.uint8), coil_maps=kspace(1, 3, 8, 8))

    def change(raw: h5py.File) -> None:
        del raw["mask"]
        raw.create_dataset("mask", (1, 1 << 18, 1 << 18), np.uint8, chunks=(1, 64, 64), compression="gzip")

    _edit(change)(path)
    with pytest.raises(InputError, match="mask: claims 68719476736 bytes"):
        MeasurementFile(path)


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("Can't decrement id ref count (file write failed: No space left on device)")

    monkeypatch.setattr(h5py.File, "close", full)
    with pytest.raises(InputError, match="m.h5: cannot be written .*No space left"):
        write_mri(tmp_path / "m.h5")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- files: bad
# ones


def _edit(change: Callable[[h5py.File], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "r+") as raw:
            change(raw)

    return apply


def _replace(name: str, convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def change(raw: h5py.File) -> None:
        new = convert(raw[name][()])
        del raw[name]
        raw[name] = new

    return _edit(change)


def _assign(name: str, where, value) -> Callable[[Path], None]:
    return _edit(lambda raw: raw[name].__setitem__(where, value))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


PARTS = {"mask", "measurements", "noise_std", "subject", "subject_names", "xxh3_64"}
BAD_FILES = {
    "missing file": (lambda p: p.unlink(), "no such file"),
    "empty file": (lambda p: p.write_bytes(b""), "not an HDF5 file|truncated"),
    "not HDF5": (lambda p: p.write_bytes(b"hello" * 999), "not an HDF5 file"),
    "truncated": (_truncate, "truncated|damaged"),
    "foreign": (_edit(lambda raw: raw.attrs.__delitem__("format")), "foreign HDF5 file"),
    "other format": (
        _edit(lambda raw: raw.attrs.__setitem__("format", "ambient_sci images")),
        "ambient_sci images",
    ),
    "other version": (
        _edit(lambda raw: raw.attrs.__setitem__("format_version", 99)),
        "format version 1 or 2, got 99",
    ),
    "no measurements": (_edit(lambda raw: raw.__delitem__("measurements")), "'measurements' is missing"),
    "no mask": (_edit(lambda raw: raw.__delitem__("mask")), "'mask' is missing"),
    "no maps": (_edit(lambda raw: raw.__delitem__("coil_maps")), "coil_maps: missing"),
    "no noise level": (_edit(lambda raw: raw.__delitem__("noise_std")), "noise level is absent"),
    "no operator": (_edit(lambda raw: raw.attrs.__delitem__("operator")), "operator: expected one of"),
    "no image shape": (_edit(lambda raw: raw.attrs.__delitem__("image_shape")), "image shape"),
    "wrong operator": (_edit(lambda raw: raw.attrs.__setitem__("operator", "identity")), "complex"),
    "wrong image shape": (
        _edit(lambda raw: raw.attrs.__setitem__("image_shape", [2, 8, 9])),
        "expected shape",
    ),
    "three channels": (_edit(lambda raw: raw.attrs.__setitem__("image_shape", [3, 8, 8])), "2 channels"),
    "double precision": (_replace("measurements", lambda a: a.astype(np.complex128)), "complex64 or float32"),
    "real k-space": (_replace("measurements", lambda a: a.real.copy()), "must be complex64"),
    "too few axes": (_replace("measurements", lambda a: a[0, 0]), "expected"),
    "no samples": (_replace("measurements", lambda a: a[:0]), "N >= 1"),
    "NaN": (_assign("measurements", (2, 0, 0, 4), np.nan), "NaN or infinite values in sample 2"),
    "infinite": (_assign("measurements", (1, 0, 0, 4), np.inf), "NaN or infinite values in sample 1"),
    "mask of floats": (_replace("mask", lambda a: a.astype(np.float32)), "mask: expected uint8"),
    "mask not 0/1": (_assign("mask", (1, 0, 4), 2), "only 0 and 1, got 2"),
    "mask all zero": (_assign("mask", 3, 0), "all zero for sample 3"),
    "mask of another size": (_replace("mask", lambda a: a[:, :, :7]), "mask: expected shape"),
    "masks of another number": (_replace("mask", lambda a: a[:3]), "1 or 5 masks"),
    "mask contradicts the data": (_assign("mask", (1, 3, 4), 0), "outside the mask in sample 1"),
    "maps of another size": (_replace("coil_maps", lambda a: a[..., :7]), "coil_maps: expected"),
    "maps of other coils": (_replace("coil_maps", lambda a: a[:, :2]), "coil_maps: expected"),
    "maps of another number": (_replace("coil_maps", lambda a: np.repeat(a, 2, 0)), "coil_maps: expected"),
    "zero maps": (_assign("coil_maps", slice(None), 0), "coil_maps: all zero"),
    "NaN in maps": (_assign("coil_maps", (0, 0, 0, 0), np.nan), "coil_maps: NaN"),
    "real maps": (_replace("coil_maps", lambda a: a.real.copy()), "coil_maps: expected complex64"),
    "negative noise level": (_assign("noise_std", 1, -0.1), "expected finite levels >= 0, got -0.1"),
    "NaN noise level": (_assign("noise_std", 1, np.nan), "expected finite levels >= 0, got nan"),
    "noise levels of another number": (_replace("noise_std", lambda a: a[:3]), "noise_std: expected"),
    "design not JSON": (_edit(lambda raw: raw.attrs.__setitem__("design", "{")), "design: expected JSON"),
    "unknown design status": (
        _edit(lambda raw: raw.attrs.__setitem__("design_status", "sure")),
        "design_status",
    ),
    "zero scale": (_edit(lambda raw: raw.attrs.__setitem__("scale", 0.0)), "scale: expected"),
    "too few subjects": (_edit(lambda raw: raw.attrs.__setitem__("subjects", ["a"])), "subjects: expected 5"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=list(BAD_FILES))
def test_bad_measurement_files_are_refused_in_one_line(tmp_path: Path, spoil, message: str):
    path = write_mri(tmp_path / "m.h5")
    MeasurementFile(path).close()
    spoil(path)
    with pytest.raises(InputError, match=message) as caught:
        MeasurementFile(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


BAD_WRITES = {
    "real k-space": ({"measurements": np.ones((5, 3, 8, 8))}, "must be complex"),
    "letters": ({"measurements": np.array(["a"] * 5)}, "expected numbers"),
    "nothing": ({"measurements": kspace(0, 3, 8, 8)}, "at least one sample"),
    "NaN": ({"measurements": np.full((5, 3, 8, 8), np.nan + 0j)}, "NaN"),
    "overflow of float32": (
        {"measurements": np.full((5, 3, 8, 8), 1e300 + 0j) * column_masks(5)[:, None]},
        "infinite",
    ),
    "no mask": ({"mask": None}, "mask: missing"),
    "mask of halves": ({"mask": column_masks(5) * 0.5}, "only 0 and 1, got 0.5"),
    "masks of another number": ({"mask": column_masks(4)}, "first axis 1 or 5"),
    "mask contradicts": ({"measurements": kspace(5, 3, 8, 8)}, "outside the mask"),
    "no maps": ({"coil_maps": None}, "coil_maps: missing"),
    "real maps": ({"coil_maps": np.ones((1, 3, 8, 8))}, "expected complex"),
    "no noise level": ({"noise_std": None}, "noise_std: absent"),
    "negative noise level": ({"noise_std": -1}, "levels >= 0, got -1"),
    "unknown operator": ({"operator": "blur"}, "got 'blur'"),
    "image shape of two sizes": ({"image_shape": (8, 8)}, "three positive sizes"),
    "subjects of another number": ({"subjects": ["a"]}, "subjects: expected 5"),
    "negative scale": ({"scale": -1.0}, "scale: expected"),
    "unknown status": ({"design_status": "sure"}, "design_status"),
    "identity with a mask": (
        {
            "operator": "identity",
            "measurements": np.ones((5, 1, 8, 8)),
            "image_shape": (1, 8, 8),
            "coil_maps": None,
        },
        "identity measures everything",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_WRITES.values(), ids=list(BAD_WRITES))
def test_bad_arrays_are_refused_and_nothing_is_written(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        write_mri(tmp_path / "m.h5", **changes)
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_are_kept_unless_told_otherwise(tmp_path: Path):
    path = write_mri(tmp_path / "m.h5")
    before = path.read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        write_mri(path, num=2)
    with pytest.raises(InputError, match="NaN"):
        write_mri(path, measurements=np.full((5, 3, 8, 8), np.nan + 0j), overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert len(MeasurementFile(write_mri(path, num=2, overwrite=True))) == 2
    with pytest.raises(InputError, match="folder"):
        write_mri(tmp_path)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), ImageWriter(tmp_path / "r.h5") as writer:
        writer.append(torch.zeros(2, 1, 4, 4))
        raise RuntimeError("killed")
    with pytest.raises(InputError, match="no sample"), ImageWriter(tmp_path / "r.h5"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 4), "expected"),
        (torch.full((1, 1, 4, 4), torch.nan), "NaN"),
        (torch.zeros(0, 1, 4, 4), "expected"),
    ],
)
def test_bad_reference_images_are_refused(tmp_path: Path, images: torch.Tensor, message: str):
    with pytest.raises(InputError, match=message):
        write_images(tmp_path / "r.h5", images=images)
    good = write_images(tmp_path / "good.h5", images=torch.zeros(1, 1, 4, 4))
    with pytest.raises(InputError, match="expected ambient_sci measurements"):
        MeasurementFile(good)
    with h5py.File(good, "r+") as raw:
        raw["images"][0, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        ReferenceFile(good)


# ---------------------------------------------------------------------------------------------- images and
# slices


def test_packaged_heads():
    train, people = brains("train")
    test, others = brains("test")
    assert tuple(train.shape) == (533, 1, 64, 64) and tuple(test.shape) == (49, 1, 64, 64)
    assert set(people) == {"colin27"} and set(others) == {"patient1", "patient2", "s1045"}
    assert not set(people) & set(others) and len(others) == 49
    assert float(train.min()) == 0 and 1 <= float(train.max()) < 1.3
    # Heads are upright after np.rot90 in both sets: more of the head is in the upper than in the lower
    # quarter of the sagittal slice, where the neck is.
    upright = np.rot90(test[-1, 0].numpy())
    assert (upright[8:24] > 0.2).sum() > (upright[-16:] > 0.2).sum()
    with pytest.raises(InputError, match="'train' or 'test'"):
        brains("all")


def test_resizing_averages_and_does_not_alias():
    board = np.indices((64, 64)).sum(0)[None, None] % 2.0
    small = resize(board, 16)
    assert small.shape == (1, 1, 16, 16) and np.allclose(small[..., 2:-2, 2:-2], 0.5, atol=0.02)
    tall = np.ones((1, 1, 8, 4))
    assert square_pad(tall).shape == (1, 1, 8, 8) and square_pad(tall).sum() == tall.sum()
    assert np.array_equal(square_pad(tall)[0, 0, :, 2:6], tall[0, 0])


def test_slices_follow_ras_axes():
    volume = np.zeros((3, 4, 5), np.float32)
    volume[1, 2, 3] = volume[0, 0, 3] = 1
    axial, numbers = slices(volume, "axial", min_foreground=0.05)
    assert numbers.tolist() == [3] and np.array_equal(axial[0], volume[:, :, 3])
    assert np.array_equal(slices(volume, "coronal")[0][2], volume[:, 2, :])
    assert np.array_equal(slices(volume, "sagittal")[0][1], volume[1])
    with pytest.raises(InputError, match="plane"):
        slices(volume, "oblique")


# ---------------------------------------------------------------------------------------------- simulation


def simulated(tmp_path: Path, images, operator: str, **options) -> tuple[MeasurementFile, ReferenceFile]:
    simulate(images, operator, tmp_path / "m.h5", tmp_path / "r.h5", overwrite=True, **options)
    return MeasurementFile(tmp_path / "m.h5"), ReferenceFile(tmp_path / "r.h5")


def gray(num: int = 40, size: int = 16) -> torch.Tensor:
    return torch.rand(num, 1, size, size, generator=torch.Generator().manual_seed(9))


SIMULATIONS = {
    "identity": ("identity", {}),
    "identity with phase": ("identity", {"phase": "smooth"}),
    "masking": ("masking", {"keep": 0.5}),
    "box": ("masking", {"design": "box", "box": (5, 4)}),
    "one mask": ("masking", {"keep": 0.5, "shared_mask": True}),
    "fully sampled": ("mri", {"acceleration": 1}),
    "single coil": ("mri", {"acceleration": 2}),
    "four coils": ("mri", {"acceleration": 2, "coils": 4, "design": "lines-variable", "acs": 4}),
    "coils that vary": ("mri", {"acceleration": 2, "coils": 3, "vary_coils": True}),
    "equispaced": ("mri", {"acceleration": 2, "design": "equispaced", "phase": "none"}),
    "poisson": ("mri", {"acceleration": 2, "design": "poisson", "shared_mask": True}),
}


@pytest.mark.parametrize(("operator", "options"), SIMULATIONS.values(), ids=list(SIMULATIONS))
def test_residuals_are_white_noise_of_the_stated_level(tmp_path: Path, operator: str, options: dict):
    file, truth = simulated(tmp_path, gray(), operator, noise_std=0.2, seed=3, **options)
    a, y = file.operator(), file.measurements()
    x = truth.images()
    measured = a.mask.expand_as(y) > 0
    residual = ((y - a.A(x)) / 0.2)[measured].double()
    n = len(residual)
    # Mean and mean square of n standard normal values; 4.5 standard errors: false alarms below 1e-5 a test.
    assert abs(float(residual.mean())) < 4.5 / n**0.5
    assert abs(float(residual.square().mean()) - 1) < 4.5 * (2 / n) ** 0.5
    assert not y[~measured].any()
    assert torch.allclose(x.square().sum(1).sqrt(), gray()[:, 0], atol=1e-5)  # phase changes no magnitude
    if operator == "mri" and options["acceleration"] > 1:
        rate = 1 / options["acceleration"]
        assert float(file.mask().mean()) == pytest.approx(rate, abs=0.1)
    assert file.shared_mask == (options.get("shared_mask", False) or file.design is None)


def test_a_seed_fixes_everything_and_streams_are_separate(tmp_path: Path):
    first, truth = simulated(tmp_path, gray(70), "mri", noise_std=0.1, acceleration=2, seed=5)
    y, x, mask = first.measurements(), truth.images(), first.mask()
    again, _ = simulated(tmp_path, gray(70), "mri", noise_std=0.1, acceleration=2, seed=5)
    assert torch.equal(again.measurements(), y) and torch.equal(again.mask(), mask)
    other, _ = simulated(tmp_path, gray(70), "mri", noise_std=0.1, acceleration=2, seed=6)
    assert not torch.equal(other.mask(), mask) and not torch.equal(other.measurements(), y)
    full, full_truth = simulated(tmp_path, gray(70), "mri", noise_std=0.1, acceleration=1, seed=5)
    assert torch.equal(full_truth.images(), x) and torch.equal(full.measurements() * mask, y)
    assert len(torch.unique(mask.flatten(1), dim=0)) > 60  # one mask a sample


def test_no_clean_image_is_in_the_measurement_file(tmp_path: Path):
    simulated(tmp_path, gray(), "masking", noise_std=0.1, keep=0.5)
    with h5py.File(tmp_path / "m.h5") as raw:
        assert {"mask", "measurements", "noise_std"} <= set(raw) <= PARTS


def test_phases_are_smooth_random_and_of_full_range():
    phase = smooth_phase(400, 32, 32, torch.Generator().manual_seed(0))
    steps = torch.diff(phase, dim=-1).abs()
    assert float(steps.max()) < 0.6 and float(steps.mean()) > 0.01
    # The mean direction of n uniform angles has length below 4 / sqrt(n) but for e^-16 of the cases.
    assert float(torch.polar(torch.ones(400), phase[:, 16, 16]).mean().abs()) < 4 / 400**0.5


def test_per_image_noise_levels(tmp_path: Path):
    levels = [0.0, 0.5] * 20
    file, truth = simulated(tmp_path, gray(), "identity", noise_std=levels)
    residual = (file.measurements() - truth.images()).flatten(1).std(1)
    assert torch.equal(file.sigma(), torch.tensor(levels))
    assert not residual[::2].any() and torch.allclose(residual[1::2], torch.tensor(0.5), rtol=0.25)


BAD_SIMULATIONS = {
    "operator": (("blur", {}), "operator: expected one of"),
    "phase": (("mri", {"phase": "rough"}), "'smooth' or 'none'"),
    "identity with acceleration": (("identity", {"acceleration": 2.0}), "acceleration has no meaning"),
    "identity with coils": (("identity", {"coils": 4}), "coils: expected"),
    "masking with acceleration": (
        ("masking", {"acceleration": 2.0, "keep": 0.5}),
        "acceleration has no meaning",
    ),
    "masking without keep": (("masking", {}), "expected keep between 0 and 1"),
    "mri with keep": (("mri", {"keep": 0.5}), "keep has no meaning"),
    "R below 1": (("mri", {"acceleration": 0.5}), "acceleration above 1, got 0.5"),
    "no coils": (("mri", {"coils": 0}), "coils: expected"),
    "one coil that varies": (("mri", {"vary_coils": True}), "more than 1 to vary"),
    "calibration lines without acceleration": (("mri", {"acs": 4}), "acs has no meaning"),
    "shared without mask": (("mri", {"shared_mask": True}), "no mask to share"),
    "design": (("mri", {"acceleration": 2.0, "design": "spiral"}), "got 'spiral'"),
    "negative noise": (("identity", {"noise_std": -1.0}), "levels >= 0"),
    "noise of another number": (("identity", {"noise_std": [0.1, 0.2]}), "noise_std: expected"),
    "size": (("identity", {"size": 0}), "at least 1 pixel"),
}


@pytest.mark.parametrize(("call", "message"), BAD_SIMULATIONS.values(), ids=list(BAD_SIMULATIONS))
def test_bad_simulations_are_refused_and_nothing_is_written(tmp_path: Path, call, message: str):
    operator, options = call
    with pytest.raises(InputError, match=message):
        simulate(gray(4), operator, tmp_path / "m.h5", tmp_path / "r.h5", **{"noise_std": 0.1, **options})
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_a_simulation_are_two_new_files(tmp_path: Path):
    with pytest.raises(InputError, match="two files"):
        simulate(gray(4), "identity", tmp_path / "m.h5", tmp_path / "m.h5", noise_std=0.1)
    write_images(tmp_path / "r.h5", images=gray(1))
    with pytest.raises(InputError, match="exists"):
        simulate(gray(4), "identity", tmp_path / "m.h5", tmp_path / "r.h5", noise_std=0.1)
    with pytest.raises(InputError, match="one channel"):
        simulate(torch.rand(2, 3, 8, 8), "mri", tmp_path / "m.h5", tmp_path / "n.h5", noise_std=0.1)
    with pytest.raises(InputError, match="complex already"):
        simulate(kspace(2, 8, 8), "mri", tmp_path / "m.h5", tmp_path / "n.h5", noise_std=0.1, phase="smooth")
    assert [p.name for p in tmp_path.iterdir()] == ["r.h5"]


# ---------------------------------------------------------------------------------------------- loader


def arrays(num: int = 10) -> MeasurementArrays:
    mask = torch.ones(num, 1, 4, 4)
    mask[:, 0, 0, 0] = torch.arange(num) % 2
    y = torch.arange(num).float()[:, None, None, None].expand(num, 1, 4, 4) * mask
    return MeasurementArrays(Masking(mask), y, torch.arange(num) / 10)


def test_every_sample_comes_once_an_epoch_and_belongs_to_its_row():
    batches = MeasurementLoader(arrays(), batch_size=4, seed=0)
    seen = torch.cat([batches.indices(s) for s in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist() and batches.epoch(5) == 2
    batch = batches.batch(2)
    assert torch.equal(batch.indices, batches.indices(2)) and torch.equal(batch.sigma_y, batch.indices / 10)
    assert torch.equal(batch.y[:, 0, 1, 1], batch.indices.float())
    assert torch.equal(batch.operator.mask[:, 0, 0, 0], batch.indices.float() % 2)


def test_batches_depend_on_seed_and_step_alone():
    one, two = MeasurementLoader(arrays(), 4, seed=0), MeasurementLoader(arrays(), 4, seed=0)
    trace = [one.batch(s).indices for s in range(20)]
    assert torch.equal(two.batch(17).indices, trace[17]) and torch.equal(two.batch(3).indices, trace[3])
    assert any(not torch.equal(MeasurementLoader(arrays(), 4, seed=1).indices(s), trace[s]) for s in range(3))
    assert len(MeasurementLoader(arrays(3), 7, seed=0).indices(1)) == 7  # a batch larger than the data


def test_processes_share_the_work_and_subsets_are_kept_to():
    ranks = [MeasurementLoader(arrays(), 2, seed=0, rank=r, num_processes=2) for r in range(2)]
    whole = MeasurementLoader(arrays(), 4, seed=0)
    for step in range(6):
        assert torch.equal(torch.cat([r.indices(step) for r in ranks]), whole.indices(step))
    subset = MeasurementLoader(arrays(), 4, seed=0, samples=[1, 5, 7])
    assert {int(k) for s in range(6) for k in subset.indices(s)} == {1, 5, 7}


def test_files_too_large_for_memory_give_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_mri(tmp_path / "m.h5", num=12, noise_std=np.arange(12) / 10)
    cached = MeasurementLoader(MeasurementFile(path), 5, seed=2)
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    lazy = MeasurementLoader(MeasurementFile(path), 5, seed=2)
    assert isinstance(cached.data, MeasurementArrays) and isinstance(lazy.data, MeasurementFile)
    for step in (0, 1, 2, 9, 4):  # in order (read ahead) and out of order
        a, b = cached.batch(step), lazy.batch(step)
        assert (
            torch.equal(a.y, b.y)
            and torch.equal(a.sigma_y, b.sigma_y)
            and torch.equal(a.operator.mask, b.operator.mask)
        )
        assert torch.equal(a.operator.A_adjoint(a.y), b.operator.A_adjoint(b.y))
    lazy.close()


@pytest.mark.parametrize(
    ("y", "sigma", "message"),
    [
        (torch.full((2, 1, 4, 4), torch.nan), 0.1, "NaN"),
        (torch.ones(2, 1, 4, 4), -0.1, "levels >= 0"),
        (torch.ones(2, 1, 4, 5), 0.1, "masking"),
        (torch.ones(2, 1, 4, 4, dtype=torch.complex64), 0.1, "real tensor"),
    ],
)
def test_arrays_are_validated(y: torch.Tensor, sigma: float, message: str):
    with pytest.raises(InputError, match=message):
        MeasurementArrays(Masking(torch.ones(1, 1, 4, 4), img_size=(1, 4, 4)), y, sigma)


def test_parts_are_virtual_processes():
    """m processes with one part and one process with m parts read the same samples; so do two with two and
    four.
    """
    four = [MeasurementLoader(arrays(), 2, seed=0, rank=r, num_processes=4) for r in range(4)]
    two = [MeasurementLoader(arrays(), 2, seed=0, rank=r, num_processes=2, parts=2) for r in range(2)]
    one = MeasurementLoader(arrays(), 2, seed=0, parts=4)
    for step in range(4):
        expected = [r.indices(step) for r in four]
        assert all(torch.equal(two[k // 2].indices(step, k % 2), e) for k, e in enumerate(expected))
        assert all(torch.equal(one.indices(step, k), e) for k, e in enumerate(expected))
        assert torch.equal(one.batch(step, 3).indices, expected[3])
    assert one.epoch(5) == two[0].epoch(5) == four[0].epoch(5) == 4
    with pytest.raises(InputError, match="part from 0 to 3, got 4"):
        one.indices(0, 4)


def same_batch(a, b) -> bool:
    tensors = [(a.y, b.y), (a.sigma_y, b.sigma_y), (a.indices, b.indices), (a.labels, b.labels)]
    tensors += [(a.operator.A_adjoint(a.y), b.operator.A_adjoint(b.y))]
    tensors += [(a.operator.mask.expand_as(a.y), b.operator.mask.expand_as(b.y))]
    return all((s is None and t is None) or torch.equal(s, t) for s, t in tensors)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["file", "files", "arrays"])
def test_who_reads_changes_no_bit(tmp_path, monkeypatch, kind: str, workers: int):
    """Kept in memory, read by any number of threads, in order or not: batches are a function
    of the step.
    """
    path = write_mri(tmp_path / "m.h5", num=7, noise_std=np.arange(7) / 10, labels=np.arange(7))
    other = write_mri(tmp_path / "n.h5", num=5, labels=np.arange(5))
    data = {"file": lambda: MeasurementFile(path), "files": lambda: MeasurementFiles([path, other])}
    data["arrays"] = lambda: MeasurementArrays.read(MeasurementFile(path))
    kept = MeasurementLoader(data[kind](), 3, seed=2, parts=2)
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    before = torch.get_rng_state()
    lazy = MeasurementLoader(data[kind](), 3, seed=2, parts=2, workers=workers)
    for step, part in [(0, 0), (0, 1), (1, 0), (1, 1), (9, 0), (4, 1), (5, 0), (5, 1), (6, 0), (6, 0)]:
        assert same_batch(kept.batch(step, part), lazy.batch(step, part))
    lazy.close()
    assert torch.equal(torch.get_rng_state(), before)
    assert same_batch(kept.batch(2), lazy.batch(2))  # a closed loader opens again
    lazy.close()


def test_damage_that_a_reader_finds_is_one_line(tmp_path, monkeypatch):
    path = write_mri(tmp_path / "m.h5", num=4)
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    monkeypatch.setattr(hdf5_file, "FULL_CHECK_BYTES", 0)
    _edit(lambda raw: raw["measurements"].__setitem__((2, 0, 0, 4), 1.5))(path)
    for workers in (0, 1):
        batches = MeasurementLoader(MeasurementFile(path), 4, seed=0, workers=workers)
        with pytest.raises(InputError, match="sample 2") as caught:
            batches.batch(0)
        assert "\n" not in str(caught.value)
        batches.close()


def test_large_arrays_stay_where_they_are(monkeypatch):
    """Only data that are small go to the device as a whole."""
    moved = []
    monkeypatch.setattr(MeasurementArrays, "to", lambda self, device: moved.append(device) or self)
    MeasurementLoader(arrays(), 2, seed=0)
    assert len(moved) == 1
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    lazy = MeasurementLoader(arrays(), 2, seed=0)
    lazy.batch(0), lazy.close()
    assert len(moved) == 1


# -- several files, other numbers, noise by entry, labels


def test_a_list_of_files_is_the_data_set(tmp_path: Path):
    """Samples, operators, noise, labels, subjects and scales of each file in turn, for any choice of
    samples.
    """
    masks, maps = column_masks(9), kspace(9, 3, 8, 8, seed=4)
    y = kspace(9, 3, 8, 8) * masks[:, None]
    whole = {"noise_std": np.arange(9) / 10, "labels": np.arange(9), "subjects": [f"p{k}" for k in range(9)]}
    one = MeasurementFile(write_mri(tmp_path / "one.h5", measurements=y, mask=masks, coil_maps=maps, **whole))
    parts = [
        write_mri(
            tmp_path / f"{a}.h5",
            measurements=y[a:b],
            mask=masks[a:b],
            coil_maps=maps[a:b],
            scale=1.0 + a,
            **{k: v[a:b] for k, v in whole.items()},
        )  # fmt: skip
        for a, b in ((0, 4), (4, 5), (5, 9))
    ]
    many = MeasurementFiles(parts)
    assert len(many) == 9 and many.subjects == one.subjects and torch.equal(many.noise_std, one.noise_std)
    assert np.array_equal(many.scale, [1, 1, 1, 1, 5, 6, 6, 6, 6]) and many.measurement_shape == (2, 3, 8, 8)
    assert many.measured_fraction == pytest.approx(one.measured_fraction) and many.nbytes == one.nbytes
    for rows in (None, [8, 0, 4, 5, 3, 0], [2, 1], slice(3, 7), 4, -1, torch.tensor([6, 2])):
        assert torch.equal(many.measurements(rows), one.measurements(rows))
        assert torch.equal(many.sigma(rows), one.sigma(rows)) and torch.equal(
            many.labels(rows), one.labels(rows)
        )
        a, b = many.operator(rows), one.operator(rows)
        assert (
            torch.equal(a.mask, b.mask) and torch.equal(a.coil_maps, b.coil_maps) and a.isometry == b.isometry
        )
    with pytest.raises(IndexError, match="0 to 8"):
        many.measurements([9])
    single = [column_masks(1, seed=k) for k in (0, 1)]
    shared = MeasurementFiles(
        [
            write_mri(tmp_path / f"s{k}.h5", num=2, measurements=y[:2] * 0, mask=m)
            for k, m in enumerate(single)
        ]
    )
    assert tuple(shared.operator([3, 0]).mask.shape) == (2, 1, 1, 8, 8) and not shared.shared_mask
    assert torch.equal(
        shared.operator([3, 0]).mask[0, 0, 0], torch.from_numpy(column_masks(1, seed=1)[0]).float()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coils": 2}, "measurement shape"),
        ({"labels": np.zeros(5, int)}, "labels"),
        ({"design": Independent((2, 8, 8), "columns", 0.5)}, "mask design"),
        ({"noise_std": np.full((1, 2, 1, 1, 1), 0.1)}, "noise by entry"),
    ],
)
def test_files_that_do_not_agree_are_no_data_set(tmp_path: Path, changes: dict, message: str):
    paths = [write_mri(tmp_path / "a.h5"), write_mri(tmp_path / "b.h5", **changes)]
    with pytest.raises(InputError, match=f"b.h5: expected {message}"):
        MeasurementFiles(paths)
    with pytest.raises(InputError, match="list of measurement files"):
        MeasurementFiles([])


@pytest.mark.parametrize("operator", ["mri", "masking"])
def test_half_precision_on_disk(tmp_path: Path, operator: str):
    """Half the bytes, rounded once and said so; in memory float32 like everything."""
    if operator == "mri":
        y, image = kspace(3, 2, 8, 8), (2, 8, 8)
        options: dict = {"coil_maps": kspace(1, 2, 8, 8, seed=1), "mask": np.ones((1, 8, 8), np.uint8)}
    else:
        y, image = rng().standard_normal((3, 2, 8, 8)).astype(np.float32), (2, 8, 8)
        options = {"mask": np.ones((1, 1, 8, 8), np.uint8)}
    common = {"measurements": y, "operator": operator, "image_shape": image, "noise_std": 0.1, **options}
    whole = MeasurementFile(write_measurements(tmp_path / "w.h5", **common))
    half = MeasurementFile(write_measurements(tmp_path / "h.h5", dtype="float16", **common))
    exact, found = whole.measurements(), half.measurements()
    assert found.dtype == torch.float32 and torch.equal(found, exact.half().float())
    worst = float((found - exact).abs().max())
    assert (
        f"stored as float16, rounded by at most {worst:.2g}, {worst / 0.1:.2g} of the noise level"
        in half.history
    )
    assert half._open()["measurements"].dtype == np.float16 and torch.equal(
        half.measurements([2, 0]), found[[2, 0]]
    )
    with pytest.raises(InputError, match="float16 holds values up to 65504"):
        write_measurements(tmp_path / "o.h5", dtype="float16", **{**common, "measurements": y * 1e6})


def test_images_of_8_bits_stay_8_bits(tmp_path: Path):
    """value = stored * step, in measurement and reference files alike; what is not on that grid is
    refused.
    """
    stored = rng().integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    values = torch.from_numpy(stored).float() / 255
    common = {
        "mask": None,
        "noise_std": 0.0,
        "operator": "identity",
        "image_shape": (3, 5, 6),
        "dtype": "uint8",
    }
    file = MeasurementFile(write_measurements(tmp_path / "m.h5", measurements=stored, **common))
    assert (
        torch.allclose(file.measurements([3, 1]), values[[3, 1]], atol=1e-7)
        and file.measurements().dtype == torch.float32
    )
    assert file._open()["measurements"].dtype == np.uint8 and "value = stored x 0.0039215686" in file.history
    images = ReferenceFile(
        write_images(tmp_path / "r.h5", images=stored, dtype="uint8", step=2.0, labels=[3, 1, 0, 2])
    )
    assert torch.equal(images.images([2]), 2 * torch.from_numpy(stored[2:3]).float())
    assert torch.equal(images.labels([0, 3]), torch.tensor([3, 2])) and "stored x 2" in images.history
    from_values = MeasurementFile(write_measurements(tmp_path / "v.h5", measurements=values, **common))
    assert torch.equal(from_values.measurements(), file.measurements())
    for wrong in (values + 0.3 / 255, values * 2, -values):
        with pytest.raises(InputError, match="expected multiples of"):
            write_measurements(tmp_path / "x.h5", measurements=wrong, **common)
    with pytest.raises(InputError, match="complex numbers, got uint8"):
        write_images(tmp_path / "x.h5", images=kspace(2, 4, 4), dtype="uint8")
    with pytest.raises(InputError, match="dtype: expected one of"):
        write_measurements(tmp_path / "x.h5", measurements=values, **{**common, "dtype": "int8"})


@pytest.mark.parametrize("kind", ["shared", "each", "broadcast"])
def test_noise_that_differs_by_entry(tmp_path, monkeypatch, kind: str):
    """A level for each entry, of the shape of y when it is read; `noise_std` is the largest of each
    sample.
    """
    y = rng().standard_normal((4, 2, 3, 5)).astype(np.float32)
    shape = {"shared": (1, 2, 3, 5), "each": (4, 2, 3, 5), "broadcast": (4, 2, 1, 1)}[kind]
    levels = rng(1).random(shape).astype(np.float32)
    path = tmp_path / "m.h5"
    with MeasurementWriter(path, operator="identity", image_shape=(2, 3, 5)) as writer:
        for rows in (slice(0, 3), slice(3, 4)):
            writer.append(y[rows], noise_std=levels if kind == "shared" else levels[rows])
    expected = torch.from_numpy(np.broadcast_to(levels, y.shape).copy())
    largest = expected.flatten(1).amax(1)
    for trusted in (True, False):
        if not trusted:
            _edit(lambda raw: raw.attrs.__delitem__("verified"))(path)
        with MeasurementFile(path) as file:
            assert file.trusted == trusted and torch.equal(file.noise_std, largest) and file.noise_by_entry
            assert torch.equal(file.sigma(), expected) and torch.equal(file.sigma([3, 0]), expected[[3, 0]])
            data = MeasurementArrays.read(file)
    assert torch.equal(data.sigma([3, 0]), expected[[3, 0]]) and torch.equal(data.noise_std, largest)
    given = MeasurementArrays(Identity((2, 3, 5)), torch.from_numpy(y), torch.from_numpy(levels))
    assert torch.equal(given.sigma(), expected) and torch.equal(given.noise_std, largest)
    monkeypatch.setattr(loader, "CACHE_BYTES", 0)
    batches = MeasurementLoader(given, 3, seed=0)
    batch = batches.batch(0)
    assert torch.equal(batch.sigma_y, expected[batch.indices])
    batches.close()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (np.ones((4, 2, 3, 4)), "a level for each entry"),
        (np.ones((3, 2, 3, 5)), "a level for each entry"),
        (np.full((1, 2, 3, 5), -1.0), "levels >= 0"),
        (np.full((1, 2, 3, 5), np.nan), "levels >= 0"),
    ],
)
def test_impossible_levels_of_entries(tmp_path: Path, levels: np.ndarray, message: str):
    y = np.zeros((4, 2, 3, 5), np.float32)
    with pytest.raises(InputError, match=message):
        write_measurements(
            tmp_path / "m.h5",
            measurements=y,
            mask=None,
            noise_std=levels,
            operator="identity",
            image_shape=(2, 3, 5),
        )
    with pytest.raises(InputError, match=message):
        MeasurementArrays(Identity((2, 3, 5)), torch.from_numpy(y), torch.from_numpy(levels))


def test_labels_are_whole_numbers_of_all_samples(tmp_path: Path):
    for labels in ([0.5] * 5, [1, 2], [-1] * 5):
        with pytest.raises(InputError, match="labels: expected 5 whole numbers"):
            write_mri(tmp_path / "m.h5", labels=labels)
    with (
        pytest.raises(InputError, match="for all samples or for none"),
        MeasurementWriter(tmp_path / "m.h5", operator="identity", image_shape=(1, 1, 1)) as writer,
    ):
        writer.append(np.zeros((2, 1, 1, 1)), noise_std=0.1)
        writer.append(np.zeros((2, 1, 1, 1)), noise_std=0.1, labels=[1, 2])
    assert list(tmp_path.iterdir()) == []


# -- surveys


def test_surveys_are_bounded_and_exact_about_completeness(tmp_path, monkeypatch):
    """At most 4,096 masks are looked at; one missing row of one sample is still a row missing."""
    monkeypatch.setattr(survey, "SURVEYED", 5)
    mask = np.ones((40, 8, 8), np.uint8)
    mask[17, :, 3] = 0
    y = kspace(40, 8, 8) * mask
    path = write_measurements(
        tmp_path / "m.h5", measurements=y, mask=mask, noise_std=0.1, operator="mri", image_shape=(2, 8, 8)
    )
    for data in (
        MeasurementFile(path),
        MeasurementArrays.read(MeasurementFile(path)),
        MeasurementFiles([path, path]),
    ):
        fraction, masks = survey.survey_masks(data)
        assert fraction == pytest.approx(1 - 8 / (40 * 64)) and fraction != 1
        assert masks.shape == (5, 1, 8, 8) and masks.dtype == torch.uint8
    full = write_measurements(
        tmp_path / "f.h5", measurements=kspace(40, 8, 8), mask=np.ones((40, 8, 8)), noise_std=0.1, operator="mri",
        image_shape=(2, 8, 8),
    )  # fmt: skip
    assert survey.survey_masks(MeasurementFiles([full, full]))[0] == 1.0
    monkeypatch.setattr(survey, "SURVEY_BYTES", 3 * 64)
    assert len(survey.survey_masks(MeasurementFile(path))[1]) == 3


def test_masks_that_the_stated_design_cannot_have_drawn(tmp_path: Path):
    """A file that states a design of 4 lines and holds a mask of 5 would be trained on with wrong weights."""
    design = FixedBudget((2, 8, 8), "columns", 4)
    masks = design.sample(12, torch.Generator().manual_seed(0))
    line = int((masks[7, 0, 0] == 0).nonzero()[0])
    wrong = masks.clone()
    wrong[7, :, :, line] = 1
    config = TrainConfig()
    for mask, refused in ((masks, False), (wrong, True)):
        operator = MRI(mask, design=design)
        y = operator.A(torch.randn(12, 2, 8, 8, generator=torch.Generator().manual_seed(1)))
        path = write_measurements(
            tmp_path / "m.h5", measurements=y, mask=mask, noise_std=0.01, operator="mri", image_shape=(2, 8, 8),
            design=design, overwrite=True,
        )  # fmt: skip
        for data in (path, (operator, y, 0.01), [path, path]):
            if refused:
                with pytest.raises(InputError, match="cannot have drawn the mask of sample 7"):
                    open_measurements_source(data, config)
            else:
                source = open_measurements_source(data, config)
                rows = torch.tensor([3, 1])
                operator_of = source.measurements.operator(rows)
                ready = source.ready(operator_of, y[rows], torch.full((2,), 0.01), torch.Generator())
                assert ready.operator._drawn_by is ready.operator.design is source.design


def test_fully_sampled_kspace_has_one_noise_level(tmp_path: Path):
    """Noise that differs between entries of k-space has another covariance in the image: no white noise to
    train on.
    """
    y = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.raises(InputError, match="one level a sample for fully sampled k-space"):
        open_measurements_source((MRI(torch.ones(8, 8)), y, torch.full((1, 2, 8, 8), 0.1)), TrainConfig())
    source = open_measurements_source(
        (Masking(torch.ones(1, 2, 8, 8)), y, torch.full((1, 2, 8, 8), 0.1)), TrainConfig()
    )
    assert source.complete and source.data_std == pytest.approx(
        (float(y.var(correction=0)) - 0.01) ** 0.5, rel=1e-4
    )


def test_fingerprints_see_every_sample_of_a_file(tmp_path: Path):
    """Equal values are one data set, wherever they lie and whatever is noted about them; one changed value is
    another.
    """
    y = kspace(20, 3, 8, 8) * column_masks(20)[:, None]
    first = MeasurementFile(write_mri(tmp_path / "a.h5", num=20, measurements=y))
    again = MeasurementFile(write_mri(tmp_path / "b.h5", num=20, measurements=y, history="copied"))
    found = survey.fingerprint(first)
    assert found == survey.fingerprint(again) == survey.fingerprint(MeasurementArrays.read(first))
    y[9, 0, 0, 4] += 1
    other = survey.fingerprint(MeasurementFile(write_mri(tmp_path / "c.h5", num=20, measurements=y)))
    assert other["content"] == found["content"] and other["file"] != found["file"]


def test_bad_loaders_are_refused():
    with pytest.raises(InputError, match="workers"):
        MeasurementLoader(arrays(), 1, seed=0, workers=-1)
    with pytest.raises(InputError, match="batch size"):
        MeasurementLoader(arrays(), 0, seed=0)
    with pytest.raises(InputError, match="no sample"):
        MeasurementLoader(arrays(), 1, seed=0, samples=[])


# ---------------------------------------------------------------------------------------------- inspection


def test_descriptions_say_what_is_in_a_file(tmp_path: Path):
    simulated(tmp_path, "brains:test", "mri", noise_std=0.05, acceleration=4, coils=2, size=16, acs=2)
    text = describe(tmp_path / "m.h5")
    for part in (
        "mri, 2 coils",
        "49, each 2 x 2 x 16 x 16",
        "0.05 per real channel",
        "25.0 % measured (acceleration 4.00)",
        "fixed-budget",
        "a Gaussian prior is",
        "patient1 (25), patient2 (23), s1045 (1)",
        "original = stored x scale",
        "RAS",
        "simulate mri from brains:test",
    ):
        assert part in text, part
    assert (
        "images" in describe(tmp_path / "r.h5")
        and "mri" not in describe(tmp_path / "r.h5").split("history")[0]
    )
    with pytest.raises(InputError, match="no such file"):
        describe(tmp_path / "none.h5")


def test_descriptions_of_estimated_noise_and_complete_data(tmp_path: Path):
    path = write_measurements(
        tmp_path / "m.h5",
        measurements=torch.randn(2, 1, 4, 4),
        mask=None,
        noise_std=[0.1, 0.3],
        operator="identity",
        image_shape=(1, 4, 4),
        noise_std_error=0.01,
        attributes={"magnitude": True},
    )
    text = describe(path)
    assert "0.1 to 0.3 per real channel, estimated with a standard error of 0.01" in text and "Rician" in text
    assert "everything is measured" in text and "identifiab" not in text


@pytest.mark.parametrize(
    "options", [{"acceleration": 2, "coils": 2}, {"acceleration": 1}], ids=["masked", "full"]
)
def test_contact_sheets_are_pictures(tmp_path: Path, options: dict):
    from PIL import Image

    simulated(tmp_path, gray(3), "mri", noise_std=0.1, **options)
    for name in ("m", "r"):
        with Image.open(contact_sheet(tmp_path / f"{name}.h5", tmp_path / f"{name}.png")) as picture:
            assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 20
    with pytest.raises(InputError, match="exists"):
        contact_sheet(tmp_path / "m.h5", tmp_path / "m.png")
    with pytest.raises(InputError, match="picture name"):
        contact_sheet(tmp_path / "m.h5", tmp_path / "m.txt")


# ---------------------------------------------------------------------------------------------- sources of
# images


def test_arrays_of_every_layout(tmp_path: Path):
    np.save(tmp_path / "a.npy", (gray(3, 8)[:, 0].numpy() * 255).astype(np.uint8))
    np.savez(
        tmp_path / "b.npz", images=np.ones((3, 8, 8, 3)), subjects=["x", "y", "y"], other=np.zeros((2, 2))
    )
    a, b = open_source(tmp_path / "a.npy"), open_source(tmp_path / "b.npz")
    assert a.image_shape == (1, 8, 8) and a.scale == 255
    assert torch.allclose(a.images(np.arange(3)), gray(3, 8), atol=1 / 255)
    assert b.image_shape == (3, 8, 8) and b.subjects == ["x", "y", "y"] and b.scale == 1
    assert open_source(kspace(3, 8, 8)).image_shape == (2, 8, 8)
    assert open_source(np.ones((8, 8))).image_shape == (1, 8, 8)
    assert open_source(gray(2, 8), size=4).images(np.arange(2)).shape == (2, 1, 4, 4)


BAD_ARRAYS = {
    "objects": (
        lambda p: np.save(p / "a.npy", np.array([{}], dtype=object), allow_pickle=True),
        "a.npy",
        "numpy file",
    ),
    "not numpy": (lambda p: (p / "a.npy").write_bytes(b"hello"), "a.npy", "numpy file"),
    "not a zip": (lambda p: (p / "a.npz").write_bytes(b"PKhello"), "a.npz", "numpy file"),
    "letters": (lambda p: np.save(p / "a.npy", np.array(["a"])), "a.npy", "expected numbers"),
    "five axes": (lambda p: np.save(p / "a.npy", np.ones((1, 1, 1, 4, 4))), "a.npy", "expected images"),
    "two arrays": (
        lambda p: np.savez(p / "a.npz", x=np.ones((2, 4, 4)), y=np.ones((2, 4, 4))),
        "a.npz",
        "'images'",
    ),
    "unknown ending": (lambda p: (p / "a.txt").write_text("hello"), "a.txt", "expected .npy"),
    "missing": (lambda p: None, "a.npy", "no such file"),
    "empty folder": (lambda p: (p / "d").mkdir(), "d", "no pictures, volumes or DICOM"),
}


@pytest.mark.parametrize(("make", "name", "message"), BAD_ARRAYS.values(), ids=list(BAD_ARRAYS))
def test_bad_sources_are_refused(tmp_path: Path, make, name: str, message: str):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / name)


def test_nan_in_a_source_is_named(tmp_path: Path):
    images = gray(4, 8)
    images[2, 0, 1, 1] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite values in image 2"):
        simulate(images, "identity", tmp_path / "m.h5", tmp_path / "r.h5", noise_std=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_design_object_is_taken_as_it_is(tmp_path: Path):
    design = FixedBudget((2, 16, 16), "columns", 5, 1.0, [8])
    file, _ = simulated(tmp_path, gray(), "mri", noise_std=0.1, design=design)
    assert json.loads(str(file.attributes["design"])) == design.to_dict()
    assert (file.mask()[:, 0, 0].sum(1) == 6).all()
