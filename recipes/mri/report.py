"""Table and figures of the cells there are. Errors are standard errors over people: slices of one head are no
repetitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ambient_sci.evaluation import reconstruction_figure
from ambient_sci.sampling import ResultFile
from ambient_sci.whole_files import whole_file, write_text
from recipes.grid import Grid, mean_std
from recipes.grid import table as markdown
from recipes.mri.ablations import ARMS
from recipes.mri.cells import CLASSIC
from recipes.mri.scans import Scans

LEVEL = "80"
#: Columns of an acceleration after the first one.
ENTRIES = ("SSIM", "std / error", f"{LEVEL} % cover truth", f"{LEVEL} % cover held-out rows")


def write_report(out: Path, profile: dict[str, Any]) -> str:
    """Write table.md and the figures into ``out``; return the table."""
    cells = Grid(out / "cells").read()
    # Cells of an earlier configuration stay on disk and out of the table.
    known = [None, *profile["priors"]]
    cells = [c for c in cells if c["prior"] in known and c["R_test"] in profile["test"]]
    ablations = Grid(out / "ablations").read()
    parts = [table(cells, profile)] if cells else []
    parts += [differences(cells)] if cells else []
    parts += [ablation_table(ablations)] if ablations else []
    text = "\n\n".join(p for p in parts if p) or "no cells yet"
    write_text(out / "table.md", text + "\n")
    if cells:
        psnr_figure(out / "psnr.png", cells, profile)
        for r in profile["test"]:
            images_figure(out / f"images-R{r:g}.png", out, r, cells, profile)
    return text


def table(cells: list[dict[str, Any]], profile: dict[str, Any]) -> str:
    """One row a prior and method, five columns an acceleration."""
    order = {row: k for k, row in enumerate(_rows(cells, profile))}
    rows = {
        "prior": lambda cell: cell["prior"] or "classic",
        "trained on": _trained_on,
        "method": lambda cell: cell["method"],
    }

    def entry(rate: float, k: int) -> Callable[[list[dict[str, Any]]], str]:
        return lambda own: next((_entries(cell)[k] for cell in own if cell["R_test"] == rate), "")

    columns = []
    for r in [r for r in profile["test"] if any(c["R_test"] == r for c in cells)]:
        columns += [(title, entry(r, k)) for k, title in enumerate([f"R = {r:g}: PSNR / dB", *ENTRIES])]
    text = markdown(sorted(cells, key=lambda c: order[c["prior"], c["method"]]), rows, columns)
    people = cells[0]["slices"]
    counted = ", ".join(f"{p} ({n})" for p, n in people.items())
    return (
        f"{text}\n\n± standard error over {len(people)} people (slices: {counted}); PSNR and SSIM of "
        "magnitudes."
    )


def _rows(cells: list[dict[str, Any]], profile: dict[str, Any]) -> list[tuple[str | None, str]]:
    """(prior, method) in the order of the configuration."""
    there = dict.fromkeys((c["prior"], c["method"]) for c in cells)
    order: list[str | None] = [None, *profile["priors"]]
    methods = [*CLASSIC, "mmps", "one-step", "a-dps"]
    return sorted(there, key=lambda k: (order.index(k[0]), methods.index(k[1])))


def _trained_on(cell: dict[str, Any]) -> str:
    if cell["prior"] is None:
        return ""
    rates = ", ".join(f"{r:g}" for r in cell["R_train"])
    return f"{cell['kind']}, R = {rates}"


def _entries(cell: dict[str, Any]) -> list[str]:
    scores, blank = cell["scores"], ["", "", ""]
    found = [with_error(scores["psnr"], 2), with_error(scores["ssim"], 3) if "ssim" in scores else ""]
    if "with_truth" not in cell:
        return found + blank
    cover = [f"{100 * cell[k]['coverage'][LEVEL]['observed']:.0f}" for k in ("with_truth", "held_out")]
    return [*found, f"{cell['std_over_error']['mean']:.2f}", *cover]


def with_error(score: dict[str, Any], digits: int) -> str:
    """Mean and standard error over people."""
    spread = standard_error(list(score["people"].values()))
    return f"{score['mean']:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def standard_error(values: list[float]) -> float | None:
    """Of their mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def differences(cells: list[dict[str, Any]]) -> str:
    """PSNR against what a prior has to be compared with, person by person: people are harder or easier for
    every method alike."""
    lines = ["| difference in PSNR / dB | R | mean ± standard error over people |", "|---|---|---|"]
    methods = {(c["prior"], c["method"], c["R_test"]): c for c in cells}
    for (prior, method, r), cell in sorted(
        methods.items(), key=lambda kv: (kv[0][2], str(kv[0][0]), kv[0][1])
    ):
        if method != "mmps" or prior is None:
            continue
        others = [("clean", "mmps"), (None, "l1-wavelet"), (None, "tv")]
        for other in others:
            if other[0] == prior or (*other, r) not in methods:
                continue
            there = methods[(*other, r)]["scores"]["psnr"]["people"]
            gaps = [v - there[p] for p, v in cell["scores"]["psnr"]["people"].items()]
            spread = standard_error(gaps)
            note = f"{statistics.fmean(gaps):+.2f}" + ("" if spread is None else f" ± {spread:.2f}")
            lines.append(f"| {prior} − {other[0] or other[1]} | {r:g} | {note} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def ablation_table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, and the paired difference from the full loss."""
    full = {f["seed"]: f["scores"]["psnr"]["mean"] for f in found if f["arm"] == "full"}

    def score(name: str, digits: int) -> Callable[[list[dict[str, Any]]], str]:
        return lambda own: _spread([f["scores"][name]["mean"] for f in own], digits)

    def difference(own: list[dict[str, Any]]) -> str:
        others = [f for f in own if f["arm"] != "full" and f["seed"] in full]
        return _spread([f["scores"]["psnr"]["mean"] - full[f["seed"]] for f in others], 2) if others else ""

    columns = [
        ("seeds", lambda own: str(len(own))),
        ("PSNR / dB", score("psnr", 2)),
        ("NRMSE", score("nrmse", 4)),
        ("PSNR − full, same seed", difference),
    ]
    ordered = sorted((f for f in found if f["arm"] in ARMS), key=lambda f: list(ARMS).index(f["arm"]))
    text = markdown(ordered, {"ablation": lambda f: f["arm"]}, columns)
    return f"{text}\n\n± standard deviation over seeds."


def _spread(values: list[float], digits: int) -> str:
    return mean_std(values, f".{digits}f", f".{digits}f")


# -- figures -------------------------------------------------------------------------------------------------


def psnr_figure(path: Path, cells: list[dict[str, Any]], profile: dict[str, Any]) -> None:
    """PSNR of every prior and method against the acceleration, with standard errors over people."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = _rows(cells, profile)
    step = 0.6 / max(len(rows) - 1, 1)
    for k, (name, method) in enumerate(rows):
        own = sorted(
            (c for c in cells if (c["prior"], c["method"]) == (name, method)), key=lambda c: c["R_test"]
        )
        x = [profile["test"].index(c["R_test"]) - 0.3 + step * k for c in own]
        y = [c["scores"]["psnr"]["mean"] for c in own]
        error = [standard_error(list(c["scores"]["psnr"]["people"].values())) or 0.0 for c in own]
        marker = "s" if name is None else {"mmps": "o", "one-step": "^", "a-dps": "v"}[method]
        label = method if name is None else f"{name}, {method}"
        axes.errorbar(x, y, error, fmt=marker, label=label, color=f"C{k % 10}", capsize=2, markersize=5)
    axes.set_xticks(range(len(profile["test"])), [f"R = {r:g}" for r in profile["test"]])
    axes.set_ylabel("PSNR / dB, mean and standard error over people")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format="png")


def images_figure(
    path: Path, out: Path, rate: float, cells: list[dict[str, Any]], profile: dict[str, Any]
) -> None:
    """A slice of each person at one acceleration: truth, classic methods, one reconstruction of every kind of
    prior, error bars of EM."""
    own = {(c["prior"], c["method"]): c for c in cells if c["R_test"] == rate}
    scans = Scans(profile["scans"], out / "scans").test(rate)
    rows = [scans.subjects.index(s) + scans.subjects.count(s) // 2 for s in dict.fromkeys(scans.subjects)]
    shown: dict[str, Any] = {}
    last: tuple[str, Any, Any] | None = None
    rows_shown = _rows(list(own.values()), profile)
    priors = foremost(rate, [own[row] for row in rows_shown])
    for name, method in rows_shown:
        if method in ("sense", "a-dps") or name not in priors:
            continue
        with ResultFile(out / "cells" / f"{name or 'classic'}--{method}--R{rate:g}.h5") as file:
            mean, std = file.mean(rows), file.std(rows)
        if name is not None and own[name, method]["kind"] == "em" and own[name, method]["R_train"] == [rate]:
            last = (name, mean, std)
        else:
            shown[name or method] = mean
    if not shown:
        return
    peaks = torch.tensor([scans.peaks[scans.subjects[r]] for r in rows], dtype=torch.float64)
    turned = {k: _upright(v) for k, v in shown.items()}
    bars = (
        {} if last is None else {"mean": _upright(last[1]), "std": _upright(last[2]), "mean_title": last[0]}
    )
    labels = [scans.subjects[r] for r in rows]
    reconstruction_figure(path, _upright(scans.truth[rows]), turned, labels=labels, peak=peaks, **bars)


def foremost(rate: float, cells: list[dict[str, Any]]) -> set[str | None]:
    """Of every kind of prior the first one trained at this acceleration, or the first one; None stands for
    classic methods."""
    chosen: dict[str, tuple[bool, str | None]] = {}
    for cell in cells:
        here = cell["R_train"] == [rate]
        if cell["kind"] not in chosen or (here and not chosen[cell["kind"]][0]):
            chosen[cell["kind"]] = here, cell["prior"]
    return {prior for _, prior in chosen.values()}


def _upright(x: Any) -> Any:
    return x.rot90(1, (-2, -1))
