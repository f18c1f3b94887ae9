"""A dataclass with an option of each kind, the values that it may and may not have, and parsers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ldae.options import DataArguments, ModelArguments, TrainArguments, option, option_parser, read_recipe

ROOT = Path(__file__).parents[2]


@dataclass
class Sample:
    """An option of each kind; VALUES says once more, and in another way, what they may be."""

    count: int = option(3, "How many.", minimum=1, maximum=9)
    seed: int = option(0, "Any integer.")
    ratio: float = option(0.5, "A part, in %.", minimum=0, exclusive_maximum=1)
    weight: float | None = option(None, "A weight.", exclusive_minimum=0, maximum=100)
    name: str = option("a", "A name.")
    flag: bool = option(True, "A switch.", group="Switches")
    kind: Literal["no", "bf16"] | None = option(None, "A choice.", group="Switches")
    sizes: list[int] = option([4, 5], "Sizes.", minimum=1)
    rates: list[float] = option([], "Rates.", exclusive_minimum=0)
    parts: list[str] = option(["x"], "Parts.", choices=("x", "y", "null"))
    settings: dict | None = option(None, "Settings.")
    title: ClassVar[str] = "Sample"


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).filter(str.strip)
WORD = st.text("abc/ =-").map("q{}".format)  # no number, no truth value
NEGATIVE, BROKEN = st.floats(max_value=0, exclude_max=True), st.sampled_from([math.nan, math.inf, -math.inf])
JSON = st.recursive(st.booleans() | st.integers() | FLOATS | TEXT | st.none(), st.lists, max_leaves=5)
VALUES = {  # what each option may be, and what it may not
    "count": (st.integers(1, 9), st.integers(max_value=0) | st.integers(10) | st.floats() | st.booleans() | WORD),
    "seed": (st.integers(-(10**30), 10**30), st.floats() | st.booleans() | WORD),
    "ratio": (st.floats(0, 1, exclude_max=True), NEGATIVE | st.floats(1) | BROKEN | st.booleans() | WORD),
    "weight": (st.floats(0, 100, exclude_min=True), st.floats(max_value=0) | st.floats(100, exclude_min=True) | BROKEN),
    "name": (TEXT, st.lists(WORD, min_size=2)),
    "flag": (st.booleans(), st.integers(2) | st.floats() | WORD),
    "kind": (st.sampled_from(["no", "bf16"]), WORD | st.booleans() | st.integers()),
    "sizes": (
        st.lists(st.integers(1), min_size=1),
        st.lists(st.integers(1)).map(lambda sizes: [*sizes, 0]) | st.lists(FLOATS, min_size=1) | WORD,
    ),
    "rates": (st.lists(FLOATS.filter(lambda x: x > 0), min_size=1), st.lists(NEGATIVE, min_size=1) | WORD),
    "parts": (st.lists(st.sampled_from(["x", "y", "null"]), min_size=1), st.lists(WORD, min_size=1)),
    "settings": (st.dictionaries(TEXT, JSON), st.lists(st.integers(), min_size=1) | st.integers() | WORD),
}


PARSER = option_parser(Sample, description="")
TRAINING = option_parser(ModelArguments, DataArguments, TrainArguments, description="")
quick = settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=50)


def command_line(name: str, value) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def read(folder: Path, text: str | bytes, parser=PARSER) -> dict:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path, parser.domains)


def refused(parser, arguments: list[str], capsys) -> str:
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as error:
        parser.given(arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err
