r"""Low-rank adapters on a frozen prior: fine-tuning that trains, averages and saves a small part of a
network.

    W -> W + (alpha / r) B A,        A (r, in) random, B (out, r) zero at first        [Hu et al. 2022]

The base is stored with the adapter, or referred to by where it was loaded from and a digest of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.priors.base import Prior, Tensors, below, description_of, rebuild_prior
from ambient_sci.priors.given import Given
from ambient_sci.whole_files import digest_of

_BASE = ".base_layer"


class LoraPrior(Prior):
    """A frozen prior whose network is adapted in low rank; trained like any other, only the adapter's tensors
    move.

    Args:
        base: the prior to adapt, with a module ``network``. It is taken over: its network is changed in
            place.
        rank: r, >= 1.
        alpha: see above; default: the rank.
        targets: layers to adapt, by the ends of their names ("to_q", ...); default: every ``nn.Linear``.
        source: where `load_prior` finds the base, a path or "pretrained:NAME". With it the adapter is saved
            alone; without it the base is saved as well.
        generator: source of the initial A; default: a fixed seed.

    Raises:
        InputError: peft is not installed, a base without a network, no layer of those names, or a rank below
            1.
    """

    kind = "lora"

    def __init__(
        self,
        base: Prior,
        rank: int = 4,
        alpha: float | None = None,
        targets: Sequence[str] = (),
        source: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        network = getattr(base, "network", None)
        if not isinstance(network, nn.Module) or rank < 1:
            raise InputError(
                f"adapter: expected a prior with a network and rank >= 1, got {type(base).__name__} and "
                f"{rank}"
            )
        self._base_description = description_of(base)  # what cannot be saved is refused before it is trained
        self._base_digest = digest_of(base.saved_tensors())
        self.rank, self.alpha, self.source = int(rank), float(rank if alpha is None else alpha), source
        self.targets = tuple(targets) or _linear_layers(network)
        _inject(network, self.rank, self.alpha, self.targets, generator)
        self.base = base
        self.takes, self.separates_rows = base.takes, base.separates_rows
        self.shape, self.data_std = base.shape, base.data_std
        self.sigma_min, self.sigma_max = base.sigma_min, base.sigma_max

    def forward(self, x: Tensor, sigma: float | Tensor, given: Given | None = None) -> Tensor:  # type: ignore[override]
        """The adapted network in the base's preconditioning."""
        return self.base(x, sigma, given)

    def describe(self) -> dict[str, Any]:
        """The adapter, and the base by description or by place and digest."""
        place = self._base_description if self.source is None else {"source": self.source}
        return {
            "kind": self.kind,
            "rank": self.rank,
            "alpha": self.alpha,
            "targets": list(self.targets),
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "base": {**place, "digest": self._base_digest},
        }

    def saved_tensors(self) -> Tensors:
        """The adapter's, and the base's where it is not elsewhere."""
        state = self.state_dict()
        return state if self.source is None else {k: t for k, t in state.items() if _is_adapter(k)}

    @classmethod
    def rebuild(cls, description: dict[str, Any], tensors: Tensors) -> Prior:
        """Inverse of `describe`; a base elsewhere must be there, with the same weights."""
        base = dict(description["base"])
        digest, source = base.pop("digest"), base.pop("source", None)
        if source is None:
            own = below({k: t for k, t in tensors.items() if not _is_adapter(k)}, "base")
            prior = rebuild_prior(base, {k.replace(_BASE, ""): t for k, t in own.items()})
        else:
            from ambient_sci.priors.storage import load_prior

            prior = load_prior(source)
        if digest_of(prior.saved_tensors()) != digest:
            raise InputError(
                "adapter: expected the base that it was trained on, got other weights at "
                f"{source or 'its own file'}"
            )
        settings = {key: description[key] for key in ("rank", "alpha", "targets")}
        new = cls(prior, source=source, **settings)
        expected = {k: t.shape for k, t in new.state_dict().items() if _is_adapter(k)}
        adapter = {k: t for k, t in tensors.items() if _is_adapter(k)}
        if expected != {k: t.shape for k, t in adapter.items()}:
            raise InputError("adapter: expected the tensors that its description asks for, got others")
        new.load_state_dict(adapter, strict=False, assign=True)
        new.sigma_min, new.sigma_max = description["sigma_min"], description["sigma_max"]
        return new


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _linear_layers(network: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in network.named_modules() if isinstance(module, nn.Linear))


def _inject(
    network: nn.Module, rank: int, alpha: float, targets: Sequence[str], generator: torch.Generator | None
) -> None:
    """Put the adapter into ``network``, frozen otherwise; its tensors are float32 whatever the base is."""
    try:
        import peft
    except ImportError:
        raise InputError("adapter: expected the package peft (pip install 'ambient-sci[sdxl]')") from None
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    seed = 0 if generator is None else int(torch.randint(2**31 - 1, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, network)
        except ValueError as error:
            raise InputError(f"adapter: {' '.join(str(error).split())[:200]}") from None
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_is_adapter(f".{name}"))
        if _is_adapter(f".{name}"):
            parameter.data = parameter.data.float()
