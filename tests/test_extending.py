"""The examples of docs/extending.md work as they stand, and touch no more files than the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ldae.tokenizers
from tokenizers_ldae import TOKENIZERS, PatchAETokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
SOURCES = ("*.py", "pyproject.toml", "ldae", "experiments", "recipes", "tests/conftest.py")
FILES = {  # that an example touches, beside its test
    "A noise schedule": ["schedules_ldae.py"],
    "A tokenizer": ["tokenizers_ldae.py"],
    "A protocol": ["ldae/probes/nearest_mean.py"],
    "A baseline": ["experiments/baselines/autoencoder.py"],
    "A rung": ["experiments/ablation/rungs.py"],
}


def blocks(text: str) -> list[tuple[str, bool, str]]:
    """The blocks of code of some Markdown: the file, whether the block is appended to it, and the code."""
    found = re.findall(r"<!-- file: (\S+)( \(append\))? -->\n```python\n(.*?)```", text, re.S)
    assert len(found) == text.count("```python")
    return [(file, bool(appended), code) for file, appended, code in found]


def extend(root: Path, text: str):
    """Puts the blocks of some Markdown into a copy of the project."""
    for file, appended, code in blocks(text):
        path = root / file
        assert path.exists() == appended, f"{file} is {'missing' if appended else 'there already'}"
        with path.open("a", encoding="utf-8") as opened:
            opened.write(f"\n\n{code}" if appended else code)


def copy_sources(root: Path):
    """Copies what an example needs of the project, without results, weights and other tests."""
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            target = root / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(path, target)


def sections() -> dict[str, str]:
    """The sections of the page by their titles."""
    return dict(part.split("\n", 1) for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:])


def test_each_example_touches_the_promised_files():
    touched = {title: [file for file, _, _ in blocks(text)] for title, text in sections().items()}
    assert {title: files[:-1] for title, files in touched.items()} == FILES
    assert all(re.fullmatch(r"tests/test_\w+\.py", files[-1]) for files in touched.values())


@pytest.mark.slow
def test_the_examples_work_as_they_stand(tmp_path):
    copy_sources(tmp_path)
    extend(tmp_path, PAGE.read_text(encoding="utf-8"))
    lint = [sys.executable, "-m", "ruff", "check", "--no-cache", "--quiet", "."]
    done = subprocess.run(lint, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short", "tests"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"^PASSED (tests/test_\w+\.py)", done.stdout, re.M))
    assert passed == {blocks(text)[-1][0] for text in sections().values()}


def test_a_trained_tokenizer_names_the_module_that_trains_it(tmp_path, monkeypatch, tiny_config):
    """As the page says of tokenizers that are trained by gradients."""
    (tmp_path / "new_trainer.py").write_text(
        "def build(config, train_args):\n    return config.latent_dim, train_args\n"
    )
    monkeypatch.setattr(ldae.tokenizers, "__path__", [*ldae.tokenizers.__path__, str(tmp_path)])
    monkeypatch.setitem(TOKENIZERS, "new", type("New", (PatchAETokenizer,), {"trainer": "new_trainer"}))
    assert "new" in ldae.tokenizers.trained_tokenizers()
    arguments = SimpleNamespace()
    config = tiny_config(tokenizer_type="new", prediction="latent")
    assert ldae.tokenizers.build(config, arguments) == (config.latent_dim, arguments)
    with pytest.raises(ValueError, match="is fitted, not trained"):
        ldae.tokenizers.build(tiny_config(), arguments)
