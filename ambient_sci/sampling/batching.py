"""How many chains fit into memory, and the rectangular chunks (images x samples) that a run is cut into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ambient_sci.operators.elementary import Masking
from ambient_sci.priors.base import Prior
from ambient_sci.priors.given import KeptRows

#: Chains at a time on a CPU: beyond it memory traffic eats what larger matrices gain.
CPU_CHAINS = 16
#: Chains tried first on an accelerator; halved until they fit.
DEVICE_CHAINS = 256


@dataclass(frozen=True)
class Chunk:
    """A rectangle of chains: the samples ``samples`` of the images ``images``."""

    images: range
    samples: range

    @property
    def chains(self) -> int:
        """How many there are."""
        return len(self.images) * len(self.samples)


def chunks(
    images: int, samples: int, size: int, *, all_images: bool = False, all_samples: bool = False
) -> Iterator[Chunk]:
    """Rectangles of at most ``size`` chains that cover ``images`` x ``samples``, image blocks outermost.

    Args:
        images, samples: number of each.
        size: chains at a time, >= 1; exceeded only as far as the next two ask for it.
        all_images: never separate the images of one sample (an operator whose parameters cannot be indexed).
        all_samples: never separate the samples of one image (a population).
    """
    width = images if all_images else max(size // samples, 1) if all_samples else min(size, images)
    depth = samples if all_samples else max(size // width, 1)
    for i in range(0, images, width):
        for s in range(0, samples, depth):
            yield Chunk(range(i, min(i + width, images)), range(s, min(s + depth, samples)))


def default_batch_size(prior: Prior, y: Tensor) -> int:
    """Chains at a time: on a CPU what memory is sure to hold, at most ``CPU_CHAINS``; elsewhere
    ``DEVICE_CHAINS`` to try first.
    """
    if y.device.type != "cpu":
        return DEVICE_CHAINS
    available = available_memory()
    if available is None:
        return CPU_CHAINS
    each = chain_memory(prior, y)
    return max(1, min(CPU_CHAINS, int(0.5 * available / max(each, 1))))


def chain_memory(prior: Prior, like: Tensor) -> int:
    """Bytes that one chain holds during a step with derivatives: what the network saves for them, and as much
    again for work.

    Measured on one forward pass at the prior's image size.
    """
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    x = torch.zeros(1, *prior.shape, dtype=like.dtype, device=like.device, requires_grad=True)
    given = None
    if prior.takes is KeptRows:
        channels = getattr(getattr(prior, "config", None), "mask_channels", 1)
        ones = torch.ones(1, channels, *prior.shape[1:], dtype=like.dtype, device=like.device)
        given = KeptRows(Masking(ones, img_size=prior.shape))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        level = torch.ones(1, dtype=like.dtype, device=like.device)
        out = prior(x, level, given)
    weights = {p.untyped_storage().data_ptr() for p in [*prior.parameters(), *prior.buffers()]}
    saved = sum(n for address, n in sizes.items() if address not in weights)
    return 2 * saved + 16 * out.numel() * out.element_size()


def available_memory() -> int | None:
    """Bytes of memory that can be had without swapping, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
