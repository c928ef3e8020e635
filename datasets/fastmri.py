"""Training and test scans from the fastMRI files that you downloaded: selected, cropped, compressed,
calibrated, split by person.

    python datasets/fastmri.py DOWNLOAD --out data/fastmri
    # T2 brains, 384 x 320, 4 virtual coils
    python datasets/fastmri.py DOWNLOAD --out data/knees --contrasts CORPD_FBK --size 320 320 # knees, multi-
    or single-coil

fastMRI (Zbontar et al., 2018) is to be had from https://fastmri.med.nyu.edu under its own data use agreement;
nothing is downloaded here. DOWNLOAD is a folder, searched with everything below it, or single .h5 files. Each
volume is

1. selected: its ``acquisition`` is one of --contrasts, it is fully sampled, and its field of view and coils
   reach --size and --coils, no column is zero padding; slices at both ends are left out (--drop-first,
   --drop-last: towards the ends of a head there is little of it);
2. cropped to --size about the centre in the image domain, readout first. The transform is orthonormal, so
   noise stays white. With --keep-padded, columns beyond those that were acquired stay unmeasured;
3. whitened with the corners of k-space, its coils compressed to --coils, scaled, its coil maps estimated with
   ESPIRiT, as `ambient-sci import` does.

Out come train.h5 and test.h5 (measurements, still fully sampled: masks are drawn later, by recipes/mri or
`MeasurementFile`'s users), and train_reference.h5 and test_reference.h5 (coil-combined images of the same
scans, with their noise). Volumes below a folder whose name ends in ``_train`` or ``_val`` are split as
published; others by --test-fraction, drawn with --seed. No person is in both.

384 x 320, four virtual coils and ESPIRiT maps are the protocol of Aali et al. (Ambient Diffusion Posterior
Sampling, 2024) for brains. The contrast and the number of slices left out are choices of ours.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
from tyro.conf import Positional

from ambient_sci.data.importers import ImportOptions, write_scans
from ambient_sci.data.raw import RawScan, centred_fft, crop_centre
from ambient_sci.data.readers.fastmri import read_fastmri
from ambient_sci.errors import InputError
from ambient_sci.progress import track
from ambient_sci.whole_files import check_output


@dataclass(frozen=True)
class Selection:
    """Which volumes and slices, and what is made of them."""

    contrasts: tuple[str, ...] = ("AXT2",)
    size: tuple[int, int] = (384, 320)
    coils: int = 4
    drop_first: int = 0
    drop_last: int = 2
    keep_padded: bool = False


@dataclass(frozen=True)
class Volume:
    """One file that was selected."""

    path: Path
    person: str
    part: str | None  # "train" or "test" as published, None where the folder does not say


def find_files(sources: tuple[Path, ...]) -> list[Path]:
    """The .h5 files in folders (and below), and those named; InputError when there are none."""
    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
        found += sorted(source.rglob("*.h5")) if source.is_dir() else [source]
    if not found:
        raise InputError(f"{', '.join(map(str, sources))}: no fastMRI files (.h5) in it")
    return found


def select(path: Path, wanted: Selection) -> Volume | str:
    """The volume in a file, or why it is left out; InputError for a file that is damaged or not fastMRI's."""
    try:
        with h5py.File(path, "r") as file:
            kspace = file.get("kspace")
            if not isinstance(kspace, h5py.Dataset):
                raise InputError(
                    f"{path}: expected a fastMRI file with 'kspace', got "
                    f"{sorted(file)[:6] or 'an empty file'}"
                )
            shape, masked = kspace.shape, "mask" in file
            padded = len(shape) in (3, 4) and not kspace[shape[0] // 2].reshape(-1, shape[-1]).any(0).all()
            about = {k: _text(file.attrs.get(k, "")) for k in ("acquisition", "patient_id")}
    except OSError as error:
        raise InputError(f"{path}: not an HDF5 file, or truncated ({' '.join(str(error).split())})") from None
    if about["acquisition"] not in wanted.contrasts:
        return f"of contrast {about['acquisition'] or 'unknown'}"
    if len(shape) not in (3, 4):
        raise InputError(f"{path}: expected kspace (slices, [coils,] H, W), got {shape}")
    if masked:
        return "undersampled"
    if shape[-2] < wanted.size[0] or shape[-1] < wanted.size[1]:
        return f"smaller than {wanted.size[0]} x {wanted.size[1]}"
    if len(shape) == 4 and shape[1] < wanted.coils:
        return f"of fewer than {wanted.coils} coils"
    if padded and not wanted.keep_padded:
        return "zero-padded: with columns that were never acquired (--keep-padded takes them)"
    if shape[0] <= wanted.drop_first + wanted.drop_last:
        return f"of {wanted.drop_first + wanted.drop_last} slices or fewer"
    return Volume(path, about["patient_id"] or path.stem, _published_part(path))


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _published_part(path: Path) -> str | None:
    for folder in path.parents:
        if folder.name.endswith("_train"):
            return "train"
        if folder.name.endswith("_val"):
            return "test"
    return None


def split(volumes: list[Volume], test_fraction: float, seed: int) -> dict[str, list[Volume]]:
    """Volumes for training and testing, no person in both: as published, and the rest at random.

    Raises:
        InputError: no volume is left for one of the two, or a person is in both published parts.
    """
    known = {(v.person, v.part) for v in volumes if v.part is not None}
    both = sorted(p for p, part in known if part == "train" and (p, "test") in known)
    if both:
        raise InputError(f"the same person in the training and validation folders: {', '.join(both[:3])}")
    parts: dict[str, str] = {person: part for person, part in known if part is not None}
    others = sorted({v.person for v in volumes} - set(parts))
    held = round(test_fraction * len(others))
    if others and not parts:
        held = min(max(held, 1), len(others) - 1)
    drawn = set(np.random.default_rng(seed).permutation(len(others))[:held].tolist())
    parts |= {person: "test" if k in drawn else "train" for k, person in enumerate(others)}
    found = {part: [v for v in volumes if parts[v.person] == part] for part in ("train", "test")}
    for part, chosen in found.items():
        if not chosen:
            people = len({v.person for v in volumes})
            raise InputError(
                f"expected volumes for training and for testing, got none for {part}ing ({people} people)"
            )
    return found


def crop(scan: RawScan, wanted: Selection) -> RawScan:
    """The chosen slices, cropped to the wanted size in the image domain; columns that were not acquired stay
    out.

    Raises: InputError when lines are missing between those that were acquired.
    """
    last = len(scan.kspace) - wanted.drop_last
    kspace = scan.kspace[wanted.drop_first : last].astype(np.complex64)
    height, width = wanted.size
    before = kspace.shape[-1]
    columns = np.flatnonzero(kspace.any(axis=(0, 1, 2)))
    if len(columns) == 0 or len(columns) != columns[-1] - columns[0] + 1:
        raise InputError(f"{scan.origin}: expected a fully sampled scan, got one with missing lines")
    for axis, size in ((-2, height), (-1, width)):
        if kspace.shape[axis] != size:
            image = crop_centre(centred_fft(kspace, axis=axis, inverse=True), axis=axis, size=size)
            kspace = centred_fft(image, axis=axis)
    # Line k of the cropped field of view is at spatial frequency k before / width of the old one.
    frequency = (np.arange(width) - width // 2) * (before / width)
    acquired = (frequency >= columns[0] - before // 2) & (frequency <= columns[-1] - before // 2)
    scan.kspace = kspace * acquired
    scan.mask = np.broadcast_to(acquired, (1, height, width))
    scan.notes.append(
        f"slices {wanted.drop_first} to {last - 1}, cropped to {height} x {width} of {int(acquired.sum())} "
        "acquired columns"
    )
    num = len(kspace)
    scan.parts = [replace(part, numbers=np.arange(num), count=num) for part in scan.parts[:1]]
    scan.readout_size = None  # the oversampled field of view went with the crop
    return scan


def scans(volumes: list[Volume], wanted: Selection, part: str) -> Iterator[tuple[Path, RawScan]]:
    """The cropped scans of the volumes, one at a time."""
    for volume in track(volumes, f"{part}: {len(volumes)} volumes"):
        scan = crop(read_fastmri(volume.path), wanted)
        scan.subject = volume.person
        yield volume.path, scan


def main(
    source: Annotated[tuple[Path, ...], Positional],
    /,
    out: Path,
    contrasts: tuple[str, ...] = Selection.contrasts,
    size: tuple[int, int] = Selection.size,
    coils: int = Selection.coils,
    drop_first: int = Selection.drop_first,
    drop_last: int = Selection.drop_last,
    keep_padded: bool = False,
    volumes: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write train.h5, test.h5 and their references into a folder.

    Args:
        source: folders with fastMRI files, or the files.
        out: folder to write to.
        contrasts: values of the files' ``acquisition``, e.g. AXT2, AXT1POST, AXFLAIR; CORPD_FBK, CORPDFS_FBK.
        size: readout and phase-encoding samples to crop to.
        coils: virtual coils of multi-coil scans.
        drop_first: slices left out at the beginning of a volume.
        drop_last: slices left out at its end.
        keep_padded: also take volumes with columns that were never acquired. They stay unmeasured: good for
            reconstruction, but nothing could supervise them in training, and recipes/mri refuses them.
        volumes: take at most so many volumes for training, and for testing.
        test_fraction: of the people, where the folders do not say who is who.
        seed: of that draw.
        overwrite: replace files that exist.
    """
    wanted = Selection(contrasts, size, coils, drop_first, drop_last, keep_padded)
    if min(size) < 1 or coils < 1 or min(drop_first, drop_last) < 0 or not 0 < test_fraction < 1:
        raise InputError("expected size and coils >= 1, dropped slices >= 0, a test fraction between 0 and 1")
    files = {part: (out / f"{part}.h5", out / f"{part}_reference.h5") for part in ("train", "test")}
    for pair in files.values():
        for path in pair:
            check_output(path, overwrite)
    found = [select(path, wanted) for path in track(find_files(source), "looking at files")]
    left_out = Counter(f for f in found if isinstance(f, str))
    chosen = [f for f in found if isinstance(f, Volume)]
    reasons = "; ".join(f"{count} {why}" for why, count in left_out.most_common())
    if not chosen:
        raise InputError(
            f"no fully sampled volume of {', '.join(contrasts)} among {len(found)} files: {reasons}"
        )
    parts = split(chosen, test_fraction, seed)
    for part, (path, reference) in files.items():
        some = parts[part][:volumes]
        options = ImportOptions(compress=coils, keep_padding=True)
        write_scans(scans(some, wanted, part), path, options, overwrite, reference)
        print(f"{path}: {len(some)} volumes of {len({v.person for v in some})} people; reference {reference}")
    if left_out:
        print(f"left out: {reasons}")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")
