"""Folders in Hub form: a folder holds all that is needed to load a model, its code included."""

from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedConfig, PreTrainedModel

from configuration_ldae import pair
from image_processing_ldae import LDAEImageProcessor
from ldae.files import replace_files


def image_processor(config: PreTrainedConfig) -> LDAEImageProcessor:
    """The processor that makes `pixel_values` (B, C, H, W) in [-1, 1] of images, as training and probes do."""
    height, width = pair(config.image_size)
    return LDAEImageProcessor({"height": height, "width": width}, config.num_channels)


def save_hub_folder(model: PreTrainedModel, folder: str | Path) -> Path:
    """Writes all that is needed to load `model` anywhere: configuration, weights, image processor, code, and their digests.

    If there are several processes, only the main one should call this.

    Args:
        model: any l-DAE model, wrapped by accelerate or not; or a model of transformers, which needs no code.
        folder: where they are written. It is made if it does not exist, and other files in it are left alone.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    with replace_files(folder) as partial:
        model.save_pretrained(partial)
        image_processor(model.config).save_pretrained(partial)
    return folder
