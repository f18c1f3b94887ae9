"""Folders in Hub form: a folder holds all that is needed to load a model, its code included, and can be pushed to the Hub."""

import shlex
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessor

from configuration_ldae import pair

# These files of a run's folder are not pushed: they are of no use to those who load the model, or they show the data.
NOT_PUBLISHED = (
    "checkpoint*/*",
    "images/*",
    "logs/*",
    "losses.jsonl",
    ".lock",
    "*.tmp",
    "*.log",
    "*tfevents*",
    "*hparams.yml",
    "results/neighbours-*.png",
)


def image_processor(config: PreTrainedConfig) -> ViTImageProcessor:
    """The processor that turns images into `pixel_values` (B, C, H, W) in [-1, 1], with the crop of training and probes.

    For a model of square images, an image is resized by its short side and its centre is cut out. For other models, it is
    resized to height and width. A model of three channels takes RGB, so grey and RGBA images are converted. Images for
    another number of channels are taken as they are. The torchvision back end of transformers before 5.21 takes no image
    of four channels; `AutoImageProcessor.from_pretrained(folder, backend="pil")` does.
    """
    channels, (height, width) = config.num_channels, pair(config.image_size)
    square = height == width
    return ViTImageProcessor(
        size={"shortest_edge": height} if square else {"height": height, "width": width},
        do_center_crop=square,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * channels,
        image_std=[0.5] * channels,
        do_convert_rgb=channels == 3,
    )


def save_hub_folder(
    model: PreTrainedModel, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
) -> Path:
    """Writes all that is needed to load `model` anywhere: configuration, weights, image processor and code.

    If there are several processes, only the main one should call this.

    Args:
        model: any l-DAE model, wrapped by accelerate or not; or a model of transformers, which needs no code.
        folder: where they are written. It is made if it does not exist, and other files in it are left alone.
        state_dict: weights to save in place of the model's own, for instance an average of them.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    model.save_pretrained(folder, state_dict=state_dict)
    image_processor(model.config).save_pretrained(folder)
    return folder


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload l-DAE model",
) -> str:
    """Uploads a Hub folder in one commit, without checkpoints and logs.

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
    try:
        if not (token or get_token()):
            raise PermissionError("no access token; log in with `hf auth login` or set HF_TOKEN")
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=list(NOT_PUBLISHED),
        )
    except (OSError, HTTPError) as error:
        options = [part for pattern in NOT_PUBLISHED for part in ("--exclude", pattern)] + ["--private"] * private
        command = shlex.join(["hf", "upload", repo_id, str(folder.resolve()), ".", *options])
        raise RuntimeError(
            f"{folder} was not uploaded to {repo_id}: {error}\n"
            f"Nothing is lost: the folder is whole. Upload it later with\n  {command}"
        ) from error
    return str(url)
