r"""The U-Net of denoising diffusion, for 2-D images: residual blocks that are told the noise level, attention
where asked for and in the middle.

    down   at each resolution: ``blocks`` residual blocks (each followed by attention where asked for), then a
           convolution of stride 2, except at the lowest
    middle residual block, attention, residual block
    up     at each resolution: ``blocks`` + 1 residual blocks, each on its input beside one output of the way
           down, then nearest-neighbour upsampling and a convolution, except at the highest

    residual block      x -> S x + C_2 silu(N(C_1 silu(N x) + W silu(e)))
    attention           x -> x + P softmax(q k^T / sqrt(d)) v       over the pixels, heads of d channels

N group normalisation, C convolutions of 3 x 3, S the identity or a convolution of 1 x 1 where widths differ,
e the embedded time. The last convolution of a block and of the network start at zero.

Names of tensors, order of modules, initial weights and arithmetic are those of MONAI's ``DiffusionModelUNet``
(without conditioning), so that its weights and those of priors trained with it load, and answer with the same
bits; a test compares the two. It is here because a network of 200 lines should not cost an environment, and
3 seconds of imports.

Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (2020); Rombach et al., "High-Resolution Image
Synthesis with Latent Diffusion Models" (2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPSILON = 1e-6
_LONGEST_PERIOD = 10_000


def time_embedding(time: Tensor, size: int) -> Tensor:
    """cos and sin of ``time`` (B,) at ``size`` // 2 frequencies from 1 down to nearly 1/10,000, (B, size)
    float32."""
    half = size // 2
    exponent = -math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32, device=time.device)
    phase = time[:, None].float() * torch.exp(exponent / half)[None, :]
    return nn.functional.pad(torch.cat([phase.cos(), phase.sin()], -1), (0, size % 2))


def _convolution(ins: int, outs: int, kernel: int = 3, stride: int = 1, *, zero: bool = False) -> nn.Module:
    """A convolution under the name it has in a file, ``conv``."""
    new = nn.Sequential()
    new.add_module("conv", nn.Conv2d(ins, outs, kernel, stride, kernel // 2))
    if zero:
        for parameter in new.parameters():
            nn.init.zeros_(parameter)
    return new


class ResidualBlock(nn.Module):
    """S x + C_2 silu(N(C_1 silu(N x) + W silu(e)))."""

    def __init__(self, ins: int, outs: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, ins, _EPSILON)
        self.nonlinearity = nn.SiLU()
        self.conv1 = _convolution(ins, outs)
        self.time_emb_proj = nn.Linear(embedding, outs)
        self.norm2 = nn.GroupNorm(groups, outs, _EPSILON)
        self.conv2 = _convolution(outs, outs, zero=True)
        self.skip_connection = nn.Identity() if ins == outs else _convolution(ins, outs, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """``x`` (B, ins, H, W), the embedded time (B, E) to (B, outs, H, W)."""
        inner = self.conv1(self.nonlinearity(self.norm1(x)))
        inner = inner + self.time_emb_proj(self.nonlinearity(embedded))[:, :, None, None]
        return self.skip_connection(x) + self.conv2(self.nonlinearity(self.norm2(inner)))


class Heads(nn.Module):
    """Attention of tokens (B, N, C) to one another, in heads of ``head`` channels."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.heads, self.scale = channels // head, head**-0.5
        self.out_proj = nn.Linear(channels, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """P softmax(q k^T / sqrt(d)) v."""
        q, k, v = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        weights = (torch.einsum("blxd,blyd->blxy", q, k) * self.scale).softmax(-1)
        mixed = torch.einsum("bhxy,bhyd->bhxd", weights, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """Attention of the pixels of a normalised image to one another, added to it."""

    def __init__(self, channels: int, head: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, _EPSILON)
        self.attn = Heads(channels, head)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        tokens = self.attn(self.norm(x).flatten(2).transpose(1, 2))
        return (tokens.transpose(1, 2).reshape(x.shape) + x).contiguous()


class Down(nn.Module):
    """One resolution on the way down."""

    def __init__(
        self,
        ins: int,
        outs: int,
        embedding: int,
        blocks: int,
        groups: int,
        head: int | None,
        halves: bool,
    ) -> None:
        super().__init__()
        resnets, attentions = [], []
        for k in range(blocks):
            resnets.append(ResidualBlock(outs if k else ins, outs, embedding, groups))
            attentions += [Attention(outs, head, groups)] if head else []
        if head:  # in this order: it is that of the parameters in an optimiser's state
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)
        self.downsampler: nn.Module | None = None
        if halves:
            self.downsampler = nn.Sequential()
            self.downsampler.add_module("op", _convolution(outs, outs, stride=2))

    def forward(self, x: Tensor, embedded: Tensor) -> list[Tensor]:
        """The outputs of each block and of the convolution of stride 2."""
        outputs = []
        for k, block in enumerate(self.resnets):
            x = block(x, embedded)
            x = self.attentions[k](x) if hasattr(self, "attentions") else x
            outputs.append(x)
        return outputs if self.downsampler is None else [*outputs, self.downsampler(x)]


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, embedding: int, groups: int, head: int) -> None:
        super().__init__()
        self.resnet_1 = ResidualBlock(channels, channels, embedding, groups)
        self.attention = Attention(channels, head, groups)
        self.resnet_2 = ResidualBlock(channels, channels, embedding, groups)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.resnet_2(self.attention(self.resnet_1(x, embedded)), embedded)


class Upsample(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.postconv = _convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        return self.postconv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Up(nn.Module):
    """One resolution on the way up; ``beside`` are the widths of what comes from the way down, in order."""

    def __init__(
        self,
        ins: int,
        beside: Sequence[int],
        outs: int,
        embedding: int,
        groups: int,
        head: int | None,
        doubles: bool,
    ) -> None:
        super().__init__()
        resnets, attentions = [], []
        for k, other in enumerate(beside):
            resnets.append(ResidualBlock((outs if k else ins) + other, outs, embedding, groups))
            attentions += [Attention(outs, head, groups)] if head else []
        self.resnets = nn.ModuleList(resnets)
        if head:
            self.attentions = nn.ModuleList(attentions)
        self.upsampler = Upsample(outs) if doubles else None

    def forward(self, x: Tensor, outputs: list[Tensor], embedded: Tensor) -> Tensor:
        """``outputs`` of the way down are taken from the end of the list."""
        for k, block in enumerate(self.resnets):
            x = block(torch.cat([x, outputs.pop()], 1), embedded)
            x = self.attentions[k](x) if hasattr(self, "attentions") else x
        return x if self.upsampler is None else self.upsampler(x)


class DiffusionUNet(nn.Module):
    """The network of the module's text.

    Args:
        in_channels, out_channels: of the images that go in and come out.
        channels: width at each resolution; each halves the size.
        blocks: residual blocks of each resolution on the way down.
        attention: where to attend besides the middle, one a resolution.
        head: channels of an attention head; divides the last width, and those with attention.
        groups: of the group normalisations; divides every width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        head: int,
        groups: int,
    ) -> None:
        super().__init__()
        first, last, embedding = channels[0], len(channels) - 1, 4 * channels[0]
        self.width = first
        self.conv_in = _convolution(in_channels, first)
        self.time_embed = nn.Sequential(
            nn.Linear(first, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.down_blocks = nn.ModuleList()
        heads = [head if here else None for here in attention]
        for k, width in enumerate(channels):
            before = channels[max(k - 1, 0)]
            self.down_blocks.append(Down(before, width, embedding, blocks, groups, heads[k], k < last))
        self.middle_block = Middle(channels[-1], embedding, groups, head)
        self.up_blocks = nn.ModuleList()
        for k in range(last, -1, -1):
            beside = [*[channels[k]] * blocks, channels[max(k - 1, 0)]]
            before = channels[min(k + 1, last)]
            self.up_blocks.append(Up(before, beside, channels[k], embedding, groups, heads[k], k > 0))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, first, _EPSILON), nn.SiLU(), _convolution(first, out_channels, zero=True)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` (B, in, H, W) at ``time`` (B,) to (B, out, H, W); H and W are multiples of
        2^(resolutions - 1)."""
        embedded = self.time_embed(time_embedding(time, self.width).to(x.dtype))
        x = self.conv_in(x)
        outputs = [x]
        for down in self.down_blocks:
            outputs += down(outputs[-1], embedded)
        x = self.middle_block(outputs[-1], embedded)
        for up in self.up_blocks:
            x = up(x, outputs, embedded)
        return self.out(x)
