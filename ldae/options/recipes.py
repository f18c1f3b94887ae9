"""Recipes: YAML files of options, which go through the same types and bounds as the command line."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ldae.options.declaration import Domain
from ldae.options.parser import closest

PACKAGE = Path(__file__).resolve().parents[1]
NULL = "tag:yaml.org,2002:null"


def shipped_recipes() -> dict[str, Path]:
    """The files of the recipes that lie in the package, or in the checkout where it is not installed, by their names."""
    folder = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str | os.PathLike) -> Path:
    """The file of a recipe: a path, or the bare name of a shipped recipe, such as `photos`.

    Raises:
        FileNotFoundError: if there is none.
    """
    path, shipped = Path(name).expanduser(), shipped_recipes()
    if str(name) in shipped:
        return shipped[str(name)]
    if path.is_file():
        return path
    if path.is_dir():
        raise FileNotFoundError(
            f"there is no recipe {str(name)!r}; it is a folder: a folder of images is given by --data"
        )
    hint = closest(path.stem, shipped) or f"shipped recipes are {', '.join(shipped)}"
    raise FileNotFoundError(f"there is no recipe {str(name)!r}; {hint}")


def read_recipe(path: str | Path, known: Mapping[str, Domain]) -> dict[str, Any]:
    """The options of a recipe, by name, each checked.

    A value is read as the text that it would be on the command line, so that `no`, `1e-4` and `16.5` mean the same in both.
    A key without a value, or with `null`, leaves an optional option at its default.

    Args:
        known: the options that a recipe may hold, such as `OptionParser.domains`.

    Raises:
        ValueError: for a file that is no mapping of options, an unknown or repeated key, or a value that the option may not
            have. The message is one line with the file, the line, the key and what was expected.
    """
    text = _text(path)
    options: dict[str, Any] = {}
    for key, value in _pairs(text, path):
        where = f"recipe {str(path)!r}, line {key.start_mark.line + 1}"
        name = (key.value if isinstance(key, yaml.ScalarNode) else _source(key, text)).replace("-", "_")
        if name not in known:
            hint = closest(name, known) or "--help lists the options"
            raise ValueError(f"{where}: {name!r} is no option; {hint}")
        if name in options:
            raise ValueError(f"{where}: {name} is given twice; keep one of the two")
        try:
            options[name] = _value(value, known[name])
        except ValueError as error:
            null = " or null" if known[name].optional else ""
            got = _source(value, text) or "null"
            raise ValueError(f"{where}: {name} must be {known[name].expected}{null}, got {got}") from error
    return {name: value for name, value in options.items() if value is not None}


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {str(path)!r} is no text file: byte {error.start} is not UTF-8") from error


def _pairs(text: str, path: str | Path) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of the one mapping that a recipe is, as they are written."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.composer.ComposerError as error:
        if "single document" not in str(error.context):
            raise ValueError(f"recipe {str(path)!r} is no YAML: {_problem(error)}") from error
        raise ValueError(f"recipe {str(path)!r} holds several documents; keep one of them") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is no YAML: {_problem(error)}") from error
    if root is None:  # an empty file, or nothing but comments
        return
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "plain text"
        raise ValueError(f"recipe {str(path)!r} must be lines of 'option: value', got {kind}")
    yield from root.value


def _problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(f"{f'line {mark.line + 1}: ' if mark else ''}{problem}".split())


def _value(node: yaml.Node, domain: Domain) -> Any:
    if node.tag == NULL:
        if domain.optional:
            return None
        raise ValueError
    if isinstance(node, yaml.MappingNode) and domain.type is dict:
        try:
            return domain.parse(json.dumps(_construct(node)))
        except (TypeError, yaml.YAMLError) as error:  # a date or a tag, say, which JSON does not have
            raise ValueError from error
    parts = node.value if isinstance(node, yaml.SequenceNode) and domain.many else [node]
    if not all(isinstance(part, yaml.ScalarNode) and part.tag != NULL for part in parts):
        raise ValueError
    values = [domain.parse(part.value) for part in parts]
    if domain.many and not domain.holds(values):
        raise ValueError
    return values if domain.many else values[0]


def _construct(node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        pairs = [(_construct(key), _construct(value)) for key, value in node.value]
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(part) for part in node.value]
    return yaml.SafeLoader("").construct_document(node)


def _source(node: yaml.Node, text: str) -> str:
    """A node as it is written, on one line."""
    written = " ".join(text[node.start_mark.index : node.end_mark.index].split())
    return written if len(written) <= 80 else f"{written[:77]}..."
