"""Pictures (PNG, JPEG, TIFF, GIF, WebP, BMP, PGM and the like), one at a time, folders and zips of them.

Every mode is read exactly or refused: grey, bilevel, RGB and palettes of 8 bits, grey of 16 bits, 32-bit
integers and floats. Alpha is taken off when it is opaque everywhere. What Pillow would reduce to 8 bits (RGB
of 16 bits) is refused, as are CMYK, Lab and the like. Images of a TIFF (``tiff.py``) and frames of an
animation are images of their own. EXIF orientation is applied. Colour profiles and gamma are not.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from ambient_sci.data.readers.guard import check_claim, check_regular, listed, one_line, reading, say
from ambient_sci.data.readers.tiff import Tiff
from ambient_sci.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".pnm", ".bmp", ".tif", ".tiff", ".gif", ".webp")
#: Formats that may hold several images, looked into before anything is read.
_PAGED = (".gif", ".webp")
_TIFF = (".tif", ".tiff")
_LARGEST = {
    "1": 255.0,
    "L": 255.0,
    "P": 255.0,
    "RGB": 255.0,
    "I;16": 65535.0,
    "I;16B": 65535.0,
    "I;16L": 65535.0,
}
_ALPHA = {"LA": "L", "La": "L", "RGBA": "RGB", "RGBa": "RGB", "PA": "RGB"}
# TIFF tags
_BITS, _PHOTOMETRIC = 258, 262


@dataclass(frozen=True)
class Picture:
    """One image (C, H, W), the largest value of its type (1: values are left as they are), and whether it was
    compressed with loss."""

    values: np.ndarray
    largest: float
    lossy: bool
    #: what a reader should know
    note: str = ""


@dataclass(frozen=True)
class _Entry:
    name: str
    load: Callable[[], bytes]
    #: the file itself, unless it lies in a zip
    path: Path | None = None
    page: int = 0
    #: images in the file
    pages: int = 1
    #: of a TIFF, whose shapes are known before it is read
    shape: tuple[int, int, int] | None = None
    #: channel, where channels are images of their own
    group: int = 0


@dataclass
class PictureSet:
    """Pictures below a folder, in a zip, or a single one, in the order of their names."""

    path: Path
    entries: list[_Entry]
    notes: list[str] = field(default_factory=list)
    channel: int | str | None = None
    #: what is known of each TIFF: axes, type, resolution
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    _open: tuple[str, Tiff] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def names(self) -> list[str]:
        """The name of each image's file, relative to the folder or zip."""
        return [e.name for e in self.entries]

    @property
    def labels(self) -> list[str]:
        """Names, with the page where a file has several."""
        return [f"{e.name} page {e.page}" if e.pages > 1 else e.name for e in self.entries]

    def shape(self, number: int) -> tuple[int, int, int]:
        """(C, H, W) of one picture."""
        known = self.entries[number].shape
        return known if known is not None else self.read(number).values.shape  # type: ignore[return-value]

    def read(self, number: int) -> Picture:
        """One picture. InputError when it is damaged or not exact."""
        entry = self.entries[number]
        if entry.name.lower().endswith(_TIFF):
            return self._read_tiff(entry)
        found = decode(entry.load(), self._label(entry), entry.page)
        if found.note and found.note not in self.notes:
            say(self.notes, self._label(entry), found.note)
        return found

    def _label(self, entry: _Entry) -> str:
        return str(self.path) if self.path.name == entry.name else f"{self.path}/{entry.name}"

    def _read_tiff(self, entry: _Entry) -> Picture:
        tiff = self.tiff(entry)
        plane = tiff.planes[entry.page]
        return Picture(tiff.read(entry.page), plane.largest, plane.lossy)

    def tiff(self, entry: _Entry) -> Tiff:
        """The open TIFF of an entry; one is open at a time."""
        if self._open is None or self._open[0] != entry.name:
            if self._open is not None:
                self._open[1].close()
            label = self._label(entry)
            data = entry.path if entry.path is not None else entry.load()

            def pillow(page: int) -> np.ndarray:
                return decode(entry.load(), label, page).values

            if isinstance(data, Path):
                check_regular(data)
            self._open = (entry.name, Tiff(data, label, self.channel, pillow))
        return self._open[1]


# -- one picture


def decode(data: bytes, name: str, page: int = 0) -> Picture:
    """One page of a picture file.

    Raises: InputError for damaged pictures, modes that are not exact, and sizes that look like a bomb.
    """
    from PIL import ImageOps

    with reading(name, "picture"), _opened(data, name) as picture:
        if page:
            picture.seek(page)
        _check_exact(picture, data, name, page)
        lossy = picture.format in ("JPEG", "MPO") or (picture.format == "WEBP" and b"VP8 " in data[:64])
        whole_png = picture.format in ("PNG", "PPM")
        note = (
            "the first picture of an MPO file; further ones (previews, depth, stereo) are left out"
            if picture.format == "MPO"
            else ""
        )
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        array, largest = _values(upright, whole_png, name)
    array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return Picture(array, largest, lossy, note)


def _opened(data: bytes, name: str) -> Any:
    import warnings

    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture = Image.open(io.BytesIO(data))
    width, height = picture.size
    check_claim(name, (width, height, len(picture.getbands())), 4, len(data), "pixels")
    return picture


def _check_exact(picture: Any, data: bytes, name: str, page: int) -> None:
    """InputError for what Pillow reads, but not exactly."""
    if picture.format == "PNG" and data[24:25] == b"\x10" and data[25:26] != b"\x00":
        raise InputError(f"{name}: a PNG of 16-bit colour, which would be cut to 8 bits; save it as .npy")
    if picture.format == "PNG" and getattr(picture, "n_frames", 1) > 1:
        raise InputError(
            f"{name}: an animated PNG of {picture.n_frames} frames; save the frames as files of their own"
        )
    if picture.format == "PPM" and picture.mode == "L" and (largest := _pgm_largest(data)) not in (None, 255):
        raise InputError(
            f"{name}: grey values up to {largest} would be rescaled to 255; save it as .npy or .png"
        )
    if picture.format != "TIFF":
        return
    tags = picture.tag_v2
    bits = tuple(np.atleast_1d(tags.get(_BITS, 1)).tolist())
    if len(bits) > 1 and max(bits) > 8:
        raise InputError(
            f"{name}: page {page} is {max(bits)}-bit colour in a compression that needs the package "
            "imagecodecs; "
            "install it, or save the picture uncompressed"
        )
    if max(bits) > 8 and tags.get(_PHOTOMETRIC) == 0:
        raise InputError(
            f"{name}: page {page} is a TIFF whose zero is white, of more than 8 bits; save it as .npy"
        )


def _pgm_largest(data: bytes) -> int | None:
    """The largest grey value a PGM or PPM header states, None for bitmaps."""
    lines = [line.split(b"#")[0] for line in data[:512].split(b"\n")]
    words = b" ".join(lines).split()
    return int(words[3]) if words[0] in (b"P2", b"P3", b"P5", b"P6") and len(words) > 3 else None


def _values(picture: Any, whole_png: bool, name: str) -> tuple[np.ndarray, float]:
    mode = picture.mode
    if mode in _ALPHA or (mode in ("P", "L", "RGB", "1") and "transparency" in picture.info):
        rgba = picture.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            raise InputError(
                f"{name}: has transparent pixels ({mode}), which have no one colour; flatten it first"
            )
        mode = _ALPHA.get(mode, "L" if mode == "1" else "RGB" if mode == "P" else mode)
        picture = picture.convert("RGB").convert(mode)
    if mode == "P":
        picture = picture.convert("RGB")
    elif mode == "1":
        picture = picture.convert("L")
    elif mode in ("I", "F"):
        array = np.asarray(picture)
        if mode == "I" and np.abs(array.astype(np.int64)).max() > 1 << 24:
            raise InputError(f"{name}: integers above 2^24 are not exact in float32; rescale them first")
        return array, 65535.0 if mode == "I" and whole_png else 1.0
    elif mode not in _LARGEST:
        raise InputError(f"{name}: pictures of mode {mode} are not read; convert it to grey or RGB first")
    return np.asarray(picture), _LARGEST[mode]


# -- many pictures


def open_pictures(path: Path, channel: int | str | None = None, expected: Collection[str] = ()) -> PictureSet:
    """The pictures in a folder, a zip or a single file; ``channel``: see ``Tiff``.

    Args:
        path: which.
        expected: names or patterns ("*.txt", without folders) of other files that need no mention.

    Raises: InputError when there are none, or the zip is damaged, encrypted or a bomb.
    """
    notes: list[str] = []
    check = path.suffix.lower() == ".zip" and not path.is_dir()
    entries, others = _members(path) if check else _files(path)
    if not entries:
        raise InputError(f"{path}: no pictures ({', '.join(PICTURES)}) in it")
    others = [n for n in others if not any(fnmatch(Path(n).name, pattern) for pattern in expected)]
    if others:
        say(notes, path, f"{len(others)} files are no pictures and are left out: {listed(sorted(others))}")
    entries.sort(key=lambda e: e.name)
    found = PictureSet(path, [], notes, channel)
    if channel is not None and not any(e.name.lower().endswith(_TIFF) for e in entries):
        raise InputError(
            f"{path}: channel: only a TIFF has several (axis C), got {listed([e.name for e in entries])}"
        )
    for entry in entries:
        found.entries += (
            _planes(found, entry) if entry.name.lower().endswith(_TIFF) else _pages(entry, path, notes)
        )
    return found


def hidden(name: str) -> bool:
    """Files that systems leave behind: dot files (macOS ``._x``), __MACOSX, Thumbs.db."""
    parts = Path(name).parts
    return any((p.startswith(".") and p != "..") or p == "__MACOSX" for p in parts) or parts[-1].lower() in (
        "thumbs.db",
        "desktop.ini",
    )


def _files(path: Path) -> tuple[list[_Entry], list[str]]:
    root = path if path.is_dir() else path.parent
    found = [p for p in path.rglob("*") if not p.is_dir()] if path.is_dir() else [path]

    def loader(file: Path) -> Callable[[], bytes]:
        def load() -> bytes:
            stored = check_regular(file)
            check_claim(file, (stored,), 1, stored)
            with reading(file, "picture"):
                return file.read_bytes()

        return load

    names = [(str(p.relative_to(root)), p) for p in found]
    names = [(n, p) for n, p in names if not hidden(n) or p == path]
    entries = [_Entry(n, loader(p), p) for n, p in names if n.lower().endswith(PICTURES)]
    return entries, [n for n, _ in names if not n.lower().endswith(PICTURES)]


def _members(path: Path) -> tuple[list[_Entry], list[str]]:
    check_regular(path)
    with reading(path, "zip file"):
        archive = zipfile.ZipFile(path)
        members = [m for m in archive.infolist() if not m.is_dir() and not hidden(m.filename)]
    encrypted = [m.filename for m in members if m.flag_bits & 1]
    if encrypted:
        raise InputError(f"{path}: encrypted, {listed(encrypted)}; unpack it first")

    def loader(member: zipfile.ZipInfo) -> Callable[[], bytes]:
        def load() -> bytes:
            label = f"{path}/{member.filename}"
            check_claim(label, (member.file_size,), 1, member.compress_size)
            with reading(one_line(label), "picture in the zip"):
                return archive.read(member)

        return load

    pictures = [m for m in members if m.filename.lower().endswith(PICTURES)]
    names = [m.filename for m in pictures]
    if len(set(names)) < len(names):
        raise InputError(
            f"{path}: holds several files of one name, {listed([n for n in names if names.count(n) > 1])}"
        )
    others = [m.filename for m in members if not m.filename.lower().endswith(PICTURES)]
    return [_Entry(m.filename, loader(m)) for m in pictures], others


def _planes(pictures: PictureSet, entry: _Entry) -> list[_Entry]:
    """The images of a TIFF."""
    tiff = pictures.tiff(entry)
    for note in tiff.notes:
        if "left out" in note:
            say(pictures.notes, pictures.path, f"{entry.name}: {note}")
        else:
            pictures.notes.append(f"{entry.name}: {note}")
    pictures.about[entry.name] = tiff.about
    count = len(tiff.planes)
    planes = enumerate(tiff.planes)
    return [replace(entry, page=k, pages=count, shape=p.shape, group=p.channel) for k, p in planes]


def _pages(entry: _Entry, path: Path, notes: list[str]) -> list[_Entry]:
    """The frames of a picture that may have several."""
    if not entry.name.lower().endswith(_PAGED):
        return [entry]
    name, data = entry.name, entry.load()
    with reading(f"{path}/{name}" if path.name != name else path, "picture"), _opened(data, name) as picture:
        count = int(getattr(picture, "n_frames", 1))
        if count > 1 << 16:
            raise InputError(f"{path}: {count} pages in {name}")
    if count > 1:
        notes.append(f"{name}: {count} pages as images of their own")
    return [replace(entry, page=k, pages=count) for k in range(count)]
