"""Results are files: every training and probing run writes one JSON, and tables, plots and cards are made from those."""

import datetime
import json
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from ldae.hardware import hardware

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


def save_result(path: str | Path, result: dict[str, Any], overwrite: bool = False) -> Path:
    """Writes one result with its environment as JSON.

    Raises:
        FileExistsError: if the file is there and `overwrite` is false; a run never replaces another's results unasked.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} holds another run's result; choose another --output_dir or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**result, **environment()}, indent=2, default=str) + "\n")
    temporary.replace(path)
    return path


def load_results(folder: str | Path) -> list[dict[str, Any]]:
    """All results below a folder, in the order of their paths; each with its path as "file"."""
    return [
        {**json.loads(path.read_text()), "file": str(path)} for path in sorted(Path(folder).rglob("results/*.json"))
    ]


def open_losses(path: Path, step: int) -> TextIO:
    """The JSONL of a run's losses to append to, without entries after the step that a resumed run goes on from."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [
        line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step
    ]  # a kill may tear the last
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a", buffering=1)


def short_name(name: str) -> str:
    """A data set's or model's name as part of a file name: a folder's own name, or the Hub id."""
    name = Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"


def commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed inside another project's repository, it is not of that
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # installed without its repository
        return None
