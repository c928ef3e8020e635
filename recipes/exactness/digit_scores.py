r"""Digits: the data, and distances on the features of a small classifier.

Data: the 10,000 images of MNIST's test part, 28 x 28, values in [-1, 1], are what priors learn from
(corrupted). The 60,000 of its training part are held out: they are the reference of every distance, and the
classifier is trained on them.

Features, 70 of them. Which digit it is: the 64 activations before the last layer of a convolutional network
(two strided convolutions, two dense layers, 104,000 weights), trained for two epochs with a fixed seed on the
held-out images. How it is drawn: the mean absolute Haar coefficients in three orientations on two scales; the
activations alone hardly see noise or blur, a blurred seven is still a seven. Each is standardised over the
reference; units of the classifier that never fire there (about half) count for nothing. Frechet distance and
KID on these features compare with nothing but each other.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ambient_sci.evaluation import distances
from recipes.scripts import script

EPOCHS, BATCH = 2, 128
KID_REFERENCE = 10_000


@lru_cache(maxsize=2)
def images(part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) and labels of "train60k" or "test10k"."""
    x, labels = script("digits").load(part)
    return torch.from_numpy(x), torch.from_numpy(labels)


def spread(num: int) -> Tensor:
    """``num`` of the 10,000 images, evenly spread (their first half is by other writers, and easier)."""
    x = images("test10k")[0]
    return x[torch.linspace(0, len(x) - 1, num).round().long()]


class Classifier(nn.Module):
    """Digits to 10 classes; `activations` are the 64 before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * 49, 64), nn.ReLU()),
        )
        self.last = nn.Linear(64, 10)

    @torch.no_grad()
    def activations(self, x: Tensor) -> Tensor:
        """(N, 64)."""
        return torch.cat([self.body(part.float()) for part in x.split(1000)])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10)."""
        return self.last(self.body(x))


def texture(x: Tensor) -> Tensor:
    """Mean absolute Haar coefficients of images (N, 1, H, W): three orientations on the finest scale and the
    next, (N, 6)."""
    found = []
    for _ in range(2):
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        found += [(part / 2).abs().mean((1, 2, 3)) for part in (a - b + c - d, a + b - c - d, a - b - c + d)]
        x = (a + b + c + d) / 2
    return torch.stack(found, 1)


def train_classifier() -> Classifier:
    """The classifier, from a fixed seed: the same bits on the same machine."""
    x, labels = images("train60k")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Classifier()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def classifier(folder: Path) -> Classifier:
    """The classifier, trained once and kept in ``folder``; its accuracy on the 10,000 is printed."""
    path = folder / "classifier.safetensors"
    model = Classifier().eval()
    if not path.exists():
        model = train_classifier()
        x, labels = images("test10k")
        with torch.no_grad():
            accuracy = float((model(x).argmax(1) == labels).float().mean())
        print(f"features: classifier with accuracy {accuracy:.4f}", flush=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model


def scale(reference: Tensor) -> Tensor:
    """Standard deviation of every feature; infinite where the reference has none.

    Some units of the classifier never fire on its reference. One sample that makes one fire would outweigh
    everything else; divided by infinity they count for nothing.
    """
    std = reference.std(0)
    return torch.where(std > 1e-3, std, torch.inf)


class Scores:
    """Distances of samples to the 60,000 held-out digits."""

    def __init__(self, folder: Path) -> None:
        self.model = classifier(folder)
        path = folder / "reference.safetensors"
        if not path.exists():
            save_file({"features": self.features(images("train60k")[0])}, path)
        reference = load_file(path)["features"]
        self.mean, self.std = reference.mean(0), scale(reference)
        self.reference = (reference - self.mean) / self.std

    def features(self, x: Tensor) -> Tensor:
        """(N, 70), not yet standardised."""
        return torch.cat([self.model.activations(x), texture(x.float())], 1)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """Frechet distance to all 60,000, KID to 10,000 of them."""
        found = (self.features(samples.cpu()) - self.mean) / self.std
        return {
            "frechet": distances.frechet_distance(found, self.reference),
            "kid": distances.kernel_distance(found, self.reference[:KID_REFERENCE])["mean"],
        }
