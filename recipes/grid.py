"""What experiments share: a grid of cells, each made once and kept as JSON, shared between processes, and
tables of what is there.

    grid = Grid(out)
    grid.run(cells, work)                    # work(cell) -> results; what is there is not made again
    print(table(grid.read(), rows, columns))

A cell that is done is one JSON file: its settings, what ``work`` returned, the machine and the seconds.
Started twice on one folder, a command shares the work: a process takes the next cells that no other has in
hand. The locks belong to the system, which releases those of a process that was killed; ``work`` continues
from its own checkpoints.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ambient_sci.errors import InputError
from ambient_sci.whole_files import write_json, write_text


@dataclass(frozen=True)
class Cell:
    """A piece of an experiment.

    Attributes:
        name: names its file.
        settings: what it is made with, JSON values; they go into its file.
        group: cells of one group are made by one process, one after the other (they share something costly);
            by default each is its own.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    group: str | None = None


class Grid:
    """The cells of an experiment in a folder.

    Args:
        out: folder of the files.
        redo: make the cells that are there again.
    """

    def __init__(self, out: Path, *, redo: bool = False) -> None:
        self.out, self.redo = out, redo

    def path(self, cell: Cell) -> Path:
        """File of a cell."""
        return self.out / f"{cell.name}.json"

    def read(self, cells: Iterable[Cell] | None = None) -> list[dict[str, Any]]:
        """What is there: of ``cells``, in their order, or of all files, by name."""
        paths = sorted(self.out.glob("*.json")) if cells is None else [self.path(cell) for cell in cells]
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def run(self, cells: Iterable[Cell], work: Callable[[Cell], dict[str, Any]]) -> None:
        """Make every cell that is not there; at the end, wait for those that other processes have in hand.

        Raises:
            InputError: a file that is there was made with other settings.
        """
        groups: dict[str, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.group or cell.name, []).append(cell)
        self.out.mkdir(parents=True, exist_ok=True)
        asked = {cell.name for group in groups.values() for cell in group} if self.redo else set()
        for wait in (False, True):
            for name, group in groups.items():
                if not self._missing(group, asked):
                    continue
                with locked(self.out / f".{name}.lock", wait=wait) as held:
                    if held:
                        self._make(self._missing(group, asked), work, asked)

    def _missing(self, group: list[Cell], asked: set[str]) -> list[Cell]:
        """Cells that are not there, or are to be made again."""
        return [cell for cell in group if cell.name in asked or not self._there(cell)]

    def _there(self, cell: Cell) -> bool:
        """Whether a cell is there, with these settings."""
        path = self.path(cell)
        if not path.exists():
            return False
        found, settings = json.loads(path.read_text()), json.loads(json.dumps(cell.settings))
        other = {key: found[key] for key in settings if key in found and found[key] != settings[key]}
        if other:
            expected = {key: settings[key] for key in other}
            raise InputError(f"{path}: expected {expected}, found {other}; give another --out, or remove it")
        return True

    def _make(self, cells: list[Cell], work: Callable[[Cell], dict[str, Any]], asked: set[str]) -> None:
        for cell in cells:
            self._log(f"{cell.name}: begun")
            begun = time.monotonic()
            try:
                found = work(cell)
            except BaseException as error:
                self._log(f"{cell.name}: {type(error).__name__}: {error}")
                raise
            seconds = round(time.monotonic() - begun, 1)
            # A method that times itself says so in `found`, which counts.
            write_json(self.path(cell), {"machine": machine(), "seconds": seconds, **cell.settings, **found})
            asked.discard(cell.name)
            self._log(f"{cell.name}: done in {seconds} s")

    def _log(self, text: str) -> None:
        """A line on the terminal, and in log.txt with the process that wrote it."""
        say(text)
        with (self.out / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {os.getpid()}  {text}\n")


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which the system releases when the process ends however it ends; yields whether it is
    held."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def table(
    cells: Iterable[Any],
    rows: Mapping[str, Callable[[Any], str]],
    columns: Sequence[tuple[str, Callable[[list[Any]], str]]],
) -> str:
    """Markdown, one line for all cells that agree in ``rows``, in the order in which they come.

    Args:
        cells: results, of any kind that the functions read.
        rows: titles of the first columns, and what tells the lines apart.
        columns: titles of the others, and the text for the cells of a line.
    """
    lines: dict[tuple[str, ...], list[Any]] = {}
    for cell in cells:
        lines.setdefault(tuple(text(cell) for text in rows.values()), []).append(cell)
    titles = [*rows, *(title for title, _ in columns)]
    found = [titles, *([*key, *(text(own) for _, text in columns)] for key, own in lines.items())]
    head, *body = ["| " + " | ".join(line) + " |" for line in found]
    return "\n".join([head, "|" + "---|" * len(titles), *body])


def fill(readme: Path, name: str, text: str) -> None:
    """Put ``text`` between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a file.

    Raises:
        InputError: the lines are not there.
    """
    begin, end, old = f"<!-- {name} -->\n", f"<!-- /{name} -->", readme.read_text()
    before, found, rest = old.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{readme}: expected the lines {begin.strip()} and {end}, found none")
    write_text(readme, f"{before}{begin}\n{text.strip()}\n\n{end}{after}")


def mean_std(values: Sequence[float], mean: str = ".4g", std: str = ".2g") -> str:
    """Mean, and the standard deviation where there are several values, in these formats."""
    centre = format(statistics.fmean(values), mean)
    return centre if len(values) == 1 else f"{centre} ± {statistics.stdev(values):{std}}"


def parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """A command line with the options that every experiment has: --out, --device, --table-only."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--out", type=Path, default=Path(out), help="folder of the results")
    found.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    found.add_argument("--table-only", action="store_true", help="the table of what there is; run nothing")
    return found


def machine() -> str:
    """Where a number was measured."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} {platform.machine()} cores, {torch.get_num_threads()} threads"


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
