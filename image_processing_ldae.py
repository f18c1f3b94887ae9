"""From an image as it is stored to what l-DAE takes. Training and the image processor share it, so no door changes features.

image as stored --as_seen--> upright, 8 bits --fit--> resized, its centre cut out --LDAEImageProcessor--> [-1, 1]
"""

import base64
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from huggingface_hub import get_session
from PIL import ExifTags, Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

try:  # phones' HEIC, where this is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()
except ImportError:
    pass

Image.init()  # registers all formats
# Those that are read: not what Pillow only writes (PDF), or hands to another plug-in or program (PostScript's).
FORMATS = tuple(sorted(set(Image.OPEN) - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}))
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels
MAX_PIXELS = 89_478_485  # of a resized image where Pillow's own bound, which this is, was taken away
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the EXIF orientation


def open_image(file: str | Path | io.BytesIO) -> Image.Image:
    """Opens a file of one of `FORMATS`, whatever it is called: Pillow alone would give PostScript to Ghostscript.

    Raises:
        OSError: if it is none.
    """
    return Image.open(file, formats=FORMATS)


def as_seen(image: Image.Image, num_channels: int) -> Image.Image:
    """Makes an image what it should look like, in 8 bits.

    It is turned upright by its EXIF orientation. Of an animation it is the first frame. 16 bits are scaled to 8.
    Transparency is blended onto white, unless `num_channels` is 4.

    Args:
        num_channels: 1, 3 or 4: the image is returned as grey, RGB or RGBA.

    Raises:
        Exception: of almost any type, if the image is of a file that cannot be read.
        ValueError: for an image of floating-point numbers.
    """
    image = _upright(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("images of floating-point numbers have no known range")
    if num_channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(PIL_MODES[num_channels])


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF that is broken, in any way, says nothing about the pixels
        return image
    return image if turn is None else image.transpose(turn)


def resize_short_side(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes an image, without changing its shape, to the smallest size that covers height and width.

    Raises:
        ValueError: if the resized image would be too large, as that of a strip of 1 by 100,000 pixels.
    """
    scale = max(height / image.height, width / image.width)
    new_height, new_width = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    if new_height * new_width > (Image.MAX_IMAGE_PIXELS or MAX_PIXELS):
        raise ValueError(f"an image of {image.width}x{image.height} is too long to resize")
    return image.resize((new_width, new_height), Image.Resampling.BICUBIC)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resizes the short side of an image and cuts out its centre.

    Raises:
        ValueError: as `resize_short_side` does.
    """
    image = resize_short_side(image, height, width)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


class _Options(TypedDict, total=False):
    size: dict[str, int]
    num_channels: int


class LDAEImageProcessor(BaseImageProcessor):
    """Makes `pixel_values` (B, C, H, W) in [-1, 1] of images, exactly as training does with the crop "center".

    Args:
        size: {"height": H, "width": W} of the result in pixels, or the side of a square. An image's short side is resized and
            its centre cut out.
        num_channels: 1, 3 or 4: images become grey, RGB or RGBA, whatever they are. Transparency is blended onto white, unless
            there are 4 channels.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = _Options
    opens_images = True  # for `pipeline_ldae`

    def __init__(self, size: dict[str, int] | int | None = None, num_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)
        if num_channels not in PIL_MODES:
            raise ValueError(f"num_channels must be one of {list(PIL_MODES)}, got {num_channels}")
        self.size, self.num_channels = _checked(size or {"height": 224, "width": 224}), num_channels

    def preprocess(
        self,
        images: Any,
        size: dict[str, int] | int | None = None,
        return_tensors: str | None = None,
        input_data_format: str | ChannelDimension | None = None,
    ) -> BatchFeature:
        """Makes the input of the model.

        Args:
            images: one image or a list of them. An image is of Pillow; or the path or the URL (data: too) of a file; or an
                array or tensor, (H, W), (H, W, C) or (C, H, W), of integers from 0 to 255, of uint16, or of floats from 0 to 1,
                with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels. An array of four dimensions is a batch.
            size: replaces the processor's for these images.
            return_tensors: "pt" for a tensor, "np" for an array; by default a list of arrays (C, H, W).
            input_data_format: "channels_first" or "channels_last", where an array's shape does not tell.

        Returns:
            {"pixel_values": float32 (B, C, H, W) in [-1, 1]}.

        Raises:
            TypeError, ValueError: for what is no image, or for an array of numbers outside these ranges.
            Exception: of almost any type, for a file that cannot be read.
        """
        hw = tuple((self.size if size is None else _checked(size))[name] for name in ("height", "width"))
        pixel_values = [self._pixels(image, hw, input_data_format) for image in _flat(images)]
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def fetch_images(self, image: Any, timeout: float | None = None) -> Any:
        """Opens an image that is given by its path or its URL, and converts nothing."""
        if not isinstance(image, str | os.PathLike):
            return image
        image = os.fspath(image)
        if image.startswith(("http://", "https://")):
            limit: dict[str, Any] = {} if timeout is None else {"timeout": timeout}  # None would wait for ever
            response = get_session().get(image, follow_redirects=True, **limit).raise_for_status()
            return open_image(io.BytesIO(response.content))
        if image.startswith("data:"):
            return open_image(io.BytesIO(base64.b64decode(image.partition(",")[2])))
        return open_image(image)

    def _pixels(self, image: Any, hw: tuple[int, ...], input_data_format: str | ChannelDimension | None) -> np.ndarray:
        image = self.fetch_images(image)
        if not isinstance(image, Image.Image):
            image = _from_array(image, input_data_format)
        pixels = np.asarray(fit(as_seen(image, self.num_channels), *hw)).reshape(*hw, self.num_channels)
        return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)


def _checked(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    try:
        size = {name: int(size[name]) for name in ("height", "width")}
    except (KeyError, TypeError):
        raise ValueError(f'size must be {{"height": H, "width": W}} in pixels, got {size!r}') from None
    if min(size.values()) < 1:
        raise ValueError(f"height and width of size must be at least 1 pixel, got {size!r}")
    return size


def _flat(images: Any) -> Iterator[Any]:
    """Yields the images of lists in any nesting and of batches."""
    if isinstance(images, Iterable) and not isinstance(images, (str, np.ndarray, torch.Tensor, Image.Image)):
        for part in images:
            yield from _flat(part)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def _from_array(image: Any, input_data_format: str | ChannelDimension | None) -> Image.Image:
    """An image of Pillow from an array or tensor whose shape and range `LDAEImageProcessor.preprocess` documents."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        shape = f" of shape {image.shape}" if isinstance(image, np.ndarray) else ""
        raise TypeError(f"an image is one of Pillow, a file's path or an array, got {type(image).__name__}{shape}")
    if image.ndim == 3:
        order = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 2, 3, 4))
        image = np.moveaxis(image, 0, -1) if order == ChannelDimension.FIRST else image
    limit = 1 if image.dtype.kind == "f" else 65535 if image.dtype == np.uint16 else 255
    if image.dtype.kind not in "uif" or not (image.min() >= 0 and image.max() <= limit):
        raise ValueError(
            f"an array holds floats from 0 to 1, integers from 0 to 255 or uint16, got {image.dtype} from {image.min()} to "
            f"{image.max()}"
        )
    if image.dtype != np.uint8:
        image = (image * (255 / limit)).round().astype(np.uint8)
    return Image.fromarray(image.squeeze(-1) if image.ndim == 3 and image.shape[-1] == 1 else image)


LDAEImageProcessor.register_for_auto_class()  # `save_pretrained` then writes this file beside its configuration

__all__ = ["LDAEImageProcessor"]
