"""Networks of other libraries as backbones: deepinv's NCSN++ and ADM, diffusers' U-Nets.

deepinv's two take two options beside their own. ``group_channels``: least channels of a group of the
normalisation, 4 in EDM; deepinv always makes 32 groups, which is the same from 128 channels on. ``gated``:
every convolution is multiplied by a gate, as in Ambient Diffusion's networks (Daras et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.priors.given import Labels, Prompt
from ambient_sci.priors.networks import Backbone
from ambient_sci.priors.padding import padded


class EDMNetwork(Backbone):
    """deepinv's ``NCSNpp`` or ``ADMUNet``, without the preconditioning that comes with them.

    Args:
        model: the network.
        label_dim: number of classes; 0 for none.
        multiple: what it divides height and width by.
    """

    takes = Labels
    any_size = True

    def __init__(self, model: nn.Module, label_dim: int, multiple: int = 1) -> None:
        super().__init__()
        self.model, self.label_dim, self.multiple = model, label_dim, multiple

    def clock(self, level: Tensor) -> Tensor:
        """c_noise = log(sigma) / 4, what these networks embed [Karras et al. 2022]."""
        return level.log() / 4

    def at(self, x: Tensor, time: Tensor, given: Labels | None = None) -> Tensor:
        """``x`` (B, in, H, W) at ``time`` (B,) to (B, out, H, W)."""
        labels = augment = None
        if self.label_dim:
            given = given or Labels(torch.full((len(x),), -1, device=x.device))
            labels = given.one_hot(self.label_dim).to(x)
        if given is not None and given.augment is not None:
            augment = given.augment.to(x)
        forward: Callable[..., Tensor] = self.model.forward_unet  # type: ignore[assignment]
        handle = self.model.map_noise.register_forward_hook(lambda module, inputs, out: out.to(x.dtype))
        try:
            return forward(x, time, class_labels=labels, augment_labels=augment)
        finally:
            handle.remove()

    def _apply(self, fn: Any, recurse: bool = True) -> EDMNetwork:
        """Moves and casts, but the embedding of the level stays in float32: rounded, its high frequencies
        point anywhere.

        With it in bfloat16 an NCSN++ answered with errors of 5 to 17 %, with it in float32 of 1 to 2 %.
        """
        buffers = self.model.map_noise._buffers
        before = dict(buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = buffers[name]
            if old is not None and new is not None and new.dtype in (torch.float16, torch.bfloat16):
                buffers[name] = old.to(new.device, torch.float32)
        return self


def _gated(model: nn.Module) -> None:
    """Replace every convolution by a gated one."""
    from deepinv.models.utils import UpDownConv2d

    class Gated(UpDownConv2d):
        """conv(x) g, with g = sigmoid(sigmoid(conv_gate(x))): twice, as published networks have it."""

        def __init__(self, plain: UpDownConv2d) -> None:
            nn.Module.__init__(self)
            self.__dict__.update({k: v for k, v in vars(plain).items() if not k.startswith("_")})
            for key in ("weight", "bias"):
                self.register_parameter(key, plain._parameters.get(key))
            self.register_buffer("resample_filter", plain.resample_filter)
            weight = None if plain.weight is None else nn.Parameter(torch.randn_like(plain.weight) * 0.02)
            self.register_parameter("gate_weight", weight)

        def _resampled(self, x: Tensor) -> Tensor:
            f, count = self.resample_filter.to(x.dtype), x.shape[1]
            pad = (f.shape[-1] - 1) // 2
            if self.up:
                f = f.mul(4).tile([count, 1, 1, 1])
                return nn.functional.conv_transpose2d(x, f, groups=count, stride=2, padding=pad)
            return nn.functional.conv2d(x, f.tile([count, 1, 1, 1]), groups=count, stride=2, padding=pad)

        def forward(self, x: Tensor) -> Tensor:
            after = self.fused_resample and self.down and self.weight is not None
            if self.resample_filter is not None and not after:
                x = self._resampled(x)
            if self.weight is not None:
                pad = self.weight.shape[-1] // 2 + ((self.resample_filter.shape[-1] - 1) // 2 if after else 0)
                gate = nn.functional.conv2d(x, self.gate_weight.to(x.dtype), padding=pad).sigmoid().sigmoid()
                x = nn.functional.conv2d(x, self.weight.to(x.dtype), padding=pad) * gate
            if after:
                f = self.resample_filter.to(x.dtype).tile([x.shape[1], 1, 1, 1])
                x = nn.functional.conv2d(x, f, groups=x.shape[1], stride=2)
            return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)

    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if isinstance(child, UpDownConv2d):
                parent._modules[key] = Gated(child)


def _regroup(model: nn.Module, least: int) -> None:
    """Group norms of at most 32 groups with at least ``least`` channels each."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = min(32, max(1, module.num_channels // least))


def _edm(name: str) -> Callable[..., EDMNetwork]:
    def factory(in_channels: int, out_channels: int, shape: tuple[int, ...], **options: Any) -> EDMNetwork:
        import deepinv

        if options.get("pretrained") is not None:
            raise InputError(
                f"network {name}: expected no option pretrained (import the weights as a prior), got one"
            )
        kind = {"ncsnpp": deepinv.models.NCSNpp, "adm": deepinv.models.ADMUNet}[name]
        levels = options.get("channel_mult") or signature(kind).parameters["channel_mult"].default
        multiple = 2 ** (len(levels) - 1)
        settings = {
            "label_dim": 0,
            "augment_dim": 0,
            **options,
            "pretrained": None,
            "img_resolution": padded(max(shape[1:]), multiple),  # decides where attention is, and names
        }
        group, gated = settings.pop("group_channels", None), bool(settings.pop("gated", False))
        unknown = [key for key in settings if key not in kind.__init__.__code__.co_varnames]
        if unknown:  # their constructors take any keyword and drop what they do not know
            raise InputError(
                f"network {name}: expected options of deepinv's {kind.__name__}, got {', '.join(unknown)}"
            )
        least = options.get("model_channels", 128) * min(options.get("channel_mult", (1,)))
        if name == "ncsnpp" and least < 64 and (group or 1) < 2:
            # Group norms have 32 groups: at 32 channels each channel is normalised by itself, and with it
            # goes what the level added.
            raise InputError(
                f"network ncsnpp: expected at least 64 channels at every resolution, got {least}: narrower, "
                "its normalisation removes "
                "the noise level from what the network sees; or group_channels of at least 2"
            )
        model = kind(in_channels=in_channels, out_channels=out_channels, **settings)
        if group is not None:
            _regroup(model, int(group))
        if gated:
            _gated(model)
        return EDMNetwork(model, settings["label_dim"], multiple)

    return factory


class DiffusersUNet(Backbone):
    """diffusers' ``UNet2DModel``; ``num_class_embeds`` counts one more than there are classes: the last one
    means no label."""

    takes = Labels
    any_size = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.multiple = 2 ** (len(model.config.block_out_channels) - 1)

    def at(self, x: Tensor, time: Tensor, given: Labels | None = None) -> Tensor:
        """``x`` (B, in, H, W) at ``time`` (B,) to (B, out, H, W)."""
        count = self.model.config.num_class_embeds
        index = None
        if count is not None:
            index = torch.full((len(x),), -1, device=x.device) if given is None else given.index
            index = torch.where(index < 0, count - 1, index)
        return self.model(x, time, class_labels=index).sample


class DiffusersConditionalUNet(Backbone):
    """diffusers' ``UNet2DConditionModel``, told a `Prompt`; without one it is told zeros, SDXL's empty
    prompt."""

    takes = Prompt

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def empty(self, num: int, device: torch.device) -> Prompt:
        """The empty prompt for ``num`` samples."""
        config = self.model.config
        width = config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        tokens = torch.zeros(num, 1, width, device=device)
        if config.addition_embed_type != "text_time":
            return Prompt(tokens)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return Prompt(tokens, torch.zeros(num, pooled, device=device), torch.zeros(num, 6, device=device))

    def at(self, x: Tensor, time: Tensor, given: Prompt | None = None) -> Tensor:
        """``x`` (B, in, H, W) at ``time`` (B,) to (B, out, H, W)."""
        given = given or self.empty(len(x), x.device)
        added = None
        if given.pooled is not None and given.time_ids is not None:
            added = {"text_embeds": given.pooled.to(x), "time_ids": given.time_ids.to(x)}
        return self.model(x, time, encoder_hidden_states=given.tokens.to(x), added_cond_kwargs=added).sample


def _diffusers(
    name: str, wrapper: type[DiffusersUNet] | type[DiffusersConditionalUNet]
) -> Callable[..., Backbone]:
    def factory(in_channels: int, out_channels: int, shape: tuple[int, ...], **options: Any) -> Backbone:
        try:
            import diffusers
        except ImportError:
            raise InputError(
                f"network {name}: expected the package diffusers (pip install 'ambient-sci[sdxl]')"
            ) from None
        size = list(shape[1:])
        model = getattr(diffusers, name)(
            sample_size=size, in_channels=in_channels, out_channels=out_channels, **options
        )
        return wrapper(model)

    return factory


FACTORIES: dict[str, Callable[..., Backbone]] = {
    "ncsnpp": _edm("ncsnpp"),
    "adm": _edm("adm"),
    "diffusers-unet": _diffusers("UNet2DModel", DiffusersUNet),
    "diffusers-conditional-unet": _diffusers("UNet2DConditionModel", DiffusersConditionalUNet),
}
