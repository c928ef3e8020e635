"""The documentation builds strictly, and quotes messages, commands and options that exist."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ambient_sci.cli import parse

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="the docs extra is not installed"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(x for x in done.stderr.splitlines() if not x.startswith("INFO"))
    return out


@needs_mkdocs
def test_pages_of_the_built_site(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "figures/hero.png" in home and (site / "figures" / "hero.png").exists()
    words = re.sub(r"<[^>]*>", "", home)  # highlighted code is in pieces
    assert "pip install torch --index-url" in words and 'load_prior("pretrained:brain64")' in words.replace(
        "&quot;", '"'
    )
    theory = (site / "theory" / "index.html").read_text()
    assert all(rf"\tag{{{k}}}" in theory for k in range(1, 6)) and 'class="arithmatex"' in theory
    assert not re.search(r"\$\$", re.sub(r"<[^>]*>", "", theory)), "mathematics that was not recognised"


@needs_mkdocs
def test_public_functions_come_first_with_headings(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    headings = re.findall(r'<h2 id="ambient_sci\.([\w.]+)"', page)
    assert [h.split(".")[-1] for h in headings[:4]] == ["fit", "reconstruct", "generate", "load_prior"]
    kinds = re.findall(
        r'<h2 id="ambient_sci\.[\w.]+".*?doc-symbol-(function|module|class)', page, flags=re.DOTALL
    )
    assert kinds[:4] == ["function"] * 4  # a module of the same name would hide the function
    configuration = (site / "api" / "configuration" / "index.html").read_text()
    assert 'id="ambient_sci.TrainConfig"' in configuration and "learning_rate" in configuration


@needs_mkdocs
def test_nothing_is_fetched_from_elsewhere_but_mathjax(site: Path) -> None:
    found = set()
    for page in site.rglob("*.html"):
        text = page.read_text()
        found |= set(re.findall(r'<script[^>]*src="(https?://[^"]+)"', text))
        found |= set(
            re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect)"[^>]*href="(https?://[^"]+)"', text)
        )
        found |= set(re.findall(r'<img[^>]*src="(https?://[^"]+)"', text))
    assert all("mathjax" in address for address in found) and len(found) == 1


@needs_mkdocs
def test_a_parameter_that_does_not_exist_is_noticed() -> None:
    """``a, b: text`` documents two parameters; griffe gets names one by one, so a wrong one stops the build."""
    separated = _joined_parameters().separated
    before = "Say it.\n\nArgs:\n    low, high: ends of the\n        grid.\n    count: how many.\n"
    after = (
        "Say it.\n\nArgs:\n    low: ends of the\n        grid.\n    high: See `low`.\n    count: how many.\n"
    )
    returns = "\nReturns:\n    a, b: both."
    assert separated(before + returns) == after + returns
    assert separated("Args:\n    a, b: both.") == "Args:\n    a: both.\n    b: See `a`."


def _joined_parameters():
    spec = importlib.util.spec_from_file_location("joined_parameters", DOCS / "joined_parameters.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command_lines() -> list[tuple[str, str]]:
    lines = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines += [(page.name, line) for line in block.splitlines() if line.startswith("ambient-sci ")]
    return lines


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_on_the_pages_exist_with_their_options(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if words != ["--version"]:
        assert parse(words), page


def test_options_in_running_text_exist() -> None:
    """Options between backquotes are those of some command or data script."""
    from ambient_sci.commands import COMMANDS

    known = {"--version", "--help"}
    for kind in COMMANDS.values():
        known |= {"--" + name.replace("_", "-") for name in kind.__dataclass_fields__}
    for script in (ROOT / "datasets").glob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', script.read_text()))
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        quoted = [q for q in re.findall(r"`([^`\n]*--[^`\n]*)`", text) if "tyro" not in q]
        named = {o for q in quoted for o in re.findall(r"--[a-z][a-z-]*", q)}
        assert named <= known, f"{page.name}: {sorted(named - known)}"


def messages_of_the_package() -> list[str]:
    """Every string of the source; what an f-string fills in stands as an ellipsis."""
    found = []
    for path in (ROOT / "ambient_sci").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_that_are_explained_exist() -> None:
    quoted = re.findall(r"^\*\*(.+?)\*\*", (DOCS / "guide" / "messages.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 15
    everything = messages_of_the_package()
    for message in quoted:
        pattern = r".*?".join(re.escape(part.strip()) for part in message.split("..."))
        assert any(re.search(pattern, known, flags=re.DOTALL) for known in everything), message


def test_the_figure_of_the_home_page_can_be_drawn_again(tmp_path: Path) -> None:
    """Its script, with two samples and two noise levels: the picture, and the numbers of the caption."""
    script, out = DOCS / "figures" / "hero.py", tmp_path / "hero.png"
    options = ["--out", str(out), "--samples", "2", "--steps", "2"]
    done = subprocess.run([sys.executable, str(script), *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_bytes()[:4] == b"\x89PNG" and done.stdout.count("std / error") == 3


def test_figures_of_the_pages_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / name).exists(), f"{page.name}: {name}"


def test_numbers_have_a_leading_zero() -> None:
    """0.05, not .05, on every page that users read."""
    for page in PAGES:
        if page.name in ("design.md", "formats.md"):
            continue
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        bare = re.findall(r"(?<![\w.\])\-/`*])\.\d+\b", text)
        assert not bare, f"{page.name}: {bare[:5]}"


def test_the_packages_description_matches_its_files() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert all((ROOT / name).exists() for name in project["project"]["license-files"])
    assert (ROOT / "ambient_sci" / "py.typed").exists()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["ambient_sci"]
    extras = set(project["project"]["optional-dependencies"])
    for page in PAGES:
        named = {
            e
            for group in re.findall(r"pip install '\.\[([\w,]+)\]'", page.read_text())
            for e in group.split(",")
        }
        assert named <= extras, f"{page.name}: {sorted(named - extras)}"
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert version and version[1] == project["project"]["version"]
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
