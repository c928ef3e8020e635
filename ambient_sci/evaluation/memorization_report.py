"""What `ambient-sci memorization` writes and says: report.json, the values behind it, figures, and a summary
in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.evaluation import memorization_figures as figures
from ambient_sci.evaluation.memorization import MemorizationScore
from ambient_sci.evaluation.memorization_attack import MemorizationAttack
from ambient_sci.evaluation.memorization_error import MemorizationError
from ambient_sci.evaluation.memorization_images import Images, take
from ambient_sci.whole_files import write_json, write_tensors
from ambient_sci.whole_sets import whole_set

#: Figures by name, and what draws them.
Drawn = dict[str, Callable[[Path], Path]]
PAIRS = 12
NO_YARDSTICK = (
    "no held-out images were attacked: how alike an image is that merely fits cannot be said, and nothing "
    "can be concluded"
)


def write_score(
    out: str | os.PathLike[str], found: MemorizationScore, samples: Images, train: Images, held_out: Images
) -> list[Path]:
    """Write a score into the folder ``out``: report, similarities, histogram, the most similar pairs of both
    kinds."""
    near, held = found.neighbours, found.neighbours.held_out
    assert held is not None
    values = {
        "similarity": near.similarity,
        "index": near.index,
        "ratio": found.ratio,
        "held_out.similarity": held.similarity,
        "held_out.index": held.index,
        "held_out.ratio": found.held_out_ratio,
    }
    columns, notes = {}, {}
    for title, images, side in (("generated", samples, near), ("held out", held_out, held)):
        best = side.similarity[:, 0].topk(min(PAIRS, len(near.index), len(held.index)))
        columns[title] = take(images, best.indices.tolist())
        columns[f"nearest to {title}"] = torch.cat(
            [take(train, [int(i)]) for i in side.index[best.indices, 0]]
        )
        notes[title] = [f"{v:.3f}" for v in best.values.tolist()]
    panels = {
        "nearest training image": {"generated": near.similarity[:, 0], "held out": held.similarity[:, 0]}
    }
    drawn: Drawn = {
        "similarity.png": lambda path: figures.distributions_figure(path, panels),
        "pairs.png": lambda path: figures.pairs_figure(path, columns, notes),
    }
    return _write(out, "similarities", values, found.report, score_text(found.report), drawn)


def write_attack(out: str | os.PathLike[str], found: MemorizationAttack) -> list[Path]:
    """Write an attack into the folder ``out``: report, similarities and errors, histograms, what came
    back."""
    values, panels = {}, {}
    drawn: Drawn = {
        "similarity.png": lambda path: figures.distributions_figure(
            path, panels, "similarity to the image itself"
        )
    }
    for attack, suspects in found.suspects.items():
        sides = {"trained on": suspects} | (
            {} if found.controls is None else {"held out": found.controls[attack]}
        )
        panels[attack] = {name: side["similarity"] for name, side in sides.items()}
        panels[f"{attack}, MMSE"] = {name: side["mmse_similarity"] for name, side in sides.items()}
        columns, notes = {}, {}
        rows = min(PAIRS, *(len(side["image"]) for side in sides.values()))
        for name, side in sides.items():
            for kind in ("similarity", "mmse_similarity", "error", "mmse_error"):
                values[f"{attack}.{name.replace(' ', '_')}.{kind}"] = side[kind]
            shown = {
                "": side["image"],
                "attacked": side["attacked"],
                "sample": side["samples"][0],
                "MMSE": side["mmse"],
            }
            columns |= {
                f"{name} {title}".strip(): images[:rows].cpu().float() for title, images in shown.items()
            }
            notes[f"{name} sample"] = [f"{v:.3f}" for v in side["similarity"][0, :rows].tolist()]
        drawn[f"{attack}.png"] = partial(figures.pairs_figure, columns=columns, notes=notes)
    return _write(out, "similarities", values, found.report, attack_text(found.report), drawn)


def write_error(out: str | os.PathLike[str], found: MemorizationError) -> list[Path]:
    """Write an error curve into the folder ``out``: report, errors of every image, figure."""
    drawn: Drawn = {"error.png": lambda path: figures.error_figure(path, found.report["levels"])}
    values = {"train": found.train, "held_out": found.held_out}
    return _write(out, "errors", values, found.report, error_text(found.report), drawn)


def score_text(report: Mapping[str, Any]) -> str:
    """The summary of a score."""
    lines = [
        f"{report['samples']} generated and {report['held_out']} held-out images against {report['train']} "
        "training images, on "
        f"{report['features']}{_range(report)}"
    ]
    for title, key in (("generated", "samples"), ("held out", "held_out")):
        side = report["similarity"][key]
        lines.append(
            f"  {title:10s} similarity {side['quantiles']['0.5']:.3f} (median), {side['max']:.3f} "
            f"(largest); {_counts(side)}; "
            f"calibrated ratio {report['ratio'][key]['quantiles']['0.5']:.3f}"
        )
    lines.append(
        "a generated image is nearer than a held-out one with probability "
        f"{_separation(report['similarity'])}"
    )
    lines.append(f"  by the calibrated ratio {_separation(report['ratio'])}; 0.5 is no memory")
    found = report["ratio"]["copies"]
    lines.append(
        f"{found['fraction']:.1%} ({found['interval'][0]:.1%} to {found['interval'][1]:.1%}) of the "
        f"generated images have a ratio as small as {found['false_alarms']:.0%} of the held-out ones have: "
        f"copies, where it is more than {found['false_alarms']:.0%}"
    )
    return "\n".join(lines)


def attack_text(report: Mapping[str, Any]) -> str:
    """The summary of an attack."""
    lines = [
        f"{report['suspects']} suspected and {report['controls']} held-out images, {report['samples']} "
        "draws each, on "
        f"{report['features']}{_range(report)}"
    ]
    for attack, found in report["attacks"].items():
        what = f"noise {report['level']:.3g}" if attack == "noise" else f"{report['hidden']:.0%} hidden"
        lines.append(f"{attack} ({what})")
        for name, kind in (("draws", "similarity"), ("MMSE", "mmse_similarity")):
            for side in ("suspects", "controls"):
                if found[kind][side] is not None:
                    values = found[kind][side]
                    lines.append(
                        f"  {name:5s} {side:9s} similarity {values['quantiles']['0.5']:.3f}; "
                        f"{_counts(values)}"
                    )
            if "separation" in found[kind]:
                lines.append(
                    f"  {name:5s} told apart with probability {_separation(found[kind])}; 0.5 is no memory"
                )
    if report["controls"] == 0:
        lines.append(f"note: {NO_YARDSTICK}")
    return "\n".join(lines)


def error_text(report: Mapping[str, Any]) -> str:
    """The summary of an error curve."""
    lines = [
        f"denoising error of {report['held_out']} held-out images over that of {report['train']} training "
        "images"
    ]
    for row in report["levels"]:
        low, high = row["interval"]
        lines.append(
            f"  sigma {row['sigma']:9.4g}   ratio {row['ratio']:.4g}   ({low:.4g} to {high:.4g})   AUC "
            f"{row['auc']:.3f}"
        )
    levels = report["memorised_at"]
    lines.append(
        f"memorised at {len(levels)} of {len(report['levels'])} levels (interval above 1)"
        + (f", {levels[0]:.3g} to {levels[-1]:.3g}" if levels else "")
    )
    lines.append(
        f"over all levels a held-out image has the larger error with probability {_separation(report)}; "
        "0.5 is no memory"
    )
    return "\n".join(lines)


def _write(
    out: str | os.PathLike[str],
    name: str,
    values: dict[str, Tensor],
    report: dict[str, Any],
    text: str,
    drawn: Drawn,
) -> list[Path]:
    """Report, values and figures, all of them or none; their paths, the report first."""
    folder, values = Path(out), {k: v.contiguous() for k, v in values.items()}
    with whole_set(folder, "report.json") as part:
        for figure, draw in drawn.items():
            draw(part / figure)
        write_tensors(part / f"{name}.safetensors", values, {})
        write_json(part / "report.json", {**report, "text": text})
    return [folder / file for file in ("report.json", f"{name}.safetensors", *drawn)]


def _range(report: Mapping[str, Any]) -> str:
    found = report["value_range"]
    return "" if found is None else f" (black {found[0]:g}, white {found[1]:g})"


def _counts(side: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{v['count']} > {t}" for t, v in side["above"].items())
    return f"of {side['count']}: {counts}"


def _separation(found: Mapping[str, Any]) -> str:
    low, high = found["separation"]["interval"]
    return f"{found['separation']['auc']:.3f} ({low:.3f} to {high:.3f})"
