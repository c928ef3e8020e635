r"""What a prior is: a denoiser, D(x, sigma) = E[x_0 | x_0 + sigma z = x].

An *unconditional* prior answers for fully observed noisy images; any posterior sampler can use it. Class
labels or a prompt may narrow it (`Labels`, `Prompt`), and without them it is what it is. A *mask-conditional*
one answers E[x_0 | y~, B] from the zero-filled image A_B^H y~ and the rows B (`KeptRows`), for masks like
those it was trained with. It is **not** a prior in the sense of the first: asked for B = I it answers what it
was never trained for, and measured in a posterior sampler it is worse than zero filling. So every prior says
what it takes, and whatever needs another kind refuses it with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from ambient_sci import plotting
from ambient_sci.errors import ConditioningError, InputError
from ambient_sci.noise import expand
from ambient_sci.priors.denoiser_base import become_denoiser, denoiser_base
from ambient_sci.priors.folder import write_folder
from ambient_sci.priors.given import Given, KeptRows

if TYPE_CHECKING:
    from deepinv.models import Denoiser
else:
    Denoiser = denoiser_base()

Conditioning = Literal["unconditional", "mask-conditional", "one-step"]
Tensors = dict[str, Tensor]


class Prior(Denoiser):
    """Base of all priors. A deepinv ``Denoiser``, so it plugs into deepinv's samplers and plug-and-play
    algorithms.

    A subclass with a ``kind`` can be saved: `describe` says in JSON types what rebuilds it, `rebuild` does so
    from that description and the tensors of its state. Subclasses of users take part in this like those of
    the library.

    Attributes:
        shape: of one image, (C, H, W).
        data_std: standard deviation of the data per entry; scales losses and preconditioning.
        takes: what it is told besides x and sigma, a type of `Given`; None: nothing.
        sigma_min: lowest noise level at which the denoiser is meaningful; 0 if all are.
        sigma_max: highest trained noise level, None if there is no limit.
        separates_rows: its output scale tells kept rows from missing ones, so that losses may weigh them
            apart.
        resized: what was done to fit images of another size than it was trained on (`at_shape`), in words.
    """

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Prior]]] = {}

    shape: tuple[int, ...]
    data_std: float
    takes: type[Given] | None = None
    sigma_min: float = 0.0
    sigma_max: float | None = None
    separates_rows: bool = False
    resized: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            Prior.kinds[cls.kind] = cls

    @property
    def conditioning(self) -> Conditioning:
        """ "mask-conditional" if it takes `KeptRows`, else "unconditional" (labels and prompts may be left
        out)."""
        return "mask-conditional" if self.takes is KeptRows else "unconditional"

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """E[x_0 | x, given]: ``x`` (B, C, H, W) at noise level ``sigma`` (float or (B,)).

        Mask-conditional priors: ``x`` = A_B^H y~ and ``given`` = `KeptRows` of B.
        """
        raise TypeError(f"{type(self).__name__} does not say how it denoises")

    def check_given(self, given: Any) -> None:
        """Raise ConditioningError unless ``given`` is what this prior takes, in kind."""
        if given is None:
            if self.takes is KeptRows:
                raise ConditioningError("mask-conditional prior: expected the kept rows (KeptRows), got none")
            return
        if type(given) in (Tensor, KeptRows):
            require_mask_conditional(self, "a mask")
        if self.takes is None or type(given) is not self.takes:
            expected = "nothing" if self.takes is None else self.takes.__name__
            raise ConditioningError(
                f"{type(self).__name__}: expected given = {expected}, got {type(given).__name__}"
            )

    def loss_weight(self, sigma: Tensor, fraction: float | Tensor = 1.0) -> Tensor:
        r"""lambda(sigma) = (d^2 + sigma^2) / (d^2 (sigma^2 + (1 - f) d^2)), the inverse of the error a best
        linear denoiser leaves per entry.

        For complete data (f = 1) it is the EDM weight 1/sigma^2 + 1/d^2; with a fraction f of the rows kept,
        the missing rest leaves an error of (1 - f) d^2 that no sigma makes small.
        """
        # Not as 1 - f d^2 / (d^2 + sigma^2): in float32 that cancels to zero long before sigma does.
        variance = self.data_std**2
        return (variance + sigma**2) / (variance * (sigma**2 + (1 - fraction) * variance))

    def at_shape(self, shape: tuple[int, ...], tile_overlap: int | None = None) -> Prior:
        """This prior for images of another size, with the same weights; ``resized`` says how.

        Larger images, in height or width, are covered with overlapping tiles of its own size, whose answers
        are averaged at every noise level (`ambient_sci.priors.tiled`). Where images are smaller its network
        runs at their size.

        Args:
            shape: (C, H, W) of the images.
            tile_overlap: pixels that neighbouring tiles share at least, 1 to half of a tile; default: a
                quarter of a tile.

        Raises:
            ConditioningError: larger images, and a prior that is not unconditional.
            InputError: other channels, an impossible overlap, or smaller images and no network that does for
                them.
        """
        from ambient_sci.priors.sizes import for_images

        return for_images(self, shape, tile_overlap)

    def __repr__(self) -> str:
        low, high = self.sigma_min, self.sigma_max
        told = "" if self.takes in (None, KeptRows) else f", takes {self.takes.__name__}"
        levels = f", sigma {low:.3g} to {'any' if high is None else f'{high:.3g}'}" if low or high else ""
        count = sum(p.numel() for p in self.parameters())
        size = f", {count / 1e6:.2f} M parameters" if count else ""
        shape = " x ".join(map(str, self.shape)) if hasattr(self, "shape") else "no shape"
        return f"{type(self).__name__}({self.conditioning}, {shape}{told}{levels}{size})"

    def _repr_html_(self) -> str:
        return plotting.html_of(repr(self))

    # -- files -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What rebuilds this prior besides its tensors, in JSON types, "kind" among it.

        Raises:
            InputError: a prior that cannot be saved; the message says why.
        """
        raise InputError(
            f"saving a prior: expected one of kind {', '.join(sorted(Prior.kinds))}, got "
            f"{type(self).__name__}, which does not "
            "describe itself"
        )

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`, with exactly these tensors, in their own types: bit for bit what was
        saved."""
        raise TypeError(f"{cls.__name__} does not say how it is rebuilt")

    def saved_tensors(self) -> Tensors:
        """The tensors that belong in the file; default: all of the state."""
        return self.state_dict()

    def save(self, path: str | Path) -> None:
        """Write to a folder (prior.json and weights.safetensors), whole or not at all; `load_prior` reads it
        back.

        Raises:
            InputError: ``path`` is a file, or a folder that holds anything but a prior; or a prior that
                cannot be saved.
        """
        write_folder(path, description_of(self), self.saved_tensors())


become_denoiser(Prior)


class TensorPrior(Prior):
    """A prior that its tensors say everything about.

    Attributes:
        arguments: names of the tensors that its constructor takes, in order.
    """

    arguments: ClassVar[tuple[str, ...]]

    def describe(self) -> dict[str, Any]:
        """Its kind."""
        return {"kind": self.kind}

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`; what the constructor derives is as it was saved, too."""
        prior = cls(*(tensors[name] for name in cls.arguments))
        prior.load_state_dict(tensors, strict=True, assign=True)
        return prior


def description_of(prior: Prior) -> dict[str, Any]:
    """`Prior.describe`, checked to describe this very class: a subclass that only inherits it would come back
    as its parent.

    Raises:
        InputError: a prior that cannot be saved.
    """
    if prior.resized:
        raise InputError(
            "saving a prior: expected one of the size it was trained on, got one that at_shape made of it; "
            "save the original"
        )
    description = prior.describe()
    known = Prior.kinds.get(description["kind"])
    if known is not type(prior):
        raise InputError(
            f"saving a prior: expected a class with a kind of its own, got {type(prior).__name__}, which "
            "would be loaded as "
            f"{known.__name__ if known else 'nothing'}"
        )
    return description


def rebuild_prior(description: dict[str, Any], tensors: Tensors) -> Prior:
    """The prior that `Prior.describe` described.

    Raises:
        InputError: a kind that nobody has registered.
    """
    values = dict(description)
    kind = values.pop("kind", None)
    if kind not in Prior.kinds:
        raise InputError(f"prior: expected kind {', '.join(sorted(Prior.kinds))}, got {kind!r}")
    return Prior.kinds[kind].rebuild(values, tensors)


def filled(build: Callable[[], Prior], tensors: Tensors) -> Prior:
    """The prior that ``build`` makes, with exactly these tensors.

    It is first made without memory (torch's meta device), so that a description can claim no more than the
    file holds; a prior with tensors that are no part of its state is then made for good.

    Raises:
        InputError: tensors of other names or shapes than the prior has.
    """
    with torch.device("meta"):
        prior = build()
    missing, surplus = prior.state_dict().keys() - tensors.keys(), tensors.keys() - prior.state_dict().keys()
    wrong = [k for k, t in prior.state_dict().items() if k in tensors and t.shape != tensors[k].shape]
    if missing or surplus or wrong:
        raise InputError(
            f"prior: expected the tensors that its description asks for, got {len(missing)} missing, "
            f"{len(surplus)} surplus and "
            f"{len(wrong)} of another shape, first "
            f"{next(iter([*sorted(missing), *sorted(surplus), *wrong]))!r}"
        )
    state = {id(t) for t in prior.state_dict(keep_vars=True).values()}
    if any(id(t) not in state for t in chain(prior.parameters(), prior.buffers())):
        prior = build()
    prior.load_state_dict(tensors, strict=True, assign=True)
    return prior


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under ``prefix.``, by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


# -- what needs which kind -----------------------------------------------------------------------------------


def require_unconditional(prior: Prior, what: str) -> None:
    """Raise ConditioningError, with the way out, if ``prior`` is mask-conditional and ``what`` needs
    E[x_0 | x_t]."""
    conditioning = getattr(prior, "conditioning", "unconditional")
    if conditioning == "one-step":
        raise ConditioningError(
            f"{what} needs a denoiser for all noise levels, got a one-step generator: it draws images, by "
            "generate; use the prior that it was distilled from"
        )
    if conditioning != "unconditional":
        raise ConditioningError(
            f"{what} needs an unconditional prior, got a mask-conditional one: it estimates E[x0 | kept "
            "rows], not E[x0 | x_t]. "
            "Use the one-step estimate or A-DPS, or get an unconditional prior by EM or from fully sampled "
            "noisy scans"
        )


def require_mask_conditional(prior: Prior, what: str) -> None:
    """Raise ConditioningError, with the way out, if ``prior`` is unconditional and ``what`` needs
    E[x_0 | y~, B]."""
    if getattr(prior, "conditioning", "unconditional") != "mask-conditional":
        raise ConditioningError(
            f"{what} needs a mask-conditional prior (trained on incomplete measurements), got "
            f"{'a one-step generator' if prior.conditioning == 'one-step' else 'an unconditional one'}: "
            "use MMPS or another posterior sampler with it"
        )


# -- types and levels ----------------------------------------------------------------------------------------


def match_dtype(prior: torch.nn.Module, x: Tensor) -> Tensor:
    """``x`` in the floating type of the prior's tensors: closed forms compute in the type that their
    parameters have."""
    tensors = (t for t in chain(prior.parameters(), prior.buffers()) if t.is_floating_point())
    first = next(tensors, None)
    return x if first is None else x.to(first.dtype)


def at_least_single(x: Tensor) -> Tensor:
    """``x``, in float32 if it is of a shorter type: what surrounds a network is never computed in half
    precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_sample(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Levels (B,) in the type of ``x``, from one level or one for each sample.

    Raises:
        InputError: levels that differ within an image; a denoiser answers for one level of the whole image.
    """
    level = expand(sigma, x)
    if level.numel() not in (1, x.shape[0]) or level.numel() != level.shape[0]:
        raise InputError(
            f"noise level: expected one value or one per sample ({x.shape[0]}) for a denoiser, got "
            f"{tuple(level.shape)}"
        )
    return level.flatten().expand(x.shape[0])
