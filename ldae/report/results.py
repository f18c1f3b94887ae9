"""Results are files: a run writes one JSON for each thing that it measures, and tables, plots and cards are made from them.

The results of many runs are kept together as a study: one .jsonl with a line for each result.
"""

import datetime
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from ldae.files import atomic_write, read_json, write_json
from ldae.hardware import hardware
from ldae.names import without_local_folders

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "datasets",
    "accelerate",
    "huggingface-hub",
    "evaluate",
)


def environment() -> dict[str, Any]:
    """The commit of the code (with "+changes" if it is not clean), versions of the libraries, the machine and the date."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def save_result(path: str | Path, result: dict[str, Any], overwrite: bool = False, data: str = "") -> Path:
    """Writes one result with its environment as JSON. Paths in it name none of this machine's folders.

    Args:
        path: of the file, RUN/results/NAME.json. What lies beside the folder RUN keeps its path from there.
        data: the folder of the images, whose names in the result then begin with its own name.

    Raises:
        FileExistsError: if the file is there and `overwrite` is false; a run never replaces another's results unasked.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} holds another run's result; choose another --output_dir or pass --overwrite")
    root = path.absolute().parent.parent.parent
    write_json(path, without_local_folders({**result, **environment()}, root, data))
    return path


@dataclass(frozen=True)
class Row:
    """One result of a study.

    Args:
        study: the study's name, which is that of its file or folder.
        run: the path of the run's folder below the study's, such as "first" or "tokenizers/first".
        kind: "train", "probe", "generation" or "sweep".
        result: what the run's file holds.
    """

    study: str
    run: str
    kind: str
    result: dict[str, Any]


def load_study(path: str | Path) -> list[Row]:
    """The results of a study, sorted by run: of a .jsonl that `save_study` wrote, or of a folder of runs.

    Below a folder these are all files results/*.json. Those of the folder itself belong to a run of the folder's name.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the file holds something else than rows, with the number of the line; if a result is damaged.
    """
    path = Path(path)
    if path.is_dir():
        rows, name = [], path.resolve().name
        for file in sorted(path.rglob("results/*.json")):
            run = file.parent.parent.relative_to(path).as_posix()
            result = read_json(file)
            if "kind" not in result:
                raise ValueError(f"{file} is no result, for it has no 'kind'; remove it to go on without it")
            rows.append(Row(name, name if run == "." else run, result["kind"], result))
        return _sorted(rows)
    if not path.is_file():
        raise FileNotFoundError(f"there is no study {str(path)!r}: give a folder of runs or a .jsonl of results")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a row of results ({error})") from error
    return rows


def save_study(path: str | Path, rows: Iterable[Row]) -> Path:
    """Writes a study as one .jsonl, a line for each result, sorted by run and named after the file."""
    path = Path(path)
    lines = (json.dumps({**asdict(row), "study": path.stem}) + "\n" for row in _sorted(rows))
    with atomic_write(path) as partial:
        partial.write_text("".join(lines))
    return path


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Rows sorted by run; the results of a run keep their order."""
    return sorted(rows, key=lambda row: row.run.split("/"))


def open_losses(path: Path, step: int) -> TextIO:
    """The JSONL of a run's losses to append to, without entries after the step that a resumed run goes on from.

    Torn lines are left out and named, but for the last one: a kill may tear it, and its step is made again.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (TypeError, KeyError, ValueError):
            if number < len(lines):
                print(f"{path}, line {number}: damaged, and left out.")
    with atomic_write(path) as partial:
        partial.write_text("".join(line + "\n" for line in kept))
    return path.open("a", buffering=1)


def commit() -> str | None:
    """The commit of the code, with "+changes" if files differ from it; None where the code is in no repository of its own."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed inside another project's repository, it is not of that
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # installed without its repository
        return None
