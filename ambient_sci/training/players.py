r"""What is optimised: a module, its optimiser, its weight average.

    theta <- AdamW(theta, clip(g), lr(s)),        theta_ema <- d(s) theta_ema + (1 - d(s)) theta

Only what training moves is averaged and saved: parameters that require a gradient, and the buffers of the
modules that own them (and running statistics of normalisations without parameters). Everything else is
frozen: the average shares it with the module, in memory, and a checkpoint does not have it. An adapter on a
frozen base costs what the adapter weighs.

Averages are kept in single precision or better: in bfloat16, of 8 bits, a step of a thousandth of the
difference is lost. Buffers are not averaged but follow: a mean of running variances is not the variance of
anything.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ambient_sci.errors import InputError
from ambient_sci.training.config import TrainConfig

#: Settings of a run that a stage may give a player of its own.
OWN = ("learning_rate", "betas", "weight_decay", "gradient_clip", "ema_decay", "ema_half_life_images")


def trainable_names(module: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient; tied ones once."""
    return [name for name, p in module.named_parameters() if p.requires_grad]


def _moving_buffers(module: nn.Module, trainable: Iterable[Tensor]) -> list[tuple[str, str]]:
    """(path of a part, name of its buffer) for every buffer that training moves."""
    moving, found = {id(p) for p in trainable}, []
    for path, part in module.named_modules():
        own = [id(p) for p in part.parameters(recurse=False)]
        if moving.intersection(own) or (not own and isinstance(part, _NormBase)):
            found += [(path, name) for name, _ in part.named_buffers(recurse=False)]
    return found


def copy_sharing(module: nn.Module, trainable: Iterable[str]) -> nn.Module:
    """A copy of ``module`` with trainable tensors of its own, and the frozen ones shared.

    Args:
        module: what is copied.
        trainable: names of the parameters that the copy is to have for itself, with the buffers that move
            along.
    """
    named = dict(module.named_parameters())
    own = [named[name] for name in trainable]
    moving = [module.get_submodule(path)._buffers[name] for path, name in _moving_buffers(module, own)]
    apart = {id(t) for t in [*own, *moving]}
    shared = [t for t in [*module.parameters(), *module.buffers()] if id(t) not in apart]
    return copy.deepcopy(module, {id(t): t for t in shared})


class Player:
    """A module that training moves, with all that belongs to it.

    Args:
        name: for messages.
        module: moved to ``device``, and into training mode, except for normalisations whose parameters are
            frozen.
        config: the run.
        own: settings in which this player differs, of `OWN`.
        device: where it is trained.

    Raises:
        InputError: nothing in the module requires a gradient, or a setting that a player cannot have.
    """

    def __init__(
        self, name: str, module: nn.Module, config: TrainConfig, own: dict[str, Any], device: torch.device
    ) -> None:
        for key in own:
            if key not in OWN:
                raise InputError(f"player {name!r}: expected settings among {', '.join(OWN)}, got {key!r}")
        config = config.explicit()
        self.name, self.config = name, dataclasses.replace(config, **own)
        self.module = module.to(device).train()
        for part in module.modules():
            weights = list(part.parameters(recurse=False))
            if isinstance(part, _NormBase) and weights and not any(p.requires_grad for p in weights):
                part.eval()  # or its running statistics would move, which are frozen with it
        self.names = trainable_names(module)
        if not self.names:
            raise InputError(f"player {name!r}: expected parameters that require a gradient, got none")
        named = dict(module.named_parameters())
        self.parameters = [named[n] for n in self.names]
        self.buffers = _moving_buffers(module, self.parameters)
        self.average = copy_sharing(module, self.names).eval().requires_grad_(False)
        averaged = dict(self.average.named_parameters())
        self._shown = [averaged[n] for n in self.names]
        single = (torch.promote_types(p.dtype, torch.float32) for p in self._shown)
        self._means = [
            p if p.dtype == kind else p.to(kind) for p, kind in zip(self._shown, single, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.rate = config.learning_rate
        # Sums since the last line of the log: loss, gradient norm, number of turns. On the device.
        self.trace = torch.zeros(3, dtype=torch.float64, device=device)
        #: The average as it was when it was last kept (`keep`); None: never.
        self.kept: nn.Module | None = None

    # -- a turn ----------------------------------------------------------------------------------------------

    def clip(self) -> Tensor:
        """Shorten the gradient to `gradient_clip`; the norm that it had."""
        return nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)

    def update(self, step: int, progress: float) -> None:
        """One step of the optimiser down the gradient that is there, and one of the average after it."""
        self.rate = self.config.learning_rate_at(step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        with torch.no_grad():  # or the average would carry the graph of all steps
            new = [p.to(mean.dtype) for p, mean in zip(self.parameters, self._means, strict=True)]
            torch._foreach_lerp_(self._means, new, 1 - self.config.ema_decay_at(step))
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """The average's buffers as the module's are."""
        for path, name in self.buffers:
            moved = self.module.get_submodule(path)._buffers[name]
            follows = self.average.get_submodule(path)._buffers[name]
            if moved is not None and follows is not None:
                follows.copy_(moved)

    def averaged(self) -> nn.Module:
        """The module with averaged weights, in evaluation mode: the same object at every call."""
        with torch.no_grad():
            for shown, mean in zip(self._shown, self._means, strict=True):
                if shown is not mean:
                    shown.copy_(mean)
        return self.average

    def keep(self) -> None:
        """Remember the average as it is."""
        average = self.averaged()
        if self.kept is None:
            self.kept = copy_sharing(average, self.names).eval().requires_grad_(False)
            return
        with torch.no_grad():
            for name, tensor in self._of_kept(self.kept).items():
                tensor.copy_(self._of_kept(average)[name])

    def _of_kept(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of the module, its average or what was kept that training moves, by name."""
        named = dict(module.named_parameters())
        moved = {f"{path}.{name}": module.get_submodule(path)._buffers[name] for path, name in self.buffers}
        return {name: named[name] for name in self.names} | {k: b for k, b in moved.items() if b is not None}

    # -- the checkpoint --------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """All that continues this player: weights, averages, moments, buffers that move, sums for the log."""
        tensors: dict[str, Tensor] = {"trace": self.trace}
        for name, p, mean in zip(self.names, self.parameters, self._means, strict=True):
            tensors |= {f"module.{name}": p.detach(), f"average.{name}": mean.detach()}
            tensors |= {f"optimizer.{name}.{k}": v for k, v in self.optimizer.state.get(p, {}).items()}
        if self.kept is not None:
            tensors |= {f"kept.{name}": t.detach() for name, t in self._of_kept(self.kept).items()}
        return tensors | {f"buffer.{name}": b for name, b in self.persistent().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`.

        Raises:
            InputError: the tensors of another module.
        """
        mine = {f"module.{n}" for n in self.names} | {f"buffer.{n}" for n in self.persistent()}
        theirs = {k for k in tensors if k.startswith(("module.", "buffer."))}
        if mine != theirs:
            odd = sorted(mine ^ theirs)[0]
            raise InputError(
                f"checkpoint of {self.name!r}: expected the tensors of this module, got others ({odd})"
            )
        with torch.no_grad():
            for name, p, mean in zip(self.names, self.parameters, self._means, strict=True):
                p.copy_(tensors[f"module.{name}"])
                mean.copy_(tensors[f"average.{name}"])
            for name, buffer in self.persistent().items():
                buffer.copy_(tensors[f"buffer.{name}"])
        self._follow()
        if any(k.startswith("kept.") for k in tensors):
            self.keep()
            assert self.kept is not None
            for name, tensor in self._of_kept(self.kept).items():
                tensor.data.copy_(tensors[f"kept.{name}"])
        self.trace.copy_(tensors["trace"])
        moments: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.names):
            prefix = f"optimizer.{name}."
            own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            own = {k: v for k, v in own.items() if "." not in k}
            if own:
                moments[index] = own
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def persistent(self) -> dict[str, Tensor]:
        """The buffers that move and are saved, by name."""
        found = {}
        for path, name in self.buffers:
            part = self.module.get_submodule(path)
            buffer = part._buffers[name]
            if buffer is not None and name not in part._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
        return found
