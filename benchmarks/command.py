"""What the benchmarks' commands share: measure, print the table and keep the numbers as a file; or fill in a file's table."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ldae.files import read_json, validate_writable
from ldae.hardware import keep_freed_memory
from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.report.results import environment, save_result
from ldae.report.tables import fill

README = Path(__file__).with_name("README.md")


@dataclass(kw_only=True)
class FileArguments:
    """The options of every command, which say nothing of what is measured."""

    output: str | None = option(None, "JSON file to write.")
    overwrite: bool = option(False, "Replace a JSON file that is there.")
    table: str | None = option(None, "Only put this JSON file's table, and its plot if it has one, into the page.")


OWN = tuple(field.name for field in fields(FileArguments))


def run(
    options: type,
    measure: Callable[[Any], Iterator[dict]],
    table: Callable[[dict], str],
    page: Path = README,
    draw: Callable[[dict], object] | None = None,
):
    """The command line of a benchmark.

    Args:
        options: a dataclass that adds its own to `FileArguments`.
        measure: options -> the result to save, as often as it grows: what is stopped has saved what it measured.
        table: a result with its environment -> markdown. `--table NAME.json` puts it between the lines `<!-- NAME -->` of
            the page.
        page: a markdown file.
        draw: draws a result's plot for the page, when its table is put there.

    Raises:
        SystemExit: with status 2 for a mistake, such as an --output that is there; before anything is measured.
    """
    run_command(partial(_run, options, measure, table, page, draw))


def _run(
    options: type,
    measure: Callable[[Any], Iterator[dict]],
    table: Callable[[dict], str],
    page: Path,
    draw: Callable[[dict], object] | None,
):
    (given,) = option_parser(options, description=options.__doc__ or "").parse_args_into_dataclasses()
    if given.table:
        result = read_json(given.table)
        if "arguments" not in result:
            raise ValueError(
                f"--table {given.table} is no result of a benchmark, for it has no 'arguments'; give one of --output"
            )
        text = table(result)
        fill(page, Path(given.table).stem, text)
        if draw is not None:
            draw(result)
    else:
        if given.output and Path(given.output).exists() and not given.overwrite:
            raise FileExistsError(f"{given.output} is there; pass --overwrite or another --output")
        if given.output:
            validate_writable(Path(given.output).parent, "--output")
        keep_freed_memory()  # as train_ldae.py does; what is beside l-DAE is faster by it, too
        arguments = {name: value for name, value in vars(given).items() if name not in OWN}
        for measured in measure(given):
            result = {**measured, "arguments": arguments}
            if given.output:
                save_result(given.output, result, overwrite=True)
        text = table({**result, **environment()})
    print(text)
