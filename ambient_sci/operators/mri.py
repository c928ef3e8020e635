r"""Magnetic resonance imaging, single- and multi-coil, Cartesian: A = M F S.

    y_c = M (F (s_c x) + sigma_y n_c),        c = 1 .. N coils

F is the centred orthonormal 2-D Fourier transform. Images are (B, 2, H, W) (real, imaginary); measurements (B, 2, H, W) without coil
maps and (B, 2, N, H, W) with them, as in deepinv. sigma_y is per real channel: complex noise has standard deviation sqrt(2) sigma_y.

Centred transforms usually cost two shifts, each a copy of the whole array. A shift in one domain is a multiplication by a
phase in the other, and there are multiplications on both sides already (maps and mask), so the shifts are folded into them:

    (F x)[k] = u[k] w  sum_j (u[j] x[j]) exp(-2 pi i k j / n) / sqrt(n),     u[j] = exp(2 pi i c j / n),  w = exp(-2 pi i c^2 / n),  c = n // 2

For even n, u is +1, -1, +1, ... and no complex product is added.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.operators.base import RowMaskedOperator
from ambient_sci.operators.designs import MaskDesign


def to_complex(x: Tensor) -> Tensor:
    """(B, 2, ...) real to (B, ...) complex; a view, without a copy, where the memory layout allows."""
    moved = x.movedim(1, -1)
    if (
        moved.stride(-1) == 1
        and all(s % 2 == 0 for s in moved.stride()[:-1])
        and moved.storage_offset() % 2 == 0
    ):
        return torch.view_as_complex(moved)
    return torch.complex(x[:, 0], x[:, 1])


def to_channels(z: Tensor) -> Tensor:
    """(B, ...) complex to (B, 2, ...) real, always a view: real and imaginary part stay interleaved in memory."""
    return torch.view_as_real(z).movedim(-1, 1)


@lru_cache(maxsize=64)
def _fold(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image-side factor u[j] and k-space-side factor w u[k], (H, W); real for even sizes, complex otherwise."""
    # The cache outlives its caller: tensors first made under inference_mode could never enter a graph later.
    with torch.inference_mode(False):
        image, kspace = torch.ones((), dtype=torch.complex128), torch.ones((), dtype=torch.complex128)
        for n, shape in ((height, (-1, 1)), (width, (1, -1))):
            c = n // 2
            u = torch.exp(2j * math.pi * torch.remainder(c * torch.arange(n).double(), n) / n).reshape(shape)
            w = torch.exp(torch.tensor(-2j * math.pi * ((c * c) % n) / n, dtype=torch.complex128))
            image, kspace = image * u, kspace * u * w
        if height % 2 == 0 and width % 2 == 0:
            real = torch.float64 if dtype == torch.complex128 else torch.float32
            return image.real.round().to(device, real), kspace.real.round().to(device, real)
        return image.to(device, dtype), kspace.to(device, dtype)


class MRI(RowMaskedOperator):
    """Cartesian MRI, y = M F S x.

    Args:
        mask: sampled k-space points, 0/1, centred (zero frequency at index n // 2): (H, W), (1|B, H, W) or (1|B, 1, H, W).
        coil_maps: None for a single coil of uniform sensitivity, or complex (N, H, W) or (1|B, N, H, W). With
            sum_c |s_c|^2 = 1 the operator is a row-masked isometry; maps of another scale are accepted and noticed
            (``isometry`` is False then).
        design: how the mask was drawn, if known.

    Raises:
        InputError: mask not 0/1, all zero in some sample, or maps that do not fit the mask, are not complex or not finite.
    """

    name = "mri"
    _maps: Tensor | None

    def __init__(
        self,
        mask: Tensor,
        coil_maps: Tensor | None = None,
        design: MaskDesign | None = None,
        noise_std: float = 0.0,
    ) -> None:
        mask = self._plane_mask(torch.as_tensor(mask), coil_maps)
        height, width = mask.shape[-2:]
        if coil_maps is None:
            super().__init__(mask, (2, height, width), (2, height, width), design=design, noise_std=noise_std)
            self.register_buffer("_maps", None)
            return
        maps = self._checked_maps(torch.as_tensor(coil_maps), mask)
        power = maps.abs().square().sum(1)
        super().__init__(
            mask[:, :, None],
            (2, height, width),
            (2, maps.shape[1], height, width),
            design=design,
            isometry=bool(((power - 1).abs() < 1e-3).all()),
            noise_std=noise_std,
        )
        image, _ = _fold(height, width, maps.dtype, maps.device)
        # Kept as (re, im) pairs: Module.to(float64) would drop the imaginary part of a complex buffer.
        self.register_buffer("_maps", torch.view_as_real(maps * image))

    @staticmethod
    def _plane_mask(mask: Tensor, coil_maps: Tensor | None) -> Tensor:
        """Any accepted mask shape as (1|B, 1, H, W)."""
        if mask.ndim == 2:
            return mask[None, None]
        if mask.ndim == 3:
            return mask[:, None]
        if mask.ndim == 5 and coil_maps is not None:  # measurement space of several coils
            if bool((mask != mask[:, :, :1]).any()):
                raise InputError("mri mask: expected the same mask for every coil")
            mask = mask[:, :, 0]
        if mask.ndim == 4 and mask.shape[1] == 2:
            if bool((mask[:, 0] != mask[:, 1]).any()):
                raise InputError(
                    "mri mask: expected real and imaginary part sampled together, got different masks"
                )
            mask = mask[:, :1]
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise InputError(f"mri mask: expected (H, W), (B, H, W) or (B, 1, H, W), got {tuple(mask.shape)}")
        return mask

    @staticmethod
    def _checked_maps(maps: Tensor, mask: Tensor) -> Tensor:
        if maps.ndim == 3:
            maps = maps[None]
        batches = {maps.shape[0], mask.shape[0]} - {1}
        if not maps.is_complex() or maps.ndim != 4 or maps.shape[-2:] != mask.shape[-2:] or len(batches) > 1:
            raise InputError(
                f"coil maps: expected complex (1 or B, coils, {mask.shape[-2]}, {mask.shape[-1]}) matching the mask "
                f"{tuple(mask.shape)}, got {maps.dtype} {tuple(maps.shape)}"
            )
        if not bool(torch.isfinite(torch.view_as_real(maps)).all()) or not bool(
            maps.abs().sum((1, 2, 3)).gt(0).all()
        ):
            raise InputError("coil maps: expected finite values, not all zero")
        return maps

    @property
    def coil_maps(self) -> Tensor | None:
        """Sensitivities, complex (1|B, N, H, W), or None for a single uniform coil."""
        if self._maps is None:
            return None
        maps = torch.view_as_complex(self._maps)
        return maps * _fold(*maps.shape[-2:], maps.dtype, maps.device)[0].conj()

    @property
    def coils(self) -> int:
        """Number of receiver coils."""
        return 1 if self._maps is None else self._maps.shape[1]

    @property
    def batch_size(self) -> int:
        """Number of samples this operator is for; 1 also means "any number"."""
        return max(self.mask.shape[0], 1 if self._maps is None else self._maps.shape[0])

    def _fits(self, x: Tensor, size: tuple[int, ...]) -> bool:
        return tuple(x.shape[1:]) == size and self.batch_size in (1, x.shape[0])

    # -- T and its adjoint, and the fused normal operator --------------------------------------------------------------------

    def _factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """What multiplies the image before the FFT (maps with the shift folded in), and k-space after it."""
        image, kspace = _fold(*self.img_size[-2:], dtype, device)
        if self._maps is not None:
            image = torch.view_as_complex(self._maps).to(dtype)
        return image, kspace

    def _encode(self, x: Tensor, weight: Tensor | None) -> Tensor:
        z = to_complex(x)
        image, kspace = self._factors(z.dtype, z.device)
        z = torch.fft.fft2(image * (z if self._maps is None else z[:, None]), norm="ortho")
        return z * (kspace if weight is None else kspace * weight)

    def _decode(self, z: Tensor, weight: Tensor | None) -> Tensor:
        image, kspace = self._factors(z.dtype, z.device)
        x = torch.fft.ifft2(z * (kspace.conj() if weight is None else kspace.conj() * weight), norm="ortho")
        x = image.conj() * x
        return to_channels(x if self._maps is None else x.sum(1))

    @property
    def _complex_mask(self) -> Tensor:
        return self.mask[:, 0]  # (b, [1,] H, W): broadcasts over the complex measurement

    def transform(self, x: Tensor) -> Tensor:
        """F S x on all of k-space."""
        return to_channels(self._encode(x, None))

    def transform_adjoint(self, z: Tensor) -> Tensor:
        """S^H F^H z: coil-combined inverse transform."""
        return self._decode(to_complex(z), None)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """M F S x."""
        self._refuse_updates(kwargs)
        self._check_image(x)
        return to_channels(self._encode(x, self._complex_mask))

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """S^H F^H M y: the zero-filled, coil-combined image."""
        self._refuse_updates(kwargs)
        self._check_measurement(y)
        return self._decode(to_complex(y), self._complex_mask)

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """S^H F^H M F S x; the k-space phases of the folded shifts cancel and are left out."""
        self._refuse_updates(kwargs)
        self._check_image(x)
        z = to_complex(x)
        image, _ = self._factors(z.dtype, z.device)
        z = (
            torch.fft.fft2(image * (z if self._maps is None else z[:, None]), norm="ortho")
            * self._complex_mask
        )
        z = image.conj() * torch.fft.ifft2(z, norm="ortho")
        return to_channels(z if self._maps is None else z.sum(1))

    # -- masks and batches ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"coil_maps": self.coil_maps}

    def _index_shared(self, index: Any) -> None:
        if self._maps is not None and self._maps.shape[0] > 1:
            self._buffers["_maps"] = self._maps[index]

    @property
    def network_mask(self) -> Tensor:
        """k-space mask as one image channel, (1|B, 1, H, W)."""
        return self.mask if self._maps is None else self.mask[:, :, 0]

    def _rows_from_network_mask(self, mask: Tensor) -> Tensor:
        return mask if self._maps is None else mask[:, :, None]
