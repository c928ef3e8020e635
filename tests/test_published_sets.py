"""datasets/*.py of published picture sets, on small archives of the same structure; and the reader of pickles that runs nothing."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambient_sci.data import ReferenceFile
from ambient_sci.data.picture_sets import check_names, hold_out, open_set, squared, write_parts
from ambient_sci.errors import InputError
from ambient_sci.plain_pickle import Global, read_plain

ROOT = Path(__file__).parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"published_{name}", ROOT / "datasets" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    module.main()


def fails(module, monkeypatch, capsys, *arguments) -> str:
    """The one line on standard error that a script ends with."""
    from ambient_sci.data.picture_sets import run_script

    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run_script(module.main)
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
    return text


def png(values: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def pictures(count: int, height: int = 20, width: int = 20, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def stored(path: Path) -> np.ndarray:
    """The 8-bit numbers of a file, (N, H, W, C)."""
    with ReferenceFile(path) as file:
        return np.moveaxis(np.rint((file.images().numpy() + 1) * 127.5).astype(np.uint8), 1, -1)


# -- CIFAR-10


def python2_batch(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and numpy wrote it: protocol 2, byte strings, numpy.core.multiarray._reconstruct."""
    raw = images.reshape(len(images), -1).tobytes()

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s  # SHORT_BINSTRING

    number = lambda n: b"J" + n.to_bytes(4, "little")  # noqa: E731
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01(" + number(len(images)) + number(3072) + b"t" + dtype + b"\x89T"
    state += len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(number(n) for n in labels) + b"e"
    pairs = text(b"data") + array + state + text(b"labels") + listed + text(b"batch_label") + text(b"x")
    return b"\x80\x02}(" + pairs + b"u."


def cifar_batches(each: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    rng = np.random.default_rng(3)
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    return {
        name: (
            rng.integers(0, 256, (each, 3, 32, 32), dtype=np.uint8),
            [int(n) for n in rng.integers(0, 10, each)],
        )
        for name in names
    }


def tarred(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def cifar_archive(path: Path, kind: str) -> Path:
    members = {"cifar-10-batches-py/batches.meta" if kind != "binary" else "cifar/batches.meta.txt": b"names"}
    for name, (images, labels) in cifar_batches().items():
        if kind == "python":
            members[f"cifar-10-batches-py/{name}"] = python2_batch(images, labels)
        elif kind == "python3":
            rows = {b"data": images.reshape(len(images), -1), b"labels": labels}
            members[f"cifar-10-batches-py/{name}"] = pickle.dumps(rows, protocol=2)
        else:
            rows = [bytes([n]) + x.tobytes() for x, n in zip(images, labels, strict=True)]
            members[f"cifar-10-batches-bin/{name}.bin"] = b"".join(rows)
    return tarred(path, members)


@pytest.mark.parametrize("kind", ["python", "python3", "binary"])
def test_cifar_of_every_version_becomes_the_same_files(tmp_path, monkeypatch, kind):
    archive = cifar_archive(tmp_path / "cifar.tar.gz", kind)
    run(script("cifar10"), monkeypatch, archive, "--out", tmp_path / "out", "--unverified")
    batches = cifar_batches()
    with ReferenceFile(tmp_path / "out" / "train50k.h5") as file:
        expected = np.concatenate([batches[f"data_batch_{k}"][0] for k in range(1, 6)])
        np.testing.assert_allclose(file.images().numpy(), expected / 127.5 - 1, atol=1e-6)
        assert file.labels().tolist() == [n for k in range(1, 6) for n in batches[f"data_batch_{k}"][1]]
        assert file.trusted and "not a published archive" in file.history
    assert np.array_equal(
        stored(tmp_path / "out" / "test10k.h5"), np.moveaxis(batches["test_batch"][0], 1, -1)
    )


def test_cifar_from_a_folder_and_a_subset_by_seed(tmp_path, monkeypatch):
    with tarfile.open(cifar_archive(tmp_path / "cifar.tar.gz", "python")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    for seed in (0, 0, 1):
        out = tmp_path / f"out{seed}"
        run(
            script("cifar10"),
            monkeypatch,
            tmp_path / "unpacked",
            "--out",
            out,
            "--images",
            6,
            "--seed",
            seed,
            "--overwrite",
        )
    first, second = (stored(tmp_path / f"out{seed}" / "train6.h5") for seed in (0, 1))
    assert len(first) == 6 and not np.array_equal(first, second)


def test_cifar_as_a_zip_of_edms_tool(tmp_path, monkeypatch):
    images = pictures(8, 32, 32)
    names = [f"00000/img{k:08d}.png" for k in range(8)]
    labels = json.dumps({"labels": [[name, k % 3] for k, name in enumerate(names)]})
    members = {name: png(x) for name, x in zip(names, images, strict=True)}
    archive = zipped(tmp_path / "cifar10-32x32.zip", {**members, "dataset.json": labels.encode()})
    run(script("cifar10"), monkeypatch, archive, "--out", tmp_path / "out", "--held-out", 3)
    train, held = (stored(tmp_path / "out" / f"{name}.h5") for name in ("train50k", "held_out"))
    assert sorted(x.tobytes() for x in [*train, *held]) == sorted(x.tobytes() for x in images)
    with ReferenceFile(tmp_path / "out" / "train50k.h5") as file:
        assert file.labels().tolist() == [
            int(re.search(r"(\d+)\.png", s).group(1)) % 3 for s in file.subjects
        ]


# -- the others


def test_ffhq_is_resized_as_edms_tool_does(tmp_path, monkeypatch):
    images = pictures(6, 40, 40)
    folder = tmp_path / "images1024x1024" / "00000"
    folder.mkdir(parents=True)
    for k, x in enumerate(images):
        (folder / f"{59_998 + k:05d}.png").write_bytes(png(x))
    run(script("ffhq"), monkeypatch, folder.parent, "--out", tmp_path / "out", "--size", 16, "--as-published")
    expected = [np.asarray(Image.fromarray(x).resize((16, 16), Image.Resampling.LANCZOS)) for x in images]
    assert np.array_equal(stored(tmp_path / "out" / "train.h5"), expected[:2])
    assert np.array_equal(stored(tmp_path / "out" / "held_out.h5"), expected[2:])
    with ReferenceFile(tmp_path / "out" / "train.h5") as file:
        assert "Lanczos" in file.history and file.labels() is None


def test_celeba_by_its_lists_and_by_person(tmp_path, monkeypatch):
    images = pictures(12, 24, 20)
    names = [f"{k + 1:06d}.jpg" for k in range(12)]
    archive = zipped(
        tmp_path / "celeba.zip",
        {f"img_align_celeba/{name}": png(x) for name, x in zip(names, images, strict=True)},
    )
    partition, people = tmp_path / "list_eval_partition.txt", tmp_path / "identity_CelebA.txt"
    partition.write_text("".join(f"{name} {k // 4}\n" for k, name in enumerate(names)))
    people.write_text("".join(f"{name} {100 + k // 2}\n" for k, name in enumerate(names)))
    celeba = script("celeba")
    common = ("--size", 8, "--crop", 16)
    run(celeba, monkeypatch, archive, "--out", tmp_path / "a", "--partition", partition, *common)
    expected = [
        np.asarray(Image.fromarray(x[4:20, 2:18]).resize((8, 8), Image.Resampling.LANCZOS)) for x in images
    ]
    for k, part in enumerate(("train", "val", "test")):
        assert np.array_equal(stored(tmp_path / "a" / f"{part}.h5"), expected[4 * k : 4 * k + 4])
    run(
        celeba,
        monkeypatch,
        archive,
        "--out",
        tmp_path / "b",
        "--identities",
        people,
        "--held-out",
        5,
        *common,
    )
    with (
        ReferenceFile(tmp_path / "b" / "train.h5") as train,
        ReferenceFile(tmp_path / "b" / "held_out.h5") as held,
    ):
        assert len(held) == 4 and set(train.subjects).isdisjoint(held.subjects)  # whole people: 2, not 2.5


def test_afhq_by_its_parts_with_classes(tmp_path, monkeypatch):
    images = pictures(9)
    members, expected = {}, {"train": [], "test": []}
    for k, x in enumerate(images):
        part, kind = "test" if k % 3 == 2 else "train", ("cat", "dog", "wild")[k // 3]
        members[f"afhq/{part}/{kind}/{k}.png"] = png(x)
        expected[part].append(k // 3)
    archive = zipped(tmp_path / "afhq_v2.zip", members)
    run(script("afhq"), monkeypatch, archive, "--out", tmp_path / "out", "--size", 10)
    for part in ("train", "test"):
        with ReferenceFile(tmp_path / "out" / f"{part}.h5") as file:
            assert sorted(file.labels().tolist()) == expected[part]
    run(script("afhq"), monkeypatch, archive, "--out", tmp_path / "all", "--size", 10, "--together")
    assert len(stored(tmp_path / "all" / "train.h5")) == 9


def tiny(path: Path) -> Path:
    root, images = "tiny-imagenet-200", pictures(8, 12, 12)
    members = {f"{root}/wnids.txt": b"n02\nn01\n", f"{root}/words.txt": b"n01\tcat\n"}
    for k, x in enumerate(images[:4]):
        kind = "n01" if k < 2 else "n02"
        values = x[..., 0] if k == 0 else x  # a grey one
        members[f"{root}/train/{kind}/images/{kind}_{k}.JPEG"] = png(values, "PNG")
        members[f"{root}/train/{kind}/{kind}_boxes.txt"] = b"0 0 1 1"
    lines = []
    for k, x in enumerate(images[4:6]):
        members[f"{root}/val/images/val_{k}.JPEG"] = png(x)
        lines.append(f"val_{k}.JPEG\tn0{2 - k}\t0\t0\t1\t1")
    members[f"{root}/val/val_annotations.txt"] = "\n".join(lines).encode()
    members[f"{root}/test/images/test_0.JPEG"] = png(images[6])
    return zipped(path, members)


def test_tiny_imagenet_with_labels_of_both_parts(tmp_path, monkeypatch):
    archive = tiny(tmp_path / "tiny-imagenet-200.zip")
    run(script("tiny_imagenet"), monkeypatch, archive, "--out", tmp_path / "out", "--unverified")
    with ReferenceFile(tmp_path / "out" / "train100k.h5") as file:
        assert file.labels().tolist() == [0, 0, 1, 1] and file.subjects == ["n01", "n01", "n02", "n02"]
        assert "1 grey pictures" in file.history and "test part" in file.history
    with ReferenceFile(tmp_path / "out" / "val10k.h5") as file:
        assert file.labels().tolist() == [1, 0]


# -- what goes wrong ends in one line


@pytest.mark.parametrize("name", ["cifar10", "ffhq", "celeba", "afhq", "tiny_imagenet"])
def test_absent_data_end_with_the_steps_that_get_them(tmp_path, monkeypatch, capsys, name):
    text = fails(script(name), monkeypatch, capsys, tmp_path / "absent", "--out", tmp_path / "out")
    assert "To get it: 1." in text and f"datasets/{name}.py" in text and not (tmp_path / "out").exists()


def test_another_archive_is_refused_unless_asked_for(tmp_path, monkeypatch, capsys):
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", "python")
    text = fails(script("cifar10"), monkeypatch, capsys, archive, "--out", tmp_path / "out")
    assert "c58f30108f718f92721af3b95e74349a" in text and "--unverified" in text
    text = fails(
        script("tiny_imagenet"), monkeypatch, capsys, tiny(tmp_path / "t.zip"), "--out", tmp_path / "out"
    )
    assert "tiny-imagenet-200.zip" in text


def test_damaged_archives(tmp_path, monkeypatch, capsys):
    archive = cifar_archive(tmp_path / "c.tar.gz", "python")
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert "not a readable tar" in fails(
        script("cifar10"), monkeypatch, capsys, archive, "--out", tmp_path / "o", "--unverified"
    )
    whole = zipped(tmp_path / "f.zip", {f"{k}.png": png(x) for k, x in enumerate(pictures(3))})
    whole.write_bytes(whole.read_bytes()[:-200])
    assert "not a readable zip" in fails(script("ffhq"), monkeypatch, capsys, whole, "--out", tmp_path / "o")
    damaged = zipped(tmp_path / "d.zip", {"0.png": png(pictures(1)[0]), "1.png": b"\x89PNG but no more"})
    text = fails(
        script("ffhq"), monkeypatch, capsys, damaged, "--out", tmp_path / "o", "--held-out", 0, "--size", 8
    )
    assert "1.png" in text and not list((tmp_path / "o").glob("*"))


def test_mixed_sizes_small_pictures_and_names_that_lead_out(tmp_path, monkeypatch, capsys):
    mixed = zipped(tmp_path / "m.zip", {"0.png": png(pictures(1)[0]), "1.png": png(pictures(1, 16, 16)[0])})
    with pytest.raises(InputError, match="mixed sizes.*1.png"):
        write_parts(open_set(mixed), {tmp_path / "m.h5": np.arange(2)}, size=None, history="")
    text = fails(
        script("ffhq"), monkeypatch, capsys, mixed, "--out", tmp_path / "o", "--held-out", 0, "--size", 64
    )
    assert "64 x 64" in text
    evil = zipped(tmp_path / "e.zip", {"../../evil.png": png(pictures(1)[0])})
    assert "inside the archive" in fails(script("ffhq"), monkeypatch, capsys, evil, "--out", tmp_path / "o")
    with pytest.raises(InputError, match="inside"):
        check_names(["C:\\x.png"], Path("a.zip"))
    other = zipped(tmp_path / "o.zip", {"bird/0.png": png(pictures(1)[0])})
    assert "cat, dog, wild" in fails(script("afhq"), monkeypatch, capsys, other, "--out", tmp_path / "o")


def test_a_set_with_labels_for_some_pictures_only_is_refused(tmp_path):
    archive = zipped(
        tmp_path / "l.zip",
        {
            "0.png": png(pictures(1)[0]),
            "1.png": png(pictures(1)[0]),
            "dataset.json": b'{"labels": [["0.png", 1]]}',
        },
    )
    with pytest.raises(InputError, match="1.png"):
        open_set(archive)


def test_squares_and_splits():
    image = np.arange(3 * 6 * 8, dtype=np.uint8).reshape(3, 6, 8)
    assert np.array_equal(squared(image, None), image[:, :, 1:7])
    with pytest.raises(InputError, match="at least 7 x 7"):
        squared(image, 4, crop=7)
    groups = [f"p{k // 4}" for k in range(40)]
    held = hold_out(40, 10, 0, groups)
    assert held.sum() == 8 and all(
        held[4 * k : 4 * k + 4].all() or not held[4 * k : 4 * k + 4].any() for k in range(10)
    )
    assert np.array_equal(hold_out(40, 10, 0), hold_out(40, 10, 0)) and hold_out(40, 10, 0).sum() == 10


# -- pickles, read and not run


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ambient_sci_was_run",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_calls_is_refused_by_name(protocol):
    with pytest.raises(InputError, match=r"refers to '(posix|nt)\.system'.*nothing of it was run"):
        read_plain(pickle.dumps({"data": Evil()}, protocol), {"numpy.ndarray"})
    assert not Path("/tmp/ambient_sci_was_run").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back_as_they_were(protocol):
    shared = [1, -5, 2**40, -(2**70), 3.5, "text é", b"bytes", None, True, False]
    value = {"a": shared, "b": (1, (2,), (3, 4), (5, 6, 7, 8)), "c": {"d": {}}, "e": [shared, shared], 3: ()}
    found = read_plain(pickle.dumps(value, protocol), {"_codecs.encode"})
    assert found == value and found["e"][0] is found["a"]


def test_what_would_be_called_is_a_record():
    from collections import OrderedDict

    found = read_plain(pickle.dumps(OrderedDict(a=1, b=2)), {"collections.OrderedDict"})
    assert found.name == "collections.OrderedDict" and found.pairs == [("a", 1), ("b", 2)]
    assert read_plain(pickle.dumps(OrderedDict), {"collections.OrderedDict"}) == Global(
        "collections.OrderedDict"
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04",
        b"\x80\x04K\x01",
        b"u.",
        b"(((",
        b"}]K\x01s.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fab.",  # 2^63 bytes are claimed
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo of 2^31 entries, nothing on the stack
        b"\x80\x02K\x01r\xff\xff\xff\x7fK\x02b.",
        b"\x80\x02" + b")\x85" * 10 + b"0" * 30 + b".",
        b"\x80\x02}" + b")" + b"\x85" * 50_000 + b"K\x01s.",  # a key as deep as the file is long
        b"\x80\x02Q.",
        b"\x80\x02U\x04pers\x51.",
        b"\x80\x82\xff.",
    ],
)
def test_damaged_and_hostile_pickles_are_one_line(data):
    with pytest.raises(InputError) as found:
        read_plain(data, {"collections.OrderedDict"}, label="x.pkl")
    assert str(found.value).startswith("x.pkl: ") and "\n" not in str(found.value)


def test_corruption_of_eight_bit_images_keeps_classes_and_bits(tmp_path):
    """What is simulated from a set of pictures: the same classes, the clean images still 8 bits, the corruption a function of the seed."""
    from ambient_sci.data import ImageWriter, MeasurementFile, simulate

    images, labels = np.stack(pictures(130, 8, 8)).transpose(0, 3, 1, 2), np.arange(130) % 7
    with ImageWriter(tmp_path / "x.h5", dtype="uint8", step=2 / 255, offset=-1.0) as file:
        file.append(images, labels=labels)
    for name in ("a", "b"):
        simulate(
            tmp_path / "x.h5",
            "masking",
            tmp_path / f"{name}.h5",
            tmp_path / f"{name}_clean.h5",
            noise_std=0.1,
            keep=0.5,
            seed=4,
        )
    with MeasurementFile(tmp_path / "a.h5") as a, MeasurementFile(tmp_path / "b.h5") as b:
        assert a.labels().tolist() == labels.tolist()
        assert a.measurements().equal(b.measurements()) and a.operator().mask.equal(b.operator().mask)
    with ReferenceFile(tmp_path / "a_clean.h5") as clean:
        assert clean.eight_bits == (2 / 255, -1.0) and clean.labels().tolist() == labels.tolist()
        np.testing.assert_allclose(clean.images().numpy(), images / 127.5 - 1, atol=1e-6)
    assert (tmp_path / "a_clean.h5").stat().st_size < 2 * images.nbytes + 100_000


def test_eight_bits_with_an_offset_refuse_other_values(tmp_path):
    from ambient_sci.data import write_images

    path = write_images(
        tmp_path / "x.h5",
        images=np.array([-1.0, 1.0], np.float32).reshape(1, 1, 1, 2),
        dtype="uint8",
        step=2 / 255,
        offset=-1,
    )
    with ReferenceFile(path) as file:
        assert file.images().flatten().tolist() == [-1, 1]
    with pytest.raises(InputError, match="from -1"):
        write_images(
            tmp_path / "y.h5",
            images=np.full((1, 1, 1, 2), 1.5, np.float32),
            dtype="uint8",
            step=2 / 255,
            offset=-1,
        )
