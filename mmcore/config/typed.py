"""Nested plain values -> frozen dataclasses. All faults are found, not the first alone."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from mmcore.errors import ConfigError


def build(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`; faults are appended to `problems`, and None comes back with them."""
    if not isinstance(values, dict):
        problems.append(f"{where or 'the recipe'} is {values!r}: it must be a section with keys")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    chosen = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
            problems.append(f"unknown key {name}: {advice}")
            continue
        chosen[key] = _convert(hints[key], value, name, problems)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in chosen:
            problems.append(f"{where}.{name} is missing")
    if len(problems) > before:
        return None
    try:
        return cls(**chosen)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _convert(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    """`value` as `kind`, or a fault. ints pass as floats and whole floats (1e6) as ints; nothing else is bent."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(a for a in arguments if a is not type(None))
        return _convert(kind, value, name, problems)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, name, problems)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            count = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
            problems.append(f"{name} is {value!r}: it must be {count}")
            return None
        return tuple(_convert(arguments[0], item, f"{name}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isnan(value):
        problems.append(f"{name} is {value!r}: it must be a number")
        return None
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    problems.append(f"{name} is {value!r}: it must be {words.get(kind, 'a section')}")
    return None
