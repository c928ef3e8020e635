r"""Operators with T = I: identity (noise alone) and masking (missing pixels).

    Identity:  y = x + sigma_y n            Masking:  y = m * (x + sigma_y n)

Identity is Masking with a mask of ones, and behaves as exactly that everywhere in the library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator, copied
from ambient_sci.operators.designs import MaskDesign


class Masking(RowMaskedOperator):
    """Random or fixed missing pixels: A x = mask * x.

    Args:
        mask: 0/1; (H, W), (1|B, H, W) or (1|B, 1|C, H, W). One channel means that a pixel is missing in all
            channels at once.
        img_size: (C, H, W). Without it a mask of one channel takes images of any number of channels.
        design: how the mask was drawn, if known.

    Raises:
        InputError: a mask that is not 0/1, does not fit, or is all zero for some sample.
    """

    name = "masking"

    def __init__(
        self,
        mask: Tensor,
        img_size: tuple[int, ...] | None = None,
        design: MaskDesign | None = None,
        noise_std: float = 0.0,
    ) -> None:
        mask = torch.as_tensor(mask)
        if mask.ndim == 2:
            mask = mask[None, None]
        elif mask.ndim == 3:
            mask = mask[:, None]
        if mask.ndim != 4:
            raise InputError(
                f"{self.name} mask: expected (H, W), (B, H, W) or (B, C, H, W), got {tuple(mask.shape)}"
            )
        self._any_channels = img_size is None and mask.shape[1] == 1
        size = tuple(img_size) if img_size is not None else tuple(mask.shape[1:])
        super().__init__(mask, size, size, design=design, noise_std=noise_std)

    @classmethod
    def _trusted(cls, mask: Tensor, img_size: tuple[int, ...], design: MaskDesign | None = None) -> Masking:
        """The operator of a mask (1|B, 1|C, H, W) that was checked before."""
        return Masking._from_parts(
            {"mask": mask},
            img_size=tuple(img_size),
            measurement_size=tuple(img_size),
            design=design,
            isometry=True,
            _any_channels=False,
        )

    def _fits(self, x: Tensor, size: tuple[int, ...]) -> bool:
        skip = 2 if self._any_channels else 1
        return (
            x.ndim == len(size) + 1
            and tuple(x.shape[skip:]) == size[skip - 1 :]
            and self.mask.shape[0] in (1, x.shape[0])
        )

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "_any_channels": self._any_channels}

    def _as_network_mask(self, mask: Tensor) -> Tensor:
        return mask.expand(-1, -1, *self.img_size[1:])

    # A projection onto coordinates is its own adjoint and its own normal operator: one multiplication, not
    # two.
    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A^H A x = mask * x."""
        return self.A(x, **kwargs)

    def A_A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """A A^H y = mask * y."""
        return self.A_adjoint(y, **kwargs)


class Identity(Masking):
    """Noise alone: A x = x.

    Args:
        img_size: shape of one image, (C, H, W).
    """

    name = "identity"

    def __init__(self, img_size: tuple[int, ...], noise_std: float = 0.0) -> None:
        img_size = tuple(int(n) for n in img_size)
        if len(img_size) != 3 or min(img_size) < 1:
            raise InputError(f"identity: expected a shape (C, H, W) of positive sizes, got {img_size}")
        super().__init__(torch.ones(1, 1, 1, 1), img_size=img_size, noise_std=noise_std)

    @property
    def complete(self) -> bool:
        """Always: nothing is missing (said without reading the mask, which may be on another device)."""
        return True

    def _with_rows(
        self, mask: Tensor, design: MaskDesign | None, host: Tensor | None = None
    ) -> RowMaskedOperator:
        """A `Masking` operator: the identity with rows missing is no identity."""
        self._check_mask_shape(mask)
        new = Masking._trusted(mask, self.img_size, design)
        new.noise_model, new._host_mask = copied(self.noise_model), host
        return new
