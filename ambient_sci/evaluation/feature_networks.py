r"""Networks whose published weights make features: FID's Inception, DINOv2, SSCD, EfficientNet-Lite0.

The definitions have the tensor names of the published files, so that a file's tensors go in as they are.
Files are read by a reader that rebuilds tensors and executes nothing.

Sources: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017), with the Inception of
2015-12-05; Oquab et al., "DINOv2" (2023); Pizzi et al., "A Self-Supervised Descriptor for Image Copy
Detection" (2022); Tan & Le, "EfficientNet" (2019).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.whole_files import read_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a PyTorch file that holds tensors by name and nothing else.

    PyTorch files go through torch's restricted unpickler: what is not a tensor or a plain container is
    refused, not run.

    Raises:
        InputError: no such file, or one that is damaged or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a file of weights, found none")
    try:
        if path.suffix == ".safetensors":
            return read_tensors(path)[0]
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file makes a reader raise is not bounded
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: expected tensors by name and nothing else, got a file that is not that ({reason})"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"{path}: expected tensors by name and nothing else, got {type(found).__name__}")
    return found


def filled(network: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> nn.Module:
    """``network`` with exactly these tensors, to be evaluated and not trained.

    Raises:
        InputError: tensors of other names or shapes.
    """
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        k for k, t in expected.items() if t.shape != tensors[k].shape
    ]
    if wrong:
        raise InputError(
            f"{path}: expected the tensors of {type(network).__name__}, got a difference at {wrong[0]!r}"
        )
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


def standardised(
    x: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """(x - mean) / std by channel, of images (B, 3, H, W) in [0, 1]."""
    shape = (1, 3, 1, 1)
    return (x - torch.tensor(mean, device=x.device).reshape(shape)) / torch.tensor(
        std, device=x.device
    ).reshape(shape)


# -- FID's Inception ---------------------------------------------------------------------------------------


def fid_inception() -> nn.Module:
    """Inception-v3 as the Frechet inception distance knows it: torchvision's, with TensorFlow's pooling and
    1008 classes.

    Average pools leave the padding out of their average, and the last block pools by maximum.
    """
    from torchvision.models import inception as tv

    def pooled(block: type[nn.Module], pool: nn.Module) -> type[nn.Module]:
        class Pooled(block):  # type: ignore[valid-type, misc]
            def _forward(self, x: Tensor) -> list[Tensor]:
                return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]

        return Pooled

    average, largest = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
    a, c, e = (pooled(block, average) for block in (tv.InceptionA, tv.InceptionC, tv.InceptionE))
    network = tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    network.Mixed_5b, network.Mixed_5c = a(192, pool_features=32), a(256, pool_features=64)
    network.Mixed_5d = a(288, pool_features=64)
    network.Mixed_6b, network.Mixed_6c = c(768, channels_7x7=128), c(768, channels_7x7=160)
    network.Mixed_6d, network.Mixed_6e = c(768, channels_7x7=160), c(768, channels_7x7=192)
    network.Mixed_7b, network.Mixed_7c = e(1280), pooled(tv.InceptionE, largest)(2048)
    network.transform_input = False
    return network


def inception_features(network: nn.Module, x: Tensor) -> Tensor:
    """(B, 2048) after the last average pool, of images (B, 3, H, W) in [0, 1], by a network whose head is
    off."""
    x = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    return network(x)


# -- DINOv2 ------------------------------------------------------------------------------------------------


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), _Attention(dim, heads), _Scale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), _Mlp(dim), _Scale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoV2(nn.Module):
    """Vision transformer with patches of 14 pixels and heads of 64 dimensions; the features are its
    normalised class token.

    Args:
        dim, depth: width and number of blocks (384, 12: small; 768, 12: base; 1024, 24: large).
        grid: side of the grid of patches that the position embedding was learned for.
    """

    PATCH = 14

    def __init__(self, dim: int, depth: int, grid: int = 37) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, self.PATCH, self.PATCH)})
        self.blocks = nn.ModuleList(_Block(dim, dim // 64) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.grid = grid

    @classmethod
    def like(cls, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> DinoV2:
        """The network that these published tensors are of."""
        positions = tensors.get("pos_embed")
        if (
            positions is None
            or positions.ndim != 3
            or "register_tokens" in tensors
            or "blocks.0.mlp.w12.weight" in tensors
        ):
            raise InputError(
                f"{path}: expected the tensors of DINOv2 small, base or large without registers, got others"
            )
        depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
        return cls(positions.shape[2], depth, round((positions.shape[1] - 1) ** 0.5))

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding for a grid of patches, (1, 1 + height width, dim), interpolated as in the
        published code."""
        if (height, width) == (self.grid, self.grid):
            return self.pos_embed
        dim = self.pos_embed.shape[2]
        grid = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, dim).permute(0, 3, 1, 2)
        # The offset of .1 keeps rounding from losing a row; it is part of how the published features came
        # about.
        scale = ((height + 0.1) / self.grid, (width + 0.1) / self.grid)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, dim)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim) of standardised images (B, 3, H, W), H and W multiples of 14."""
        patches = self.patch_embed["proj"](x)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.positions(
            *patches.shape[2:]
        )
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


# -- SSCD --------------------------------------------------------------------------------------------------


class GlobalGeneralisedMean(nn.Module):
    """(mean of x^3 over the image)^(1/3)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        return x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)


class Sscd(nn.Module):
    """ResNet-50 with a generalised mean as pool and 512 outputs of length 1."""

    def __init__(self) -> None:
        from torchvision.models import resnet50

        super().__init__()
        self.backbone = resnet50(num_classes=512)
        self.backbone.avgpool = GlobalGeneralisedMean()

    def forward(self, x: Tensor) -> Tensor:
        """(B, 512) of standardised images (B, 3, H, W)."""
        return F.normalize(self.backbone(x))
