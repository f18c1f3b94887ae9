"""Images that strangers upload: what a model takes, or one friendly sentence."""

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from image_processing_ldae import MAX_PIXELS, LDAEImageProcessor, open_image

TOO_LARGE = (
    f"This image is too large: the page takes up to {MAX_PIXELS // 10**6} megapixels. Make it smaller and try again."
)
NO_IMAGE = "This file is not an image that can be read here. Try a PNG, JPEG or WebP file."
DAMAGED = "This image is damaged and cannot be decoded. Try another copy of it, or another image."
TOO_LONG = "This image is too long and thin for a square view. Cut out a part of it and try again."
NO_RANGE = "This image holds floating-point numbers without a known range. Save it with 8 or 16 bits and try again."


def read_upload(path: str | Path, image_hw: tuple[int, int], num_channels: int) -> torch.Tensor:
    """Reads an uploaded file as training reads images: upright, 16 bits scaled to 8, transparency on white, the centre cut out.

    Args:
        image_hw: height and width of the result in pixels.
        num_channels: 1, 3 or 4 of the result.

    Returns:
        (1, C, H, W) in [-1, 1].

    Raises:
        ValueError: with a sentence for whoever uploaded it, if the file is no image, is damaged, or is too large or too thin.
    """
    processor = LDAEImageProcessor({"height": image_hw[0], "width": image_hw[1]}, num_channels)
    try:
        with open_image(path) as file:
            refusal = _refusal(file, *image_hw)
            if refusal is None:
                return processor(file, return_tensors="pt")["pixel_values"]
    except Image.DecompressionBombError:
        refusal = TOO_LARGE
    except UnidentifiedImageError:
        refusal = NO_IMAGE
    except Exception:  # hostile files make decoders fail in every way
        refusal = DAMAGED
    raise ValueError(refusal)


def _refusal(file: Image.Image, height: int, width: int) -> str | None:
    """Why an image is not decoded, as its header tells; None if it is."""
    scale = max(height / file.height, width / file.width)
    if file.width * file.height > MAX_PIXELS:
        return TOO_LARGE
    if scale**2 * file.width * file.height > MAX_PIXELS:
        return TOO_LONG
    return NO_RANGE if file.mode == "F" else None
