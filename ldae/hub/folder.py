"""Folders in Hub form: everything that loads a model, its code included, in one place; and their way to the Hub."""

import json
import shlex
import shutil
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # of the HTTP client that the library uses, whichever it is
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel, ViTImageProcessor

import configuration_ldae
import modeling_ldae
import schedules_ldae
import tokenizers_ldae

AUTO_MAP = {
    "AutoConfig": "configuration_ldae.LDAEConfig",
    "AutoModel": "modeling_ldae.LDAEModel",
    "AutoModelForPreTraining": "modeling_ldae.LDAEForPreTraining",
    "AutoModelForImageClassification": "modeling_ldae.LDAEForImageClassification",
    "AutoBackbone": "modeling_ldae.LDAEBackbone",
}

# What a run leaves in its folder that is of no use to those who load the model, or shows the data.
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
    """The processor that turns images into a model's `pixel_values` in [-1, 1], cropped as training and probes crop them.

    Images for a model that takes squares are resized by their short side and the centre is cut out; for others they are
    resized to height and width. Three channels are taken to be RGB, so grey and RGBA images are converted; images of
    another number of channels are taken as they are. The torchvision back end of transformers before 5.21 takes no image
    of four channels; `AutoImageProcessor.from_pretrained(folder, backend="pil")` does.
    """
    channels, size = config.num_channels, config.image_size
    height, width = (size, size) if isinstance(size, int) else size
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
    """Makes `folder` all that is needed to load `model` anywhere: configuration, weights, image processor and code.

    Of several processes, only the main one should call it.

    Args:
        model: any l-DAE model, wrapped by accelerate or not; or a model of transformers, which needs no code.
        folder: is made if it is not there; other files in it are left alone.
        state_dict: weights to save in place of the model's own, for instance an average of them.
    """
    folder = Path(folder)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    model.save_pretrained(folder, state_dict=state_dict)
    image_processor(model.config).save_pretrained(folder)
    if model.config.model_type == configuration_ldae.LDAEConfig.model_type:
        for module in (configuration_ldae, modeling_ldae, schedules_ldae, tokenizers_ldae):
            shutil.copy(module.__file__, folder)
        path = folder / "config.json"  # changed here, and not on the live configuration, which the model goes on using
        config = {**json.loads(path.read_text()), "auto_map": AUTO_MAP}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload l-DAE model",
) -> str:
    """Uploads a Hub folder, without checkpoints and logs, in one commit, and returns the address of the model.

    Args:
        folder: as `save_hub_folder` makes it.
        repo_id: `"name"` or `"organization/name"`; is made if it is not there.
        private: whether a repository that is made here is private.
        token: an access token with the right to write; by default that of `HF_TOKEN` or `hf auth login`.
        commit_message: the commit's title.

    Raises:
        FileNotFoundError: if `folder` holds no `config.json`.
        RuntimeError: if there is no token, no network or the Hub refuses; it names the command that uploads later. The
            folder stays whole.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no Hub folder: it holds no config.json")
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
