r"""What a denoiser is told besides the state x and its noise level: kept rows, class labels, prompts.

    D(x, sigma, given)        given: one row a sample

Everything that handles batches handles ``given`` with them: a loss indexes it with its samples, consistency
repeats it for its draws, guidance drops it, a staged prior cuts it where it cuts the batch. `Prior.takes`
says which kind a prior wants.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from ambient_sci.errors import InputError

if TYPE_CHECKING:
    from ambient_sci.operators.base import RowMaskedOperator


class Given(Protocol):
    """A batch of conditions: indexable, repeatable, movable."""

    def __getitem__(self, index: Any) -> Given:
        """The conditions of some samples of the batch."""
        ...

    def repeat(self, times: int) -> Given:
        """The batch ``times`` times over, as ``x.repeat(times, 1, 1, 1)`` orders it."""
        ...

    def to(self, device: torch.device | str) -> Given:
        """The same on another device."""
        ...


class KeptRows:
    """The kept rows B of a measurement: what a mask-conditional prior is told beside x = A_B^H y~.

    Args:
        operator: A_B, for one sample each or one for all.
    """

    def __init__(self, operator: RowMaskedOperator) -> None:
        self.operator = operator

    @property
    def mask(self) -> Tensor:
        """0/1, (1|B, m, H, W)."""
        return self.operator.network_mask

    def gram(self, x: Tensor) -> Tensor:
        """A_B^H A_B x of images (B, C, H, W)."""
        return self.operator.A_adjoint_A(x)

    def __getitem__(self, index: Any) -> KeptRows:
        return self if self.operator.batch_size == 1 else KeptRows(self.operator[index])

    def repeat(self, times: int) -> KeptRows:
        """The rows of the batch, ``times`` times over."""
        batch = self.operator.batch_size
        return self if batch == 1 else KeptRows(self.operator[torch.arange(batch).repeat(times)])

    def to(self, device: torch.device | str) -> KeptRows:
        """The same rows on another device; this object stays where it is."""
        return KeptRows(self.operator[:].to(device))

    def __repr__(self) -> str:
        return f"KeptRows({self.operator.name}, batch {self.operator.batch_size})"


class _Tensors:
    """Conditions that are tensors with one row a sample, or None."""

    def _each(self, change: Any) -> Self:
        changed = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {name: None if value is None else change(value) for name, value in changed.items()}
        return replace(self, **changed)  # type: ignore[type-var]

    def __getitem__(self, index: Any) -> Self:
        return self._each(lambda t: t[index])

    def repeat(self, times: int) -> Self:
        """The batch, ``times`` times over."""
        return self._each(lambda t: t.repeat(times, *([1] * (t.ndim - 1))))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in pinned memory of the host."""
        return self._each(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Labels(_Tensors):
    """Class labels.

    Attributes:
        index: (B,) integers; -1 means no label.
        augment: augmentation labels (B, k) as in Karras et al. (2022), for networks that take them; None: not
            augmented.
    """

    index: Tensor
    augment: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.index.is_floating_point():
            raise InputError(
                f"labels: expected integers (B,), got {self.index.dtype} {tuple(self.index.shape)}"
            )

    def dropped(self, which: Tensor) -> Labels:
        """Without the labels of the samples ``which`` (B,) bool."""
        return replace(self, index=torch.where(which, -torch.ones_like(self.index), self.index))

    def one_hot(self, classes: int) -> Tensor:
        """(B, classes) float32, a row of zeros where there is no label."""
        return (self.index[:, None] == torch.arange(classes, device=self.index.device)).float()


def class_count(prior: Any) -> int:
    """Number of classes that a prior's network is told one of; 0 where it is told none."""
    network = getattr(getattr(prior, "anchor", prior), "network", None)
    told = getattr(network, "label_dim", None)
    if told is None:  # diffusers' networks count one more, which means no label
        embedded = getattr(getattr(getattr(network, "model", None), "config", None), "num_class_embeds", None)
        told = max(int(embedded or 0) - 1, 0)
    return int(told) if getattr(prior, "takes", None) is Labels else 0


@dataclass(frozen=True)
class Prompt(_Tensors):
    """Text as a diffusion network takes it.

    Attributes:
        tokens: embedded tokens (B, length, width).
        pooled: embedding of the whole prompt (B, width), for networks that take it (SDXL).
        time_ids: original size, crop and target size (B, 6), for networks that take them (SDXL).
    """

    tokens: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def dropped(self, which: Tensor) -> Prompt:
        """With zeros for the text of the samples ``which`` (B,) bool, SDXL's empty prompt; sizes stay."""

        def without(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.masked_fill(which.reshape(-1, *([1] * (t.ndim - 1))), 0)

        return replace(self, tokens=without(self.tokens), pooled=without(self.pooled))
