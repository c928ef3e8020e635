"""How good are the denoisers behind the digits' table, level by level? Needs the truth, so it explains and
does not choose.

    python -m recipes.exactness.denoiser_error [--images 256] [--out runs/exactness]

For every prior of the part "digits", on held-out images x + sigma z: the root mean square error of D over
sigma, and the share of the noise that D leaves in flat background (further than two pixels from ink), mean of
(D - x) z / sigma.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ambient_sci import load_prior
from ambient_sci.priors import Prior, StagedPrior
from recipes.small_images import images

LEVELS = (0.01, 0.02, 0.05, 0.07, 0.1, 0.107, 0.115, 0.15, 0.2, 0.214, 0.23, 0.3, 0.5)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--profile", default="two-core", choices=["two-core", "gpu"])
    parser.add_argument("--out", type=Path, default=Path("runs/exactness"))
    arguments = parser.parse_args()
    clean = images("train60k")[0][: arguments.images]
    folder = arguments.out / arguments.profile / "digits"
    print(f"{'level':28s}" + "".join(f"{level:8g}" for level in LEVELS))
    for path in sorted(p for p in folder.iterdir() if (p / "prior").is_dir()):
        prior = load_prior(path)
        shown = {path.name: prior}
        if isinstance(prior, StagedPrior):
            shown[f"{path.name}, anchor"] = prior.anchor
        for name, one in shown.items():
            found = [errors(one, clean, level) for level in LEVELS]
            print(f"{name:28s}" + "".join(f"{rms:8.3f}" for rms, _ in found) + "   error / level")
            print(f"{'':28s}" + "".join(f"{left:8.3f}" for _, left in found) + "   noise left", flush=True)


@torch.no_grad()
def errors(prior: Prior, clean: torch.Tensor, level: float) -> tuple[float, float]:
    """(RMS error over ``level``, share of the noise left in flat background)."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    error = (prior(clean + level * noise, level) - clean) / level
    flat = torch.nn.functional.max_pool2d(clean, 5, 1, 2) == clean.min()
    return float(error.square().mean().sqrt()), float((error * noise)[flat].mean())


if __name__ == "__main__":
    main()
