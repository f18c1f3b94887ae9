"""What commands load: folders that hold what was written to them, and weights that are numbers."""

from pathlib import Path

import torch
from torch import nn

from ldae.files import DIGESTS, damage


def validate_folder(source: str | Path, name_of_option: str):
    """Validates that a sealed folder is as it was written; another folder or a Hub id passes.

    Raises:
        ValueError: naming the file that is missing or has changed.
    """
    folder = Path(source).expanduser()
    if (folder / DIGESTS).is_file() and (reason := damage(folder)) is not None:
        raise ValueError(
            f"{name_of_option}: {str(source)!r} is damaged: {reason}; if you have changed it yourself, remove its {DIGESTS}"
        )


def validate_weights(model: nn.Module, source: str | Path, name_of_option: str):
    """Validates that all weights and buffers are finite, and that no tokenizer divides by 0.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name_of_option}: {name} of {str(source)!r} holds NaN or infinity; give another model")
        if f".{name}".endswith(".tokenizer.scale") and not value.all():
            raise ValueError(f"{name_of_option}: {name} of {str(source)!r} holds 0, by which latents are divided")
