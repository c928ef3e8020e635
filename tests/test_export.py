"""Reconstructions go back to where their scans came from: same affine, same places, original intensities, as
nibabel reads them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from closed_forms import seeded
from test_importers import save_dicom

from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile, import_source, simulate
from ambient_sci.data.exporters import select_geometry
from ambient_sci.errors import InputError
from ambient_sci.priors import GaussianMixturePrior
from ambient_sci.sampling import Reconstruction, ResultFile, reconstruct, reconstruct_to_file
from ambient_sci.sampling.export import export_nifti

SHAPE = (8, 10, 5)


def head(seed: int = 0) -> np.ndarray:
    """A volume of grey levels up to about 900, its first slice empty."""
    volume = np.random.default_rng(seed).uniform(100, 900, SHAPE).astype(np.float32)
    volume[:, :, 0] = 0
    return volume


def oblique() -> np.ndarray:
    """Voxels of 2 x 1.5 x 4 mm, turned about the first axis, anywhere but at the origin."""
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) * [2.0, 1.5, 4.0]
    affine[:3, 3] = [-31.0, 12.5, 7.0]
    return affine


def flat_prior(size: tuple[int, ...]) -> GaussianMixturePrior:
    """So wide that a measurement with little noise decides everything."""
    return GaussianMixturePrior(torch.zeros(1, *size), 2.0)


def reconstructed(folder: Path, scans: Path, **settings) -> Path:
    """A result file of three samples."""
    with MeasurementFile(scans) as file:
        prior = flat_prior(file.image_shape)
        out = folder / "R.h5"
        options = {"samples": 3, "steps": 4, "sigma_min": 1e-3, "images_at_once": 3, **settings}
        reconstruct_to_file(prior, file, out, generator=seeded(), **options)
    return out


def world(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Values and affine in RAS order, so that files of any voxel order compare."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asarray(image.dataobj), image.affine


@pytest.mark.parametrize("order", [(1, 1, 1), (-1, 1, -1)])
def test_nifti_to_nifti(tmp_path: Path, order: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """NIfTI, import, reconstruct, `ambient-sci export`: affine and intensities of the file we began with,
    also from another voxel order."""
    flip = np.diag([*order, 1.0])
    volume = head()[:: order[0], :: order[1], :: order[2]]
    nibabel.save(nibabel.Nifti1Image(volume, oblique() @ flip), tmp_path / "ann.nii.gz")
    with pytest.warns(UserWarning, match="Rician"):
        scans = import_source(tmp_path / "ann.nii.gz", tmp_path / "M.h5", noise_std=2e-3, min_foreground=0.1)
    result = reconstructed(tmp_path, scans)
    capsys.readouterr()
    assert main(["export", str(result), "--out", str(tmp_path / "new" / "X.nii.gz")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"mean: {tmp_path / 'new' / 'X.nii.gz'}"]
    found, affine = world(tmp_path / "new" / "X.nii.gz")
    expected, expected_affine = world(tmp_path / "ann.nii.gz")
    assert np.allclose(affine, expected_affine, atol=1e-5)
    # Noise of .002 and levels down to .001, in units of about 900: errors of a few grey levels.
    assert found.shape == SHAPE and np.abs(found - expected).max() < 12
    assert nibabel.load(tmp_path / "new" / "X.nii.gz").header.get_xyzt_units()[0] == "mm"


def test_dicom_to_nifti(tmp_path: Path) -> None:
    """A DICOM series comes back in millimetres of RAS space and rescaled grey levels."""
    pytest.importorskip("pydicom")
    pixels = np.random.default_rng(0).integers(200, 2000, (3, 6, 8))
    for k in range(3):
        save_dicom(tmp_path / "d" / f"{k}", pixels[k], position=4.0 * k)
    with pytest.warns(UserWarning, match="Rician"):
        scans = import_source(tmp_path / "d", tmp_path / "M.h5", noise_std=2e-3)
    (path,) = export_nifti(reconstructed(tmp_path, scans), tmp_path / "out")
    assert path.name == "p17_mean.nii.gz"
    found, affine = world(path)
    # Pixel (row 2, column 1) of slice 1 lies at LPS (-10 + 3, -20 + 2 * 2, 4), as save_dicom says.
    i, j, k = np.rint(np.linalg.solve(affine, [10 - 3, 20 - 4, 4, 1])[:3]).astype(int)
    assert abs(found[i, j, k] - (0.5 * pixels[1, 2, 1] + 1)) < 12


def test_undersampled_scans_of_several_people(tmp_path: Path) -> None:
    """Complex reconstructions of simulated scans: magnitudes, one file a person, each under its own affine
    and scale."""
    (tmp_path / "volumes").mkdir()
    for k, name in enumerate(("ann", "bob")):
        affine = oblique()
        affine[0, 3] += 5 * k
        image = nibabel.Nifti1Image((1 + k) * head(k)[:, :, 1:], affine)
        nibabel.save(image, tmp_path / "volumes" / f"{name}.nii.gz")
    simulate(tmp_path / "volumes", "mri", tmp_path / "M.h5", tmp_path / "C.h5", noise_std=2e-3, coils=3)
    result = reconstructed(tmp_path, tmp_path / "M.h5")
    paths = export_nifti(result, tmp_path / "out")
    assert [p.name for p in paths] == ["ann_mean.nii.gz", "bob_mean.nii.gz"]
    for path, name in zip(paths, ("ann", "bob"), strict=True):
        found, affine = world(path)
        expected, expected_affine = world(tmp_path / "volumes" / f"{name}.nii.gz")
        assert np.allclose(affine, expected_affine, atol=1e-5)
        assert np.abs(found - expected).max() < 0.015 * expected.max()


def test_what_is_exported(tmp_path: Path) -> None:
    """The three quantities, from samples that are known: complex images, a scale for each image."""
    samples = torch.randn(4, 3, 2, 6, 5, generator=seeded())
    scale = np.array([2.0, 2.0, 5.0])
    result = Reconstruction.from_samples(samples, {})
    result.subjects, result.scale = ["ann", "ann", "bob"], scale
    result.save(tmp_path / "R.h5")
    magnitudes = samples.square().sum(2).sqrt() * torch.as_tensor(scale)[:, None, None]  # (S, N, H, W)
    mean = samples.mean(0).square().sum(1).sqrt() * torch.as_tensor(scale)[:, None, None]
    expected = {"mean": mean, "std": magnitudes.std(0), "samples": magnitudes.movedim(0, -1)}
    for what, value in expected.items():
        ann, bob = export_nifti(tmp_path / "R.h5", tmp_path / "out", what=what)
        assert (ann.name, bob.name) == (f"ann_{what}.nii.gz", f"bob_{what}.nii.gz")
        volume = np.asarray(nibabel.load(ann).dataobj)
        assert np.allclose(np.moveaxis(volume, 2, 0), value[:2].numpy(), atol=1e-5)
        assert np.allclose(
            np.moveaxis(np.asarray(nibabel.load(bob).dataobj), 2, 0), value[2:].numpy(), atol=1e-5
        )


def test_results_carry_the_geometry_of_what_was_reconstructed(tmp_path: Path) -> None:
    """Of some images of a file, the slices of those; on loading and saving again it stays."""
    (tmp_path / "v").mkdir()
    for name in ("ann", "bob"):
        nibabel.save(nibabel.Nifti1Image(head()[:, :, 1:], oblique()), tmp_path / "v" / f"{name}.nii.gz")
    simulate(tmp_path / "v", "identity", tmp_path / "M.h5", tmp_path / "C.h5", noise_std=0.01)
    result = reconstructed(tmp_path, tmp_path / "M.h5", indices=range(2, 7))
    whole = MeasurementFile(tmp_path / "M.h5").geometry["volumes"]
    geometry = ResultFile(result).geometry
    ann, bob = geometry["volumes"]
    assert (ann["name"], ann["slices"], ann["first"]) == ("ann", whole[0]["slices"][2:], 0)
    assert (bob["name"], bob["slices"], bob["first"]) == ("bob", whole[1]["slices"][:3], 2)
    assert ann["affine"] == whole[0]["affine"] and geometry["orientation"] == "RAS"
    loaded = Reconstruction.load(result)
    loaded.save(tmp_path / "again.h5")
    assert ResultFile(tmp_path / "again.h5").geometry == geometry == loaded.geometry
    (path,) = export_nifti(
        reconstructed(tmp_path, tmp_path / "M.h5", indices=range(5, 7), overwrite=True), tmp_path
    )
    volume = np.asarray(nibabel.load(path).dataobj)
    assert volume.shape == (8, 10, 4) and [bool(volume[:, :, k].any()) for k in range(4)] == [
        False,
        True,
        True,
        False,
    ]
    assert select_geometry({"orientation": "RAS"}, range(3)) == {"orientation": "RAS"}


def test_results_of_large_data_sets_and_of_before(tmp_path: Path) -> None:
    """Thousands of people and slices do not fit into an ordinary HDF5 attribute; results without geometry are
    read."""
    samples = torch.zeros(1, 900, 1, 1, 1)
    result = Reconstruction.from_samples(samples, {})
    result.subjects = [f"person {k:080d}" for k in range(900)]
    result.geometry = {"volumes": [{"name": "a", "slices": list(range(900)), "note": "." * 70_000}]}
    result.save(tmp_path / "R.h5")
    with h5py.File(tmp_path / "R.h5", "a") as file:
        assert json.loads(file.attrs["geometry"]) == result.geometry
        del file.attrs["geometry"], file.attrs["source"], file.attrs["verified"]
    with ResultFile(tmp_path / "R.h5") as file:
        assert file.geometry == {} and file.subjects == result.subjects


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and nothing written."""
    prior = flat_prior((2, 4, 4))
    from ambient_sci.operators import MRI

    y = torch.randn(2, 2, 4, 4, generator=seeded())
    result = reconstruct(
        prior, MRI(torch.ones(4, 4)), y, 0.1, samples=1, steps=2, sigma_min=0.05, generator=seeded()
    )
    result.subjects = ["ann", "bob"]
    result.save(tmp_path / "R.h5")
    out = tmp_path / "out"
    cases = [
        ({"what": "variance"}, "expected one of mean, std, samples"),
        ({"what": "std"}, "expected 2 or more samples"),
        ({"out": tmp_path / "X.nii.gz"}, "expected a folder for 2 volumes"),
        ({"out": tmp_path / "R.h5"}, "expected FILE.nii.gz or a folder"),
    ]
    for settings, message in cases:
        with pytest.raises(InputError, match=message):
            export_nifti(tmp_path / "R.h5", **{"out": out, **settings})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["R.h5"]
    assert main(["export", str(tmp_path / "R.h5"), "--out", str(out)]) == 0
    assert "came without geometry" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "R.h5"), "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "R.h5"), "--out", str(out), "--overwrite"]) == 0
    result.geometry = {
        "volumes": [
            {
                "name": "a",
                "slices": [0],
                "first": 0,
                "shape": [4, 4, 1],
                "axis": 2,
                "affine": np.eye(4).tolist(),
            }
        ]
    }
    result.save(tmp_path / "R.h5", overwrite=True)
    with pytest.raises(InputError, match="the geometry is of 1 slices, got 2 images"):
        export_nifti(tmp_path / "R.h5", tmp_path / "other")
    fits = {
        "name": "a",
        "slices": [0],
        "first": 0,
        "shape": [4, 4, 1],
        "axis": 2,
        "affine": np.eye(4).tolist(),
    }
    result.geometry = {"volumes": [fits, {**fits, "name": "b", "first": 1, "shape": [4, 5, 1]}]}
    result.save(tmp_path / "R.h5", overwrite=True)
    with pytest.raises(InputError, match=r"expected slices \(4, 5\) of b, got \(4, 4\)"):
        export_nifti(tmp_path / "R.h5", tmp_path / "other")
    assert not (tmp_path / "other").exists()
