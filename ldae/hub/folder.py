"""Folders in Hub form: a folder holds all that is needed to load a model, its code included."""

import json
import shutil
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

import image_processing_ldae
import modeling_ldae
import pipeline_ldae
from configuration_ldae import LDAEConfig, pair
from image_processing_ldae import LDAEImageProcessor
from ldae.files import replace_files

AUTO_MAP = {
    "AutoConfig": "configuration_ldae.LDAEConfig",
    "AutoModel": "modeling_ldae.LDAEModel",
    "AutoModelForPreTraining": "modeling_ldae.LDAEForPreTraining",
    "AutoModelForImageClassification": "modeling_ldae.LDAEForImageClassification",
    "AutoBackbone": "modeling_ldae.LDAEBackbone",
}


def code_files() -> list[Path]:
    """The modules that a Hub folder carries: models, pipelines, and every sibling that they import, directly or not.

    They are found as transformers finds them when it loads the folder with `trust_remote_code=True`.
    """
    roots = [Path(str(module.__file__)) for module in (modeling_ldae, pipeline_ldae, image_processing_ldae)]
    return sorted({*roots, *(Path(file) for root in roots for file in get_relative_import_files(root))})


def image_processor(config: PreTrainedConfig) -> LDAEImageProcessor:
    """The processor that makes `pixel_values` (B, C, H, W) in [-1, 1] of images, as training and probes do."""
    height, width = pair(config.image_size)
    return LDAEImageProcessor({"height": height, "width": width}, config.num_channels)


def save_hub_folder(
    model: PreTrainedModel, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None
) -> Path:
    """Writes all that is needed to load `model` anywhere: configuration, weights, image processor, code, and their digests.

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
    with replace_files(folder) as partial:
        model.save_pretrained(partial, state_dict=state_dict)
        image_processor(model.config).save_pretrained(partial)
        if model.config.model_type == LDAEConfig.model_type:
            for file in code_files():
                shutil.copy(file, partial)
            path = partial / "config.json"  # the live configuration is left as it is, for the model goes on using it
            config = {**json.loads(path.read_text()), "auto_map": AUTO_MAP}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder
