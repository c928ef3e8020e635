r"""Streams of randomness as functions of a seed and a key: what makes a run a function of its configuration.

A stream is named by (seed, key), key a few small integers: the purpose, the step, the share of the batch.
Streams of different keys are unrelated, also those that differ by trailing zeros, which NumPy's plain entropy
lists would identify. Nothing here moves a global stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number(seed: int, *key: int) -> int:
    """A seed of 63 bits that is a function of (seed, key).

    Args:
        seed: of the run, >= 0.
        key: integers in [0, 2^32).
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded(seed: int, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` that is a function of (seed, key): the same on every machine, unrelated for
    different keys."""
    return torch.Generator(device).manual_seed(number(seed, *key))


@contextmanager
def forked(seed: int, device: torch.device) -> Iterator[None]:
    """What modules draw from torch's global streams in here (dropout) starts at ``seed``; after it they are
    where they were.

    Args:
        seed: of the streams inside.
        device: where the modules are; its stream is forked beside the CPU's.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for place in devices:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield
