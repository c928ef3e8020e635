"""Prompts that samples carry: each text's embedding once, and which one a sample has.

    tokens (P, length, width), pooled (P, width)     of P different texts
    index (N,)                                       the text of each of N samples
    time_ids (N, 6)                                  original size, crop and target size of each sample (SDXL)

In a measurement file these are the datasets ``prompt_tokens``, ``prompt_pooled``, ``prompt_index`` and
``prompt_time_ids``; the first two are read text by text, when a sample asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ambient_sci.data.layout import to_numpy
from ambient_sci.errors import InputError
from ambient_sci.priors.given import Prompt

#: Datasets with a row for each text.
TEXTS = ("prompt_tokens", "prompt_pooled")
_INDEX, _SIZES = "prompt_index", "prompt_time_ids"


class Prompts:
    """The prompts of N samples.

    Args:
        tokens: embedded tokens (P, length, width) of P texts, float16 or float32.
        index: which text each sample has (N,), whole numbers below P.
        pooled: embedding of each whole text (P, width), for networks that take it.
        time_ids: sizes (N, 6), for networks that take them.

    Raises:
        InputError: shapes that do not fit, an index without a text, or values that are not finite.
    """

    def __init__(
        self, tokens: Tensor, index: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> None:
        self.tokens, self.pooled = _floats(tokens, "tokens", 3), _floats(pooled, "pooled", 2)
        self.time_ids = _floats(time_ids, "time_ids", 2)
        self.index = torch.as_tensor(index).long()
        if self.tokens is None or not len(self.tokens):
            raise InputError("prompts: expected the tokens of at least one text, got none")
        if self.pooled is not None and len(self.pooled) != len(self.tokens):
            raise InputError(
                f"prompts: expected pooled embeddings of {len(self.tokens)} texts, got {len(self.pooled)}"
            )
        _check_index(self.index.cpu().numpy(), len(self.index), len(self.tokens))
        if self.time_ids is not None and self.time_ids.shape != (len(self.index), 6):
            raise InputError(
                f"prompts: expected time_ids ({len(self.index)}, 6), got {tuple(self.time_ids.shape)}"
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any) -> Prompt:
        """The prompts of some samples."""
        text = self.index[rows]
        assert self.tokens is not None
        return Prompt(
            self.tokens[text],
            None if self.pooled is None else self.pooled[text],
            None if self.time_ids is None else self.time_ids[rows],
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(
            t.numel() * t.element_size() for t in (self.tokens, self.pooled, self.time_ids) if t is not None
        )

    def to(self, device: torch.device | str) -> Prompts:
        """The same on another device."""
        new = Prompts.__new__(Prompts)
        new.__dict__ = {k: None if t is None else t.to(device) for k, t in vars(self).items()}
        return new

    @classmethod
    def joined(cls, parts: Sequence[Prompts]) -> Prompts:
        """Those of several files, one after the other."""
        starts = np.cumsum([0] + [len(p.tokens) for p in parts])  # type: ignore[arg-type]

        def together(name: str) -> Tensor | None:
            found = [getattr(p, name) for p in parts]
            return None if found[0] is None else torch.cat(found)

        tokens, pooled, sizes = together("tokens"), together("pooled"), together("time_ids")
        index = torch.cat([p.index + int(start) for p, start in zip(parts, starts, strict=False)])
        assert tokens is not None
        return cls(tokens, index, pooled, sizes)


def _floats(values: Any, name: str, axes: int) -> Tensor | None:
    if values is None:
        return None
    found = torch.as_tensor(values)
    if found.dtype not in (torch.float16, torch.float32) or found.ndim != axes:
        raise InputError(
            f"prompts: expected {name} of {axes} axes in float16 or float32, got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    if not torch.isfinite(found).all():
        raise InputError(f"prompts: {name}: NaN or infinite values")
    return found


def _check_index(index: np.ndarray, num: int, texts: int) -> None:
    if index.shape != (num,) or index.size and not 0 <= index.min() <= index.max() < texts:
        raise InputError(
            f"prompts: expected for each of {num} samples a text from 0 to {texts - 1}, got an index of "
            f"shape {index.shape}" + (f" from {index.min()} to {index.max()}" if index.size else "")
        )


class StoredPrompts:
    """The prompts of a measurement file, texts read when a sample asks for one.

    Args:
        dataset: ``dataset(name, types)`` opens a checked dataset of the file, or gives None.
        read: ``read(name, rows)`` reads rows of it.
        num: samples of the file.

    Raises:
        InputError: datasets of other types or shapes than a writer leaves.
    """

    def __init__(
        self,
        dataset: Callable[[str, Sequence[type]], h5py.Dataset | None],
        read: Callable[[str, np.ndarray], np.ndarray],
        num: int,
    ) -> None:
        texts = [dataset(name, (np.float16, np.float32)) for name in TEXTS]
        index, sizes = dataset(_INDEX, (np.int32,)), dataset(_SIZES, (np.float32,))
        if texts[0] is None or index is None or texts[0].ndim != 3:
            raise InputError(f"prompts: expected {TEXTS[0]} (P, length, width) and {_INDEX}, got others")
        if texts[1] is not None and (texts[1].ndim != 2 or len(texts[1]) != len(texts[0])):
            raise InputError(f"prompts: expected {TEXTS[1]} ({len(texts[0])}, width), got {texts[1].shape}")
        if sizes is not None and sizes.shape != (num, 6):
            raise InputError(f"prompts: expected {_SIZES} ({num}, 6), got {sizes.shape}")
        self.count = len(texts[0])
        self.names = [name for name, found in zip(TEXTS, texts, strict=True) if found is not None]
        self.index, self.sizes = index[()], None if sizes is None else sizes[()]
        _check_index(self.index, num, self.count)
        if self.sizes is not None and not np.isfinite(self.sizes).all():
            raise InputError(f"prompts: {_SIZES}: NaN or infinite values")
        #: bytes of all texts
        self.nbytes = sum(found.size * found.dtype.itemsize for found in texts if found is not None)
        self._read = read

    def __getitem__(self, rows: np.ndarray) -> Prompt:
        """The prompts of some samples, each text read once."""
        which, back = np.unique(self.index[rows], return_inverse=True)
        texts = [torch.from_numpy(self._read(name, which))[torch.from_numpy(back)] for name in self.names]
        sizes = None if self.sizes is None else torch.from_numpy(self.sizes[rows])
        return Prompt(texts[0], texts[1] if len(texts) > 1 else None, sizes)

    def all(self) -> Prompts:
        """All of them in memory."""
        texts = [torch.from_numpy(self._read(name, np.arange(self.count))) for name in self.names]
        pooled = texts[1] if len(texts) > 1 else None
        sizes = None if self.sizes is None else torch.from_numpy(self.sizes)
        return Prompts(texts[0], torch.from_numpy(self.index), pooled, sizes)


def store(
    prompts: Prompts,
    num: int,
    extend: Callable[[str, np.ndarray], None],
    small: Callable[[str, np.ndarray], None],
) -> None:
    """Write the prompts of ``num`` samples: ``extend`` takes what is read row by row, ``small`` the rest.

    Raises:
        InputError: prompts of another number of samples.
    """
    if len(prompts) != num:
        raise InputError(f"prompts: expected {num}, one a sample, got {len(prompts)}")
    for name, values in zip(TEXTS, (prompts.tokens, prompts.pooled), strict=True):
        if values is not None:
            extend(name, to_numpy(values, name))
    small(_INDEX, prompts.index.cpu().numpy().astype(np.int32))
    if prompts.time_ids is not None:
        small(_SIZES, to_numpy(prompts.time_ids, _SIZES).astype(np.float32))


def check_text_values(name: str, block: np.ndarray) -> None:
    """Raise InputError unless embedded texts are finite."""
    if not np.isfinite(block).all():
        raise InputError(f"{name}: NaN or infinite values")
