"""What is in a run folder or the folder of a saved prior, in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ambient_sci.errors import InputError


def is_prior(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a run, or of a saved prior."""
    folder = Path(path)
    return any((folder / name).is_file() for name in ("prior.json", "run.json", "prior/prior.json"))


def describe_prior(path: str | os.PathLike[str]) -> str:
    """Text about a run folder or a saved prior: kind, size, noise levels, data, and how far training has
    come.

    Raises:
        InputError: neither, or a damaged one.
    """
    folder = Path(path)
    run = _json(folder / "run.json")
    prior = _json(folder / "prior.json") or _json(folder / "prior" / "prior.json")
    if run is None and prior is None:
        raise InputError(
            f"{folder}: expected a run or a saved prior, got a folder without run.json or prior.json"
        )
    lines = [("kind", "run" if run is not None else "saved prior")]
    if prior is None:
        lines.append(("prior", "none was saved yet"))
    else:
        lines += _prior(prior, folder)
    if run is not None:
        lines += _run(run, folder)
    width = max(len(name) for name, _ in lines)
    return "\n".join([str(folder), *(f"  {name:<{width}}  {value}" for name, value in lines)])


def _prior(prior: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    kind = str(prior.get("conditioning") or prior.get("kind"))
    shape = prior.get("shape") or _loaded_shape(folder)
    lines = [("prior", f"{kind}, images {' x '.join(map(str, shape))}")]
    if isinstance(prior.get("sigma_min"), (int, float)):
        lines.append(("levels", f"noise levels from {prior['sigma_min']:.4g} up, per real channel"))
    network = prior.get("network")
    if isinstance(network, dict):
        words = [str(network.get("kind")), f"channels {network.get('channels')}"]
        lines.append(("network", ", ".join(words)))
    weights = next(
        (
            f
            for f in (folder / "weights.safetensors", folder / "prior" / "weights.safetensors")
            if f.is_file()
        ),
        None,
    )
    if weights is not None:
        lines.append(("weights", f"{weights.stat().st_size / 1e6:.2g} MB"))
    about = prior.get("about")
    if isinstance(about, dict) and about.get("data"):
        lines.append(("trained on", str(about["data"])))
    if isinstance(about, dict) and about.get("padding"):
        lines.append(("sizes", str(about["padding"])))
    return lines


def _loaded_shape(folder: Path) -> tuple[int, ...]:
    """The size of a prior whose description does not have it."""
    from ambient_sci.priors import load_prior

    return tuple(load_prior(folder if (folder / "prior.json").is_file() else folder / "prior").shape)


def _run(run: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    settings = run.get("settings", {})
    data = run.get("data", {})
    lines = []
    if isinstance(data, dict) and data:
        lines.append(
            ("data", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in data.items() if _plain(k, v)))
        )
    shown = ("max_steps", "max_minutes", "batch_size", "learning_rate", "augmentations", "seed")
    text = ", ".join(f"{k.replace('_', ' ')} {settings[k]}" for k in shown if settings.get(k) is not None)
    lines.append(("settings", text))
    last = _last_line(folder / "log.jsonl")
    if last is not None:
        words = [f"stage {last.get('stage')}, step {last.get('step')}"]
        if isinstance(last.get("loss"), (int, float)):
            words.append(f"loss {last['loss']:.4g}")
        if isinstance(last.get("seconds"), (int, float)):
            words.append(f"after {last['seconds']:.0f} s")
        lines.append(("last entry", ", ".join(words)))
    return lines


def _plain(name: str, value: Any) -> bool:
    """Facts for a reader; fingerprints are none."""
    if name in ("content", "file"):
        return False
    return isinstance(value, (str, int, float)) or (isinstance(value, list) and len(value) < 6)


def _json(path: Path) -> dict[str, Any] | None:
    """A file's JSON, None without the file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        raise InputError(f"{path}: expected JSON, got a damaged file") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def _last_line(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    for line in reversed(path.read_text().splitlines()):
        try:
            return json.loads(line)
        except ValueError:  # a line that was cut off
            continue
    return None
