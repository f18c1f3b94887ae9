"""The way of a Hub folder to the Hub: what of it is uploaded, and the upload."""

import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import HFValidationError, filter_repo_objects, validate_repo_id

from code_ldae import code_files
from ldae.hub.cards import IMAGES
from ldae.loading import validate_folder
from ldae.options.shared import HubArguments
from ldae.retries import reason, retried

# What training, probes and cards write into a model's folder, and is pushed beside the code. Not so nearest neighbours, which
# show the data.
WRITTEN = (
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
    *IMAGES,
)


def published_files(folder: Path) -> list[str]:
    """The files of a Hub folder that are pushed: those that training, probes and the card wrote, and nothing else there."""
    return sorted(
        path.relative_to(folder).as_posix() for name in _names() for path in folder.glob(name) if path.is_file()
    )


def validate_hub(repo_id: str) -> str:
    """Validates that the Hub knows the access token, and returns the repository's whole name, with an owner.

    Args:
        repo_id: `"organization/name"`, or `"name"` for a repository of the token's owner.

    Raises:
        ValueError: for what cannot be a repository's name, or without a token.
        ConnectionError: if the Hub cannot be reached, or does not take the token.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--hub_model_id {repo_id!r} can be no repository's name: {error}") from error
    if not get_token():
        raise ValueError("push_to_hub needs an access token: log in with `hf auth login` or set HF_TOKEN")
    try:
        owner = retried(HfApi().whoami)["name"]
    except (OSError, HTTPError) as error:
        raise ConnectionError(f"nothing can be uploaded to {repo_id}: {reason(error)}") from error
    return repo_id if "/" in repo_id else f"{owner}/{repo_id}"


def push(folder: str | Path, options: HubArguments) -> str:
    """Uploads a Hub folder to where the options say, and returns its address; raises what `push_folder` does."""
    repo_id = options.hub_model_id or Path(folder).expanduser().resolve().name
    return push_folder(folder, repo_id, options.hub_branch, options.hub_tag, options.hub_private)


def push_folder(
    folder: str | Path,
    repo_id: str,
    branch: str | None = None,
    tag: str | None = None,
    private: bool = False,
) -> str:
    """Uploads what belongs to a Hub folder in one commit, and prints the list of it.

    The commit also removes what an earlier one has published and the folder no longer holds, such as weights in other files.
    What may pass, such as a dropped connection, is tried again. A commit that the Hub has made, though its answer was lost, is
    not made twice.

    Args:
        folder: as `save_hub_folder` makes it.
        repo_id: `"name"` or `"organization/name"`. The repository is made if it does not exist.
        branch: is made from main if it does not exist; by default main itself.
        tag: that the commit is given.
        private: whether a repository that is made here is private.

    Returns:
        The address of the model.

    Raises:
        FileNotFoundError: if `folder` holds no `config.json`.
        ValueError: if the folder is damaged, there is no token, the name can be none, the tag is taken, or `private` is asked of
            a repository that is public. Nothing is uploaded.
        ConnectionError: if there is no network, or the Hub says no. The folder is whole, and the branch is as it was. The message
            holds the command that uploads the folder later.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no Hub folder, for it holds no config.json; save a model there first")
    validate_folder(folder, "--model")
    repo_id = validate_hub(repo_id)
    files, api, commit = published_files(folder), HfApi(), None
    try:
        url = retried(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not retried(lambda: api.repo_info(repo_id)).private:
            raise ValueError(f"--hub_private: {repo_id} is there and public; choose another --hub_model_id")
        if tag and tag in {ref.name for ref in retried(lambda: api.list_repo_refs(repo_id)).tags}:
            raise ValueError(f"--hub_tag: {repo_id} has a tag {tag!r} already; choose another")
        if branch:
            retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        print(f"Uploading {len(files)} files of {folder} to {repo_id}: {', '.join(files)}")
        commit = retried(lambda: _commit(api, folder, files, repo_id, branch))
        if tag:
            retried(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))
    except (OSError, HTTPError, RuntimeError) as error:  # the client gives a failed upload of a large file as the last
        options = [f"--hub_{name}={value}" for name, value in (("branch", branch), ("tag", tag)) if value]
        options = ["--model", str(folder.resolve()), "--hub_model_id", repo_id, *options]
        command = shlex.join(["python", "-m", "ldae.hub", *options, *["--hub_private"] * private])
        fate = f"was uploaded to {repo_id}, but got no tag" if commit else f"was not uploaded to {repo_id}"
        raise ConnectionError(
            f"{folder} {fate}: {reason(error)}. Nothing is lost: the folder is whole. Try again later: {command}"
        ) from error
    return f"{url}/tree/{branch}" if branch else str(url)


def _names() -> list[str]:
    """The patterns of all names that a push publishes."""
    return [*WRITTEN, *(path.name for path in code_files())]


def _commit(api: HfApi, folder: Path, files: list[str], repo_id: str, branch: str | None) -> str:
    """Makes the commit, unless the branch is what it would make of it, and returns its name.

    `HfApi.upload_folder` makes several commits of a large folder.
    """
    there = filter_repo_objects(api.list_repo_files(repo_id, revision=branch), allow_patterns=_names())
    additions = [CommitOperationAdd(file, folder / file) for file in files]
    deletions = [CommitOperationDelete(file) for file in there if file not in files]
    return api.create_commit(
        repo_id, [*additions, *deletions], commit_message="Upload l-DAE model", revision=branch
    ).oid
