"""The way of a Hub folder to the Hub: what of it is uploaded, and the upload."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError

from code_ldae import code_files
from ldae.hub.cards import IMAGES

# What is pushed, beside the code and the drawings that a card shows. Nearest neighbours, which show the data, are not.
PUBLISHED = (
    "README.md",
    "digests.sha256",
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
    "results/train.json",
    "results/generation.json",
    "results/probe*.json",
    "results/sweep-*.json",
    "results/sweep-*.png",
    "results/confusion-*.png",
)


def published_files(folder: Path) -> list[str]:
    """The files of a Hub folder that are pushed: those that training, probes and the card wrote, and nothing else there."""
    names = (*PUBLISHED, *IMAGES, *(path.name for path in code_files()))
    return sorted(path.relative_to(folder).as_posix() for name in names for path in folder.glob(name) if path.is_file())


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload l-DAE model",
) -> str:
    """Uploads what belongs to a Hub folder in one commit, and prints the list of it.

    Args:
        folder: as `save_hub_folder` makes it.
        repo_id: `"name"` or `"organization/name"`. The repository is made if it does not exist.
        private: whether a repository that is made here is private.
        token: an access token with the right to write; by default that of `HF_TOKEN` or `hf auth login`.
        commit_message: the commit's title.

    Returns:
        The address of the model.

    Raises:
        FileNotFoundError: if `folder` holds no `config.json`.
        RuntimeError: if there is no token or no network, or the Hub says no. The message holds the command that uploads the
            folder later. The folder stays as it was.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no Hub folder, for it holds no config.json; save a model there first")
    files = published_files(folder)
    try:
        if not (token or get_token()):
            raise PermissionError("no access token; log in with `hf auth login` or set HF_TOKEN")
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        print(f"Uploading {len(files)} files of {folder} to {url.repo_id}: {', '.join(files)}")
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message, allow_patterns=files)
    except (OSError, HTTPError) as error:
        options = [part for file in files for part in ("--include", file)] + ["--private"] * private
        command = shlex.join(["hf", "upload", repo_id, str(folder.resolve()), ".", *options])
        raise RuntimeError(
            f"{folder} was not uploaded to {repo_id}: {error}\n"
            f"Nothing is lost: the folder is whole. Upload it later with\n  {command}"
        ) from error
    return str(url)
