"""The names of `ambient_sci.precision`."""

from __future__ import annotations

from ambient_sci.precision import Precision, native_bfloat16, precision_context

__all__ = ["Precision", "native_bfloat16", "precision_context"]
