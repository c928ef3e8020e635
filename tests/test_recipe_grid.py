"""The grid of cells: each made once, shared between processes, refused where settings differ; the table."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from ambient_sci.errors import InputError
from recipes.grid import Cell, Grid, fill, locked, mean_std, table


def test_what_is_there_is_not_made_again(tmp_path):
    made = []

    def work(cell: Cell) -> dict:
        made.append(cell.name)
        return {"value": cell.settings["x"] ** 2}

    grid, cells = Grid(tmp_path / "g"), [Cell(f"x{k}", {"x": k, "many": (1, 2)}) for k in range(3)]
    grid.run(cells[:2], work)
    grid.run(cells, work)
    assert made == ["x0", "x1", "x2"] and [c["value"] for c in grid.read(reversed(cells))] == [4, 1, 0]
    found = json.loads(grid.path(cells[2]).read_text())
    assert found["x"] == 2 and found["many"] == [1, 2] and {"machine", "seconds"} <= set(found)
    log = (tmp_path / "g" / "log.txt").read_text()
    assert log.count("begun") == log.count("done") == 3
    Grid(tmp_path / "g", redo=True).run(cells[1:], work)
    assert made[3:] == ["x1", "x2"]
    with pytest.raises(InputError, match=r"x1\.json: expected \{'x': 7\}, found \{'x': 1\}"):
        grid.run([Cell("x1", {"x": 7})], work)


def test_a_cell_that_fails_leaves_no_file_and_a_line_in_the_log(tmp_path):
    def work(cell: Cell) -> dict:
        raise ZeroDivisionError("of no use")

    grid = Grid(tmp_path)
    with pytest.raises(ZeroDivisionError):
        grid.run([Cell("a")], work)
    assert not grid.path(Cell("a")).exists()
    assert "a: ZeroDivisionError: of no use" in (tmp_path / "log.txt").read_text()


def test_a_cell_in_other_hands_is_left_alone_and_waited_for(tmp_path):
    """While its lock is held elsewhere the others are done first; then it is found done, and not done
    again."""
    grid, order = Grid(tmp_path), []
    with locked(tmp_path / ".both.lock") as first, locked(tmp_path / ".both.lock", wait=False) as second:
        assert first and not second

    def work(cell: Cell) -> dict:
        order.append(cell.name)
        if cell.name == "c":  # the other process is done with its group
            for name in ("a", "b"):
                (tmp_path / f"{name}.json").write_text('{"by": "other"}')
            other.__exit__(None, None, None)
        return {}

    other = locked(tmp_path / ".both.lock")
    assert other.__enter__()
    grid.run([Cell("a", group="both"), Cell("b", group="both"), Cell("c")], work)
    assert order == ["c"] and [c.get("by") for c in grid.read()] == ["other", "other", None]


def _share(folder: Path, barrier) -> None:
    def work(cell: Cell) -> dict:
        with (folder / f"{cell.name}.made").open("a") as file:
            file.write("x")
        return {}

    barrier.wait()
    Grid(folder).run([Cell(f"c{k}") for k in range(20)], work)


def test_processes_share_the_cells(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_share, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(w.exitcode == 0 for w in workers)
    assert [(tmp_path / f"c{k}.made").read_text() for k in range(20)] == ["x"] * 20
    assert len(Grid(tmp_path).read()) == 20


def test_table():
    cells = [{"m": "b", "s": 1.0, "r": 2}, {"m": "a", "s": 3.0, "r": 4}, {"m": "b", "s": 2.0, "r": 4}]
    columns = [
        ("seeds", lambda own: str(len(own))),
        ("score", lambda own: mean_std([c["s"] for c in own], ".1f", ".2f")),
        ("score", lambda own: next((f"{c['s']:g}" for c in own if c["r"] == 2), "")),
    ]
    assert table(cells, {"method": lambda c: c["m"]}, columns).splitlines() == [
        "| method | seeds | score | score |",
        "|---|---|---|---|",
        "| b | 2 | 1.5 ± 0.71 | 1 |",
        "| a | 1 | 3.0 |  |",
    ]


def test_two_recipes_in_one_process_and_none_in_the_wheel():
    import tomllib

    import recipes.exactness.run as exactness
    import recipes.mri.run as mri

    assert exactness.main is not mri.main
    root = Path(__file__).resolve().parent.parent
    find = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    assert find["include"] == ["ambient_sci*"]
    for script in (root / "recipes").rglob("*.py"):
        assert "sys.path" not in script.read_text(), script


def test_a_table_is_put_between_its_lines(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n")
    for _ in range(2):  # again: the same file
        fill(readme, "one", "| new |\n")
        assert readme.read_text() == (
            "a\n<!-- one -->\n\n| new |\n\n<!-- /one -->\nb\n<!-- two -->\n<!-- /two -->\n"
        )
    with pytest.raises(InputError, match="<!-- three -->"):
        fill(readme, "three", "x")
