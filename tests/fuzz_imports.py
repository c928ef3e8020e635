"""Random corruptions of foreign files: every import succeeds or ends in one line of InputError, and leaves nothing half.

python tests/fuzz_imports.py [NUMBER] [SEED]          500 corruptions by default, with a table and the peak memory
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from test_importers import (
    COILS,
    complex_noise,
    header,
    line_mask,
    multi_coil_kspace,
    save_cfl,
    save_dicom,
    save_fastmri,
)

from ambient_sci.data import MeasurementFile, import_source
from ambient_sci.errors import InputError

SIZE = 12


def pictures(folder: Path) -> Path:
    from PIL import Image

    g = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "p.zip", "w") as archive:
        for k, kind in enumerate(("PNG", "PNG", "TIFF")):
            stream = io.BytesIO()
            Image.fromarray(g.integers(0, 255, (SIZE, SIZE), dtype=np.uint8)).save(stream, kind)
            archive.writestr(f"{k}.{kind.lower()}", stream.getvalue())
    return folder / "p.zip"


def tiff(folder: Path) -> Path:
    from PIL import Image

    pages = [
        Image.fromarray(p)
        for p in np.random.default_rng(0).integers(0, 6000, (3, SIZE, SIZE)).astype(np.uint16)
    ]
    pages[0].save(folder / "p.tif", save_all=True, append_images=pages[1:])
    return folder / "p.tif"


def jpeg(folder: Path) -> Path:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(
        folder / "p.jpg"
    )
    return folder / "p.jpg"


def npy(folder: Path) -> Path:
    np.save(folder / "a.npy", np.random.default_rng(0).random((4, 1, SIZE, SIZE)))
    return folder / "a.npy"


def npz(folder: Path) -> Path:
    mask = np.random.default_rng(0).random((3, SIZE, SIZE)) > 0.5
    np.savez(
        folder / "a.npz",
        images=np.random.default_rng(1).random((3, SIZE, SIZE)) * mask,
        mask=mask,
        noise_std=0.1,
    )
    return folder / "a.npz"


def npz_scan(folder: Path) -> Path:
    kspace = multi_coil_kspace(0.01)[:1]
    np.savez(
        folder / "k.npz",
        kspace=kspace,
        noise=complex_noise(COILS, 100),
        coil_maps=complex_noise(1, *kspace.shape[1:]),
    )
    return folder / "k.npz"


def nifti(folder: Path) -> Path:
    nibabel.save(
        nibabel.Nifti1Image(
            np.random.default_rng(0).random((SIZE, SIZE, 3, 2)).astype(np.float32), np.eye(4)
        ),
        folder / "v.nii",
    )
    return folder / "v.nii"


def nifti_gz(folder: Path) -> Path:
    nibabel.save(nibabel.load(nifti(folder)), folder / "v.nii.gz")
    return folder / "v.nii.gz"


def mgz(folder: Path) -> Path:
    nibabel.save(
        nibabel.MGHImage(np.random.default_rng(0).random((SIZE, SIZE, 3)).astype(np.float32), np.eye(4)),
        folder / "v.mgh",
    )
    return folder / "v.mgh"


def minc(folder: Path) -> Path:
    data = Path(nibabel.__file__).parent / "tests" / "data"
    shutil.copy(data / "minc2_1_scale.mnc", folder / "v.mnc")
    return folder / "v.mnc"


def dicom(folder: Path) -> Path:
    (folder / "d").mkdir()
    for k in range(3):
        save_dicom(
            folder / "d" / f"{k}.dcm", np.random.default_rng(k).integers(1, 999, (SIZE, SIZE)), 4.0 * k
        )
    return folder / "d" / "1.dcm"


def fastmri(folder: Path) -> Path:
    return save_fastmri(folder / "s.h5", multi_coil_kspace(0.01)[:1, :1], line_mask())


def ismrmrd(folder: Path) -> Path:
    """A small file of the layout of the ismrmrd package, with its types."""
    from test_ismrmrd_fields import plain, save

    return save(folder / "s.h5", plain(1))


def bart(folder: Path) -> Path:
    save_cfl(folder / "k.cfl", multi_coil_kspace()[0, :1].transpose(1, 2, 0)[:, :, None])
    return folder / "k.hdr"


def xml(folder: Path) -> Path:
    """A damaged ISMRMRD header in a sound file: letters of it are changed."""
    path = save_fastmri(folder / "s.h5", multi_coil_kspace(0.01)[:1, :1])
    (folder / "header.xml").write_text(header((32, 32, 1), (32, 32, 1)))
    return path


TARGETS = (
    pictures,
    tiff,
    jpeg,
    npy,
    npz,
    npz_scan,
    nifti,
    nifti_gz,
    mgz,
    minc,
    dicom,
    fastmri,
    ismrmrd,
    bart,
    xml,
)


def corrupt(data: bytes, g: np.random.Generator) -> bytes:
    """One of: bytes changed, zeroed, set to ff, cut off, deleted, doubled. Half of them near the beginning, where headers are."""
    raw = bytearray(data)
    reach = min(len(raw), 600) if g.random() < 0.5 else len(raw)
    start = int(g.integers(reach))
    length = int(g.choice([1, 1, 2, 4, 16, 64]))
    kind = int(g.integers(6))
    if kind == 0:
        for _ in range(int(g.integers(1, 6))):
            raw[int(g.integers(reach))] = int(g.integers(256))
    elif kind == 1:
        raw[start : start + length] = bytes(length)
    elif kind == 2:
        raw[start : start + 4] = b"\xff\xff\xff\x7f"
    elif kind == 3:
        del raw[start:]
    elif kind == 4:
        del raw[start : start + length]
    else:
        raw[start:start] = raw[start : start + length]
    return bytes(raw)


def attempt(folder: Path, number: int, seed: int) -> tuple[str, str]:
    """One corruption: the format, and "read", "refused" or a traceback."""
    target, g = TARGETS[number % len(TARGETS)], np.random.default_rng((seed, number))
    place = folder / str(number)
    place.mkdir()
    path = target(place)
    if target is xml:
        import h5py

        text = corrupt((place / "header.xml").read_bytes(), g)
        (place / "header.xml").unlink()
        with h5py.File(path, "r+") as file:
            del file["ismrmrd_header"]
            file["ismrmrd_header"] = np.void(text or b"x")
    else:
        path.write_bytes(corrupt(path.read_bytes(), g))
    source = path.parent if target is dicom else path
    before = {p.name for p in place.iterdir()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            MeasurementFile(import_source(source, place / "out.h5", noise_std=0.01)).close()
        (place / "out.h5").unlink()
        outcome = "read"
    except InputError as error:
        outcome = "refused" if "\n" not in str(error) else f"several lines: {error}"
    except BaseException:
        outcome = traceback.format_exc()
    left = {p.name for p in place.iterdir()} - before
    shutil.rmtree(place)
    return target.__name__, f"left {sorted(left)}" if left else outcome


def main(number: int = 500, seed: int = 0) -> int:
    import resource

    counts: Counter[tuple[str, str]] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for k in range(number):
            start = time.monotonic()
            name, outcome = attempt(Path(folder), k, seed)
            slowest = max(slowest, time.monotonic() - start)
            if outcome not in ("read", "refused"):
                print(f"--- {k} {name}\n{outcome}")
                outcome = "other"
            counts[name, outcome] += 1
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:10} {outcome:8} {count}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{number} corruptions, peak memory {peak} MB, slowest {slowest:.1f} s")
    return sum(count for (_, outcome), count in counts.items() if outcome == "other")


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
