"""Bounds of options, which stand beside each option: `option(default, text, minimum=…, maximum=…, above=…, below=…)`."""

import dataclasses
import math
import operator
from typing import Any, Literal, get_args, get_origin, get_type_hints

BOUNDS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "greater than"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def validate(options: Any):
    """Validates the fields of a dataclass against the bounds that they declare.

    None is valid for any option. Each number of a list must keep the bounds, and a list may be empty only if its default is.
    A number must be finite.

    Raises:
        ValueError: naming the option, its bounds and the value.
    """
    types = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None:
            continue
        if isinstance(value, list):
            if not value and field.default_factory():
                raise ValueError(f"--{field.name} must hold at least one value, got []")
            _validate(field, value, value, "hold only numbers that are")
        else:
            _validate(field, [value], value, "be")
        choices = get_args(types[field.name]) if get_origin(types[field.name]) is Literal else (value,)
        if value not in choices:
            raise ValueError(f"--{field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _validate(field: dataclasses.Field, numbers: list[Any], value: Any, verb: str):
    given = [(*BOUNDS[name], field.metadata[name]) for name in BOUNDS if name in field.metadata]
    if not given:
        return
    for number in numbers:
        if not math.isfinite(number) or not all(holds(number, bound) for holds, _, bound in given):
            bounds = " and ".join(f"{words} {bound:g}" for _, words, bound in given)
            raise ValueError(f"--{field.name} must {verb} {bounds}, got {value}")
