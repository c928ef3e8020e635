"""Files that were made to hurt, or were damaged: one line of InputError that names the file, no hang, no memory, nothing written.

Also arrays and pictures that have two readings, or none that is exact.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fuzz_imports import TARGETS, attempt
from PIL import Image
from test_importers import complex_noise, header, multi_coil_kspace, save_cfl, save_fastmri

from ambient_sci.data import MeasurementFile, import_source, open_source
from ambient_sci.data.whiteness import noise_correlation
from ambient_sci.errors import InputError

RNG = np.random.default_rng(0)


def imported(source: Any, folder: Path, **options: Any) -> MeasurementFile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MeasurementFile(
            import_source(source, folder / "out.h5", **{"noise_std": 0.1, "overwrite": True, **options})
        )


def picture(mode: str = "L", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, size, dtype=np.uint8)).convert(mode)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(bytes(1000)) if data is None else zlib.compress(data)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


# -- hostile files


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with (
            warnings.catch_warnings(),
            zipfile.ZipFile(folder / "x.zip", "w", method, compresslevel=1) as archive,
        ):
            warnings.simplefilter("ignore")  # of names that come twice
            for name, data in members:
                archive.writestr(name, data)
        return folder / "x.zip"

    return make


def edited(make: Callable[[Path], Path], change: Callable[[bytearray], Any]) -> Callable[[Path], Path]:
    def remake(folder: Path) -> Path:
        path = make(folder)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(bytes(data))
        return path

    return remake


def encrypt(data: bytearray) -> None:
    """The flag of encryption in the local header and in the directory."""
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1


def unknown_method(data: bytearray) -> None:
    data[8] = 97
    data[data.index(b"PK\x01\x02") + 10] = 97


def bad_checksum(data: bytearray) -> None:
    data[14] ^= 1
    data[data.index(b"PK\x01\x02") + 16] ^= 1


def lying_zip(folder: Path) -> Path:
    """A member that claims 3 GB."""
    path = zipped(("a.png", as_bytes(picture())))(folder)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 24
    data[at : at + 4] = struct.pack("<I", 3 << 30)
    path.write_bytes(bytes(data))
    return path


def written(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.npy")
    return folder / "a.npy"


def device(folder: Path) -> Path:
    (folder / "d").mkdir()
    (folder / "d" / "a.png").symlink_to("/dev/zero")
    return folder / "d"


def password(folder: Path) -> Path:
    (folder / "d").mkdir()
    (folder / "secret").write_text("root:x:0:0")
    (folder / "d" / "a.png").symlink_to(folder / "secret")
    return folder / "d"


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64)


def hdf5(change: Callable[[h5py.File], Any]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with h5py.File(folder / "other.h5", "w") as file:
            file["kspace"] = np.ones((1, 8, 8), np.complex64)
        with h5py.File(folder / "x.h5", "w") as file:
            change(file)
        return folder / "x.h5"

    return make


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((1, 8, 8), np.complex64)
    layout[:] = h5py.VirtualSource("other.h5", "kspace", (1, 8, 8))
    file.create_virtual_dataset("kspace", layout)


def external_storage(file: h5py.File) -> None:
    file.create_dataset("kspace", (1, 8, 8), np.complex64, external=[("secret", 0, h5py.h5f.UNLIMITED)])


def npz(**content: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "x.npz", **content)
        return folder / "x.npz"

    return make


def bart(dimensions: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_cfl(folder / "k.cfl", np.ones((4, 4)))
        (folder / "k.hdr").write_text(f"# Dimensions\n{dimensions}\n")
        return folder / "k.cfl"

    return make


def fastmri_header(old: str, new: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = save_fastmri(folder / "s.h5", multi_coil_kspace(0.01)[:, :1])
        with h5py.File(path, "r+") as file:
            del file["ismrmrd_header"]
            file["ismrmrd_header"] = header((32, 32, 1), (32, 32, 1)).replace(old, new, 1)
        return path

    return make


IMAGES = np.ones((2, 1, 8, 8))
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "encrypted zip": (edited(zipped(("a.png", as_bytes(picture()))), encrypt), "x.zip: encrypted, a.png"),
    "zip of an unknown compression": (edited(zipped(("a.png", as_bytes(picture()))), unknown_method), "x.zip/a.png"),
    "zip with a wrong checksum": (edited(zipped(("a.png", as_bytes(picture()))), bad_checksum), "x.zip/a.png.*CRC"),
    "zip bomb": (zipped(("a.png", bytes(300 << 20))), "x.zip/a.png: claims 300 MB .* bomb"),
    "zip that lies about sizes": (lying_zip, "bomb"),
    "zip cut short": (edited(zipped(("a.png", as_bytes(picture()))), lambda d: d.__delitem__(slice(60, None))), "x.zip: not a readable zip"),
    "zip with one name twice": (zipped(("a.png", as_bytes(picture())), ("a.png", as_bytes(picture()))), "several files of one name"),
    "zip without pictures": (zipped(("a.txt", b"x")), "no pictures"),
    "PNG of 3600 megapixels": (written("a.png", png(60000, 60000)), "bomb|exceeds limit|above the limit"),
    "PNG of 169 megapixels of zeros": (written("a.png", png(13000, 13000, data=bytes(13001 * 13000))), "bomb"),
    "TIFF of 10^9 pixels": (written("a.tif", as_bytes(picture(), "TIFF").replace(struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 1 << 30))), "a.tif"),
    "pipe": (fifo, "a.npy: expected a regular file"),
    "link to a device": (device, "a.png: expected a regular file"),
    "link to another file": (password, "not a readable picture"),
    "npy of 10^12 values": (written("a.npy", npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }")), "a.npy: truncated"),
    "npy of objects": (written("a.npy", npy_header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }")), "pickled objects"),
    "npy with a broken header": (written("a.npy", npy_header("{'descr': '<f8', \xe2 'shape': (1,), }")), "a.npy: not a readable numpy file"),
    "npz mask of text": (npz(images=IMAGES, mask=np.array([["a"] * 8] * 8), noise_std=0.1), "x.npz: mask"),
    "npz mask of objects": (npz(images=IMAGES, mask=np.array([None, 1], dtype=object)), "x.npz"),
    "npz kspace of objects": (npz(kspace=np.array([None, 1], dtype=object)), "x.npz"),
    "npz noise of text": (npz(images=IMAGES, mask=np.ones((2, 8, 8)), noise_std="loud"), "noise_std"),
    "npz of more masks than images": (npz(images=IMAGES, mask=np.ones((3, 8, 8)), noise_std=0.1), "expected 1 mask or 2, one an image, got 3"),
    "npz of fewer masks than images": (npz(images=np.ones((3, 1, 8, 8)), mask=np.ones((2, 8, 8)), noise_std=0.1), "expected 1 mask or 3, one an image, got 2"),
    "npz mask of other pixels": (npz(images=IMAGES, mask=np.ones((2, 8, 9)), noise_std=0.1), "masks of .8, 8. pixels"),
    "npz mask of other values": (npz(images=IMAGES, mask=np.full((2, 8, 8), 0.5), noise_std=0.1), "only 0 and 1"),
    "npz of several pictures": (npz(a=IMAGES, b=IMAGES), "named 'images'"),
    "external link": (hdf5(lambda f: f.__setitem__("kspace", h5py.ExternalLink("other.h5", "/kspace"))), "x.h5: 'kspace' is a ExternalLink"),
    "soft link": (hdf5(lambda f: f.__setitem__("kspace", h5py.SoftLink("/nothing"))), "x.h5: 'kspace' is a SoftLink"),
    "virtual data set": (hdf5(virtual), "virtual, which can read another file"),
    "external storage": (hdf5(external_storage), "stored outside, which can read another file"),
    "HDF5 of 10^10 zeros in nothing": (hdf5(lambda f: f.create_dataset("kspace", (100, 8, 3000, 3000), np.complex64, chunks=(1, 1, 64, 64))), "bomb|limit"),
    "HDF5 with groups for data": (hdf5(lambda f: f.create_group("kspace")), "expected a data set 'kspace'"),
    "empty HDF5": (hdf5(lambda f: None), "an empty file"),
    "empty file": (written("a.png", b""), "empty"),
    "BART of dimensions below 0": (bart("-4 -4 1 1"), "at least 1"),
    "BART of 72 dimensions": (bart("4 4 " + "1 " * 70), "up to 16 dimensions"),
    "BART of 10^10 values": (bart("100000 100000"), "expected 10000000000 values"),
    "header of text": (fastmri_header("<x>32</x>", "<x>abc</x>"), "'abc'"),
    "header of NaN": (fastmri_header("<x>32</x>", "<x>nan</x>"), "'nan'"),
    "header of infinity": (fastmri_header("<x>32</x>", "<x>1e400</x>"), "'1e400'"),
    "header of entities": (fastmri_header('<?xml version="1.0"?>', '<!DOCTYPE x [<!ENTITY a "&a;&a;">]>&a;'), "not XML"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_files_are_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    source = make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as refused:
        imported(source, tmp_path)
    assert "\n" not in str(refused.value) and source.name in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_members_with_paths_stay_where_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    path = zipped(("../../evil.png", as_bytes(picture())), ("/tmp/evil.png", as_bytes(picture())))(folder)
    file = imported(path, folder)
    assert len(file) == 2 and sorted(p.name for p in tmp_path.rglob("*.png")) == []


def test_a_limit_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 1, 64, 64)))
    monkeypatch.setenv("AMBIENT_SCI_MAX_GB", "1e-5")
    with pytest.raises(InputError, match="above the limit of 1e-05 GB"):
        imported(tmp_path / "a.npy", tmp_path)
    monkeypatch.setenv("AMBIENT_SCI_MAX_GB", "many")
    with pytest.raises(InputError, match="expected a number, got 'many'"):
        imported(tmp_path / "a.npy", tmp_path)


def test_random_corruptions_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Eight of each format; ``fuzz_imports.py`` tries as many as one likes."""
    found = [attempt(tmp_path, k, 1) for k in range(8 * len(TARGETS))]
    assert [f for f in found if f[1] not in ("read", "refused")] == []
    assert {name for name, outcome in found if outcome == "refused"} == {t.__name__ for t in TARGETS}


# -- arrays


READ = {
    "(N, 1, H, W)": ((5, 1, 8, 9), (5, 1, 8, 9)),
    "(N, C, H, W)": ((5, 3, 8, 9), (5, 3, 8, 9)),
    "latents": ((5, 4, 8, 9), (5, 4, 8, 9)),
    "seven channels": ((5, 7, 12, 12), (5, 7, 12, 12)),
    "(N, H, W, 3)": ((5, 8, 9, 3), (5, 3, 8, 9)),
    "(N, H, W, 1)": ((5, 8, 9, 1), (5, 1, 8, 9)),
    "(N, H, W, 2)": ((5, 8, 9, 2), (5, 2, 8, 9)),
    "(N, H, W)": ((5, 8, 9), (5, 1, 8, 9)),
    "(H, W)": ((8, 9), (1, 1, 8, 9)),
    "one colour picture": ((8, 9, 3), (1, 3, 8, 9)),
    "tiny images": ((6, 1, 4, 4), (6, 1, 4, 4)),
}


@pytest.mark.parametrize(("shape", "expected"), READ.values(), ids=list(READ))
def test_axes_of_arrays(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    array = RNG.random(shape)
    file = imported(array, tmp_path)
    moved = np.moveaxis(array, -1, 1) if len(shape) == 4 and shape[1:] != expected[1:] else array
    moved = np.moveaxis(array, -1, 0) if len(shape) == 3 and shape[-1] == 3 else moved
    assert np.allclose(file.measurements().numpy(), moved.reshape(expected), atol=1e-6)


AMBIGUOUS = {
    "slices last": (np.zeros((64, 64, 20)), "read as .N, H, W. but perhaps .H, W, N."),
    "strips": (np.zeros((181, 217, 20)), "perhaps .H, W, N."),
    "four channels last": (np.zeros((32, 40, 4)), "perhaps .H, W, N."),
    "volumes": (np.zeros((5, 32, 32, 32)), "images of 32 channels but perhaps volumes"),
    "pictures last": (np.zeros((32, 32, 3, 8)), "ambiguous"),
    "channels on both sides": (np.zeros((5, 3, 8, 3)), "perhaps .N, H, W, C."),
    "RGBA": (np.zeros((5, 8, 9, 4), np.uint8), "looks like RGBA"),
    "complex coils": (np.zeros((5, 3, 8, 9), complex), "are these coils"),
    "five axes": (np.zeros((2, 2, 2, 8, 8)), "expected images"),
    "one axis": (np.zeros(8), "expected images"),
    "empty": (np.zeros((0, 1, 8, 8)), "expected images"),
    "text": (np.array([["a"]]), "expected numbers"),
    "masked": (np.ma.masked_less(np.arange(64.0).reshape(1, 1, 8, 8), 5), "masked array"),
    "sparse": (torch.eye(8).to_sparse(), "dense tensor"),
}


@pytest.mark.parametrize(("array", "message"), AMBIGUOUS.values(), ids=list(AMBIGUOUS))
def test_arrays_with_two_readings_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported(array, tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2, torch.uint8, torch.int64, torch.bool]
)
def test_types_of_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(64).reshape(1, 1, 8, 8) % 4).to(dtype)
    file = imported(tensor, tmp_path)
    assert torch.allclose(file.measurements() * file.scale, tensor.float())


def test_kspace_with_two_readings_is_refused(tmp_path: Path) -> None:
    kspace = complex_noise(3, 32, 32)
    np.savez(tmp_path / "a.npz", kspace=kspace, coil_maps=kspace)
    with pytest.raises(
        InputError, match=r"read as \(slices, H, W\), but coil_maps has these axes as \(coils, H, W\)"
    ):
        imported(tmp_path / "a.npz", tmp_path)
    np.savez(tmp_path / "b.npz", kspace=complex_noise(1, 32, 32, 3))
    with pytest.raises(InputError, match="are the coils last"):
        imported(tmp_path / "b.npz", tmp_path)


def test_levels_of_an_npz_are_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=IMAGES, noise_std=[0.1, 0.3], labels=[1, 2])
    file = imported(tmp_path / "a.npz", tmp_path, noise_std=None)
    assert (
        np.allclose(file.noise_std, [0.1, 0.3])
        and "stated by the file" in file.history
        and "labels" in file.history
    )


# -- pictures


def modes() -> dict[str, tuple[Image.Image, str, np.ndarray]]:
    """Pictures that are read exactly: the picture, its format, and its values (C, H, W)."""
    grey = RNG.integers(0, 256, (8, 9), dtype=np.uint8)
    colour = RNG.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    deep = RNG.integers(0, 65536, (8, 9), dtype=np.uint16)
    palette = Image.fromarray(colour).quantize(16)
    opaque = np.dstack([colour, np.full((8, 9), 255, np.uint8)])
    return {
        "1": (Image.fromarray(grey > 99), "PNG", 255 * (grey > 99)[None]),
        "L": (Image.fromarray(grey), "PNG", grey[None]),
        "RGB": (Image.fromarray(colour), "PNG", colour.transpose(2, 0, 1)),
        "P": (palette, "PNG", np.asarray(palette.convert("RGB")).transpose(2, 0, 1)),
        "opaque RGBA": (Image.fromarray(opaque), "PNG", colour.transpose(2, 0, 1)),
        "opaque LA": (Image.fromarray(grey).convert("LA"), "PNG", grey[None]),
        "I;16": (Image.fromarray(deep), "PNG", deep[None]),
        "I;16 TIFF": (Image.fromarray(deep), "TIFF", deep[None]),
        "I": (Image.fromarray(deep.astype(np.int32) * 7), "TIFF", deep[None] * 7.0),
        "F": (Image.fromarray(grey.astype(np.float32) / 7), "TIFF", grey[None] / np.float32(7)),
        "GIF": (Image.fromarray(grey), "GIF", np.stack([grey] * 3)),
        "BMP": (Image.fromarray(colour), "BMP", colour.transpose(2, 0, 1)),
        "PGM": (Image.fromarray(grey), "PPM", grey[None]),
        "PGM of 16 bits": (Image.fromarray(deep), "PPM", deep[None]),
        "lossless WebP": (Image.fromarray(colour), "WEBP", colour.transpose(2, 0, 1)),
    }  # fmt: skip


@pytest.mark.parametrize("mode", list(modes()))
def test_picture_modes_are_exact(tmp_path: Path, mode: str) -> None:
    image, kind, expected = modes()[mode]
    suffix = {"TIFF": "tif", "PPM": "pgm"}.get(kind, kind.lower())
    path = written(f"a.{suffix}", as_bytes(image, kind, **({"lossless": True} if kind == "WEBP" else {})))(
        tmp_path
    )
    found = open_source(path)
    values = found.images(np.array([0]))[0].numpy() * np.float32(found.scale)
    assert values.shape == expected.shape and np.allclose(values, expected, rtol=1e-6, atol=1e-3)


def transparent(mode: str) -> bytes:
    image = Image.new("RGBA", (8, 8), (1, 2, 3, 100))
    return as_bytes(image.convert(mode))


def palette_with_hole() -> bytes:
    return as_bytes(Image.new("P", (8, 8)), transparency=0)


REFUSED_PICTURES = {
    "RGBA": ("a.png", transparent("RGBA"), "transparent pixels"),
    "LA": ("a.png", transparent("LA"), "transparent pixels"),
    "palette with a hole": ("a.png", palette_with_hole(), "transparent pixels"),
    "CMYK": ("a.jpg", as_bytes(picture("CMYK"), "JPEG"), "mode CMYK"),
    "Lab": ("a.tif", as_bytes(picture("RGB").convert("LAB"), "TIFF"), "mode LAB"),
    "PNG of 16-bit colour": ("a.png", png(4, 4, 16, 2, bytes(4 * 25)), "16-bit colour"),
    "PNG of 16-bit grey with alpha": ("a.png", png(4, 4, 16, 4, bytes(4 * 17)), "16-bit colour"),
    "PGM of other levels": ("a.pgm", b"P5 4 4 100 " + bytes(16), "up to 100"),
    "integers that are not exact": ("a.tif", as_bytes(Image.fromarray(np.full((8, 8), 1 << 30, np.int32)), "TIFF"), "2.24"),
    "animated PNG": ("a.png", as_bytes(picture(), "PNG", save_all=True, append_images=[picture()]), "animated PNG of 2 frames"),
    "truncated": ("a.png", as_bytes(picture(size=(64, 64)))[:900], "a.png: not a readable picture"),
    "no picture": ("a.png", b"hello", "a.png: not a readable picture"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "message"), REFUSED_PICTURES.values(), ids=list(REFUSED_PICTURES))
def test_pictures_that_are_not_exact_are_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        imported(written(name, data)(tmp_path), tmp_path)
    assert name in str(refused.value)


def tiff(folder: Path, pages: np.ndarray, **tags: Any) -> Path:
    frames = [Image.fromarray(p) for p in pages]
    frames[0].save(folder / "a.tif", save_all=True, append_images=frames[1:], **tags)
    return folder / "a.tif"


def test_pages_of_a_tiff_are_images(tmp_path: Path) -> None:
    pages = RNG.integers(0, 60000, (6, 8, 9)).astype(np.uint16)
    file = imported(tiff(tmp_path, pages), tmp_path)
    assert len(file) == 6 and set(file.subjects) == {"a"} and "6 pages" in file.history
    assert np.allclose(file.measurements()[:, 0] * 65535, pages, atol=0.01)


def test_thumbnails_and_stacks_in_tiffs(tmp_path: Path) -> None:
    from PIL.TiffImagePlugin import AppendingTiffWriter, ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[254] = 1
    with AppendingTiffWriter(str(tmp_path / "b.tif"), new=True) as writer:
        picture().save(writer, "TIFF")
        writer.newFrame()
        picture().save(writer, "TIFF", tiffinfo=tags)
    with pytest.warns(UserWarning, match="1 of 2 pages are thumbnails or masks"):
        assert len(open_source(tmp_path / "b.tif")) == 1
    described = ImageFileDirectory_v2()
    described[270] = "ImageJ=1.53\nimages=40\nslices=40\n"
    picture().save(tmp_path / "c.tif", "TIFF", tiffinfo=described)
    with pytest.raises(InputError, match="an ImageJ stack of 40 images in 1 pages"):
        imported(tmp_path / "c.tif", tmp_path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif, pixels = Image.Exif(), np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found = open_source(tmp_path / "a.png")
    assert np.allclose(found.images(np.array([0]))[0, 0] * 255, np.rot90(pixels, -1))


def test_other_files_among_pictures_are_said_to_be_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(as_bytes(picture()))
    (folder / "._a.png").write_bytes(b"Mac OS X")
    (folder / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="1 files are no pictures and are left out: notes.txt"):
        file = MeasurementFile(import_source(folder, tmp_path / "m.h5", noise_std=0.1))
    assert file.subjects == ["a", "b"] and "notes.txt" in file.history


# -- noise that is not white


def smooth_images(num: int = 24, size: int = 64) -> np.ndarray:
    v, u = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size), indexing="ij")
    return np.stack([np.exp(-3 * (u - 0.01 * k) ** 2 - 2 * v**2) for k in range(num)])


def zero_filled(images: np.ndarray, factor: float) -> np.ndarray:
    pad = int(images.shape[-1] * (factor - 1) / 2)
    k = np.pad(np.fft.fftshift(np.fft.fft2(images), axes=(-1, -2)), ((0, 0), (pad, pad), (pad, pad)))
    return np.fft.ifft2(np.fft.ifftshift(k, axes=(-1, -2))).real * factor**2


def jpeg(images: np.ndarray) -> np.ndarray:
    levels = np.uint8(np.clip(images * 127, 0, 255))
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(as_bytes(Image.fromarray(p), "JPEG", quality=60)))) for p in levels]
    )


def blurred(images: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(images, (0, 0.7, 0.7))


NOISE = {
    "white": (lambda x: x, True),
    "8 bits": (lambda x: np.round(x * 127), True),
    "zero-filled by 2": (lambda x: zero_filled(x, 2), False),
}
NOISE |= {
    "zero-filled by 1.25": (lambda x: zero_filled(x, 1.25), False),
    "smoothed": (blurred, False),
    "JPEG": (jpeg, False),
}


@pytest.mark.parametrize(("change", "white"), NOISE.values(), ids=list(NOISE))
@pytest.mark.parametrize("rician", [False, True])
def test_noise_that_is_not_white_is_warned_of(
    tmp_path: Path, change: Callable, white: bool, rician: bool
) -> None:
    g = np.random.default_rng(5)
    images = smooth_images() + 0.05 * g.standard_normal((24, 64, 64))
    images = np.abs(images + 0.05j * g.standard_normal(images.shape)) if rician else images
    array = change(images)[:, None].astype(np.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        file = MeasurementFile(import_source(array, tmp_path / "m.h5"))
    warned = any("the noise is not white" in str(w.message) for w in said)
    assert warned is not white and ("not white" in file.history) is warned
    assert ("noise_correlation" in file.attributes) is warned


def test_jpeg_files_are_warned_of_whatever_they_look_like(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(as_bytes(picture(size=(64, 64)), "JPEG", quality=95))
    with pytest.warns(UserWarning, match="not white .compressed with loss"):
        import_source(tmp_path / "a.jpg", tmp_path / "m.h5")


def test_correlation_of_a_moving_average() -> None:
    """x_k + x_(k+1) has lag-1 correlation 1/2 along its axis, less what planes and the choice of the flattest tiles take; white noise 0."""
    noise = torch.randn(8, 1, 65, 65, generator=torch.Generator().manual_seed(0))
    found = noise_correlation(noise[..., 1:] + noise[..., :-1])
    assert found is not None and 0.3 < found < 0.5 and noise_correlation(noise) == 0.0
    assert (
        noise_correlation(torch.ones(4, 1, 64, 64)) is None and noise_correlation(noise[..., :5, :5]) is None
    )
