"""Configuration of the network prior: plain data, no torch, so that the command line can read it quickly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ambient_sci.errors import InputError


@dataclass(frozen=True)
class NetworkConfig:
    """A MONAI ``DiffusionModelUNet`` or a small multilayer perceptron.

    Attributes:
        kind: "unet" for images, "mlp" for vectors and tiny images (every entry sees every other).
        channels: width at each resolution (U-Net; each level halves the size) or of each hidden layer (MLP).
        blocks: residual blocks per resolution.
        attention: self-attention at each resolution; the U-Net's bottleneck has it in any case. Default: nowhere else.
        patch: the U-Net runs on patch x patch pixels folded into channels (pixel-unshuffle): about patch^2 times cheaper, less fine.
        head_channels: channels of one attention head; must divide the width of every level with attention.
        norm_groups: group-norm groups; must divide every width.
        embedding: dimensions of the noise-level embedding (MLP).
    """

    kind: Literal["unet", "mlp"] = "unet"
    channels: tuple[int, ...] = (32, 64, 64)
    blocks: int = 1
    attention: tuple[bool, ...] | None = None
    patch: int = 1
    head_channels: int = 16
    norm_groups: int = 8
    embedding: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(int(c) for c in self.channels))
        if self.attention is not None:
            object.__setattr__(self, "attention", tuple(bool(a) for a in self.attention))
        if self.kind not in ("unet", "mlp") or not self.channels or min(self.channels) < 1:
            raise InputError(
                f"network: expected kind unet or mlp and positive channels, got {self.kind!r}, {self.channels}"
            )
        if self.kind == "unet":
            wrong = [c for c in self.channels if c % self.norm_groups]
            if wrong or self.channels[-1] % self.head_channels:
                raise InputError(
                    f"network: expected channels divisible by norm_groups = {self.norm_groups} (and the last one by head_channels = "
                    f"{self.head_channels}), got {self.channels}"
                )
            if self.attention is not None and len(self.attention) != len(self.channels):
                raise InputError(
                    f"network: expected attention for each of {len(self.channels)} levels, got {len(self.attention)} entries"
                )

    @property
    def size_factor(self) -> int:
        """Height and width must be multiples of this."""
        return 1 if self.kind == "mlp" else self.patch * 2 ** (len(self.channels) - 1)

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError unless the network can divide an image of this size."""
        if height % self.size_factor or width % self.size_factor:
            raise InputError(
                f"image size: expected height and width divisible by {self.size_factor} for this network "
                f"(patch {self.patch}, {len(self.channels)} levels), got {height} x {width}"
            )


@dataclass(frozen=True)
class PriorConfig:
    """Everything that rebuilds a `NetworkPrior` besides its weights.

    Attributes:
        shape: (C, H, W).
        data_std: standard deviation of the clean data per entry, estimated from noisy data as sqrt(var - sigma^2).
        conditioning: "unconditional" or "mask-conditional".
        sigma_min: lowest noise level that was trained; samplers stop there.
        sigma_max: highest noise level that was trained.
        mask_channels: channels of the mask a mask-conditional network is shown.
        network: the network.
        about: free text and numbers on the training (data, steps, licence …), for model cards.
    """

    shape: tuple[int, ...]
    data_std: float
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
        if not self.data_std > 0:
            raise InputError(f"prior: expected a positive data_std, got {self.data_std}")

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
