"""The notebook runs from its first cell to its last, and is kept without what it prints."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs/notebooks/first-steps.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_its_links_lead_somewhere(notebook):
    links = [link for cell in notebook.cells for link in re.findall(r"\]\(([^)\s]+)\)", cell.source)]
    assert len(links) > 3
    assert all((PATH.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    """With two steps of training in place of half a minute."""
    code = [cell for cell in notebook.cells if "max_minutes=0.5" in cell.source]
    assert len(code) == 1
    code[0].source = code[0].source.replace("max_minutes=0.5", "max_steps=2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    text = "".join(output.get("text", "") for output in notebook.cells[-2].outputs)
    assert re.fullmatch(r"trained: \d+ %\nfresh weights: \d+ %\nthumbnails: 84 %\n", text)
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == 3  # two of the run, and the search
