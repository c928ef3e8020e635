"""Nearest neighbours against brute force, however the references lie in blocks, and what has no direction is
refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import ambient_sci.evaluation.neighbours  # noqa: F401  (the module must not hide the function of its name)
from ambient_sci import evaluation
from ambient_sci.errors import InputError
from ambient_sci.evaluation import neighbours as search


def rows(n: int, d: int, seed: int, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(dtype)


def brute(queries: np.ndarray, references: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    unit = [
        x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        for x in (queries, references)
    ]
    cosine = unit[0] @ unit[1].T
    index = np.argsort(-cosine, axis=1)[:, :k]
    return np.take_along_axis(cosine, index, 1), index


def module():
    import sys

    return sys.modules["ambient_sci.evaluation.neighbours"]


def test_the_name_is_the_functions_whatever_was_imported_before() -> None:
    for name in evaluation._HOMES:
        getattr(evaluation, name)
        assert callable(getattr(evaluation, name)), name
    assert callable(evaluation.chi_squared) and callable(evaluation.neighbours)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 5, 3000])
def test_neighbours_are_those_of_brute_force_over_several_blocks(dtype: type, k: int) -> None:
    queries, references = rows(7, 6, 0), 3 * rows(3000, 6, 1).astype(dtype) + 1
    found = search(queries, references, k, held_out=queries[:2])
    similarity, index = brute(queries, references, k)
    np.testing.assert_allclose(found.similarity.numpy(), similarity, atol=1e-12)
    if k < 3000:
        assert (found.index.numpy() == index).all()
    assert (np.sort(found.index.numpy(), 1) == np.sort(index, 1)).all()


def test_references_on_disk_and_queries_in_parts_give_the_same(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    references = rows(2500, 8, 2, np.float16)
    path = tmp_path / "references.npy"
    np.save(path, references)
    whole = search(rows(9, 8, 3), references, 4, held_out=rows(5, 8, 4))
    monkeypatch.setattr(module(), "QUERIES_AT_ONCE", 4)
    monkeypatch.setattr(module(), "BLOCK_BYTES", 1)  # blocks of 1024, ranks of one query
    parts = search(torch.from_numpy(rows(9, 8, 3)), np.load(path, mmap_mode="r"), 4, held_out=rows(5, 8, 4))
    assert torch.equal(whole.index, parts.index)
    torch.testing.assert_close(whole.similarity, parts.similarity, rtol=0, atol=1e-12)


def test_a_copy_that_single_precision_cannot_tell_from_its_like_is_found() -> None:
    """Eight references closer to each other than float32 resolves: the ranking is in float64."""
    base = rows(1, 16, 5)
    references = base + 1e-6 * rows(8, 16, 6)
    found = search(references[3:4], references, 1, held_out=base)
    assert int(found.index[0, 0]) == 3 and float(found.similarity[0, 0]) == pytest.approx(1.0, abs=1e-15)


def test_held_out_images_go_through_the_same_search_and_are_missed_aloud() -> None:
    references, held = rows(50, 4, 7), rows(6, 4, 8)
    found = search(rows(3, 4, 9), references, 2, held_out=held)
    assert found.held_out is not None
    np.testing.assert_allclose(found.held_out.similarity.numpy(), brute(held, references, 2)[0], atol=1e-12)
    assert "held-out 6" in repr(found)
    with pytest.warns(UserWarning, match="no held-out"):
        alone = search(held, references)
    assert alone.held_out is None and "no held-out images" in repr(alone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(held, references, held_out=held)


def test_extreme_scales_have_a_direction() -> None:
    references = rows(40, 5, 10)
    scales = np.array([1e-200, 1e-30, 1.0, 1e30, 1e200])[:, None]
    found = search(references[:5] * scales, references, 1, held_out=references)
    assert found.index[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found.similarity.numpy(), 1, atol=1e-12)


def bad(x: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x[3] = value
    return x


@pytest.mark.parametrize(
    ("queries", "references", "k", "fragment"),
    [
        (rows(4, 3, 0), rows(9, 2, 0), 1, "2 dimensions"),
        (rows(4, 3, 0), rows(9, 3, 0), 10, "k <= 9"),
        (rows(4, 3, 0), rows(9, 3, 0), 0, "k <= 9"),
        (rows(4, 3, 0)[0], rows(9, 3, 0), 1, "(n, d)"),
        (rows(0, 3, 0), rows(9, 3, 0), 1, "(n, d)"),
        (rows(4, 3, 0), bad(rows(9, 3, 0), 0.0), 1, "row 3"),
        (bad(rows(4, 3, 0), np.nan), rows(9, 3, 0), 1, "row 3"),
        (rows(4, 3, 0), bad(rows(9, 3, 0), np.inf), 1, "row 3"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(queries, references, k: int, fragment: str) -> None:
    with pytest.raises(InputError) as error:
        search(queries, references, k, held_out=rows(2, references.shape[-1], 1))
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_blocks_of_references_and_their_products_are_bounded() -> None:
    """A block of references and its products stay under the bound, whatever their number."""
    seen: list[int] = []

    class Counting(np.ndarray):
        def __getitem__(self, item):
            found = super().__getitem__(item)
            seen.append(np.asarray(found).shape[0] if np.ndim(found) == 2 else 0)
            return found

    references = rows(200_000, 2, 11, np.float32).view(Counting)
    search(rows(500, 2, 12), references, 1, held_out=rows(500, 2, 13))
    assert max(seen) * 500 * 4 <= module().BLOCK_BYTES


def test_tensors_are_left_as_they_were() -> None:
    references: Tensor = torch.from_numpy(rows(30, 4, 14)).float()
    before = references.clone()
    search(references, references, 1, held_out=references)
    assert torch.equal(references, before)
