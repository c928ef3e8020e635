r"""Magnetic resonance imaging, single- and multi-coil, Cartesian: A = M F S.

    y_c = M (F (s_c x) + sigma_y n_c),        c = 1 .. N coils

F is the centred orthonormal 2-D Fourier transform. Images are (B, 2, H, W) (real, imaginary); measurements
(B, 2, H, W) without coil maps and (B, 2, N, H, W) with them, as in deepinv. sigma_y is per real channel:
complex noise has standard deviation sqrt(2) sigma_y.

Centred transforms usually cost two shifts, each a copy of the whole array. A shift in one domain is a
multiplication by a phase in the other, and there are multiplications on both sides already (maps and mask),
so the shifts are folded into them:

    (F x)[k] = u[k] w  sum_j (u[j] x[j]) exp(-2 pi i k j / n) / sqrt(n),     u[j] = exp(2 pi i c j / n),
    w = exp(-2 pi i c^2 / n),  c = n // 2

For even n, u is +1, -1, +1, ... and no complex product is added. F is symmetric, so the adjoint needs the
same factors, not their conjugates:

    A^H y = conj( sum_c s_c F conj(M y_c) )

What remains is bound by memory. So products go into the memory of the transform before them, conjugation is a
sign in a product that is there anyway, and on a CPU a batch is worked off in parts that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
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
    """(B, ...) complex to (B, 2, ...) real, always a view: real and imaginary part stay interleaved in
    memory.
    """
    return torch.view_as_real(z).movedim(-1, 1)


#: Coil images worked on at a time on a CPU, in bytes: about a core's cache.
PART_BYTES = 4 << 20


@lru_cache(maxsize=64)
def _fold(height: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image-side factor u[j] and k-space-side factor w u[k], (H, W); real for even sizes, complex
    otherwise.
    """
    # The cache outlives its caller: tensors first made under inference_mode could never enter a graph later.
    with torch.inference_mode(False):
        image, kspace = torch.ones((), dtype=torch.complex128), torch.ones((), dtype=torch.complex128)
        for n, shape in ((height, (-1, 1)), (width, (1, -1))):
            c = n // 2
            u = torch.exp(2j * math.pi * torch.remainder(c * torch.arange(n).double(), n) / n).reshape(shape)
            w = torch.exp(torch.tensor(-2j * math.pi * ((c * c) % n) / n, dtype=torch.complex128))
            image, kspace = image * u, kspace * u * w
        if height % 2 == 0 and width % 2 == 0:
            real = dtype.to_real()
            return image.real.round().to(device, real), kspace.real.round().to(device, real)
        return image.to(device, dtype), kspace.to(device, dtype)


def coil_power(maps: Tensor) -> Tensor:
    """sum_c |s_c|^2 of maps (B, N, H, W), (B, H, W): sample by sample, in the cache."""
    power = torch.empty_like(maps.real[:, 0])
    for sample, out in zip(torch.view_as_real(maps), power, strict=True):
        squares = sample.square().unbind(0)
        total = squares[0]
        for coil in squares[1:]:
            total = total.add_(coil)
        torch.add(total[..., 0], total[..., 1], out=out)
    return power


def is_isometric(low: Tensor, high: Tensor) -> bool:
    """T^H T = I, from the least and the largest sum_c |s_c|^2; False for NaN."""
    return bool((low > 1 - 1e-3) & (high < 1 + 1e-3))


def _folded(maps: Tensor, own: bool = False) -> Tensor:
    """Maps times u as an operator keeps them; ``own`` writes into ``maps``.

    (re, im) pairs, because Module.to(float64) would drop the imaginary part of a complex buffer.
    """
    image, _ = _fold(*maps.shape[-2:], maps.dtype, maps.device)
    return torch.view_as_real(_weigh(maps, image, maps if own else None))


def _rows(shared: Tensor, rows: slice) -> Tensor:
    """``rows`` of what there is for each sample; what serves all samples as it is."""
    return shared if len(shared) == 1 else shared[rows]


def _weigh(z: Tensor, weight: Tensor, out: Tensor | None = None, *, conjugate: bool = False) -> Tensor:
    """weight z, or weight conj(z); ``out`` may be z itself. A real weight multiplies (re, im) pairs, the
    cheapest product there is.
    """
    if weight.is_complex():
        return torch.mul(z.conj() if conjugate else z, weight, out=out)
    pairs = torch.view_as_real(torch.complex(weight, -weight if conjugate else weight))
    into = None if out is None else torch.view_as_real(out)
    return torch.view_as_complex(torch.mul(torch.view_as_real(z), pairs, out=into))


class _Linear(torch.autograd.Function):
    """A linear map whose derivative is its adjoint: a graph then stores neither maps nor coil images."""

    @staticmethod
    def forward(
        x: Tensor, forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.forward_map, ctx.adjoint_map = inputs

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        forward: Callable[..., Tensor],
        adjoint: Callable[..., Tensor],
    ) -> tuple[Tensor, int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One after the other: products in place cannot be batched, and an operator may hold a mask for each
        sample.
        """
        return torch.stack([_Linear.apply(one, forward, adjoint) for one in x.unbind(in_dims[0])]), 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Linear.apply(gradient.resolve_conj(), ctx.adjoint_map, ctx.forward_map), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _Linear.apply(tangent, ctx.forward_map, ctx.adjoint_map)


class MRI(RowMaskedOperator):
    """Cartesian MRI, y = M F S x.

    Args:
        mask: sampled k-space points, 0/1, centred (zero frequency at index n // 2): (H, W), (1|B, H, W) or
            (1|B, 1, H, W).
        coil_maps: None for a single coil of uniform sensitivity, or complex (N, H, W) or (1|B, N, H, W). With
            sum_c |s_c|^2 = 1 the operator is a row-masked isometry; maps of another scale are accepted and
            noticed (``isometry`` is False then).
        design: how the mask was drawn, if known.

    Raises:
        InputError: mask not 0/1, all zero in some sample, or maps that do not fit the mask, are not complex
            or not finite.
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
        maps, isometry = self._checked_maps(torch.as_tensor(coil_maps), mask)
        super().__init__(
            mask[:, :, None],
            (2, height, width),
            (2, maps.shape[1], height, width),
            design=design,
            isometry=isometry,
            noise_std=noise_std,
        )
        self.register_buffer("_maps", _folded(maps))

    @classmethod
    def _trusted(
        cls,
        mask: Tensor,
        coil_maps: Tensor | None = None,
        design: MaskDesign | None = None,
        *,
        isometry: bool = True,
        own: bool = False,
    ) -> MRI:
        """The operator of a mask and maps that were checked before.

        Args:
            mask: (1|B, 1, H, W), or (1|B, 1, 1, H, W) with maps: measurement space.
            coil_maps: complex (1|B, N, H, W), or None for a single coil.
            design: how the mask was drawn, if known.
            isometry: sum_c |s_c|^2 = 1 everywhere.
            own: nobody else needs ``coil_maps``, so that the shift is folded in where they lie.
        """
        size = (2, *mask.shape[-2:])
        coils = () if coil_maps is None else (coil_maps.shape[1],)
        return cls._from_parts(
            {"mask": mask, "_maps": None if coil_maps is None else _folded(coil_maps, own)},
            img_size=size,
            measurement_size=(2, *coils, *size[1:]),
            design=design,
            isometry=isometry,
        )

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
    def _checked_maps(maps: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
        """Maps as (1|B, N, H, W), and whether sum_c |s_c|^2 = 1."""
        if maps.ndim == 3:
            maps = maps[None]
        batches = {maps.shape[0], mask.shape[0]} - {1}
        if not maps.is_complex() or maps.ndim != 4 or maps.shape[-2:] != mask.shape[-2:] or len(batches) > 1:
            raise InputError(
                f"coil maps: expected complex (1 or B, coils, {mask.shape[-2]}, {mask.shape[-1]}) matching "
                "the mask "
                f"{tuple(mask.shape)}, got {maps.dtype} {tuple(maps.shape)}"
            )
        if maps.requires_grad:
            raise InputError("coil maps: expected constants, got maps that require a gradient")
        power = coil_power(maps)
        low, high = power.aminmax()
        # Squares of finite values may overflow or vanish: only then are the values themselves asked.
        finite = bool(torch.isfinite(high)) or bool(torch.isfinite(torch.view_as_real(maps)).all())
        if not finite or not bool(((power > 0).flatten(1).any(1) | (maps != 0).flatten(1).any(1)).all()):
            raise InputError("coil maps: expected finite values, not all zero")
        return maps, is_isometric(low, high)

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

    # -- T and its adjoint, and the fused normal operator ----------------------------------------------------

    def _factors(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What multiplies the image before the FFT (maps with the shift folded in; batch first), and k-space
        after it.
        """
        image, kspace = _fold(*self.img_size[-2:], z.dtype, z.device)
        if self._maps is not None:
            image = torch.view_as_complex(self._maps).to(z.dtype)
        return image if image.ndim > 2 else image[None], kspace[None]

    def _parts(self, z: Tensor) -> list[slice]:
        """Samples of a batch to work on at a time."""
        size = self.coils * math.prod(self.img_size[-2:]) * z.element_size()
        step = max(1, len(z) if z.device.type != "cpu" else PART_BYTES // size)
        return [slice(k, k + step) for k in range(0, len(z), step)]

    def _encode(self, x: Tensor, masked: bool) -> Tensor:
        image, kspace = self._factors(x)
        weight = (kspace * self._complex_mask).to(kspace.dtype) if masked else self._plane(kspace)
        parts = self._parts(x)
        y = x.new_empty(len(x), *self.measurement_size[1:]) if len(parts) != 1 else None
        for rows in parts:
            coil_images = torch.fft.fft2(_rows(image, rows) * self._plane(x[rows]), norm="ortho")
            _weigh(coil_images, _rows(weight, rows), coil_images if y is None else y[rows])
        return coil_images if y is None else y

    def _decode(self, y: Tensor, masked: bool) -> Tensor:
        image, kspace = self._factors(y)
        weight = (kspace * self._complex_mask).to(kspace.dtype) if masked else self._plane(kspace)
        x = y.new_empty(len(y), *self.img_size[-2:])
        for rows in self._parts(y):
            self._combine(_weigh(y[rows], _rows(weight, rows), conjugate=True), _rows(image, rows), x[rows])
        return x

    def _encode_decode(self, x: Tensor) -> Tensor:
        image, _ = self._factors(x)
        weight = self._complex_mask.to(x.real.dtype)
        out = torch.empty_like(x)
        for rows in self._parts(x):
            y = torch.fft.fft2(_rows(image, rows) * self._plane(x[rows]), norm="ortho")
            self._combine(_weigh(y, _rows(weight, rows), y, conjugate=True), _rows(image, rows), out[rows])
        return out

    def _combine(self, conjugate: Tensor, image: Tensor, out: Tensor) -> None:
        """conj(sum_c s_c F conj(y_c)) of the conjugate measurements, into ``out``."""
        coil_images = torch.fft.fft2(conjugate, norm="ortho").mul_(image)
        if self._maps is None:
            torch.conj_physical(coil_images, out=out)
        else:
            torch.sum(coil_images, 1, out=out).conj_physical_()

    def _plane(self, z: Tensor) -> Tensor:
        """(b, H, W) as it broadcasts over complex measurements."""
        return z if self._maps is None else z[:, None]

    @property
    def _complex_mask(self) -> Tensor:
        return self.mask[:, 0]  # (b, [1,] H, W): broadcasts over the complex measurement

    def _mapped(self, name: str, z: Tensor, **options: bool) -> Tensor:
        """One of the maps above, between complex tensors, as real ones and with its derivative."""
        adjoint = {"encode": "decode", "decode": "encode", "encode_decode": "encode_decode"}[name]
        forward, backward = (partial(getattr(self, f"_{n}"), **options) for n in (name, adjoint))
        if (
            self._maps is not None and len(z) == 1
        ):  # all samples' maps on one image; the parts of a batch are its own
            z = z.expand(len(self._maps), *z.shape[1:])
        return to_channels(_Linear.apply(to_complex(z), forward, backward))

    def transform(self, x: Tensor) -> Tensor:
        """F S x on all of k-space."""
        return self._mapped("encode", x, masked=False)

    def transform_adjoint(self, z: Tensor) -> Tensor:
        """S^H F^H z: coil-combined inverse transform."""
        return self._mapped("decode", z, masked=False)

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """M F S x."""
        self._refuse_updates(kwargs)
        self._check_image(x)
        return self._mapped("encode", x, masked=True)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """S^H F^H M y: the zero-filled, coil-combined image."""
        self._refuse_updates(kwargs)
        self._check_measurement(y)
        return self._mapped("decode", y, masked=True)

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """S^H F^H M F S x; the k-space phases of the folded shifts cancel and are left out."""
        self._refuse_updates(kwargs)
        self._check_image(x)
        return self._mapped("encode_decode", x)

    # -- masks and batches -----------------------------------------------------------------------------------

    def _index_shared(self, index: Any) -> None:
        if self._maps is not None and self._maps.shape[0] > 1:
            self._buffers["_maps"] = self._maps[index]

    def _as_network_mask(self, mask: Tensor) -> Tensor:
        """The mask of a plane, (1|B, 1, H, W): one for all coils."""
        return mask if self._maps is None else mask[:, :, 0]

    def _rows_from_network_mask(self, mask: Tensor) -> Tensor:
        return mask if self._maps is None else mask[:, :, None]
