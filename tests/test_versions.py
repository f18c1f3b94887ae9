"""What setup.py says of versions is what tests/versions.py tried."""

import contextlib
import json
from itertools import chain
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.versions import FILE, keep

RUNS = json.loads(FILE.read_text())
LOWEST = next(run for run in RUNS if run["which"] == "lowest")


@pytest.fixture
def stated(monkeypatch):
    """What setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    path = Path(__file__).parents[1] / "setup.py"
    with contextlib.chdir(path.parent):
        exec(compile(path.read_text(), path, "exec"), {"__file__": str(path)})
    return given


def test_lower_bounds_are_what_was_tried(stated):
    bounds = {}
    for text in chain(stated["install_requires"], *stated["extras_require"].values()):
        requirement = Requirement(text)
        for one in requirement.specifier:
            if one.operator == ">=":
                bounds[canonicalize_name(requirement.name)] = Version(one.version)
    assert bounds == {name: Version(version) for name, version in LOWEST["packages"].items()}


def test_each_stated_python_was_tried(stated):
    tried = {".".join(run["python"].split(".")[:2]) for run in RUNS}
    assert {name.split(" :: ")[-1] for name in stated["classifiers"]} == tried
    assert stated["python_requires"] == f">={min(tried, key=Version)}"
    assert LOWEST["python"].startswith(min(tried, key=Version))


def test_what_was_tried_passed():
    assert [run["failed"] for run in RUNS] == [[]] * len(RUNS)


def test_a_run_takes_the_place_of_its_like(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.versions.FILE", tmp_path / "versions.json")
    for which, python in [("newest", "3.13.0"), ("newest", "3.9.1"), ("lowest", "3.13.0"), ("newest", "3.13.2")]:
        keep({"which": which, "python": python})
    kept = [(run["which"], run["python"]) for run in json.loads((tmp_path / "versions.json").read_text())]
    assert kept == [("lowest", "3.13.0"), ("newest", "3.9.1"), ("newest", "3.13.2")]
