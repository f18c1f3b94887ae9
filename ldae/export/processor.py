"""What makes pixel values of images where this package is not installed."""

from pathlib import Path

from transformers import CLIPImageProcessor

from folding_ldae import PlainViT


def save_processor(plain: PlainViT, folder: Path):
    """Writes `preprocessor_config.json` of transformers' CLIP, which resizes the short side and cuts out the centre.

    Ours does so too, but rounds the resized long side where CLIP's drops its fraction, which moves pixels where there is one.
    None is written for images that are not square: transformers has no processor that scales them as training did.
    """
    height, width = plain.image_hw
    if height != width:
        print(
            f"No image processor is written: transformers' cut no {height}x{width} pixels as training did. "
            "LDAEImageProcessor does, and so does timm's transform (--to timm)."
        )
        return
    half = [0.5] * plain.config.num_channels
    CLIPImageProcessor(
        size={"shortest_edge": height},
        crop_size={"height": height, "width": width},
        image_mean=half,
        image_std=half,
        do_convert_rgb=plain.config.num_channels == 3,
    ).save_pretrained(folder)
