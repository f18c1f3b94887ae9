"""The commands of the stress scripts, which are too long for the tests; docs/reliability.md holds what they counted."""

import runpy
from pathlib import Path

import pytest

from tests.stress import command

RESULTS = Path(command.__file__).parent / "results"


@pytest.mark.parametrize("name", ["damage", "inputs", "kills"])
def test_a_script_puts_its_table_into_the_page(name, tmp_path, monkeypatch):
    page, shown = tmp_path / "page.md", command.PAGE.read_text()
    page.write_text(f"# Page\n\n<!-- {name} -->\nold\n<!-- {name} -->\n")
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr("sys.argv", [name, "--table", str(RESULTS / f"{name}.json")])
    runpy.run_module(f"tests.stress.{name}", run_name="__main__")
    table = page.read_text().split(f"<!-- {name} -->")[1]
    assert "old" not in table
    assert table in shown
