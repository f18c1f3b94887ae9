"""A run's folder: what it may not hold at the start, and what is written there in the end, beside the checkpoints."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token

from ldae.data.images import ImageDataset, StepSampler, hub_id, to_pixel_values, training_loader
from ldae.hub.folder import save_hub_folder
from ldae.report import figures
from ldae.report.results import save_result, short_name
from ldae.tokenizers.fitting import variance_held
from modeling_ldae import LDAEForPreTraining


def refuse(train_args):
    """What cannot end well, before any work starts.

    Raises:
        FileExistsError: if output_dir holds another run's results.
        ValueError: if the run is to be uploaded and cannot.
    """
    if any(Path(train_args.output_dir).expanduser().glob("*")) and not (train_args.resume or train_args.overwrite):
        raise FileExistsError(
            f"output_dir {train_args.output_dir!r} is not empty; pass --resume to go on with its run, --overwrite to replace "
            "it, or another --output_dir"
        )
    if train_args.push_to_hub and not get_token():
        raise ValueError("push_to_hub needs an access token: log in with `hf auth login` or set HF_TOKEN")


def write_run(
    trained: torch.nn.Module,
    images: ImageDataset,
    output_dir: Path,
    state: dict[str, Any],
    per_step: int,
    arguments: dict[str, Any],
    uses_labels: bool,
):
    """The Hub folder, the drawings and results/train.json of a run that is done."""
    save_hub_folder(trained, output_dir)
    config = trained.config
    if isinstance(trained, LDAEForPreTraining):
        draw_denoised(trained, images, output_dir / "denoised.png")
        if trained.ldae.tokenizer.linear:
            figures.filters(trained.ldae.tokenizer, config.patch_hw, config.num_channels, output_dir / "filters.png")
            figures.spectrum(trained.ldae.tokenizer, output_dir / "spectrum.png")
    images_seen = state["step"] * per_step
    num_images, held = None if images.streaming else len(images), None
    if isinstance(trained, LDAEForPreTraining) and not images.streaming:
        held = variance_held(trained.ldae.tokenizer, images, config.patch_hw)
    result = {
        "kind": "train",
        "data": {
            "name": short_name(arguments["data"]),
            "hub_id": hub_id(arguments["data"]),
            "fingerprint": images.fingerprint(),
            "num_images": num_images,
            "bad_images": state["bad_images"],
        },
        "arguments": arguments,
        "config": config.to_dict(),
        "variance_held": held,
        "steps": state["step"],
        "images_seen": images_seen,
        "epochs": images_seen / num_images if num_images else None,
        "seconds": state["seconds"],
        "loss": state["loss"],
        "seed": arguments["seed"],
        "uses_labels": uses_labels,
    }
    save_result(output_dir / "results" / "train.json", result, arguments["overwrite"] or arguments["resume"])


def draw_denoised(model: torch.nn.Module, images: ImageDataset, path: Path):
    """Rows of clean | noisy | denoised, for models that denoise: the first images of the run."""
    if isinstance(model, LDAEForPreTraining):
        batch = next(iter(training_loader(StepSampler(images, 0, 1, batch_size=8))))
        path.parent.mkdir(exist_ok=True)
        figures.save_denoising(model, to_pixel_values(batch["pixel_values"]).to(model.device), path)
