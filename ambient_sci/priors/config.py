"""Configuration of the network prior: plain data, no torch, so that the command line can read it quickly."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal

from ambient_sci.errors import InputError
from ambient_sci.known_settings import refuses_unknown_settings
from ambient_sci.numbers import LARGEST as LARGEST_NUMBER
from ambient_sci.numbers import SMALLEST, number_in_range
from ambient_sci.priors.registry import OWN, is_known, names

#: Bounds of what a description may ask for: far above any network in use, far below what would fill a machine
#: before it is refused.
LARGEST = {"channels": 16_384, "levels": 16, "blocks": 64, "patch": 64, "embedding": 4_096}


@refuses_unknown_settings
@dataclass(frozen=True)
class NetworkConfig:
    """A backbone by name, with its options.

    Attributes:
        kind: "unet" (`ambient_sci.priors.unet`) for images, "mlp" for vectors and tiny images (every
            entry sees every other); or the name of another backbone, see `ambient_sci.priors.backbones`,
            which the next fields do not concern.
        channels: width at each resolution (U-Net; each level halves the size) or of each hidden layer (MLP).
        blocks: residual blocks per resolution.
        attention: self-attention at each resolution; the U-Net's bottleneck has it in any case. Default:
            nowhere else.
        patch: the U-Net runs on patch x patch pixels folded into channels (pixel-unshuffle): about patch^2
            times cheaper, less fine.
        head_channels: channels of one attention head; must divide the width of every level with attention.
        norm_groups: group-norm groups; must divide every width.
        embedding: dimensions of the noise-level embedding (MLP).
        options: of the other backbones: keyword arguments of their constructors, JSON types.
    """

    kind: str = "unet"
    channels: tuple[int, ...] = (32, 64, 64)
    blocks: int = 1
    attention: tuple[bool, ...] | None = None
    patch: int = 1
    head_channels: int = 16
    norm_groups: int = 8
    embedding: int = 32
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        if self.attention is not None:
            object.__setattr__(self, "attention", tuple(bool(a) for a in self.attention))
        self._check_fields_in_use()
        self._check_ranges()
        if self.kind == "unet":
            self._check_unet()

    def _check_fields_in_use(self) -> None:
        if not is_known(self.kind):
            raise InputError(f"network: expected kind {', '.join(names())}, got {self.kind!r}")
        if not isinstance(self.options, dict):
            raise InputError(f"network.options: expected a table, got {self.options!r}")
        if self.kind in OWN and self.options:
            raise InputError(
                f"network.options: expected none for kind {self.kind}, got {', '.join(self.options)}"
            )
        idle = [f.name for f in fields(self) if f.name not in ("kind", "options") and _changed(self, f)]
        if self.kind not in OWN and idle:
            raise InputError(
                f"network: expected the settings of kind {self.kind} under options, got {', '.join(idle)} of "
                "unet and mlp"
            )

    def _check_ranges(self) -> None:
        values = {
            "levels": len(self.channels),
            **{k: getattr(self, k) for k in ("blocks", "patch", "embedding")},
        }
        values |= {"channels": max(self.channels, default=0)}
        small = not self.channels or min((*self.channels, self.norm_groups, self.head_channels)) < 1
        for name, value in values.items():
            if small or not 1 <= value <= LARGEST[name]:
                raise InputError(
                    f"network: expected channels, norm_groups and head_channels of at least 1 and {name} "
                    "from 1 to "
                    f"{LARGEST[name]}, got channels {self.channels[:8]}, {name} {value}"
                )

    def _check_unet(self) -> None:
        wrong = [c for c in self.channels if c % self.norm_groups]
        if wrong or self.channels[-1] % self.head_channels:
            raise InputError(
                f"network: expected channels divisible by norm_groups = {self.norm_groups} (and the last one "
                "by head_channels = "
                f"{self.head_channels}), got {self.channels}"
            )
        if self.attention is not None and len(self.attention) != len(self.channels):
            raise InputError(
                f"network: expected attention for each of {len(self.channels)} levels, got "
                f"{len(self.attention)} entries"
            )

    @property
    def size_factor(self) -> int:
        """Height and width are padded to multiples of this (1 where only the backbone itself knows)."""
        return 1 if self.kind != "unet" else self.patch * 2 ** (len(self.channels) - 1)


def _changed(config: Any, f: Field[Any]) -> bool:
    """Whether a field differs from its default."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    return getattr(config, f.name) != default


@refuses_unknown_settings
@dataclass(frozen=True)
class PriorConfig:
    """Everything that rebuilds a `NetworkPrior` besides its weights.

    Attributes:
        shape: (C, H, W).
        data_std: standard deviation of the clean data per entry, estimated from noisy data as sqrt(var -
            sigma^2).
        data_mean: mean of the clean data over all entries, which the network works around.
        conditioning: "unconditional" or "mask-conditional".
        sigma_min: lowest noise level that was trained; samplers stop there.
        sigma_max: highest noise level that was trained.
        mask_channels: channels of the mask a mask-conditional network is shown.
        network: the network.
        about: free text and numbers on the training (data, steps, licence …), for model cards.
    """

    shape: tuple[int, ...]
    data_std: float
    data_mean: float = 0.0
    conditioning: Literal["unconditional", "mask-conditional"] = "unconditional"
    sigma_min: float = 0.0
    sigma_max: float | None = None
    mask_channels: int = 1
    network: NetworkConfig = field(default_factory=NetworkConfig)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.conditioning not in ("unconditional", "mask-conditional"):
            raise InputError(
                f"prior: expected conditioning unconditional or mask-conditional, got {self.conditioning!r}"
            )
        if not self.shape or min(self.shape) < 1:
            raise InputError(f"prior: expected a shape of positive sizes, got {self.shape}")
        if not SMALLEST <= self.data_std <= LARGEST_NUMBER:  # its square is a number in single precision
            raise InputError(f"prior: expected a positive data_std, 1e-18 to 1e18, got {self.data_std}")
        if not abs(self.data_mean) < 1e18:
            raise InputError(f"prior: expected a data_mean between -1e18 and 1e18, got {self.data_mean}")
        high = math.inf if self.sigma_max is None else self.sigma_max
        wrong = [v for v in (self.sigma_min, self.sigma_max or 0.0) if number_in_range(float(v)) is not None]
        if wrong or not 0 <= self.sigma_min <= high:
            raise InputError(
                "prior: expected 0 <= sigma_min <= sigma_max, each 0 or 1e-18 to 1e18, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )
        if self.mask_channels < 1:
            raise InputError(f"prior: expected mask_channels >= 1, got {self.mask_channels}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PriorConfig:
        """Inverse of `to_dict`; InputError on keys that do not belong."""
        try:
            return cls(**{**values, "network": NetworkConfig(**values.get("network", {}))})
        except TypeError as error:
            raise InputError(f"prior description: {error}") from None
