"""Figures of images and results, and what a notebook shows of results, priors and operators."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import ambient_sci as asci
from ambient_sci import plotting
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, Identity, Masking, birdcage_maps
from ambient_sci.priors import GaussianPrior, load_prior
from ambient_sci.sampling import Reconstruction


def result(images: int = 3, channels: int = 1, samples: int = 4, size: int = 8) -> Reconstruction:
    x = torch.randn(samples, images, channels, size, size, generator=torch.Generator().manual_seed(0))
    return Reconstruction.from_samples(x, {"sampler": "mmps"})


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def pixels(figure, title: str, row: int = 0) -> np.ndarray:
    """What a cell of the figure shows."""
    columns = [axes for axes in figure.axes if axes.images]
    width = len(titles(figure))
    return np.asarray(columns[row * width + titles(figure).index(title)].images[0].get_array())


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_result_shows_what_it_holds(channels):
    found = result(channels=channels)
    truth = torch.zeros(3, channels, 8, 8)
    figure = found.plot(truth=truth, measured=np.ones((3, channels, 8, 8)), samples=1)
    assert titles(figure) == ["truth", "measured", "mean", "std", "sample 1", "|error|"]
    std = found.std.square().sum(1).sqrt()
    assert np.allclose(pixels(figure, "std", 1), std[1].numpy(), atol=1e-6)
    assert np.allclose(pixels(figure, "|error|", 2), found.mean.square().sum(1).sqrt()[2].numpy(), atol=1e-6)
    shared = [
        axes.images[0].get_clim()
        for axes in figure.axes
        if axes.images and axes.images[0].get_cmap().name == "magma"
    ]
    assert len(set(shared)) == 1
    figure.savefig(written := io.BytesIO())
    assert written.tell() > 1000


def test_columns_that_would_say_nothing_are_left_out():
    assert titles(result().plot()) == ["mean", "std", "sample 1", "sample 2"]
    assert titles(result(samples=1).plot()) == ["mean"]
    assert titles(asci.plot(result(), samples=0)) == ["mean", "std"]


def test_rows_are_chosen_and_labelled():
    found = result(images=9)
    found.subjects = [f"s{k}" for k in range(9)]
    figure = found.plot(rows=3)
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["s0", "s4", "s8"]
    figure = found.plot(indices=[5, 2])
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["s5", "s2"]
    assert np.allclose(pixels(figure, "mean", 1), found.mean[2, 0].numpy())


def test_images_of_any_form():
    one = torch.rand(8, 8)
    for images in (one, one[None], one[None, None], one.numpy(), torch.polar(one, one)):
        cells = [axes for axes in asci.plot(images).axes if axes.images]
        assert len(cells) == 1 and np.allclose(
            np.asarray(cells[0].images[0].get_array()), one.numpy(), atol=1e-6
        )
    assert len([axes for axes in asci.plot(torch.rand(5, 1, 4, 4)).axes if axes.images]) == 5
    assert titles(asci.plot({"a": torch.rand(2, 1, 4, 4), "b": torch.rand(2, 3, 4, 4)})) == ["a", "b"]
    assert titles(asci.plot([torch.rand(2, 1, 4, 4)] * 2, titles=["x", "y"])) == ["x", "y"]


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: asci.plot(torch.zeros(2, 1, 3, 4, 4)), r"\(B, C, H, W\)"),
        (lambda: asci.plot(torch.full((1, 4, 4), torch.nan)), "finite"),
        (lambda: asci.plot({"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(3, 1, 4, 4)}), "equally many"),
        (lambda: asci.plot({}), "none"),
        (lambda: asci.plot([torch.zeros(1, 4, 4)] * 2, titles=["a"]), "title for each of 2"),
        (lambda: asci.plot(torch.zeros(1, 4, 4), truth=1), "truth only with a reconstruction"),
        (lambda: result().plot(truth=torch.zeros(2, 1, 8, 8)), "3 images as truth"),
        (lambda: result().plot(truth=torch.zeros(3, 1, 4, 4)), r"\(8, 8\) pixels"),
        (lambda: result().plot(indices=[3]), "from 0 to 2"),
        (lambda: result().plot(rows=0), "at least 1 row"),
    ],
)
def test_wrong_calls(call, fragment):
    with pytest.raises(InputError, match=fragment):
        call()


def test_arrays_of_a_result():
    arrays = result().to_numpy()
    assert {k: v.shape for k, v in arrays.items()} == {
        "mean": (3, 1, 8, 8),
        "std": (3, 1, 8, 8),
        "samples": (4, 3, 1, 8, 8),
    }
    assert all(isinstance(v, np.ndarray) for v in arrays.values())


MAPS = torch.as_tensor(birdcage_maps(4, 8, 8))
LINES = torch.zeros(8, 8).index_fill_(1, torch.tensor([0, 2, 4, 6]), 1)


@pytest.mark.parametrize(
    ("thing", "texts", "picture"),
    [
        (result(images=40, size=64), ["Reconstruction(40 images"], True),
        (result(samples=1), ["1 sample"], True),
        (MRI(LINES, MAPS), ["4 coils", "50 % measured", "(R = 2)"], True),
        (Masking(LINES), ["50 % measured"], True),
        (Identity((1, 8, 8)), ["Identity(1 x 8 x 8)"], False),
        (
            GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4)),
            ["GaussianPrior(unconditional, 1 x 2 x 2"],
            False,
        ),
        (
            load_prior("pretrained:brain64"),
            ["NetworkPrior(unconditional, 2 x 64 x 64", "M parameters"],
            False,
        ),
    ],
)
def test_what_a_notebook_shows(thing, texts, picture):
    shown = thing._repr_html_()
    assert all(text in repr(thing) for text in texts) and "\n" not in repr(thing)
    assert repr(thing) in shown and len(shown) < 200_000
    found = re.search('src="data:image/png;base64,([^"]+)"', shown)
    assert bool(found) == picture
    if found:
        assert Image.open(io.BytesIO(base64.b64decode(found[1]))).width > 50


def test_nothing_global_is_touched():
    import matplotlib.pyplot as plt

    result().plot()
    assert plt.get_fignums() == []
    assert plotting.window([]) == (0.0, 1.0)
