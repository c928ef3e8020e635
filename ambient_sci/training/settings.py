"""Values from outside (JSON, YAML, a person) into dataclasses: exact types, one line that names the setting
where one is wrong."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from ambient_sci.errors import InputError
from ambient_sci.numbers import LARGEST, number_in_range, short


def require(condition: bool, key: str, expected: str, got: Any) -> None:
    """Raise InputError, naming the setting, unless ``condition``."""
    if not condition:
        raise InputError(f"configuration: {key}: expected {expected}, got {short(got)}")


def check_types(config: Any, prefix: str) -> None:
    """Every field as its annotation says, or an InputError that names it (lists become tuples, integers
    floats)."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not dataclasses.is_dataclass(value) and not _left_open(type(config), f.name, value):
            object.__setattr__(config, f.name, _parse(hints[f.name], value, f"{prefix}{f.name}"))


def parse_dataclass(kind: type, values: Any, where: str) -> Any:
    """A dataclass of type ``kind`` from a table of settings, or an InputError that names what does not
    belong."""
    if not isinstance(values, dict):
        raise InputError(
            f"configuration: {where or 'top level'}: expected a table of settings, got {values!r}"
        )
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    prefix = f"{where}." if where else ""
    values = _without_retired(kind, values, prefix)
    unknown = [key for key in values if key not in names]
    if unknown:
        raise InputError(
            f"configuration: {prefix}{unknown[0]}: unknown setting; expected one of {', '.join(names)}"
        )
    return kind(
        **{
            key: value if _left_open(kind, key, value) else _parse(hints[key], value, f"{prefix}{key}")
            for key, value in values.items()
        }
    )


def _left_open(kind: type, key: str, value: Any, prefix: str = "") -> bool:
    """Whether ``value`` is a word that leaves a setting to be chosen later; ``kind.OPEN`` has those words."""
    words = getattr(kind, "OPEN", {}).get(key, ())
    if not words or not isinstance(value, str) or _is_number(value):
        return False
    require(value in words, prefix + key, f"its own values or {' | '.join(words)}", value)
    return True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


#: In ``RETIRED``: whatever value the setting has, it had no effect.
ANY = object()


def _without_retired(kind: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """``values`` without settings that older files of this kind have; ``kind.RETIRED`` names their only
    value, and why."""
    retired: dict[str, tuple[Any, str]] = getattr(kind, "RETIRED", {})
    for key, (value, why) in retired.items():
        if key in values and value is not ANY:
            same = type(values[key]) is type(value) and values[key] == value
            require(same, f"{prefix}{key}", f"{value!r} ({why})", values[key])
    return {key: value for key, value in values.items() if key not in retired}


def _member(kinds: list[Any], value: Any, where: str) -> Any:
    """Which of several dataclasses a table is: the one whose ``mode`` it has; the first if it has none."""
    if len(kinds) == 1 or not isinstance(value, dict) or "mode" not in value:
        return kinds[0]
    modes = {typing.get_args(typing.get_type_hints(kind)["mode"])[0]: kind for kind in kinds}
    require(value["mode"] in modes, f"{where}.mode", f"one of {', '.join(map(repr, modes))}", value["mode"])
    return modes[value["mode"]]


def _parse(kind: Any, value: Any, where: str) -> Any:
    """``value`` as what the annotation ``kind`` asks for; exact types, except that an integer serves as a
    float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return parse_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _parse(_member([a for a in arguments if a is not type(None)], value, where), value, where)
    if origin is Literal:
        require(value in arguments, where, f"one of {', '.join(map(repr, arguments))}", value)
        return value
    if origin is tuple:
        return _parse_tuple(arguments, value, where)
    if origin is dict:
        require(isinstance(value, dict) and all(isinstance(k, str) for k in value), where, "a table", value)
        return value
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 (without a decimal point) as text.
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and type(value) in (int, float):
        require(
            abs(value) <= LARGEST or value != value, where, f"a number of size {LARGEST:g} at most", value
        )
        value = float(value)
    require(type(value) is kind, where, f"a value of type {getattr(kind, '__name__', kind)}", value)
    if kind in (int, float):
        expected = number_in_range(value, where)
        require(expected is None, where, expected or "", value)
    return value


def _parse_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    require(isinstance(value, (list, tuple)), where, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    require(len(value) == len(arguments), where, f"a list of {len(arguments)}", value)
    return tuple(
        _parse(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(arguments, value, strict=True))
    )
