r"""Row-masked linear operators: A = M T, a transform T followed by a 0/1 mask M over its rows.

    y = M (T x + sigma_y n)

T is the identity (noise, masking) or coil maps followed by the centred orthonormal Fourier transform (MRI).
Keeping rows, holding rows out and asking what a network sees change M alone, so one loss and one sampler
serve every operator.

Operators are `deepinv.physics.LinearPhysics`: they work in deepinv's algorithms unchanged. Unlike deepinv's,
masks are fixed at construction (a mask passed to ``A`` is an error, not a silent update), an operator holds
one mask per sample or one for all, and it can be indexed, split and pickled.

Constructors check every value of what a caller hands in. What the library derives from an operator or reads
from a checked file is built by ``_trusted``, which looks at no value: a batch's operator costs what its
memory costs.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache
from operator import index as as_index
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from deepinv.physics import GaussianNoise, LinearPhysics, ZeroNoise
from torch import Tensor, nn

from ambient_sci import plotting
from ambient_sci.errors import InputError
from ambient_sci.operators.split import Split, always_measured

if TYPE_CHECKING:
    from ambient_sci.operators.designs import MaskDesign


_Module = TypeVar("_Module", bound=nn.Module)


def copied(module: _Module) -> _Module:
    """A module of its own over the same tensors: moving the copy leaves ``module`` where it is."""
    new = object.__new__(type(module))
    # Every container a module keeps (buffers, submodules, hooks) is the copy's own; tensors are shared until
    # replaced.
    new.__dict__ = {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()}
    children = {name: child if child is None else copied(child) for name, child in module._modules.items()}
    new.__dict__["_modules"] = children
    return new


@lru_cache(maxsize=16)
def _prototype(kind: type[RowMaskedOperator]) -> RowMaskedOperator:
    """An operator to copy: deepinv's constructor is a tenth of a millisecond that a batch need not pay."""
    with torch.inference_mode(False):  # it outlives its caller
        prototype = kind.__new__(kind)
        RowMaskedOperator.__init__(prototype, torch.ones(1, 1, 1, 1), (1, 1, 1), (1, 1, 1))
    return prototype


class RowMaskedOperator(LinearPhysics):
    """A = M T. Subclasses give ``transform`` (T), ``transform_adjoint`` (T^H), and whether T^H T = I.

    Args:
        mask: 0/1, (1, ...) or (B, ...), broadcastable to a measurement.
        img_size: (C, H, W) of one image.
        measurement_size: shape of one measurement, without batch.
        design: how the mask was drawn, if known: what `split` needs for exact weights.
        isometry: T^H T = I, so that A^H A + a I can be inverted in closed form.

    Raises:
        InputError: the mask does not fit, is not 0/1 or selects nothing in some sample.
    """

    name = "row-masked"
    mask: Tensor

    def __init__(
        self,
        mask: Tensor,
        img_size: tuple[int, ...],
        measurement_size: tuple[int, ...],
        *,
        design: MaskDesign | None = None,
        isometry: bool = True,
        noise_std: float = 0.0,
    ) -> None:
        noise = GaussianNoise(noise_std) if noise_std else ZeroNoise()
        super().__init__(img_size=img_size, noise_model=noise, solver="CG")
        self.img_size = tuple(img_size)
        self.measurement_size = tuple(measurement_size)
        self.design = design
        self.isometry = isometry
        self._drawn_by: MaskDesign | None = None  # the design that the masks are known to fit
        self._host_mask: Tensor | None = None  # the mask on the CPU, where this operator is on another device
        self.register_buffer("mask", self._checked(mask))

    def _checked(self, mask: Tensor) -> Tensor:
        # One floating type whatever came in: 0 and 1 are exact in any, and a float64 mask must not turn
        # float32 data into float64.
        mask = torch.as_tensor(mask).to(torch.get_default_dtype())
        self._check_mask_shape(mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(f"{self.name} mask: expected only 0 and 1, got other values")
        empty = ~mask.flatten(1).any(1)
        if bool(empty.any()):
            raise InputError(f"{self.name} mask: sample {int(empty.nonzero()[0])} selects nothing (all zero)")
        return mask

    @classmethod
    def _from_parts(cls, buffers: dict[str, Tensor | None], **fields: Any) -> Self:
        """An operator of checked parts: its buffers ("mask" among them) and attributes, not looked at."""
        new = copied(_prototype(cls))
        assert isinstance(new, cls)
        new._buffers.update(buffers)
        device = new.mask.device
        if device.type != "cpu":
            new._buffers["_device_holder"] = torch.zeros((), device=device)
        new.__dict__.update(fields)
        return new

    def _check_mask_shape(self, mask: Tensor) -> None:
        fits = mask.ndim == len(self.measurement_size) + 1 and all(
            m in (1, s) for m, s in zip(mask.shape[1:], self.measurement_size, strict=True)
        )
        if not fits:
            raise InputError(
                f"{self.name} mask: expected a shape that broadcasts to (1 or B, "
                f"{', '.join(map(str, self.measurement_size))}), "
                f"got {tuple(mask.shape)}"
            )

    # -- the transform; subclasses override ------------------------------------------------------------------

    def transform(self, x: Tensor) -> Tensor:
        """T x, all rows, ignoring the mask."""
        return x

    def transform_adjoint(self, z: Tensor) -> Tensor:
        """T^H z, ignoring the mask."""
        return z

    def _fields(self) -> dict[str, Any]:
        """The attributes that, with the buffers, make an operator: what is pickled."""
        return {
            "img_size": self.img_size,
            "measurement_size": self.measurement_size,
            "design": self.design,
            "isometry": self.isometry,
        }

    # -- the operator ----------------------------------------------------------------------------------------

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A x = M T x: (B, C, H, W) to measurement space, zero outside the mask."""
        self._refuse_updates(kwargs)
        self._check_image(x)
        return self.transform(x) * self.mask

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """A^H y = T^H M y: measurement space to (B, C, H, W)."""
        self._refuse_updates(kwargs)
        self._check_measurement(y)
        return self.transform_adjoint(y * self.mask)

    def A_adjoint_A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A^H A x = T^H M T x (M is a projection, applied once)."""
        return self.A_adjoint(self.transform(x), **kwargs)

    def A_A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """A A^H y; for an isometric square T this is M y."""
        return self.A(self.A_adjoint(y, **kwargs))

    def A_dagger(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Pseudo-inverse: A^H y for a square isometric T (A A^H a projection), else deepinv's solver."""
        if self.square:
            return self.A_adjoint(y)
        return super().A_dagger(y, **{k: v for k, v in kwargs.items() if k in ("solver", "max_iter", "tol")})

    @property
    def square(self) -> bool:
        """T maps R^n onto R^n isometrically, so that T T^H = I as well."""
        return self.isometry and math.prod(self.img_size) == math.prod(self.measurement_size)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor, **kwargs: Any) -> Tensor:
        r"""argmin_x  gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2, in closed form for a square isometric T.

        There A^H A = T^H M T, so (I + gamma T^H M T)^-1 = I - gamma/(1+gamma) T^H M T. gamma: float, (B,) or
        (B,1,1,1).
        """
        if self.square and torch.is_tensor(z):
            g = torch.as_tensor(gamma, dtype=z.dtype, device=z.device).reshape(-1, *([1] * (z.ndim - 1)))
            return z - g / (1 + g) * self.A_adjoint(self.A(z) - y)
        return super().prox_l2(z, y, gamma, **kwargs)

    def noise(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Measurement noise on the rows that were measured, and there only."""
        return self.noise_model(x, **kwargs) * self.mask

    def update_parameters(self, **kwargs: Any) -> None:
        """deepinv's way of changing an operator in place: refused for the mask and the maps."""
        self._refuse_updates(kwargs)

    # -- masks -----------------------------------------------------------------------------------------------

    def with_mask(self, mask: Tensor, *, design: MaskDesign | None = None) -> RowMaskedOperator:
        """The same T under another mask in measurement space; nothing but the mask is new memory.

        Args:
            mask: 0/1, of a shape that fits. Values are trusted, and it may be empty: the held-out part of a
                split can be.
            design: how it was drawn, if known.

        Raises:
            InputError: a shape that does not broadcast to a measurement.
        """
        self._check_mask_shape(mask)
        new = self._with_rows(mask, design)
        if _same_values(mask, self.mask):
            new._host_mask = None if self._host_mask is None else self._host_mask.expand(mask.shape)
        else:
            new._drawn_by = None
        return new

    def for_samples(self, count: int) -> RowMaskedOperator:
        """The operator with a mask for each of ``count`` samples; a shared one is expanded, not copied."""
        return self.with_mask(self.mask.expand(count, *self.mask.shape[1:]), design=self.design)

    def _with_rows(
        self, mask: Tensor, design: MaskDesign | None, host: Tensor | None = None
    ) -> RowMaskedOperator:
        """The same T under rows derived from this mask (thinned, mirrored), which fit the same design."""
        new = copied(self)
        new._buffers["mask"] = mask
        new._host_mask = host
        new.design = design
        return new

    def on_device(self, device: torch.device | str) -> RowMaskedOperator:
        """A copy on another device that remembers its mask on the host, so that a split waits for nothing."""
        new = copied(self).to(device, non_blocking=True)
        new._host_mask = self.mask if self.mask.device.type == "cpu" else self._host_mask
        return new

    def __getitem__(self, index: Any) -> RowMaskedOperator:
        """The operator of some samples of the batch: ``op[3]``, ``op[2:5]``, ``op[tensor]``.

        It is a copy, also where one mask serves all samples: moving it to a device leaves this operator where
        it is. Tensors that serve all samples are the same memory in both.
        """
        with suppress(TypeError):
            index = as_index(index)
        if isinstance(index, int):
            if not -self.batch_size <= index < self.batch_size and self.batch_size > 1:
                raise IndexError(f"{self.name}: expected an index below {self.batch_size}, got {index}")
            index = slice(index, index + 1 if index != -1 else None)
        new = copied(self)
        if self.mask.shape[0] > 1:
            new._buffers["mask"] = self.mask[index]
            # Numbers that lie on a device cannot index what lies on the host without waiting for them.
            on_host = self._host_mask is not None and not (
                torch.is_tensor(index) and index.device.type != "cpu"
            )
            new._host_mask = self._host_mask[index] if on_host and self._host_mask is not None else None
        new._index_shared(index)
        return new

    def pin_memory(self) -> RowMaskedOperator:
        """A copy in page-locked memory, from which an accelerator fetches without the host waiting."""
        new = copied(self)
        new._buffers.update({k: b if b is None else b.pin_memory() for k, b in self._buffers.items()})
        return new

    __iter__ = (
        None  # an operator for any number of samples has no end: iterating over `__getitem__` would not stop
    )

    def _index_shared(self, index: Any) -> None:
        """Index what else varies over the batch (coil maps)."""

    @property
    def batch_size(self) -> int:
        """Number of samples this operator is for; 1 also means "any number"."""
        return self.mask.shape[0]

    @property
    def network_mask(self) -> Tensor:
        """The mask as image channels, (1|B, m, H, W): what a mask-conditional network is shown."""
        return self._as_network_mask(self.mask)

    def _as_network_mask(self, mask: Tensor) -> Tensor:
        """A mask in measurement space as image channels."""
        return mask

    @property
    def kept_fraction(self) -> Tensor:
        """Fraction of rows measured, (1|B,)."""
        return self.mask.flatten(1).mean(1)

    @property
    def complete(self) -> bool:
        """Every row is measured in every sample: the data are noisy but not incomplete."""
        return bool((self.mask == 1).all())

    def split(
        self,
        design: MaskDesign | None = None,
        *,
        keep: float,
        generator: torch.Generator | None = None,
        num: int | None = None,
        keep_calibration: bool = False,
        mask: Tensor | None = None,
    ) -> Split:
        """Divide the measured rows at random: keep a fraction ``keep`` of them, hold out the rest.

        Args:
            design: how the mask was drawn (default: this operator's own). It decides how rows are grouped
                (pixels, k-space lines), how they are thinned, and the exact weights. If unknown, rows are
                grouped as the mask suggests, each kept independently, and held-out weights are 1.
            keep: fraction of measured rows to keep, in (0, 1]; 1 keeps everything.
            generator: source of randomness, on the CPU.
            num: number of measurements; one mask for all of them is then divided anew for each.
            keep_calibration: keep the rows that every mask of the design measures. Where estimates are made
                at the noise level of the data, nothing then supervises those rows.
            mask: `network_mask` on the CPU, if the caller has it there: saves waiting for an accelerator.

        Raises:
            InputError: keep outside (0, 1], masks that this design cannot have drawn, or no rows that are
                always measured where ``keep_calibration`` asks for some.
            IdentifiabilityError: the design has no probabilities (Poisson disc).
        """
        from ambient_sci.operators.make_design import unknown_design

        if not 0 < keep <= 1:
            raise InputError(f"split: expected keep in (0, 1], got {keep}")
        if keep == 1:
            # Without a row held out there is no inverse probability to speak of: B = A, and nothing outside
            # is supervised.
            return Split(self, self, self.mask)
        whole = self
        if num is not None and len(self.mask) != num:
            whole = self._with_rows(self.mask.expand(num, *self.mask.shape[1:]), self.design)
        host = self._as_network_mask(self.mask if self._host_mask is None else self._host_mask)
        host = (host if mask is None else mask).cpu().expand(len(whole.mask), *host.shape[1:])
        design = design or self.design or unknown_design(self.name, host)
        if design is not self._drawn_by:  # once for each operator and design
            design._checked_units(host)
            self._drawn_by = design
        kept, probability = design._split(host, keep, generator, like=self.mask)
        held = whole.network_mask * (1 - kept)
        weights = kept + torch.where(held > 0, held / probability.clamp(min=1e-12), held)
        if keep_calibration:
            kept = kept + held * always_measured(design).to(kept)
        kept, weights = (self._rows_from_network_mask(part) for part in (kept, weights))
        return Split(whole, whole._with_rows(kept, design), weights)

    def _rows_from_network_mask(self, mask: Tensor) -> Tensor:
        """Inverse of `network_mask`: image channels back to measurement space."""
        return mask

    def _repr_html_(self) -> str:
        if self.mask.shape[-2:] == (1, 1):
            return plotting.html_of(repr(self))
        return plotting.html_of(
            repr(self), {"measured rows": self.network_mask.detach().cpu()[:, :1].float()}
        )

    def __repr__(self) -> str:
        coils = f", {self.measurement_size[1]} coils" if len(self.measurement_size) == 4 else ""
        measured = float(self.mask.detach().float().mean())
        rows = "" if measured == 1 else f", {100 * measured:.3g} % measured"
        if rows and self.name == "mri":
            rows += f" (R = {1 / measured:.3g})"
        design = "" if self.design is None else f", {self.design.name}"
        masks = f", {len(self.mask)} masks" if len(self.mask) > 1 else ""
        return f"{type(self).__name__}({' x '.join(map(str, self.img_size))}{coils}{rows}{design}{masks})"

    def __reduce__(self) -> tuple[Any, ...]:
        # deepinv's base class holds lambdas, which do not pickle: the parts do.
        buffers = {name: buffer for name, buffer in self._buffers.items() if name != "_device_holder"}
        noise_std = float(getattr(self.noise_model, "sigma", 0.0))
        return _rebuild, (type(self), buffers, self._fields(), noise_std)

    # -- checks ----------------------------------------------------------------------------------------------

    def _refuse_updates(self, kwargs: dict[str, Any]) -> None:
        for key in ("mask", "coil_maps"):
            if kwargs.get(key) is not None:
                raise InputError(
                    f"{self.name}: {key} is fixed at construction; use with_mask(...) or a new operator"
                )

    def _fits(self, x: Tensor, size: tuple[int, ...]) -> bool:
        return tuple(x.shape[1:]) == size and self.mask.shape[0] in (1, x.shape[0])

    def _check_image(self, x: Tensor) -> None:
        if not self._fits(x, self.img_size):
            raise InputError(
                f"{self.name}: expected images (B, {', '.join(map(str, self.img_size))}) with B = "
                f"{self.mask.shape[0] if self.mask.shape[0] > 1 else 'any'}, got {tuple(x.shape)}"
            )

    def _check_measurement(self, y: Tensor) -> None:
        if not self._fits(y, self.measurement_size):
            raise InputError(
                f"{self.name}: expected measurements (B, {', '.join(map(str, self.measurement_size))}) with "
                "B = "
                f"{self.mask.shape[0] if self.mask.shape[0] > 1 else 'any'}, got {tuple(y.shape)}"
            )


def _same_values(mask: Tensor, other: Tensor) -> bool:
    """``mask`` is ``other``, or a view that shows the same values (a mask expanded over samples or coils)."""
    if mask is other:
        return True
    base = other if other._base is None else other._base
    return mask._base is base and int(mask.storage_offset()) == int(other.storage_offset())


def _rebuild(
    kind: type[RowMaskedOperator], buffers: dict[str, Tensor | None], fields: dict[str, Any], noise_std: float
) -> RowMaskedOperator:
    operator = kind._from_parts(buffers, **fields)
    if noise_std:
        operator.noise_model = GaussianNoise(noise_std)
    return operator
