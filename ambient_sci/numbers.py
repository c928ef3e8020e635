"""The numbers that a person or a file may give: finite, and of a size that single precision can square.

Variances, products of levels and norms are computed in float32, whose largest number is 3.4e38: a value of up
to 1e18 has a square that is a number, as has the sum of a hundred such squares. One below 1e-18 has a square
that is nearly 0 there. So 1e308 is a valid double and no noise level. Counts are below 2^31, seeds below 2^63
(what a generator takes).
"""

from __future__ import annotations

import math
from typing import Any

from ambient_sci.errors import InputError

LARGEST, SMALLEST = 1e18, 1e-18
LARGEST_COUNT, LARGEST_SEED = 2**31 - 1, 2**63 - 1
#: Text of people in descriptions, which nothing is computed from.
FREE = ("about", "licence", "license")


def number_in_range(value: float, key: str = "", *, setting: bool = True) -> str | None:
    """What was expected in place of a number; None where it is fine.

    Args:
        value: an int or a float.
        key: its name; a name that ends in "seed" allows for more.
        setting: somebody chose it: a count is below 2^31 then, and no other number is so small that its
            square is none. False: it may be any that arises, as the 1e-20 of a rotation by 90 degrees.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        most = LARGEST_COUNT if setting and not key.rsplit(".", 1)[-1].endswith("seed") else LARGEST_SEED
        return None if abs(value) <= most else f"an integer of at most {most} in size"
    if not math.isfinite(value):
        return "a finite number"
    if abs(value) > LARGEST or (setting and 0 < abs(value) < SMALLEST):
        return f"0 or a number of size {SMALLEST:g} to {LARGEST:g} (single precision holds its square)"
    return None


def check_numbers(value: Any, name: str, key: str = "") -> None:
    """Raise InputError for a number out of range anywhere in a value of JSON types.

    Args:
        value: what a file says.
        name: of the file, for the message.
        key: where in it ``value`` is.
    """
    if isinstance(value, dict):
        for k, v in value.items():
            if k not in FREE:
                check_numbers(v, name, f"{key}.{k}" if key else str(k))
    elif isinstance(value, (list, tuple)):
        for k, v in enumerate(value):
            check_numbers(v, name, f"{key}[{k}]")
    elif isinstance(value, (int, float)):
        expected = number_in_range(value, key, setting=False)
        if expected is not None:
            raise InputError(f"{name}: {key}: expected {expected}, got {short(value)}")


def short(value: Any) -> str:
    """A value in a message: of an integer of a thousand digits, its size."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"one of {value.bit_length()} bits"
    return f"{value!r}"
