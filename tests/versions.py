"""Runs the tests with the lowest versions that setup.py allows together, or with the newest, and keeps which passed.

`python tests/versions.py lowest [--python 3.12] [pytest arguments]` makes an environment with uv, runs the fast tests in it,
puts the outcome into versions.json beside this file, and makes the table in CONTRIBUTING.md from that file.
`python tests/versions.py table` only makes the table.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldae.report.results import commit
from ldae.report.tables import fill, markdown

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
PAGE = ROOT / "CONTRIBUTING.md"
FOUND = """
import json, platform, re
from importlib.metadata import distributions, requires

def name(text):
    return re.sub("[-_.]+", "-", re.match(r"[\\w.-]+", text)[0]).lower()

found = {name(one.name): one.version for one in distributions()}
named = sorted(found.keys() & set(map(name, requires("ldae"))))
print(json.dumps({"python": platform.python_version(), "packages": {name: found[name] for name in named}}))
"""  # run in the environment: its Python, and the versions of what setup.py names


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("which", choices=["lowest", "newest", "table"])
    parser.add_argument(
        "--python", default=sys.executable, help="an interpreter, by its path or version; default: this one"
    )
    parser.add_argument(
        "--venv", type=Path, help="a folder to make the environment in, or to go on with; default: a new one"
    )
    parser.add_argument("--extras", default="test,docs,demo,trackio,fid", help="of setup.py; default: %(default)s")
    given, arguments = parser.parse_known_args()  # the others are pytest's
    status = 0
    if given.which != "table":
        with tempfile.TemporaryDirectory() as folder:
            venv = given.venv or Path(folder) / "venv"
            install(given.which, given.python, given.extras, venv)
            run, status = run_tests(given.which, venv, arguments)
        if status > 1:  # stopped, or not begun
            return status
        keep(run)
    fill(PAGE, "versions", table(json.loads(FILE.read_text())))
    return status


def install(which: str, python: str, extras: str, venv: Path):
    """Makes an environment with the package and its extras.

    "lowest" takes the lowest versions that setup.py allows, and the newest of what these need in turn.

    Raises:
        subprocess.CalledProcessError: if the versions do not go together.
    """
    uv = [sys.executable, "-m", "uv", "--quiet"]
    if not venv.exists():
        subprocess.run([*uv, "venv", "--python", python, venv], check=True)
    resolution = {"lowest": "lowest-direct", "newest": "highest"}[which]
    wanted = ["--upgrade", "--resolution", resolution, "--editable", f".[{extras}]"]
    subprocess.run([*uv, "pip", "install", "--python", venv / "bin/python", *wanted], cwd=ROOT, check=True)


def run_tests(which: str, venv: Path, arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Runs the tests in an environment; returns what was tried and how it went, and the exit status of pytest."""
    found = json.loads(subprocess.check_output([venv / "bin/python", "-c", FOUND]))
    report = venv / "tests.xml"
    tests = [venv / "bin/python", "-m", "pytest", "--disable-warnings", "--junitxml", report, *arguments]
    written = ROOT / "tests/test_versions.py"  # reads what this run is to write
    status = subprocess.run([*tests, f"--ignore={written}"], cwd=ROOT).returncode
    (suite,) = ET.parse(report).getroot().iter("testsuite")
    failed = [
        f"{case.get('classname')}.{case.get('name')}" for case in suite if {"failure", "error"} & {e.tag for e in case}
    ]
    run = {
        "which": which,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "arguments": arguments,
        "tests": int(suite.get("tests", 0)),
        "skipped": int(suite.get("skipped", 0)),
        "failed": failed,
        **found,
    }
    return run, status


def keep(run: dict[str, Any]):
    """Puts a run into the file, in place of that of the same kind with the same minor version of Python."""

    def kind(run: dict[str, Any]) -> tuple:
        return run["which"], [int(number) for number in run["python"].split(".")[:2]]

    runs = json.loads(FILE.read_text()) if FILE.exists() else []
    runs = sorted([run, *(other for other in runs if kind(other) != kind(run))], key=kind)
    FILE.write_text(json.dumps(runs, indent=1) + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table with a column for each run: how its tests went, and the versions of what setup.py names."""
    columns = {f"{run['which']}, Python {run['python']}": run for run in runs}

    def row(title: str, cell: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return {"": title, **{column: cell(run) for column, run in columns.items()}}

    rows = [
        row("tests", lambda run: " ".join(run["arguments"]) or "all fast ones"),
        row("passed", lambda run: run["tests"] - run["skipped"] - len(run["failed"])),
        row("failed", lambda run: len(run["failed"])),
        row("on", lambda run: run["date"]),
    ]
    for name in sorted({name for run in runs for name in run["packages"]}):
        rows.append(row(name, lambda run, name=name: run["packages"].get(name)))
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
