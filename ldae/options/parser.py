"""The command line of dataclasses of options."""

import argparse
import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from ldae.mistakes import is_first, program
from ldae.options.declaration import Domain, domains

METAVARS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}


class OptionParser(argparse.ArgumentParser):
    """A parser of dataclasses whose fields are options.

    `--help` shows the options in titled groups, with their bounds and defaults. Names may be written with - or _. A switch is
    set by `--x` or `--x true`, and cleared by `--no_x` or `--x false`. A mistake ends the program with status 2 and one line
    that names the option, the value and the remedy.
    """

    def __init__(self, types: Iterable[type], description: str, usage: str | None = None):
        super().__init__(program(), usage, description, formatter_class=_Help, argument_default=argparse.SUPPRESS)
        self.types = tuple(types)
        self.domains: dict[str, Domain] = {}
        # `ldae.mistakes` acts on it, and takes it off the command line
        self.add_argument("--debug", action="store_true", help="show the traceback of a mistake, not its one line")
        self._names = {"--help", "--debug"}
        groups: dict[str | None, Any] = {None: self}
        for cls in self.types:
            # what a class inherits comes after its own
            declared = [inspect.get_annotations(base) for base in cls.__mro__]
            for f in sorted(fields(cls), key=lambda f: next(i for i, names in enumerate(declared) if f.name in names)):
                if (domain := domains(cls).get(f.name)) is not None:
                    title = f.metadata["group"] or getattr(cls, "title", None)
                    if title not in groups:
                        groups[title] = self.add_argument_group(title)
                    name = f.name if f.metadata["positional"] else f"--{f.name}"
                    action = groups[title].add_argument(name, **_argument(f, domain))
                    self._names.update(action.option_strings)
                    self.domains[f.name] = domain
        places = (f"[{a.metavar}]" if a.nargs == "?" else f"{a.metavar}" for a in self._actions if not a.option_strings)
        needed = (f"{a.option_strings[0]} {a.metavar}" for a in self._actions if a.option_strings and a.required)
        self.usage = usage or " ".join(["%(prog)s", *places, *needed, "[--option VALUE ...]"])

    def given(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The options that a command line gives, by name, each checked.

        Raises:
            SystemExit: with status 2 for an unknown option, a value that an option may not have, or a missing option.
        """
        arguments: list[str] = []
        for argument in sys.argv[1:] if argv is None else argv:
            argument = _with_underscores(argument)
            last = arguments[-1].removeprefix("--") if arguments else ""
            if argument.startswith("--") and (name := argument.partition("=")[0]) not in self._names:
                self._unknown(name)
            if re.match(r"-[\d.]", argument) and last in self.domains and not self.domains[last].many:
                arguments[-1] += f"={argument}"  # argparse takes -1e-4 for an option
            else:
                arguments.append(argument)
        namespace, rest = self.parse_known_args(arguments)
        for argument in rest:
            if argument.startswith("-"):
                self._unknown(argument)
            self.error(f"unexpected argument {argument!r}; {self.format_usage()}")
        return vars(namespace)

    def keywords(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The options that keyword arguments give, by name, each checked.

        A path stands for its text, one value for a list of one, and None for the default where an option may be None.

        Raises:
            TypeError: for an unknown name.
            ValueError: for a value that an option may not have. It names the argument, what it must be, and what was got.
        """
        values = {}
        for name, value in arguments.items():
            if (domain := self.domains.get(name)) is None:
                hint = closest(name, self.domains) or "--help of the command lists the options"
                raise TypeError(f"unknown option {name!r}; {hint}")
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            value = [value] if domain.many and not isinstance(value, (list, tuple)) and value is not None else value
            if not domain.holds(value):
                raise ValueError(f"{name} must be {domain.expected}, got {value!r}")
            if value is not None:
                values[name] = list(value) if isinstance(value, tuple) else value
        return values

    def build(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """An instance of each dataclass, with these values and otherwise its defaults."""
        return tuple(cls(**{name: values[name] for name in domains(cls) if name in values}) for cls in self.types)

    def parse_args_into_dataclasses(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """An instance of each dataclass from a command line, by default the program's own.

        Raises:
            SystemExit: as `given`.
        """
        return self.build(self.given(argv))

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and one line, without the usage of all options; of several processes, one says it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n" if is_first() else None)

    def _unknown(self, name: str) -> NoReturn:
        hint = closest(f"--{name.lstrip('-')}", self._names)
        self.error(f"unknown option {name}; {hint or '--help lists the options'}")


def option_parser(*types: type, description: str, usage: str | None = None) -> OptionParser:
    """A parser of dataclasses whose fields are options; see `OptionParser`."""
    return OptionParser(types, description, usage)


def names_given(argv: Iterable[str]) -> set[str]:
    """The options that a command line names, as fields: of --max-steps=3, max_steps."""
    names = (_with_underscores(argument).partition("=")[0] for argument in argv if argument.startswith("--"))
    return {name.removeprefix("--") for name in names}


def closest(name: str, known: Iterable[str]) -> str:
    """ "did you mean X?" for the known name that is closest to this one; empty where none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


class _Switch(argparse.Action):
    """`--x`, `--x true` or `--x false`, and `--no_x`: one option, shown once."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__([*option_strings, f"--no_{dest}"], dest, nargs="?", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string == self.option_strings[0]:
            setattr(namespace, self.dest, True if values is None else values)
        elif values is None:
            setattr(namespace, self.dest, False)
        else:
            raise argparse.ArgumentError(
                None, f"argument {option_string}: takes no value, got {values!r}; leave it out"
            )


class _Help(argparse.HelpFormatter):
    """Switches as "--x, --no_x", without a value. No name is broken at its hyphens, so that it can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


def _argument(f: Field, domain: Domain) -> dict[str, Any]:
    """Returns what argparse is told of an option."""
    default = f.default_factory() if callable(f.default_factory) else f.default
    notes = [domain.bounds] if domain.bounds else []
    if default not in (None, MISSING, []):  # of these, the help itself says what is taken
        shown = " ".join(map(str, default)) if domain.many else str(default)
        notes.append(f"default: {shown}")
    text = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    argument: dict[str, Any] = {"help": text.replace("%", "%%"), "type": _converter(domain)}
    required = f.default is MISSING and f.default_factory is MISSING
    if f.metadata["positional"]:
        optional = {} if required else {"nargs": "?", "default": default}
        return {**argument, "metavar": f.name.upper(), **optional}
    if required:
        argument["required"] = True
    if domain.type is bool and not domain.many:
        return {**argument, "action": _Switch}
    choices = "{" + ",".join(map(str, domain.choices)) + "}"
    argument["metavar"] = choices if domain.choices else METAVARS[domain.type]
    return {**argument, "nargs": "+"} if domain.many else argument


def _converter(domain: Domain) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return domain.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def _with_underscores(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if argument.startswith("--") else argument
