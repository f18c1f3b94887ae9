"""A folder that Hugging Face runs as a Space: the page, the code that it needs, a model, and what says so."""

import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_save, snapshot_download

from ldae.files import atomic_write, remove, validate_writable
from ldae.loading import load_config
from ldae.names import short_name
from ldae.retries import retried

ROOT = Path(__file__).resolve().parents[2]
MODEL_FOLDER = "model"  # beside app.py; in it lies the folder of one model
MODEL_FILES = ("*.json", "*.safetensors")  # and no code, since the page runs none that comes with a model

TEXT = """
Drop an image, and see what a latent denoising autoencoder makes of it. `app.py` is the page, and `model/` what it shows.
"""


def write_space(folder: str | Path, model: str) -> Path:
    """Writes all that a Space needs into a new folder, which `hf upload` then takes there.

    Args:
        model: an l-DAE's folder, or a Hub id, which is downloaded.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder exists.
        FileNotFoundError: if there is no such model, or this is no checkout.
        ImportError: if the package or Gradio is not installed, since their versions are part of a Space.
        ValueError: if the model is no l-DAE, or the folder cannot be made.
    """
    folder = Path(folder).expanduser()
    if folder.exists():
        raise FileExistsError(f"--space: {str(folder)!r} exists; name a new folder")
    validate_writable(folder.parent, "--space")
    if not (ROOT / "app.py").is_file():
        raise FileNotFoundError("--space: app.py is not beside the package; run it from a checkout")
    requirements, front_matter = _requirements(), _front_matter(model)
    load_config(model)
    with atomic_write(folder) as partial:
        shutil.copytree(ROOT / "ldae", partial / "ldae", ignore=shutil.ignore_patterns("__pycache__"))
        for file in (ROOT / "app.py", ROOT / "LICENSE", *ROOT.glob("*_ldae.py")):
            shutil.copy(file, partial)
        _copy_model(model, partial / MODEL_FOLDER / short_name(model))
        (partial / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(TEXT, encoding="utf-8")
        metadata_save(partial / "README.md", front_matter)
    return folder


def _front_matter(model: str) -> dict[str, Any]:
    """What a Space's README says to Hugging Face, before any text."""
    return {
        "title": f"l-DAE: {short_name(model)}",
        "emoji": "🌫️",
        "colorFrom": "green",
        "colorTo": "gray",
        "sdk": "gradio",
        "sdk_version": _version("gradio"),
        "python_version": "3.11",
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": "What a latent denoising autoencoder sees in images",
    }


def _requirements() -> list[str]:
    """What the package requires, without its extras."""
    _version("ldae")
    return [requirement for requirement in requires("ldae") or [] if "extra ==" not in requirement]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise ImportError(f'--space: {package} is not installed; pip install -e ".[demo]"') from None


def _copy_model(model: str, target: Path):
    source = Path(model).expanduser()
    if not source.is_dir():
        files = list(MODEL_FILES)
        retried(lambda: snapshot_download(model, local_dir=target, allow_patterns=files, ignore_patterns=["*/*"]))
        remove(target / ".cache")
        return
    target.mkdir(parents=True)
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)
