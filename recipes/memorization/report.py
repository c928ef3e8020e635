"""Table and figures of the cells there are."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ambient_sci.evaluation.memorization_figures import frontier_figure
from ambient_sci.whole_files import write_text
from recipes.grid import Grid, mean_std, table
from recipes.memorization.cells import Job, jobs
from recipes.memorization.pictures import write_pictures

#: What a cell is asked, and the title of its column.
KINDS = {
    "frechet": "Fréchet, {}",
    "kid": "KID, {}",
    "copies": "copies, {}",
    "similarity": "similarity, {}",
    "held-out similarity": "held out",
}
AXES = {"frechet": "Fréchet distance", "kid": "KID", "copies": "share of copies"}
Entry = tuple[Job, dict[str, Any]]


def write_report(grid: Grid, settings: dict[str, Any]) -> str:
    """Write table.md and the figures beside the cells; return the table."""
    there = [(job, cell) for job in jobs(settings) for cell in grid.read([job.cell()])]
    if not there:
        return "no cells yet"
    there.sort(key=lambda entry: (entry[0].images, entry[0].sigma_n, entry[0].step))
    rows = {
        "images": lambda entry: str(entry[0].images),
        "sigma_n": lambda entry: "0 (DSM)" if entry[0].sigma_n == 0 else f"{entry[0].sigma_n:g}",
        "steps": lambda entry: str(entry[0].step),
    }
    last = [entry for entry in there if entry[0].last]
    parts = [table(own, rows, _columns(own)) for own in (last, there) if own]
    titles = ("Trained to the end", "At every stop")
    text = "\n\n".join(f"{title}\n\n{part}" for title, part in zip(titles[-len(parts) :], parts, strict=True))
    write_text(grid.out / "table.md", text + "\n")
    for num in dict.fromkeys(job.images for job, _ in there):
        frontier(grid.out, num, [entry for entry in there if entry[0].images == num], settings["frontier"])
    write_pictures(grid.out, [job for job, _ in last], settings["show"])
    return text


def value(cell: dict[str, Any], kind: str, features: str) -> dict[str, Any] | None:
    """``value`` and perhaps ``interval`` of a kind of measure on these features; None where a cell has not
    got it."""
    found = cell["scores"].get(features, {})
    if kind in ("frechet", "kid"):
        found = found.get(kind)
        key = "distance" if kind == "frechet" else "mean"
        return None if found is None else {"value": found[key], "interval": found["interval"]}
    memory = found.get("memory")
    if memory is None:
        return None
    if kind == "copies":
        copies = memory["ratio"]["copies"]
        return {"value": copies["fraction"], "interval": copies["interval"]}
    return {"value": memory["similarity"]["held_out" if "held" in kind else "samples"]["mean"]}


def _columns(entries: list[Entry]) -> list[tuple[str, Callable[[list[Entry]], str]]]:
    """The number of seeds, and a column for every measure that some cell has."""
    found: list[tuple[str, Callable[[list[Entry]], str]]] = [("seeds", lambda own: str(len(own)))]
    for features in dict.fromkeys(name for _, cell in entries for name in cell["scores"]):
        for kind, title in KINDS.items():
            if any(value(cell, kind, features) for _, cell in entries):
                found.append((title.format(features), _text(kind, features)))
    return found


def _text(kind: str, features: str) -> Callable[[list[Entry]], str]:
    """Mean over seeds ± their standard deviation; the interval of the cell where there is one seed."""

    def text(own: list[Entry]) -> str:
        values = [found for _, cell in own if (found := value(cell, kind, features))]
        if not values:
            return ""
        mean = mean_std([found["value"] for found in values], ".3g")
        if len(values) > 1 or "interval" not in values[0]:
            return mean
        return "{} ({:.3g} to {:.3g})".format(mean, *values[0]["interval"])

    return text


def frontier(out: Path, num: int, entries: list[Entry], axes: dict[str, list[str]]) -> Path | None:
    """Quality against copies: sigma_n at the last stop, and denoising score matching over its stops.

    Means over seeds of values and of the ends of their bootstrap intervals.
    """

    def points(chosen: list[Entry], key: Callable[[Job], float]) -> list[dict[str, Any]]:
        found: dict[float, list[dict[str, Any]]] = {}
        for job, cell in chosen:
            both = {axis: value(cell, *axes[axis]) for axis in "xy"}
            if all(both.values()):
                found.setdefault(key(job), []).append(both)
        return [{"text": f"{place:g}", **_mean(own)} for place, own in sorted(found.items())]

    curves = {
        "trained to the end, by sigma_n": points([e for e in entries if e[0].last], lambda job: job.sigma_n),
        "DSM, by steps": points([e for e in entries if e[0].sigma_n == 0], lambda job: job.step),
    }
    curves = {title: own for title, own in curves.items() if own}
    if not curves:
        return None
    x, y = (f"{AXES[kind]} ({features})" for kind, features in (axes["x"], axes["y"]))
    return frontier_figure(out / f"frontier-n{num}.png", curves, (x, y), none=0.01)


def _mean(own: list[dict[str, Any]]) -> dict[str, Any]:
    """A point of several seeds."""
    mean = statistics.fmean
    return {axis: mean(p[axis]["value"] for p in own) for axis in "xy"} | {
        f"{axis}_interval": [mean(p[axis]["interval"][end] for p in own) for end in (0, 1)] for axis in "xy"
    }
