r"""How good a prior's images are by the published protocol: many samples, several seeds, one reference.

    for every seed: 50,000 images into a file -> features -> Frechet distance and KID to the reference

Karras et al. (2022) draw 50,000 images three times and report the least of the three distances; here all
three are reported, with their mean and least. On Inception features the distance is called FID; on any
others it is a Frechet distance on those features, and the report says on which.

Everything is kept in the folder and resumed: images (`generate_to_file`), features (`share_features`), the
reference's statistics. Processes of one ``torchrun`` share images and features. Statistics of a reference
are a file that says what they are of, and by which version of this module: another data set, extractor,
preparation or version has another file.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambient_sci.data import ReferenceFile
from ambient_sci.errors import InputError
from ambient_sci.evaluation.extractors import Extractor, Range, get_extractor, natural_range
from ambient_sci.evaluation.feature_distances import FeatureMoments, frechet, kid
from ambient_sci.evaluation.features import share_features
from ambient_sci.priors import Labels, Prior
from ambient_sci.priors.given import class_count
from ambient_sci.sampling import generate_to_file
from ambient_sci.sampling.parts import fingerprint, process_share
from ambient_sci.whole_files import read_tensors, whole_file, write_json, write_tensors

#: Of the statistics' file and of how they are computed. A change of either makes all anew.
VERSION = 1


@dataclass(frozen=True)
class Protocol:
    """What is drawn and compared.

    Attributes:
        num: images of each seed.
        seeds: of the draws.
        steps: noise levels of the sampler: 18 for CIFAR-10, 40 for 64 px in Karras et al. (2022).
        sampler: a name in `SAMPLERS`.
        sigma_min, sigma_max: ends of the levels; default: the prior's.
        batch_size: images at a time; changes nothing.
    """

    num: int = 50_000
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    sampler: str = "heun"
    sigma_min: float | None = None
    sigma_max: float | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.num < 20 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(
                f"protocol: expected at least 20 images and different seeds, got {self.num} and {self.seeds}"
            )


def run_protocol(
    prior: Prior,
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    protocol: Protocol | None = None,
    extractor: str | Extractor = "efficientnet-lite0",
    reference_count: int | None = None,
    value_range: Range | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Draw, compare, and write ``report.json`` into the folder ``out``.

    Args:
        prior: unconditional; one that is told classes draws each image's class uniformly, as published.
        reference: file of real images, or published statistics (.npz with ``mu`` and ``sigma``, for
            Inception features).
        out: folder; what is there of an interrupted run with the same settings is used.
        protocol: numbers of images, seeds, sampler; default: `Protocol`'s.
        extractor: see `get_extractor`.
        reference_count: images that published statistics are of; they do not say.
        value_range: black and white; default: `natural_range` of the reference (or of the first samples).
        cache: folder of features and statistics; default: ``out``/features.
        device: where features are computed.
        overwrite: replace images of another protocol or prior in ``out`` (one process only).
        progress: show progress bars.

    Returns:
        what report.json holds.

    Raises:
        ConditioningError: a mask-conditional prior.
        InputError: settings other than those of what is in ``out``, too few images for the features, or
            statistics that are not of these features.
    """
    plan, out = protocol or Protocol(), Path(out)
    cache = Path(cache or out / "features")
    found = get_extractor(extractor)
    _same_settings(prior, plan, out, overwrite and process_share(torch.device(device))[1] == 1)
    paths = [_drawn(prior, plan, seed, out, progress) for seed in plan.seeds]
    if value_range is None and found.rgb:
        value_range = _range(Path(reference), paths[0])
    shared: dict[str, Any] = {"value_range": value_range, "device": device, "progress": progress}
    real, reference_features = _reference(Path(reference), found, cache, reference_count, shared)
    rows = []
    for seed, path in zip(plan.seeds, paths, strict=True):
        features = share_features(path, found, cache, batch_size=plan.batch_size, **shared)
        rows.append({"seed": seed, **_distances(features, real, reference_features, found.name, seed)})
    report = {
        "version": VERSION,
        "features": found.name,
        "metric": "FID" if found.name == "inception" else f"Frechet distance on {found.name}",
        "value_range": list(value_range) if found.rgb and value_range else None,
        "reference": {"file": str(reference), "images": real.n},
        "protocol": asdict(plan),
        "seeds": rows,
        "frechet": _summary([row["frechet"] for row in rows]),
    }
    if process_share(torch.device(device))[0] == 0:
        write_json(out / "report.json", report)
    return report


def protocol_text(report: dict[str, Any]) -> str:
    """A report in words."""
    lines = [
        f"{report['metric']}, {report['protocol']['num']} images a seed, reference of "
        f"{report['reference']['images']} images"
    ]
    for row in report["seeds"]:
        also = "" if "kid" not in row else f", KID {row['kid']['mean']:.5f}"
        lines.append(f"seed {row['seed']}: {row['frechet']:.4g}{also}")
    found = report["frechet"]
    spread = "" if found["std"] is None else f" ± {found['std']:.2g}"
    lines.append(f"mean {found['mean']:.4g}{spread}, least {found['least']:.4g} (as Karras et al. report)")
    return "\n".join(lines)


def _summary(values: Sequence[float]) -> dict[str, Any]:
    several = len(values) > 1
    spread = statistics.stdev(values) if several else None
    return {"mean": statistics.fmean(values), "std": spread, "least": min(values)}


# -- samples -----------------------------------------------------------------------------------------------


def _same_settings(prior: Prior, plan: Protocol, out: Path, overwrite: bool) -> None:
    """Refuse a folder with images of other settings; note those of this one."""
    settings = {"prior": fingerprint(prior, []), **json.loads(json.dumps(asdict(plan)))}
    settings.pop("batch_size")
    path = out / "protocol.json"
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except ValueError:
            raise InputError(f"{path}: expected the settings of a protocol, got a damaged file") from None
        other = {k for k in settings if there.get(k) != settings[k]} - {"seeds"}
        if not other:
            return
        if not overwrite:
            raise InputError(
                f"{out}: expected a new folder or one of the same protocol, got one with another "
                f"{', '.join(sorted(other))}; --overwrite (by one process) replaces it"
            )
        for old in out.glob("samples-s*.h5"):
            old.unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _drawn(prior: Prior, plan: Protocol, seed: int, out: Path, progress: bool) -> Path:
    """The images of a seed, drawn unless they are there."""
    path = out / f"samples-s{seed}.h5"
    if path.exists():
        with ReferenceFile(path) as file:
            if len(file) == plan.num:
                return path
        raise InputError(f"{path}: expected {plan.num} images, got {len(file)}; remove it")
    generator = torch.Generator().manual_seed(seed)
    given = _labels(prior, plan.num, seed)
    return generate_to_file(
        prior,
        plan.num,
        path,
        steps=plan.steps,
        sampler=plan.sampler,
        sigma_min=plan.sigma_min,
        sigma_max=plan.sigma_max,
        batch_size=plan.batch_size,
        given=given,
        history=f"protocol: {plan.num} images, {plan.sampler}, {plan.steps} levels, seed {seed}"
        + ("" if given is None else ", classes drawn uniformly"),
        generator=generator,
        progress=progress,
    )


def _labels(prior: Prior, num: int, seed: int) -> Labels | None:
    """Classes drawn uniformly, for a prior that is told one."""
    classes = class_count(prior)
    if not classes:
        return None
    drawn = np.random.default_rng([seed, 1]).integers(0, classes, num)
    return Labels(torch.from_numpy(drawn))


# -- the reference -----------------------------------------------------------------------------------------


def _range(reference: Path, samples: Path) -> Range:
    with ReferenceFile(samples if reference.suffix == ".npz" else reference) as file:
        return natural_range(file.images(slice(0, min(len(file), 1024))))


def _reference(
    path: Path, extractor: Extractor, cache: Path, count: int | None, shared: dict[str, Any]
) -> tuple[FeatureMoments, np.ndarray | None]:
    """Statistics of the reference, and its features where there are images."""
    if path.suffix == ".npz":
        return published_statistics(path, extractor, count), None
    if count is not None:
        raise InputError("reference count: expected none for a file of images, which says how many it has")
    features = share_features(path, extractor, cache, **shared)
    return reference_statistics(features, _key(path, extractor, shared["value_range"]), cache), features


def published_statistics(path: Path, extractor: Extractor, count: int | None) -> FeatureMoments:
    """Mean and covariance of Inception features from an .npz file, as EDM publishes them.

    Raises:
        InputError: no such file, other contents or other features, or no number of images.
    """
    if extractor.name != "inception":
        raise InputError(
            f"{path}: published statistics are of Inception features, expected --features inception:FILE, "
            f"got {extractor.name}"
        )
    if count is None or count < 2:
        raise InputError(
            f"{path}: expected the number of images that the statistics are of (50000 for CIFAR-10), got "
            f"{count}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = file["mu"], file["sigma"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: expected statistics (.npz with mu and sigma), got {reason}") from None
    return FeatureMoments.stated(mean, covariance, count)


def _key(path: Path, extractor: Extractor, value_range: Range | None) -> dict[str, Any]:
    """What decides the statistics of a file of images."""
    with ReferenceFile(path) as file:
        digest = hashlib.sha256()
        for start in range(0, len(file), 1024):
            digest.update(file.images(slice(start, min(start + 1024, len(file)))).numpy().tobytes())
        count = len(file)
    return {
        "version": VERSION,
        "images": count,
        "images_sha256": digest.hexdigest(),
        "extractor": extractor.name,
        "fingerprint": extractor.fingerprint,
        "value_range": list(value_range) if extractor.rgb and value_range else None,
    }


def reference_statistics(features: np.ndarray, key: dict[str, Any], cache: Path) -> FeatureMoments:
    """Statistics of a reference's features, from the cache or into it.

    Args:
        features: of the reference, (N, d).
        key: what decides them, JSON values, the version among it.
        cache: folder of the file, which is named by a hash of ``key``.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache / f"statistics-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        tensors, about = read_tensors(path)
        if about.get("of") == text:
            return FeatureMoments.stated(tensors["mean"], tensors["covariance"], int(about["n"]))
    found = FeatureMoments.of(features)
    tensors = {"mean": found.mean.contiguous(), "covariance": found.covariance.contiguous()}
    with whole_file(path) as part:
        write_tensors(part, tensors, {"of": text, "n": str(found.n)})
    return found


def _distances(
    features: np.ndarray, real: FeatureMoments, reference: np.ndarray | None, name: str, seed: int
) -> dict[str, Any]:
    distance = frechet(FeatureMoments.of(features), real, features=name)
    found: dict[str, Any] = {"frechet": distance["distance"], "samples": distance["samples"]}
    if reference is not None:
        generator = torch.Generator().manual_seed(seed)
        found["kid"] = kid(features, reference, features=name, generator=generator)
    return found
