"""How precisely the network computes while everything around it (states, solves, noise) stays in the type of
the measurements.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from ambient_sci.errors import InputError

Precision = Literal["fp32", "bf16", "auto"]


def precision_context(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Context in which a network runs in ``precision``.

    "fp32": as it is. "bf16": autocast, half the time where the processor multiplies bfloat16 matrices
    natively and slower elsewhere. "auto": bf16 on such processors (GPUs from Ampere on, CPUs with AMX), fp32
    elsewhere.

    Raises:
        InputError: another word.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}")
    if precision == "fp32" or (precision == "auto" and not native_bfloat16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())
