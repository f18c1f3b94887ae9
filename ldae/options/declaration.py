"""What an option is: a field of a dataclass that carries its help, its bounds, its group and whether it defines the run."""

import json
import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

TRUE, FALSE = {"yes", "true", "t", "y", "1"}, {"no", "false", "f", "n", "0"}
NOUNS = {  # of one value, and of several
    bool: ("true or false", "of true and false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text that is not empty", "texts that are not empty"),
    dict: ("a JSON object", "JSON objects"),
}


def option(
    default: Any,
    help: str,
    *,
    group: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: float | None = None,
    exclusive_maximum: float | None = None,
    choices: Sequence[Any] = (),
    defines_run: bool = False,
    positional: bool = False,
) -> Any:
    """A field of a dataclass that is an option of a command. Its annotation is its type.

    Args:
        default: the value where none is given; `dataclasses.MISSING` for an option that must be given.
        help: what the option does, as whole sentences.
        group: the title below which `--help` shows it; by default the `title` of its dataclass, or "Options".
        minimum, maximum, exclusive_minimum, exclusive_maximum: bounds of a number, or of each number of a list.
        choices: the values that it may have; an annotation with `Literal` says them by itself.
        defines_run: whether a run that is resumed must keep it.
        positional: whether a command line gives it, one value, by its place and without its name.
    """
    bounds = {
        "minimum": minimum,
        "maximum": maximum,
        "exclusive_minimum": exclusive_minimum,
        "exclusive_maximum": exclusive_maximum,
    }
    metadata = {
        "help": help,
        "group": group,
        "bounds": bounds,
        "choices": tuple(choices),
        "defines_run": defines_run,
        "positional": positional,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Domain:
    """The values that an option may have: what `option` and the annotation say, in one place.

    Args:
        type: bool, int, float, str or dict; of each element, where the option is a list.
        many: whether it is a list.
        empty: whether that list may be empty.
        optional: whether it may be None.
    """

    type: type
    many: bool = False
    empty: bool = False
    optional: bool = False
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    exclusive_maximum: float | None = None

    @property
    def bounds(self) -> str:
        """The bounds in words, such as "at least 0 and less than 1"; empty where there are none."""
        pairs = (
            ("at least", self.minimum),
            ("greater than", self.exclusive_minimum),
            ("at most", self.maximum),
            ("less than", self.exclusive_maximum),
        )
        return " and ".join(f"{words} {bound:,}" for words, bound in pairs if bound is not None)

    @property
    def expected(self) -> str:
        """Says in words what a value must be, such as "an integer of at least 1"."""
        if self.choices:
            return f"one {'or more ' if self.many else ''}of {', '.join(map(str, self.choices))}"
        words = f"one or more {NOUNS[self.type][1]}" if self.many else NOUNS[self.type][0]
        return f"{words}{' of ' if self.bounds.startswith('at') else ' '}{self.bounds}" if self.bounds else words

    def parse(self, text: str) -> Any:
        """The value, or one element of it, that a text of a command line or of a recipe stands for.

        Raises:
            ValueError: if it stands for none. The message says what was expected.
        """
        try:
            value = _PARSERS[self.type](text)
        except ValueError:
            value = None
        if not self._holds(value):
            raise ValueError(f"must be {self.expected}, got {text!r}")
        return value

    def holds(self, value: Any) -> bool:
        """Whether the option may have this value: its type, its bounds and its choices."""
        if value is None:
            return self.optional
        if not self.many:
            return self._holds(value)
        return isinstance(value, (list, tuple)) and (self.empty or len(value) > 0) and all(map(self._holds, value))

    def _holds(self, value: Any) -> bool:
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.type is not bool):
            return False
        if self.choices:
            return value in self.choices
        if isinstance(value, str):
            # "" is what an unset variable of a shell leaves; no name of a file may hold NUL
            return bool(value.strip()) and "\0" not in value
        return self.type not in (int, float) or self._within_bounds(value)

    def _within_bounds(self, value: Any) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.exclusive_minimum is None or value > self.exclusive_minimum)
            and (self.exclusive_maximum is None or value < self.exclusive_maximum)
        )


@cache
def domains(cls: type) -> dict[str, Domain]:
    """The domain of each option of a dataclass, by name, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    return {f.name: _domain(hints[f.name], f) for f in fields(cls) if "help" in f.metadata}


def validate(options: Any) -> None:
    """Checks each option of a dataclass's instance against its type, its bounds and its choices.

    Raises:
        ValueError: for the first value that is out of bounds or of another type. It names the option, what it must be, and
            what was got.
    """
    cls: type = type(options)
    for name, domain in domains(cls).items():
        if not domain.holds(value := getattr(options, name)):
            raise ValueError(f"--{name} must be {domain.expected}, got {value!r}")


def _domain(annotation: Any, f: Any) -> Domain:
    parts, optional = [annotation], False
    if get_origin(annotation) in (Union, types.UnionType):
        optional = type(None) in get_args(annotation)
        parts = [part for part in get_args(annotation) if part is not type(None)]
    if len(parts) != 1:
        raise TypeError(f"the option {f.name!r} must have one type, got {annotation}")
    (kind,) = parts
    if many := get_origin(kind) is list:
        (kind,) = get_args(kind)
    choices = f.metadata["choices"]
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        kind = type(choices[0])
    empty = many and callable(f.default_factory) and not f.default_factory()
    return Domain(get_origin(kind) or kind, many, empty, optional, choices, **f.metadata["bounds"])


def _bool(text: str) -> bool:
    if text.lower() not in TRUE | FALSE:
        raise ValueError
    return text.lower() in TRUE


_PARSERS: dict[type, Callable[[str], Any]] = {bool: _bool, int: int, float: float, str: str, dict: json.loads}
