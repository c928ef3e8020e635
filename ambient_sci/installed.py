"""What is here: versions, devices, extras, what ships with the package; and what a file or folder is."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from ambient_sci._version import __version__
from ambient_sci.errors import InputError

Lines = list[tuple[str, str]]
PACKAGES = ("torch", "deepinv", "numpy", "h5py", "accelerate")


def report() -> Lines:
    """The installation, as names and values."""
    import torch

    from ambient_sci.baselines import BASELINES
    from ambient_sci.priors import pretrained_names
    from ambient_sci.priors.backbones import names
    from ambient_sci.sampling import POSTERIOR_SAMPLERS
    from ambient_sci.sampling.batching import available_memory

    memory = available_memory()
    lines = [
        ("ambient_sci", f"{__version__} in {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("packages", ", ".join(f"{name} {version_of(name)}" for name in PACKAGES)),
        ("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"),
        ("memory", "unknown" if memory is None else f"{memory / 2**30:.1f} GiB available"),
        ("device", _devices()),
        ("priors", ", ".join(f"pretrained:{name}" for name in pretrained_names()) or "none"),
        ("samplers", ", ".join(POSTERIOR_SAMPLERS)),
        ("classic", ", ".join(BASELINES)),
        ("networks", ", ".join(names())),
    ]
    return lines + [("extra " + name, state) for name, state in extras().items()]


def version_of(distribution: str) -> str:
    """The installed version, "missing" where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU (no CUDA device)"
    found = []
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        found.append(f"cuda:{k} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    return "; ".join(found)


def extras() -> dict[str, str]:
    """Each extra of the package, and whether its requirements are installed; empty where the package is not
    installed itself."""
    try:
        requirements = metadata.requires("ambient-sci") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        name = re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0]
        if extra and extra[1] not in ("dev", "docs") and name != "ambient-sci":
            found.setdefault(extra[1], []).append(name)
    return {name: _state(group) for name, group in sorted(found.items())}


def _state(distributions: list[str]) -> str:
    missing = [name for name in distributions if version_of(name) == "missing"]
    return "installed" if not missing else f"missing {', '.join(missing)}"


# -- files ---------------------------------------------------------------------------------------------------


def what_is(path: Path) -> Lines:
    """What a file or folder of the package is, and what is in it.

    Raises:
        InputError: nothing there, or nothing of the package's.
    """
    text = str(path)
    if text.startswith("pretrained:"):
        return _prior(text)
    if not path.exists():
        raise InputError(f"{path}: expected a file or folder, found nothing")
    if path.is_dir():
        if (path / "config.json").exists() or (path / "run.json").exists():
            return _run(path)
        return _prior(text)
    return _hdf5(path)


def _prior(place: str) -> Lines:
    from ambient_sci.priors import load_prior

    prior = load_prior(place)
    lines = [("kind", "prior"), ("prior", repr(prior)), ("data std", f"{prior.data_std:.4g}")]
    about = getattr(getattr(prior, "config", None), "about", {})
    return lines + [(str(key), " ".join(str(value).split())) for key, value in about.items()]


def _run(path: Path) -> Lines:
    from ambient_sci.training.run_folder import RunFolder

    lines: Lines = [("kind", "training run")]
    run: dict[str, Any] = RunFolder(path).read_json("run.json") if (path / "run.json").exists() else {}
    lines += [("stage", f"{stage['name']}: {stage['reason']}") for stage in run.get("stages", [])]
    log = (path / "log.jsonl").read_text().splitlines() if (path / "log.jsonl").exists() else []
    if log:
        last = json.loads(log[-1])
        lines.append(
            ("trained", f"{last['step']} steps, {last['seconds']:.0f} s, last stage {last['stage']}")
        )
    if (path / "prior" / "prior.json").exists():
        lines += _prior(str(path))[1:]
    return lines


def _hdf5(path: Path) -> Lines:
    import h5py

    from ambient_sci.data import MeasurementFile, ReferenceFile
    from ambient_sci.data.files import IMAGE_FORMAT
    from ambient_sci.data.hdf5_file import format_of
    from ambient_sci.sampling.result import FORMAT, ResultFile

    try:
        with h5py.File(path, "r") as file:
            kind = format_of(file)
    except OSError:
        raise InputError(
            f"{path}: expected a file of ambient_sci (HDF5), a run or a prior, got something else"
        ) from None
    size = ("size", f"{path.stat().st_size / 2**20:.1f} MiB")
    if kind == FORMAT:
        with ResultFile(path) as result:
            samples, count, *shape = result.shape
            source = result.source.get("name", "unknown")
            some = result.source.get("indices")
            of = "" if some is None else f", {len(some)} of its {result.source.get('samples')} samples"
            return [
                ("kind", "result"),
                size,
                ("images", f"{count} of {' x '.join(map(str, shape))}, {samples} samples of each"),
                ("sampler", str(result.report.get("sampler", "unknown"))),
                ("made from", source + of),
            ]
    if kind == IMAGE_FORMAT:
        with ReferenceFile(path) as images:
            return [
                ("kind", "images"),
                size,
                ("images", f"{len(images)}, {len(set(images.subjects))} subjects"),
            ]
    with MeasurementFile(path) as data:
        low, high = float(data.noise_std.min()), float(data.noise_std.max())
        noise = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        return [
            ("kind", "measurements"),
            size,
            ("images", f"{len(data)} of {' x '.join(map(str, data.image_shape))}"),
            ("operator", repr(data.operator([0]))),
            ("noise", f"{noise} per real channel"),
            ("subjects", str(len(set(data.subjects)))),
        ]
