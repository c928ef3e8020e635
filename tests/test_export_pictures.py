"""Pictures out: by suffix, in original units and depth, with axes and resolution of what was imported; and contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from closed_forms import seeded
from PIL import Image

from ambient_sci.cli import main
from ambient_sci.data import (
    MeasurementFile,
    ReferenceFile,
    contact_sheet,
    import_source,
    simulate,
    write_images,
)
from ambient_sci.data.sheets import window
from ambient_sci.errors import InputError
from ambient_sci.priors import GaussianMixturePrior
from ambient_sci.sampling import Reconstruction, ResultFile, reconstruct_to_file
from ambient_sci.sampling.describe import describe_result, result_sheet
from ambient_sci.sampling.export import export


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def reconstructed(scans: Path, samples: int = 3) -> Path:
    """A result whose mean is the measurement to about a hundredth of a grey level: all but noise-free data, a flat prior."""
    out = scans.with_name("R.h5")
    with MeasurementFile(scans) as file:
        prior = GaussianMixturePrior(torch.zeros(1, *file.image_shape), 2.0)
        options = {"samples": samples, "steps": 4, "sigma_min": 1e-5, "overwrite": True}
        reconstruct_to_file(prior, file, out, generator=seeded(), **options)
    return out


def imported(source: Path, **options) -> Path:
    settings = {"noise_std": 1e-5, "overwrite": True, **options}
    return import_source(source, source.parent / "M.h5", **settings)


@pytest.mark.parametrize(("dtype", "mode"), [("uint8", "grey"), ("uint16", "grey"), ("uint8", "colour")])
def test_png_in_is_png_out(tmp_path: Path, dtype: str, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey levels and depth of the picture that was imported; nothing but FILE.png."""
    shape = (9, 8, 3) if mode == "colour" else (9, 8)
    pixels = rng().integers(9, 250 if dtype == "uint8" else 65000, shape).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    result = reconstructed(imported(tmp_path / "in.png"))
    assert main(["export", str(result), "--out", str(tmp_path / "new" / "rec.png")]) == 0
    with Image.open(tmp_path / "new" / "rec.png") as found:
        assert np.abs(np.asarray(found).astype(float) - pixels).max() <= (1 if dtype == "uint8" else 4)
        assert np.asarray(found).dtype == dtype and "original grey levels" in found.info["encoding"]
    assert f"{8 if dtype == 'uint8' else 16} bits, original grey levels" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["rec.png"]


def test_png_folders_are_named_after_the_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    pixels = rng().integers(9, 250, (3, 9, 8)).astype(np.uint8)
    for name, image in zip("abc", pixels, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    result = reconstructed(imported(folder))
    paths = export(result, tmp_path / "out").paths
    assert [p.name for p in paths] == ["a_mean.png", "b_mean.png", "c_mean.png"]
    assert np.abs(np.asarray(Image.open(paths[1])).astype(int) - pixels[1]).max() <= 1
    with pytest.raises(InputError, match="expected a folder for 3 pictures.*or a .tif file"):
        export(result, tmp_path / "rec.png")
    assert not (tmp_path / "rec.png").exists()
    found = export(result, tmp_path / "all", what="all").files
    names = {"mean", "std", "sample1", "sample2", "sample3"}
    assert {p.stem.split("_")[1] for _, p in found if p.stem.startswith("b_")} == names


def test_windows_of_what_is_no_grey_level_are_said(tmp_path: Path) -> None:
    """A standard deviation in PNG: its largest value is white, which the note, and the file, says."""
    Image.fromarray(rng().integers(9, 250, (9, 8)).astype(np.uint8)).save(tmp_path / "in.png")
    result = reconstructed(imported(tmp_path / "in.png", noise_std=0.02))
    exported = export(result, tmp_path / "rec.png", what="std")
    with ResultFile(result) as file:
        std = file.std(slice(None))[0, 0].numpy() * 255
    with Image.open(exported.paths[0]) as found:
        values, text = np.asarray(found), found.info["encoding"]
    assert f"white {std.max():.6g}" in text and text in exported.notes[0]
    assert np.abs(values / 255 * std.max() - std).max() <= 0.51 * std.max() / 255


def test_values_beyond_the_type_are_counted(tmp_path: Path) -> None:
    mean = torch.full((1, 1, 10, 10), 0.5)
    mean[..., 0, :3] = 1.5
    result = Reconstruction.from_samples(mean[None].repeat(2, 1, 1, 1, 1), {})
    result.scale, result.geometry = 255.0, {"pictures": one_picture("uint8")}
    result.save(tmp_path / "R.h5")
    exported = export(tmp_path / "R.h5", tmp_path / "rec.png")
    assert "3 % of the pixels lie beyond and are cut off" in exported.notes[0]
    assert np.asarray(Image.open(exported.paths[0]))[0, 0] == 255


def one_picture(dtype: str) -> dict:
    return {
        "files": ["a.png"],
        "dtype": dtype,
        **{k: [[0, 0, 1]] for k in ("file", "page", "y", "x", "height", "width")},
    }


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_stacks_keep_axes_and_resolution(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hyperstack comes back as one: pages in their places, 16 bits, pixel size, depth."""
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    pages = rng().integers(100, 60000, (2, 3, 2, 9, 8), dtype=np.uint16)  # T Z C
    if kind == "ome":
        meta = {
            "axes": "TZCYX",
            "PhysicalSizeX": 0.25,
            "PhysicalSizeY": 0.5,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeZ": 2.0,
        }
        tifffile.imwrite(path, pages, metadata=meta)
    else:
        meta = {"axes": "TZCYX", "unit": "um", "spacing": 2.0}
        tifffile.imwrite(path, pages, imagej=True, metadata=meta, resolution=(4, 2))
    with pytest.warns(UserWarning, match="left out"):
        scans = imported(path, channel=1)
    result = reconstructed(scans, samples=2)
    assert main(["export", str(result), "--out", str(tmp_path / "rec.tif"), "--what", "all"]) == 0
    assert "mean: 16 bits, original grey levels" in capsys.readouterr().out
    with tifffile.TiffFile(tmp_path / "rec_mean.tif") as found:
        assert found.is_imagej and found.series[0].axes == "TZYX" and found.series[0].dtype == np.uint16
        assert np.abs(found.asarray().astype(float) - pages[:, :, 1]).max() <= 4
        tags = found.pages[0].tags
        assert [np.divide(*tags[k].value) for k in ("XResolution", "YResolution")] == pytest.approx([4, 2])
        assert found.imagej_metadata["unit"] == "um" and found.imagej_metadata["spacing"] == 2
    with tifffile.TiffFile(tmp_path / "rec_std.tif") as found:
        assert found.series[0].dtype == np.float32
    with tifffile.TiffFile(tmp_path / "rec_samples.tif") as found:
        assert found.series[0].axes == "TZCYX" and found.series[0].shape == (2, 3, 2, 9, 8)
    # What went out can be imported again.
    again = MeasurementFile(imported(tmp_path / "rec_mean.tif"))
    assert len(again) == 6 and again.scale == 65535


def test_tiff_folders_and_float_pictures(tmp_path: Path) -> None:
    """One TIFF for each file; floating-point numbers stay what they are; several files in one stack are labelled."""
    folder = tmp_path / "d"
    folder.mkdir()
    images = {name: rng(k).standard_normal((k + 1, 9, 8)).astype(np.float32) for k, name in enumerate("ab")}
    for name, image in images.items():
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack")
    result = reconstructed(imported(folder))
    for path, image in zip(export(result, tmp_path / "out").paths, images.values(), strict=True):
        found = tifffile.imread(path)
        assert found.dtype == np.float32 and np.abs(found - image).max() < 1e-3, path
    (path,) = export(result, tmp_path / "one.tif").paths
    with tifffile.TiffFile(path) as found:
        assert found.series[0].shape == (3, 9, 8)
        assert found.imagej_metadata["Labels"] == ["a.tif page 0", "b.tif page 0", "b.tif page 1"]
    eight = export(result, tmp_path / "eight.tif", bits=8)
    assert tifffile.imread(eight.paths[0]).dtype == np.uint8 and "black is" in eight.notes[0]


def test_binned_pixels_are_larger(tmp_path: Path) -> None:
    """Ten pixels a micrometre, averaged by two: five."""
    pages = rng().integers(100, 60000, (2, 16, 16), dtype=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", pages, imagej=True, metadata={"axes": "ZYX", "unit": "um"}, resolution=(10, 10)
    )
    export(reconstructed(imported(tmp_path / "a.tif", bin=2)), tmp_path / "b.tif")
    with tifffile.TiffFile(tmp_path / "b.tif") as found:
        assert found.series[0].axes == "ZYX" and found.series[0].shape == (2, 8, 8)
        assert np.divide(*found.pages[0].tags["XResolution"].value) == pytest.approx(5)


def test_patches_are_called_patches(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", rng().integers(100, 60000, (2, 16, 16), dtype=np.uint16))
    exported = export(reconstructed(imported(tmp_path / "a.tif", patch=8)), tmp_path / "p.tif")
    assert any("not whole pictures" in note for note in exported.notes)
    with tifffile.TiffFile(tmp_path / "p.tif") as found:
        assert found.series[0].shape == (8, 8, 8)
        assert found.imagej_metadata["Labels"][7] == "a.tif page 1 y 8 x 8"


def test_arrays_in_original_units(tmp_path: Path) -> None:
    """npy of real and of complex images; complex means and samples stay complex."""
    samples = torch.randn(4, 3, 2, 6, 5, generator=seeded())
    result, scale = Reconstruction.from_samples(samples, {}), np.array([2.0, 2.0, 5.0])
    result.scale = scale
    result.save(tmp_path / "R.h5")
    values = torch.view_as_complex(samples.movedim(2, -1).contiguous()).numpy() * scale[:, None, None]
    expected = {"mean": values.mean(0), "std": np.abs(values).std(0, ddof=1)[:, None], "samples": values}
    for what, value in expected.items():
        (path,) = export(tmp_path / "R.h5", tmp_path / f"{what}.npy", what=what).paths
        found = np.load(path)
        assert found.shape == value.shape and np.allclose(found, value, atol=1e-5), what
    colours = torch.rand(2, 3, 3, 6, 5, generator=seeded())
    Reconstruction.from_samples(colours, {}).save(tmp_path / "C.h5")
    assert np.allclose(
        np.load(export(tmp_path / "C.h5", tmp_path / "c.npy").paths[0]), colours.mean(0), atol=1e-6
    )


def test_errors_against_a_reference(tmp_path: Path) -> None:
    samples = torch.rand(2, 3, 1, 6, 5, generator=seeded())
    result = Reconstruction.from_samples(samples, {})
    result.scale = 7.0
    result.save(tmp_path / "R.h5")
    truth = torch.rand(3, 1, 6, 5, generator=seeded(1))
    write_images(tmp_path / "T.h5", images=truth)
    (path,) = export(tmp_path / "R.h5", tmp_path / "e.npy", what="error", reference=tmp_path / "T.h5").paths
    assert np.allclose(np.load(path), 7 * (samples.mean(0) - truth).abs(), atol=1e-5)
    write_images(tmp_path / "U.h5", images=truth[:2])
    for wrong, said in (({}, "--reference"), ({"reference": tmp_path / "U.h5"}, "expected 3 clean images")):
        with pytest.raises(InputError, match=said):
            export(tmp_path / "R.h5", tmp_path / "x.npy", what="error", **wrong)


def test_wrong_suffixes_list_the_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = Reconstruction.from_samples(torch.rand(2, 3, 1, 6, 5, generator=seeded()), {})
    result.save(tmp_path / "R.h5")
    for name in ("rec.jpg", "rec.h6", "a.b"):
        assert main(["export", str(tmp_path / "R.h5"), "--out", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert ".png, .tif, .npy, .nii, .nii.gz" in said and len(said.splitlines()) == 1
    for settings, said in (
        ({"format": "png", "out": "x.tif"}, "a folder with --format png"),
        ({"what": "median"}, "mean, std"),
        ({"bits": 12}, "8, 16 or 32"),
    ):
        with pytest.raises(InputError, match=said):
            export(
                tmp_path / "R.h5",
                **{
                    "out": tmp_path / "y",
                    **settings,
                    **({"out": tmp_path / settings["out"]} if "out" in settings else {}),
                },
            )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["R.h5"]
    export(tmp_path / "R.h5", tmp_path / "r.tif")
    with pytest.raises(InputError, match="exists"):
        export(tmp_path / "R.h5", tmp_path / "r.tif")


def test_the_channels_that_png_cannot_hold_are_refused(tmp_path: Path) -> None:
    Reconstruction.from_samples(torch.rand(2, 1, 5, 6, 5, generator=seeded()), {}).save(tmp_path / "R.h5")
    with pytest.raises(InputError, match="PNG"):
        export(tmp_path / "R.h5", tmp_path / "r.png")
    assert not (tmp_path / "r.png").exists()
    with tifffile.TiffFile(export(tmp_path / "R.h5", tmp_path / "r.tif").paths[0]) as found:
        assert found.series[0].shape == (5, 6, 5) or found.series[0].axes.endswith("CYX")


# -- contact sheets ------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """What sheets are asked to show."""
    calls: list = []

    def record(panels, titles, heading, out, **options) -> None:
        calls.append((panels, titles, heading))

    for module in ("ambient_sci.data.inspect.draw", "ambient_sci.sampling.describe.draw"):
        monkeypatch.setattr(module, record)
    return calls


def test_sheets_show_measurement_mean_std_and_three_samples(tmp_path: Path, drawn: list) -> None:
    """Of a result: rows and their values, the measured ones found beside it; the heading says how many of how many."""
    images = rng().uniform(0, 1, (11, 1, 9, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", images)
    result = reconstructed(imported(tmp_path / "a.npy", noise_std=0.05), samples=5)
    result_sheet(result, tmp_path / "r.png")
    ((panels, titles, heading),) = drawn
    assert [p.name for p in panels] == ["measured", "mean", "std", "sample 1", "sample 2", "sample 3"]
    assert heading == "R.h5: 8 of 11 images, 3 of 5 samples" and len(titles) == 8
    rows = [int(t.split(":")[0]) for t in titles]
    assert np.allclose(panels[0].images, images[rows, 0], atol=1e-6)
    with ResultFile(result) as file:
        assert np.allclose(panels[2].images, file.std(slice(None)).numpy()[rows, 0], atol=1e-6)
    assert panels[0].window == panels[1].window == panels[3].window == window(panels[1].images)


def test_measurements_of_something_else_are_not_shown(tmp_path: Path, drawn: list) -> None:
    """A file of the same name beside the result that is not the one it was made from."""
    images = rng().uniform(0, 1, (4, 1, 9, 8)).astype(np.float32)
    np.save(tmp_path / "a.npy", images)
    result = reconstructed(imported(tmp_path / "a.npy"))
    np.save(tmp_path / "a.npy", images[::-1])
    other = imported(tmp_path / "a.npy")
    result_sheet(result, tmp_path / "r.png")
    assert drawn[0][0][0].name == "mean"
    with pytest.raises(InputError, match="made from, got others"):
        result_sheet(result, tmp_path / "r.png", measurements=other)
    other.write_bytes(b"damaged")
    result_sheet(result, tmp_path / "s.png")
    assert drawn[1][0][0].name == "mean"


def test_complex_images_are_magnitudes_and_scans_have_an_adjoint(tmp_path: Path, drawn: list) -> None:
    simulate(
        rng().uniform(0, 1, (3, 1, 16, 16)),
        "mri",
        tmp_path / "M.h5",
        tmp_path / "C.h5",
        noise_std=0.01,
        acceleration=2,
    )
    result = reconstructed(tmp_path / "M.h5", samples=2)
    result_sheet(result, tmp_path / "r.png")
    panels = drawn[0][0]
    assert [p.name for p in panels] == ["adjoint", "mean", "std", "sample 1", "sample 2"]
    with ResultFile(result) as file:
        mean = file.mean(slice(None))
        assert np.allclose(panels[1].images, mean.square().sum(1).sqrt(), atol=1e-6)
    contact_sheet(tmp_path / "M.h5", tmp_path / "m.png")
    assert [p.name for p in drawn[1][0]] == ["adjoint", "mask"] and "3 of 3 measurements" in drawn[1][2]


def test_identity_is_measured_and_images_fill_lines(tmp_path: Path, drawn: list) -> None:
    simulate(
        rng().uniform(0, 1, (40, 1, 8, 8)), "identity", tmp_path / "M.h5", tmp_path / "C.h5", noise_std=0.01
    )
    contact_sheet(tmp_path / "M.h5", tmp_path / "m.png")
    contact_sheet(tmp_path / "C.h5", tmp_path / "c.png")
    (panels, titles, heading), (_, images, counted) = drawn
    assert panels[0].name == "measured" and heading == "M.h5: 8 of 40 measurements" and len(titles) == 8
    assert counted == "C.h5: 32 of 40 images" and len(images) == 32


def test_point_estimates_have_no_spread(tmp_path: Path, drawn: list) -> None:
    Reconstruction.from_samples(torch.rand(1, 2, 1, 6, 5, generator=seeded()), {"sampler": "one-step"}).save(
        tmp_path / "R.h5"
    )
    result_sheet(tmp_path / "R.h5", tmp_path / "r.png")
    assert [p.name for p in drawn[0][0]] == ["estimate"]
    text = describe_result(tmp_path / "R.h5")
    assert "one-step" in text and "no standard deviation" in text


def test_sheets_are_bounded(tmp_path: Path) -> None:
    """One image of 2,000 pixels, and many small ones: pictures of at most about 1,600 pixels in width."""
    for shape in ((1, 1, 300, 2000), (1, 3, 40, 40), (40, 1, 8, 8)):
        write_images(tmp_path / "C.h5", images=rng().uniform(0, 1, shape), overwrite=True)
        contact_sheet(tmp_path / "C.h5", tmp_path / "c.png", overwrite=True)
        with Image.open(tmp_path / "c.png") as sheet:
            assert (
                150 < sheet.width < 1700 and sheet.height < 1700 and np.asarray(sheet.convert("L")).std() > 5
            )


def test_inspect_of_results_runs_and_priors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "a.npy", rng().uniform(0, 1, (3, 1, 8, 8)).astype(np.float32))
    result = reconstructed(imported(tmp_path / "a.npy", noise_std=0.05))
    assert main(["inspect", str(result)]) == 0
    said = capsys.readouterr().out
    for words in (
        "M.h5 (identity, 3 measurements)",
        "mmps, 4 noise levels",
        "3 of each image",
        "contact sheet:",
    ):
        assert words in said
    assert (tmp_path / "R.png").read_bytes().startswith(b"\x89PNG")
    GaussianMixturePrior(torch.zeros(1, 1, 8, 8), 2.0).save(tmp_path / "prior")
    assert main(["inspect", str(tmp_path / "prior")]) == 0
    assert "1 x 8 x 8" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "prior"), "--out", str(tmp_path / "x.png")]) == 2
    (tmp_path / "folder").mkdir()
    assert main(["inspect", str(tmp_path / "folder")]) == 2
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert main(["inspect", str(tmp_path / "broken")]) == 2
    assert all(line.startswith("ambient-sci: error") for line in capsys.readouterr().err.splitlines())


def test_references_of_pictures_know_their_files(tmp_path: Path) -> None:
    Image.fromarray(rng().integers(9, 250, (9, 8)).astype(np.uint8)).save(tmp_path / "in.png")
    simulate(tmp_path / "in.png", "identity", tmp_path / "M.h5", tmp_path / "C.h5", noise_std=0.01)
    assert ReferenceFile(tmp_path / "C.h5").geometry["pictures"]["files"] == ["in.png"]
