"""Table and figures of attacked priors: similarities by rank, counts above thresholds, each beside held-out
images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ambient_sci.evaluation.memorization_figures import ranked_figure
from ambient_sci.evaluation.memorization_statistics import THRESHOLDS
from ambient_sci.whole_files import write_text
from recipes.grid import Grid, table

PLAIN = "plain samples"
#: What is compared with what, and where the report of a cell has it.
QUESTIONS = {
    "noise": ("attack", "attacks", "noise", "similarity"),
    "noise, MMSE": ("attack", "attacks", "noise", "mmse_similarity"),
    "hidden": ("attack", "attacks", "inpaint", "similarity"),
    "hidden, MMSE": ("attack", "attacks", "inpaint", "mmse_similarity"),
    PLAIN: ("samples", "similarity"),
}


def write_report(grid: Grid, names: list[str]) -> str:
    """Write table.md and similarity.png of the priors that have been attacked; return the table."""
    cells = [cell for cell in grid.read() if cell["prior"] in names]
    cells.sort(key=lambda cell: names.index(cell["prior"]))
    if not cells:
        return "no cells yet"
    rows = [
        (cell["prior"], question, side, _found(cell, path))
        for cell in cells
        for question, path in QUESTIONS.items()
        for side in (("generated" if question == PLAIN else "trained on"), "held out")
    ]
    text = table(
        rows,
        {"prior": lambda row: row[0], "what": lambda row: row[1], "images": lambda row: row[2]},
        [
            ("similarity, mean", lambda own: f"{_side(own[0])['mean']:.3f}"),
            *((f"> {t:g}", _share(t)) for t in THRESHOLDS),
            ("told apart", lambda own: _apart(own[0])),
        ],
    )
    write_text(grid.out / "table.md", text + "\n")
    panels = {question: _values(grid.out, cells, question) for question in QUESTIONS}
    ranked_figure(grid.out / "similarity.png", panels)
    return text


def _found(cell: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        cell = cell[key]
    return cell


def _side(row: tuple[Any, ...]) -> dict[str, Any]:
    """The distribution of a row's images: of an attack's suspects or controls, of samples or real images."""
    of_attack, of_samples = ("suspects", "controls"), ("samples", "held_out")
    place = int(row[2] == "held out")
    return row[3].get(of_attack[place]) or row[3][of_samples[place]]


def _share(threshold: float) -> Any:
    def text(own: list[Any]) -> str:
        found = _side(own[0])["above"][f"{threshold:g}"]
        return f"{found['count']} of {_side(own[0])['count']}"

    return text


def _apart(row: tuple[Any, ...]) -> str:
    if row[2] == "held out":
        return ""
    found = row[3]["separation"]
    low, high = found["interval"]
    return f"{found['auc']:.3f} ({low:.3f} to {high:.3f})"


def _values(out: Path, cells: list[dict[str, Any]], question: str) -> dict[str, Tensor]:
    """Similarities of every prior, and of the held-out images beside it."""
    found: dict[str, Tensor] = {}
    attack, _, kind = question.partition(", ")
    for cell in cells:
        folder = out / cell["prior"]
        if question == PLAIN:
            values = load_file(folder / "plain.safetensors")
            pair = values["samples"], values["held_out"]
        else:
            values = load_file(folder / "similarities.safetensors")
            name = "inpaint" if attack == "hidden" else attack
            key = "mmse_similarity" if kind else "similarity"
            pair = values[f"{name}.trained_on.{key}"], values[f"{name}.held_out.{key}"]
        found |= {cell["prior"]: pair[0], f"{cell['prior']}, held out": pair[1]}
    return found
