"""Settings that are misspelt, refused by name. Free of torch."""

from __future__ import annotations

import dataclasses
import functools
from difflib import get_close_matches
from typing import Any, TypeVar

from ambient_sci.errors import InputError

Kind = TypeVar("Kind", bound=type)


def refuses_unknown_settings(kind: Kind) -> Kind:
    """Make a dataclass name its fields where it is given a keyword that is none of them."""
    plain = kind.__init__
    names = [f.name for f in dataclasses.fields(kind) if f.init]

    @functools.wraps(plain)
    def checked(self: Any, *values: Any, **settings: Any) -> None:
        unknown = [name for name in settings if name not in names]
        if unknown:
            near = get_close_matches(unknown[0], names, 1)
            hint = f" (perhaps {near[0]})" if near else ""
            raise InputError(
                f"{kind.__name__}: {unknown[0]}: unknown setting{hint}; expected one of {', '.join(names)}"
            )
        plain(self, *values, **settings)

    kind.__init__ = checked
    return kind
