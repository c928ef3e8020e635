"""Pictures in: every axis of a TIFF, reductions that keep noise white, clipping, levels that cannot be meant, and k-space that
is taken for images."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from ambient_sci.cli import main
from ambient_sci.data import MeasurementFile, import_source, open_source, simulate
from ambient_sci.data.exporters import select_geometry
from ambient_sci.data.origins import Origin, origins_of, pack, unpack
from ambient_sci.data.raw import centred_fft
from ambient_sci.data.reductions import LUMA, Reduction, fourier_matrix
from ambient_sci.errors import InputError

ALL = np.arange


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def smooth(num: int, size: int, seed: int = 0) -> np.ndarray:
    """Images in about [0.4, 0.6] without any detail at the finest scale."""
    found = gaussian_filter(
        rng(seed).standard_normal((num, size, size)), (0, size / 6, size / 6), mode="wrap"
    )
    return 0.5 + 0.03 * found / found.std()


def stored(path: Path) -> np.ndarray:
    with MeasurementFile(path) as file:
        return file.measurements().numpy()


def imported(source: Path | np.ndarray, folder: Path, **options) -> MeasurementFile:
    return MeasurementFile(import_source(source, folder / "m.h5", overwrite=True, **options))


# -- TIFF ----------------------------------------------------------------------------------------------------------


def test_eight_pages_are_eight_samples(tmp_path: Path) -> None:
    """NEWCOMER A 1: written by Pillow, by tifffile with and without a description, and compressed."""
    pages = rng().integers(1, 60000, (8, 12, 10), dtype=np.uint16)
    frames = [Image.fromarray(p) for p in pages]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "lzw.tif", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    tifffile.imwrite(tmp_path / "b.tif", pages)
    tifffile.imwrite(tmp_path / "c.tif", pages, metadata=None, compression="zlib")
    tifffile.imwrite(tmp_path / "d.tif", pages, imagej=True, metadata={"axes": "TYX"})
    tifffile.imwrite(tmp_path / "e.ome.tif", pages, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "f.tif", pages, metadata={"axes": "TYX"}, volumetric=True)
    for path in sorted(tmp_path.glob("*.tif")):
        file = imported(path, tmp_path, noise_std=0.01)
        assert len(file) == 8 and "8 " in file.history, path
        assert np.allclose(file.measurements()[:, 0].numpy() * 65535, pages, atol=0.02), path


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_every_axis_is_used_or_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    axes = "TCZYX" if kind == "ome" else "TZCYX"
    array = rng().integers(0, 60000, (2, 3, 4, 9, 8) if kind == "ome" else (2, 4, 3, 9, 8), dtype=np.uint16)
    meta = {"axes": axes, "Channel": {"Name": ["DAPI", "GFP", "RFP"]}} if kind == "ome" else {"axes": axes}
    tifffile.imwrite(path, array, imagej=kind == "imagej", metadata=meta)
    by_channel = np.moveaxis(array, axes.index("C"), 0).reshape(3, 8, 9, 8)  # T slowest, then Z
    with pytest.raises(InputError, match=r"3 channels \(axis C.*--channel 0 to 2.*--channel together"):
        open_source(path)
    with pytest.raises(InputError, match="got 3"):
        open_source(path, channel=3)
    with pytest.warns(UserWarning, match="the others are left out"):
        one = open_source(path, channel=1)
    assert np.allclose(one.images(ALL(8))[:, 0] * 65535, by_channel[1], atol=0.02)
    assert any("2 time points (axis T) x 4 depths (axis Z)" in note for note in one.notes)
    assert kind == "imagej" or any("GFP" in note for note in one.notes)
    every = open_source(path, channel="together")
    assert every.image_shape == (3, 9, 8)
    assert np.allclose(every.images(ALL(8)) * 65535, by_channel.swapaxes(0, 1), atol=0.02)
    each = open_source(path, channel="each")  # in the order of the file
    assert np.allclose(each.images(ALL(24))[:, 0] * 65535, array.reshape(24, 9, 8), atol=0.02)


def test_channels_of_their_own_have_levels_of_their_own(tmp_path: Path) -> None:
    levels = np.array([0.02, 0.05])
    noisy = smooth(20, 32)[:, None] + levels[:, None, None] * rng(1).standard_normal((20, 2, 32, 32))
    tifffile.imwrite(tmp_path / "a.ome.tif", noisy.astype(np.float32), metadata={"axes": "TCYX"})
    file = imported(tmp_path / "a.ome.tif", tmp_path, channel="each", patch=16)
    assert len(file) == 160
    assert np.allclose(file.noise_std.reshape(20, 2, 4), levels[None, :, None], rtol=0.05)


def test_the_command_takes_a_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = rng().integers(0, 60000, (3, 2, 9, 8), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": "ZCYX"})
    command = ["import", str(tmp_path / "a.tif"), "--out", str(tmp_path / "m.h5"), "--noise-std", "0.01"]
    assert main(command) == 2 and "--channel 0 to 1" in capsys.readouterr().err
    assert main([*command, "--channel", "blue"]) == 2 and "--channel" in capsys.readouterr().err
    assert main([*command, "--channel", "1"]) == 0
    said = capsys.readouterr()
    assert "left out" in said.err + said.out
    assert np.allclose(stored(tmp_path / "m.h5")[:, 0] * 65535, array[:, 1], atol=0.02)


def test_numbers_of_tiffs_are_exact(tmp_path: Path) -> None:
    arrays = {
        "f": rng().standard_normal((2, 9, 8)).astype(np.float32),
        "i": rng().integers(-3000, 3000, (2, 9, 8), dtype=np.int16),
        "b": rng().integers(0, 256, (2, 9, 8), dtype=np.uint8),
    }
    for name, array in arrays.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="minisblack")
        found = open_source(tmp_path / f"{name}.tif")
        assert found.scale == (255 if name == "b" else 1)
        assert np.allclose(found.images(ALL(2))[:, 0] * found.scale, array, rtol=1e-6, atol=1e-4), name
    deep = rng().integers(0, 60000, (2, 9, 8, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "rgb.tif", deep, photometric="rgb")
    found = open_source(tmp_path / "rgb.tif")
    assert found.image_shape == (3, 9, 8) and any("3 colours (axis S)" in n for n in found.notes)
    assert np.allclose(found.images(ALL(2)) * 65535, deep.transpose(0, 3, 1, 2), atol=0.02)
    clear = np.concatenate([deep[0], np.full((9, 8, 1), 300, np.uint16)], axis=-1)
    tifffile.imwrite(tmp_path / "alpha.tif", clear, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(InputError, match="transparent"):
        open_source(tmp_path / "alpha.tif").images(ALL(1))


def test_pages_of_unequal_size_are_named(tmp_path: Path) -> None:
    pages = [np.full(s, 900, np.uint16) for s in ((16, 16), (8, 16), (16, 16))]
    frames = [Image.fromarray(p) for p in pages]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"a.tif page 0 is 16 x 16 and a.tif page 1 8 x 16.*--patch"):
        import_source(tmp_path / "a.tif", tmp_path / "m.h5", noise_std=0)
    file = imported(tmp_path / "a.tif", tmp_path, noise_std=0, patch=8)
    assert (
        len(file) == 4 + 2 + 4 and [o.page for o in origins_of(file.geometry)] == [0] * 4 + [1] * 2 + [2] * 4
    )


def test_files_of_one_ome_data_set_are_read_each_for_itself(tmp_path: Path) -> None:
    """Two files of one OME data set, each of which describes both."""
    array = rng().integers(0, 60000, (4, 9, 8), dtype=np.uint16)
    with tifffile.TiffWriter(tmp_path / "whole.ome.tif") as writer:
        writer.write(array, metadata={"axes": "TYX"})
    xml = tifffile.TiffFile(tmp_path / "whole.ome.tif").ome_metadata
    assert xml is not None
    blocks = "".join(
        f'<TiffData IFD="{k % 2}" FirstT="{k}" PlaneCount="1"><UUID FileName="{n}.ome.tif">urn:uuid:{u}</UUID></TiffData>'
        for k, (n, u) in enumerate([("one", "1" * 8)] * 2 + [("two", "2" * 8)] * 2)
    )
    head, tail = xml.split("<TiffData")[0], xml.split("</Pixels>")[1]
    for name, uuid, part in (("one", "1" * 8, array[:2]), ("two", "2" * 8, array[2:])):
        own = re.sub(r'UUID="[^"]*"', f'UUID="urn:uuid:{uuid}"', head, count=1) + f"{blocks}</Pixels>{tail}"
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", part, description=own.encode(), metadata=None)
    (tmp_path / "whole.ome.tif").unlink()
    found = open_source(tmp_path)
    assert len(found) == 4 and any("several files; axes T of 4" in n for n in found.notes)
    assert np.allclose(found.images(ALL(4))[:, 0] * 65535, array, atol=0.02)
    path = tmp_path / "one.ome.tif"
    channels = path.read_bytes().replace(b'SizeC="1"', b'SizeC="4"').replace(b'SizeT="4"', b'SizeT="1"')
    path.write_bytes(channels.replace(b"FirstT", b"FirstC"))
    with pytest.raises(InputError, match="several files with axes C of 4.*--channel each"):
        open_source(path)
    assert len(open_source(path, channel="each")) == 2


# -- reductions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "old"), [(1, 5), (4, 9), (5, 9), (6, 8), (7, 16), (24, 32), (31, 32), (32, 32)]
)
def test_the_fourier_crop_has_orthonormal_rows(size: int, old: int) -> None:
    """M M^T = 1, so white noise stays white exactly; a constant stays itself, a slow wave is sampled at the new centres."""
    matrix = fourier_matrix(size, old)
    assert np.allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    assert np.allclose(math.sqrt(size / old) * matrix @ np.ones(old), 1, atol=1e-12)
    if size > 2:
        waves = [np.cos(2 * np.pi * (np.arange(n) + 0.5) / n + 0.3) for n in (old, size)]
        assert np.allclose(math.sqrt(size / old) * matrix @ waves[0], waves[1], atol=1e-12)


REDUCTIONS = {
    "bin 2": ({"bin": 2}, 1 / 2),
    "bin 3 with a border": ({"bin": 3}, 1 / 3),
    "size 32 of 64": ({"size": 32}, 1 / 2),
    "size 48 of 64": ({"size": 48}, 48 / 64),
    "size 45 of 64": ({"size": 45}, 45 / 64),
    "crop": ({"crop": (40, 52)}, 1.0),
    "patches": ({"patch": 24, "stride": 20}, 1.0),
    "patches of bins of a crop": ({"crop": (60, 60), "bin": 2, "patch": 15}, 1 / 2),
}


@pytest.mark.filterwarnings("ignore:.*in no image")
@pytest.mark.parametrize(("options", "factor"), REDUCTIONS.values(), ids=list(REDUCTIONS))
def test_the_estimate_is_right_after_every_reduction(tmp_path: Path, options: dict, factor: float) -> None:
    """NEWCOMER A 3: within three standard errors, which are below 2 %; and a level that is given follows."""
    clean = np.repeat(smooth(4, 64), 12, axis=0)
    noisy = (clean + 0.05 * rng(1).standard_normal(clean.shape)).astype(np.float32)
    found = imported(noisy, tmp_path, **options)
    error = float(found.attributes["noise_std_error"])
    assert abs(float(found.noise_std[0]) - 0.05 * factor) < 3 * error and error < 0.02 * 0.05 * factor
    assert "noise_correlation" not in found.attributes
    given = imported(noisy, tmp_path, noise_std=0.05, **options)
    assert torch.allclose(given.noise_std, torch.full_like(given.noise_std, 0.05 * factor))
    # The noise itself, against the same reduction of the clean images.
    left = (
        stored(tmp_path / "m.h5")
        - imported(clean.astype(np.float32), tmp_path, noise_std=0.05, **options).measurements().numpy()
    )
    assert abs(left.std() / (0.05 * factor) - 1) < 0.03
    assert abs((left[..., 1:] * left[..., :-1]).mean() / left.var()) < 0.02


def test_grey_knows_its_noise(tmp_path: Path) -> None:
    """Colours are averaged, grey pictures are not: each kind has its own level, estimated or given."""
    factor = math.sqrt(sum(w * w for w in LUMA))
    clean, folder = smooth(40, 32)[..., None], tmp_path / "d"
    folder.mkdir()
    for k, one in enumerate(clean + 0.05 * rng(1).standard_normal((40, 32, 32, 3))):
        image = np.clip(np.rint(255 * one), 0, 255).astype(np.uint8)
        Image.fromarray(image if k % 2 else image[..., 0]).save(folder / f"{k:02d}.png")
    given = imported(folder, tmp_path, grey=True, noise_std=0.05)
    assert given.image_shape == (1, 32, 32) and "BT.601" in given.history and "times" in given.history
    assert np.allclose(given.noise_std[:2], [0.05, 0.05 * factor], rtol=1e-5)
    found = imported(folder, tmp_path, grey=True)
    assert np.allclose(found.noise_std[:2], [0.05, 0.05 * factor], rtol=0.05)
    with pytest.raises(InputError, match="grey: expected 3 channels"):
        imported(np.ones((4, 2, 16, 16)), tmp_path, grey=True)


def test_sizes_that_would_correlate_noise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="enlarging correlates the noise"):
        imported(smooth(2, 16), tmp_path, size=20)
    with pytest.raises(InputError, match="square.*--crop 12 12"):
        imported(smooth(2, 16)[:, None, :12], tmp_path, size=8)
    clean = imported(smooth(2, 16)[:, None, :12], tmp_path, size=8, noise_std=0)
    assert clean.image_shape == (1, 8, 8) and "no longer white" in clean.history
    for wrong, said in (
        ({"stride": 4}, "stride"),
        ({"size": 8, "patch": 4}, "size"),
        ({"bin": 1}, "bin"),
        ({"patch": 17}, "patch"),
    ):
        with pytest.raises(InputError, match=f"{said}: expected"):
            imported(smooth(2, 16), tmp_path, **wrong)


def test_patches_know_where_they_come_from(tmp_path: Path) -> None:
    """A stack and single pictures of other sizes: every patch is found again in the pixels that its origin names."""
    folder = tmp_path / "d"
    folder.mkdir()
    stack = rng().integers(1, 60000, (2, 40, 50), dtype=np.uint16)
    single = rng().integers(1, 60000, (30, 33), dtype=np.uint16)
    tifffile.imwrite(folder / "a.tif", stack)
    tifffile.imwrite(folder / "b.tif", single)
    tifffile.imwrite(folder / "c.tif", single[:9])
    with pytest.warns(UserWarning) as said:
        file = imported(folder, tmp_path, patch=16, stride=12, noise_std=0.01)
    texts = [str(w.message) for w in said]
    assert any("c.tif" in t and "smaller than a patch" in t for t in texts)
    # 40 = 16 + 2 x 12, 50 = 16 + 2 x 12 + 10 and so on: what is in no patch is said, and recorded.
    lost = (2 * (1 - 40 * 40 / 2000) + (1 - 28 * 28 / 990)) / 3
    assert any(f"{100 * lost:.2g} % of the pixels are in no image" in t for t in texts)
    assert "in no image" in file.history and "every 12 pixels" in file.history
    found, values = origins_of(file.geometry), file.measurements()[:, 0].numpy() * 65535
    assert len(found) == len(file) == 2 * 9 + 4
    for origin, patch in zip(found, values, strict=True):
        page = stack[origin.page] if origin.file == "a.tif" else single
        assert (origin.height, origin.width) == page.shape
        assert np.allclose(patch, page[origin.y : origin.y + 16, origin.x : origin.x + 16], atol=0.02)
    assert set(file.subjects) == {"a", "b"}
    some = select_geometry(file.geometry, range(7, 19))
    assert origins_of(some) == found[7:19]


def test_patches_of_one_stack_are_subjects_by_page(tmp_path: Path) -> None:
    pages = rng().integers(1, 60000, (3, 32, 32), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    file = imported(tmp_path / "a.tif", tmp_path, patch=16, noise_std=0.01)
    assert file.subjects == [f"a {k}" for k in range(3) for _ in range(4)]


def test_zoomed_origins_are_pixels_of_the_file(tmp_path: Path) -> None:
    image = smooth(1, 64)[0].astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", image)
    with pytest.warns(UserWarning, match="in no image"):
        file = imported(tmp_path / "a.tif", tmp_path, crop=(60, 56), bin=2, patch=10, noise_std=0.01)
    for origin, patch in zip(origins_of(file.geometry), file.measurements()[:, 0].numpy(), strict=True):
        region = image[origin.y : origin.y + 20, origin.x : origin.x + 20]
        assert np.allclose(patch, region.reshape(10, 2, 10, 2).mean((1, 3)), atol=1e-6)


def test_affines_follow_crops_and_bins(tmp_path: Path) -> None:
    import nibabel

    volume = rng().uniform(100, 900, (12, 16, 3)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([2.0, 2, 3, 1])), tmp_path / "v.nii")
    with pytest.warns(UserWarning, match="Rician"):
        file = imported(
            tmp_path / "v.nii", tmp_path, crop=(8, 8), bin=2, noise_std=1.0, noise_units="original"
        )
    (found,) = file.geometry["volumes"]
    # Pixel 0 is the mean of old pixels 2 and 3 (4 and 5): centred at 2.5 and 4.5 of 2 mm each.
    assert np.allclose(found["affine"], [[4, 0, 0, 5], [0, 4, 0, 9], [0, 0, 3, 0], [0, 0, 0, 1]])
    assert found["shape"] == [4, 4, 3]


def test_columns_of_origins_are_packed_without_loss() -> None:
    for values in (
        [],
        [3],
        [3, 3, 3],
        list(range(9)),
        [0, 48, 96, 0, 48, 96],
        rng().integers(0, 3, 50).tolist(),
    ):
        assert unpack(pack(values)) == values
    assert pack(range(1000)) == [[0, 1, 1000]]
    assert origins_of({}) == [] and Origin("a", 1, 2, 3, 4, 5).page == 1


def test_a_reduction_covers_what_it_says() -> None:
    """The dropped share against counting pixels, for all strides up to beyond the patch."""
    for height, width, side, step in itertools.product((9, 16), (13, 20), (4, 7), (2, 4, 9)):
        plan = Reduction(patch=side, stride=step).plan((1, height, width))
        assert plan is not None
        seen = np.zeros((height, width), bool)
        for y, x in plan.corners:
            seen[y : y + side, x : x + side] = True
        assert plan.dropped == pytest.approx(1 - seen.mean())


# -- clipping and levels that cannot be meant ----------------------------------------------------------------------


def test_clipping_is_said(tmp_path: Path) -> None:
    """NEWCOMER A 4: dark pictures whose noise is cut off at 0; the share is counted over all of them, once each."""
    noisy = 0.1 * smooth(20, 32) + 0.15 * rng(1).standard_normal((20, 32, 32))
    bytes_ = np.clip(np.rint(255 * noisy), 0, 255).astype(np.uint8)
    share = 100 * (bytes_ == 0).mean()
    with pytest.warns(UserWarning, match=f"{share:.2g} % of the pixels are at 0.*underestimated"):
        file = imported(bytes_, tmp_path)
    assert "clipped" in file.history
    camera = np.clip(np.rint(4000 + 400 * rng().standard_normal((8, 32, 32))), 0, 4095).astype(np.uint16)
    with pytest.warns(UserWarning, match="at 4095, the largest value"):
        imported(camera, tmp_path)


def test_unclipped_and_clean_pictures_are_not_accused(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    noisy = smooth(20, 32) + 0.05 * rng(1).standard_normal((20, 32, 32))
    imported(np.rint(255 * noisy).clip(0, 255).astype(np.uint8), tmp_path)
    imported(noisy, tmp_path)
    imported((255 * (smooth(4, 32) > 0.5)).astype(np.uint8), tmp_path, noise_std=0)
    assert not [w for w in recwarn if "clipped" in str(w.message)]


def test_levels_in_other_units_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NEWCOMER A 5: grey levels given for pictures in [0, 1]; the way out is in the message, and works."""
    bytes_ = np.rint(255 * smooth(4, 16)).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "a.npy", bytes_)
    out = ["--out", str(tmp_path / "m.h5"), "--overwrite"]
    source = [
        "simulate",
        str(tmp_path / "a.npy"),
        "--operator",
        "identity",
        "--reference",
        str(tmp_path / "r.h5"),
        *out,
    ]
    for command in (
        ["import", str(tmp_path / "a.npy"), *out, "--noise-std", "38"],
        [*source, "--noise-std", "15"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "--noise-units original" in said and len(said.splitlines()) == 1
        assert main([*command, "--noise-units", "original"]) == 0
        with MeasurementFile(tmp_path / "m.h5") as file:
            assert float(file.noise_std[0]) == pytest.approx(float(command[-1]) / 255)
    with pytest.raises(InputError, match="noise_units"):
        simulate(bytes_, "identity", tmp_path / "x.h5", tmp_path / "y.h5", noise_std=1, noise_units="grey")
    with pytest.warns(UserWarning, match="disappear in the noise"):
        simulate(smooth(2, 16), "identity", tmp_path / "x.h5", tmp_path / "y.h5", noise_std=1.2)


# -- k-space -------------------------------------------------------------------------------------------------------


def kspace(size: int = 32, noise: float = 0.05) -> np.ndarray:
    """Three slices of single-coil k-space of objects with a phase."""
    images = smooth(3, size) * np.exp(1j * smooth(3, size, seed=1))
    draws = rng(2).standard_normal((2, 3, size, size))
    return centred_fft(centred_fft(images, -1), -2) + noise * (draws[0] + 1j * draws[1])


def test_kspace_is_not_taken_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NEWCOMER A 2: both readings and both commands are spelled out, and both commands work."""
    path = tmp_path / "kspace.npy"
    np.save(path, kspace())
    command = ["import", str(path), "--out", str(tmp_path / "M.h5")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for way in ("--kind kspace", f"`ambient-sci import {path} --out M.h5 --kind images`"):
        assert way in said
    assert main([*command, "--kind", "kspace"]) == 0
    with MeasurementFile(tmp_path / "M.h5") as file:
        assert file.operator_name == "mri" and len(file) == 3
        # The corners of k-space have the noise alone: 0.05 over the scale of the images.
        assert float(file.noise_std[0]) * float(np.asarray(file.scale).flat[0]) == pytest.approx(
            0.05, rel=0.1
        )
    assert main([*command, "--kind", "images", "--overwrite"]) == 0
    with MeasurementFile(tmp_path / "M.h5") as file:
        assert file.operator_name == "identity"


def test_masks_of_kspace_arrays(tmp_path: Path) -> None:
    mask = np.zeros(32)
    mask[::2] = 1
    np.save(tmp_path / "mask.npy", mask)
    scan = kspace() * mask
    for given in (mask, tmp_path / "mask.npy", None):
        file = imported(scan, tmp_path, kind="kspace", noise_std=0.01, mask=given)
        assert np.array_equal(file.mask()[0, 0, 0].numpy(), mask)
    with pytest.raises(InputError, match="contradicts the data"):
        imported(kspace(), tmp_path, kind="kspace", noise_std=0.01, mask=mask)
    with pytest.raises(InputError, match="mask has no meaning"):
        imported(smooth(2, 16), tmp_path, mask=mask)


def test_complex_images_are_still_images(tmp_path: Path) -> None:
    images = smooth(3, 32) * np.exp(1j * smooth(3, 32, seed=1))
    assert imported(images, tmp_path, noise_std=0.01).image_shape == (2, 32, 32)
    uncentred = np.fft.ifftshift(kspace(), axes=(-2, -1))
    with pytest.raises(InputError, match="in the corners.*fftshift"):
        imported(uncentred, tmp_path)
    with pytest.raises(InputError, match="kind"):
        imported(images, tmp_path, kind="raw")
