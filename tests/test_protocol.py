"""The published protocol at a small size: resumed, shared by processes, with statistics that say what they are of; and files of images with classes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import launch

from ambient_sci.cli import main
from ambient_sci.data import ReferenceFile, write_images
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.evaluation import (
    Extractor,
    FeatureMoments,
    Protocol,
    features_of,
    frechet,
    run_protocol,
    share_features,
)
from ambient_sci.evaluation import protocol as module
from ambient_sci.priors import GaussianPrior, Labels, NetworkConfig, NetworkPrior, load_prior
from ambient_sci.sampling import generate, generate_to_file

SHAPE = (1, 3, 3)
PLAN = Protocol(num=60, seeds=(0, 1, 2), steps=6, sigma_max=20.0, sigma_min=0.01)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianPrior:
    factor = 0.3 * torch.randn(9, 9, generator=rng(5)) + 0.3 * torch.eye(9)
    return GaussianPrior(torch.zeros(SHAPE), factor @ factor.T)


def reference(path: Path, num: int = 200, seed: int = 9) -> Path:
    prior = gaussian()
    images = generate(prior, num, steps=6, sigma_max=20.0, sigma_min=0.01, generator=rng(seed))
    return write_images(path, images=images)


def test_the_report_is_what_its_parts_say(tmp_path):
    real = reference(tmp_path / "real.h5")
    report = run_protocol(gaussian(), real, tmp_path / "out", protocol=PLAN, extractor="pixels")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    with ReferenceFile(real) as file:
        truth = FeatureMoments.of(file.images().flatten(1))
    for row in report["seeds"]:
        images = generate(gaussian(), 60, steps=6, sigma_max=20.0, sigma_min=0.01, generator=rng(row["seed"]))
        assert row["frechet"] == pytest.approx(
            frechet(images.flatten(1), truth, features="x")["distance"], rel=1e-6
        )
        assert row["samples"] == 60 and "interval" in row["kid"]
    values = [row["frechet"] for row in report["seeds"]]
    assert report["frechet"]["least"] == min(values) and len(set(values)) == 3
    assert report["frechet"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert report["metric"] == "Frechet distance on pixels" and report["reference"]["images"] == 200


def test_interrupted_it_goes_on_and_makes_nothing_twice(tmp_path, monkeypatch):
    real, out = reference(tmp_path / "real.h5"), tmp_path / "out"
    whole = run_protocol(gaussian(), real, tmp_path / "whole", protocol=PLAN, extractor="pixels")
    drawn = module.generate_to_file

    def broken(prior, num, path, **settings):
        if path.name == "samples-s1.h5":
            raise KeyboardInterrupt
        return drawn(prior, num, path, **settings)

    monkeypatch.setattr(module, "generate_to_file", broken)
    with pytest.raises(KeyboardInterrupt):
        run_protocol(gaussian(), real, out, protocol=PLAN, extractor="pixels")
    begun = (out / "samples-s0.h5").stat().st_mtime_ns
    monkeypatch.setattr(module, "generate_to_file", drawn)
    found = run_protocol(gaussian(), real, out, protocol=PLAN, extractor="pixels")
    assert found["seeds"] == whole["seeds"] and (out / "samples-s0.h5").stat().st_mtime_ns == begun
    monkeypatch.setattr(module, "generate_to_file", lambda *a, **b: pytest.fail("drawn again"))
    assert run_protocol(gaussian(), real, out, protocol=PLAN, extractor="pixels") == found


def test_statistics_are_kept_under_what_they_are_of_and_by_version(tmp_path, monkeypatch):
    real, cache = reference(tmp_path / "real.h5"), tmp_path / "cache"
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    key = {"version": 1, "images_sha256": "a"}
    first = module.reference_statistics(features, key, cache_of(cache))
    again = module.reference_statistics(features[:0], key, cache)  # from the file: nothing to compute it from
    assert (
        torch.allclose(first.mean, again.mean)
        and torch.allclose(first.covariance, again.covariance)
        and again.n == 50
    )
    run_protocol(gaussian(), real, tmp_path / "a", protocol=PLAN, extractor="pixels", cache=cache)
    count = len(list(cache.glob("statistics-*")))
    run_protocol(
        gaussian(),
        reference(tmp_path / "other.h5", seed=3),
        tmp_path / "b",
        protocol=PLAN,
        extractor="pixels",
        cache=cache,
    )
    monkeypatch.setattr(module, "VERSION", 2)
    run_protocol(gaussian(), real, tmp_path / "c", protocol=PLAN, extractor="pixels", cache=cache)
    assert len(list(cache.glob("statistics-*"))) == count + 2


def test_many_processes_may_write_the_same_statistics(tmp_path):
    """Processes at the same work at once: none takes another's file in the making for debris."""
    code = """
import sys, numpy as np
from pathlib import Path
from ambient_sci.evaluation.protocol import reference_statistics
features = np.random.default_rng(0).standard_normal((50, 200)).astype(np.float32)
for k in range(60):
    reference_statistics(features, {"k": k}, Path(sys.argv[1]))
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    errors = [worker.communicate()[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], errors
    assert len(list(tmp_path.glob("statistics-*"))) == 60 and not list(tmp_path.glob(".*"))


def cache_of(path: Path) -> Path:
    path.mkdir()
    return path


def test_published_statistics(tmp_path):
    real = reference(tmp_path / "real.h5")
    with ReferenceFile(real) as file:
        x = file.images().flatten(1).double()
    np.savez(tmp_path / "stats.npz", mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    inception = Extractor("inception", lambda x: x.flatten(1), "a stand-in")
    settings = {"protocol": PLAN, "extractor": inception}
    found = run_protocol(gaussian(), tmp_path / "stats.npz", tmp_path / "a", reference_count=200, **settings)
    same = run_protocol(gaussian(), real, tmp_path / "b", **settings)
    assert found["metric"] == "FID" and "kid" not in found["seeds"][0]
    assert [r["frechet"] for r in found["seeds"]] == pytest.approx(
        [r["frechet"] for r in same["seeds"]], rel=1e-5
    )
    with pytest.raises(InputError, match="50000 for CIFAR-10"):
        run_protocol(gaussian(), tmp_path / "stats.npz", tmp_path / "a", **settings)
    with pytest.raises(InputError, match="statistics are of Inception features"):
        run_protocol(
            gaussian(),
            tmp_path / "stats.npz",
            tmp_path / "a",
            protocol=PLAN,
            extractor="pixels",
            reference_count=200,
        )
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="bad.npz: expected statistics"):
        run_protocol(gaussian(), tmp_path / "bad.npz", tmp_path / "a", reference_count=200, **settings)
    with pytest.raises(InputError, match="says how many"):
        run_protocol(gaussian(), real, tmp_path / "b", reference_count=200, **settings)


def test_other_settings_and_too_few_images_are_one_line(tmp_path):
    real, out = reference(tmp_path / "real.h5"), tmp_path / "out"
    run_protocol(gaussian(), real, out, protocol=PLAN, extractor="pixels")
    with pytest.raises(InputError, match="another steps"):
        run_protocol(
            gaussian(), real, out, protocol=Protocol(**{**vars(PLAN), "steps": 7}), extractor="pixels"
        )
    other = GaussianPrior(torch.ones(SHAPE), torch.eye(9))
    with pytest.raises(InputError, match="another prior"):
        run_protocol(other, real, out, protocol=PLAN, extractor="pixels")
    found = run_protocol(other, real, out, protocol=PLAN, extractor="pixels", overwrite=True)
    assert found["frechet"]["least"] > 1
    run_protocol(gaussian(), real, out, protocol=PLAN, extractor="pixels", overwrite=True)
    few = write_images(tmp_path / "few.h5", images=torch.rand(5, *SHAPE))
    with pytest.raises(InputError, match="more samples than the 9 dimensions, got 60 and 5"):
        run_protocol(gaussian(), few, out, protocol=PLAN, extractor="pixels")
    with pytest.raises(InputError, match="different seeds"):
        Protocol(seeds=(1, 1))
    masked = NetworkPrior((1, 8, 8), 1.0, "mask-conditional")
    with pytest.raises(ConditioningError):
        run_protocol(masked, real, tmp_path / "m", protocol=PLAN, extractor="pixels")


def test_two_processes_share_it_and_agree_with_one(tmp_path):
    gaussian().save(tmp_path / "prior")
    real = reference(tmp_path / "real.h5")
    common = ["evaluate-prior", tmp_path / "prior", "--reference", real, "--features", "pixels", "--num", 600]
    common += ["--steps", 4, "--seeds", 0, "--sigma-max", 20, "--device", "cpu"]
    assert main([*map(str, common), "--out", str(tmp_path / "one")]) == 0
    done = launch("ambient_sci", *common, "--out", tmp_path / "two", module=True)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["seeds"] == two["seeds"] and done.stdout.count("report:") == 1
    assert not list((tmp_path / "two" / "features").glob(".*parts*"))


def test_shared_features_are_the_cached_ones(tmp_path):
    real = reference(tmp_path / "real.h5")
    shared = share_features(real, "pixels", tmp_path / "cache")
    assert (
        np.array_equal(shared, features_of(real, "pixels"))
        and len(list((tmp_path / "cache").glob("*.npy"))) == 1
    )


def test_generated_files_hold_the_classes_they_were_told(tmp_path):
    options = {
        "model_channels": 64,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
        "label_dim": 3,
    }
    prior = NetworkPrior(
        (1, 8, 8), 0.5, network=NetworkConfig("ncsnpp", options=options), sigma_min=0.01, sigma_max=10.0
    ).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=rng(1)))
    given = Labels(torch.arange(7) % 3)
    path = generate_to_file(
        prior, 7, tmp_path / "s.h5", steps=3, images_at_once=3, given=given, generator=rng(0)
    )
    expected = generate(prior, 7, steps=3, given=given, generator=rng(0))
    with ReferenceFile(path) as file:
        assert (
            torch.allclose(file.images(), expected, atol=1e-5)
            and file.labels().tolist() == given.index.tolist()
        )
    assert not torch.allclose(expected, generate(prior, 7, steps=3, generator=rng(0)), atol=1e-3)
    prior.save(tmp_path / "prior")
    real = write_images(tmp_path / "real.h5", images=torch.rand(100, 1, 8, 8))
    plan = Protocol(num=70, seeds=(0,), steps=2)
    run_protocol(load_prior(tmp_path / "prior"), real, tmp_path / "out", protocol=plan, extractor="pixels")
    with ReferenceFile(tmp_path / "out" / "samples-s0.h5") as file:
        assert set(file.labels().tolist()) == {0, 1, 2}
