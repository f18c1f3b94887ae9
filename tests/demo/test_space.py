"""The folder of a Space: it holds the page, the code, a model, and what Hugging Face reads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load

from ldae.demo import space
from ldae.demo.space import write_space
from ldae.loading import load_model

ROOT = Path(__file__).parents[2]
VERSIONS = {"gradio": "6.31.0", "ldae": "0.1.0"}


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """As if the package and Gradio were installed."""
    monkeypatch.setattr(space, "version", VERSIONS.__getitem__)
    monkeypatch.setattr(space, "requires", lambda package: ["torch>=2.11", 'gradio>=6.31; extra == "demo"'])


@pytest.fixture
def model(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "a-model")
    (tmp_path / "a-model/losses.jsonl").write_text("")
    return str(tmp_path / "a-model")


def test_a_space_holds_the_page_its_code_and_the_model(model, tmp_path):
    folder = write_space(tmp_path / "space", model)
    assert metadata_load(folder / "README.md") == {
        "title": "l-DAE: a-model",
        "emoji": "🌫️",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": "6.31.0",
        "python_version": "3.11",
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": "What a latent denoising autoencoder sees in images",
    }
    assert (folder / "requirements.txt").read_text() == "torch>=2.11\n"
    assert (folder / "app.py").read_bytes() == (ROOT / "app.py").read_bytes()
    assert {path.suffix for path in (folder / "model/a-model").iterdir()} == {".json", ".safetensors"}  # no code
    assert {path.name for path in tmp_path.iterdir()} == {"a-model", "space"}
    there, copied = (load_model(str(path)).state_dict() for path in (model, folder / "model/a-model"))
    assert all(torch.equal(there[name], copied[name]) for name in there)


def test_the_code_of_a_space_stands_alone(model, tmp_path):
    folder = write_space(tmp_path / "space", model)
    code = (
        "import sys; sys.path.insert(0, '.'); import ldae.demo.views, modeling_ldae;"
        "print(ldae.demo.views.__file__, modeling_ldae.__file__, sep='\\n')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, env={}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert all((folder / file).resolve().is_relative_to(folder.resolve()) for file in ran.stdout.splitlines())


def test_mistakes_are_named_and_nothing_is_left(model, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"--space: .* exists; name a new folder"):
        write_space(tmp_path / "there", model)
    with pytest.raises(FileNotFoundError, match="--model"):
        write_space(tmp_path / "space", str(tmp_path / "missing"))
    monkeypatch.setattr(space, "_copy_model", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_space(tmp_path / "space", model)
    assert {path.name for path in tmp_path.iterdir()} == {"a-model", "there"}


def test_a_space_needs_what_it_names(model, tmp_path, monkeypatch):
    def version(package):
        raise space.PackageNotFoundError(package)

    monkeypatch.setattr(space, "version", version)
    with pytest.raises(ImportError, match=r"--space: .* is not installed; pip install -e \"\.\[demo\]\""):
        write_space(tmp_path / "space", model)
