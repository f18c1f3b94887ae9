"""transformers' VitDet, whose tokens are a map (B, E, H / patch, W / patch), for detection and segmentation."""

from pathlib import Path
from typing import Any

import torch
from transformers import VitDetConfig, VitDetModel

from folding_ldae import PlainViT, renamed
from ldae.export.processor import save_processor

OPENS = """from transformers import VitDetBackbone

model = VitDetBackbone.from_pretrained("FOLDER")"""

NAMES = {
    r"^blocks\.": "encoder.layer.",
    r"\.attn\.": ".attention.",
    r"^patch_embed\.proj\.": "embeddings.projection.",
    r"^pos_embed$": "embeddings.position_embeddings",
}


def as_vitdet(plain: PlainViT, cls: type = VitDetModel) -> Any:
    """The encoder without its final LayerNorm and classifier as `VitDetModel` or `VitDetBackbone`, in float64.

    Raises:
        ValueError: for images, or an intermediate_size, that VitDet has no numbers for.
    """
    config = plain.config
    grid = [side // patch for side, patch in zip(plain.image_hw, config.patch_hw, strict=True)]
    if grid[0] != grid[1]:
        raise ValueError(
            f"VitDet takes as many patches high as wide, got {grid[0]} and {grid[1]}; choose an image_size that has them"
        )
    if config.intermediate_size % config.hidden_size:
        raise ValueError(
            f"VitDet needs intermediate_size to be a multiple of hidden_size={config.hidden_size}, "
            f"got {config.intermediate_size}"
        )
    vitdet_config = VitDetConfig(
        **plain.fields,
        pretrain_image_size=list(plain.image_hw),
        mlp_ratio=config.intermediate_size // config.hidden_size,
    )
    encoder = {name: value for name, value in plain.weights.items() if not name.startswith(("norm.", "head."))}
    encoder["pos_embed"] = torch.nn.functional.pad(encoder["pos_embed"], (0, 0, 1, 0))  # of a class token, not used
    model = cls(vitdet_config).double()
    model.load_state_dict(renamed(encoder, NAMES))
    return model.eval()


def save(plain: PlainViT, folder: Path):
    """Writes the model in float32, and an image processor.

    Raises:
        ValueError: as `as_vitdet` does.
    """
    as_vitdet(plain).float().save_pretrained(folder)
    save_processor(plain, folder)
