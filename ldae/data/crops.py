"""Crops and flips: what is drawn for an image, from (seed, epoch, index) alone, and how its crop is cut out.

`Crop.cut` cuts one image with Pillow. `BatchCutter` cuts whole batches on any device and gives the same values, bit for bit.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from image_processing_ldae import fit, resize_short_side

KINDS = ("center", "random", "random_resized")
MARGIN = 8 / 7  # "random" resizes the short side to this factor of the crop's
ASPECTS = (3 / 4, 4 / 3)  # width over height of a "random_resized" crop, as in torchvision
TRIES = 10  # sizes that are drawn for a "random_resized" crop until one fits into the image, as in torchvision
WEIGHT_BITS = 22  # Pillow rounds the weights of its filters to so many binary places


def random_bits(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Draws `count` random 64-bit numbers for each image from (seed, epoch, index) alone.

    This is the generator splitmix64 (Steele, Lea and Flood, 2014), started at a hash of the three numbers, for all images
    at once.

    Args:
        epochs: int64 (B,).
        indices: int64 (B,).

    Returns:
        uint64 (B, count).
    """
    step = np.uint64(0x9E3779B97F4A7C15)

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + step
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    state = mix(np.array([seed % 2**64], np.uint64))
    for numbers in (epochs, indices):
        state = mix(state ^ numbers.astype(np.uint64))
    return mix(state[:, None] + step * np.arange(count, dtype=np.uint64))


@dataclass(frozen=True)
class Crop:
    """A way to cut a crop out of an image. `ldae.data.images.ImageDataset` documents the fields.

    Raises:
        ValueError: if `kind` is none of `KINDS`.
    """

    image_hw: tuple[int, int]
    kind: str = "center"
    flip: bool = False
    seed: int = 0
    min_area: float = 0.2

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"crop must be 'center', 'random' or 'random_resized', got {self.kind!r}")

    def prepare(self, image: Image.Image) -> Image.Image:
        """Does to an image what is the same in every epoch: it is resized, and its centre is cut out for "center"."""
        if self.kind == "random_resized":
            return image
        if self.kind == "random":
            return resize_short_side(image, *(round(MARGIN * side) for side in self.image_hw))
        return fit(image, *self.image_hw)

    def draw(self, epochs: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws what the crops of images depend on.

        Args:
            epochs: int64 (B,).
            indices: int64 (B,).

        Returns:
            uniforms: float64 (B, 2 + 2 * TRIES) in [0, 1), of which `boxes` makes boxes once the images' sizes are known,
            and which of the crops are mirrored, bool (B,).
        """
        count = {"center": 0, "random": 2, "random_resized": 2 + 2 * TRIES}[self.kind]
        bits = random_bits(self.seed, epochs, indices, 1 + count)
        uniforms = (bits >> np.uint64(11)) * 2.0**-53
        return uniforms[:, 1:], (uniforms[:, 0] < 0.5) & self.flip

    def boxes(self, uniforms: np.ndarray, height: int, width: int) -> np.ndarray:
        """Places the crops in prepared images of one size.

        Returns:
            int64 (B, 4): top, left, height and width of each crop in pixels.
        """
        if self.kind == "center":
            return np.tile((0, 0, *self.image_hw), (len(uniforms), 1))
        if self.kind == "random_resized":
            sizes, fitted = self._sizes(uniforms[:, 2:], height, width)
        else:
            sizes, fitted = np.tile(self.image_hw, (len(uniforms), 1)), np.array(True)
        room = np.array((height, width)) - sizes
        corners = np.where(fitted, np.floor(uniforms[:, :2] * (room + 1)).astype(np.int64), room // 2)
        return np.concatenate([corners, sizes], axis=1)

    def _sizes(self, uniforms: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws heights and widths (B, 2) as torchvision's RandomResizedCrop does: the first of ten tries that fits.

        The second array (B, 1) tells where one fitted. Elsewhere, the size is the largest whose aspect ratio is allowed.
        """
        areas = height * width * (self.min_area + uniforms[:, :TRIES] * (1 - self.min_area))
        low, high = np.log(ASPECTS)
        aspects = np.exp(low + uniforms[:, TRIES:] * (high - low))
        heights, widths = np.rint(np.sqrt(areas / aspects)), np.rint(np.sqrt(areas * aspects))
        fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
        first, fitted = fits.argmax(axis=1)[:, None], fits.any(axis=1, keepdims=True)
        drawn = np.concatenate([np.take_along_axis(sides, first, axis=1) for sides in (heights, widths)], axis=1)
        largest = min(height, round(width / ASPECTS[0])), min(width, round(height * ASPECTS[1]))
        return np.where(fitted, drawn, largest).astype(np.int64), fitted

    def cut(self, pixels: np.ndarray, box: np.ndarray, flip: bool) -> np.ndarray:
        """Cuts the crop (h, w, C) out of the prepared uint8 image (H, W, C)."""
        top, left, height, width = box.tolist()
        crop = pixels[top : top + height, left : left + width]
        if (height, width) != self.image_hw:
            image = Image.fromarray(crop.squeeze(-1) if crop.shape[-1] == 1 else crop)
            # the width first and then the height, since Pillow's versions disagree on the order
            for size in ((self.image_hw[1], height), self.image_hw[::-1]):
                image = image.resize(size, Image.Resampling.BICUBIC)
            crop = np.asarray(image).reshape(*self.image_hw, -1)
        return crop[:, ::-1] if flip else crop


def bicubic_weights(lengths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes Pillow's antialiased bicubic filter that resizes `lengths` pixels to `size` pixels.

    The weights are multiples of 2^-22, as in Pillow. Sums of products with 8-bit values are therefore exact in double
    precision, and do not depend on their order.

    Args:
        lengths: int (L,).

    Returns:
        positions, int64 (L, size, K), and weights, float64 (L, size, K): a new pixel is the sum of `weights` times the old
        pixels at `positions`.
    """
    scale = lengths[:, None] / size
    stretch = np.maximum(scale, 1)
    centers, support = (np.arange(size) + 0.5) * scale, 2 * stretch
    first = np.floor(centers - support + 0.5).clip(0)[..., None]
    end = np.floor(centers + support + 0.5).clip(max=lengths[:, None])[..., None]
    positions = first + np.arange(2 * math.ceil(support.max()) + 1)
    x = np.abs((positions - centers[..., None] + 0.5) / stretch[..., None])
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (positions < end)
    weights = weights / weights.sum(axis=-1, keepdims=True) * 2**WEIGHT_BITS
    weights = np.trunc(weights + np.copysign(0.5, weights)) / 2**WEIGHT_BITS
    return positions.clip(max=lengths[:, None, None] - 1).astype(np.int64), weights


class BatchCutter:
    """Cuts whole batches out of prepared images of one size, on the device that holds them.

    The values are those of `Crop.cut`, bit for bit, on every device. A crop that is resized is two products with a matrix
    of filter weights, one for each axis. A step launches some twenty kernels and never waits for the device.

    Args:
        crop: What `boxes` and `flips` are drawn from.
        images: uint8 (n, H, W, C), C being 1 or 3 for "random_resized": Pillow resizes transparent images by other rules.
    """

    def __init__(self, crop: Crop, images: torch.Tensor):
        self.crop, self.images = crop, images
        if crop.kind == "random_resized":
            self.filters = [
                [torch.from_numpy(part).to(images.device) for part in bicubic_weights(np.arange(1, side + 1), size)]
                for side, size in zip(images.shape[1:3], crop.image_hw, strict=True)
            ]

    def __call__(self, indices: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> torch.Tensor:
        """Cuts the crops of images (B,), given their boxes (B, 4) and flips (B,).

        Returns:
            uint8 (B, C, h, w) on the images' device.
        """
        device, (h, w) = self.images.device, self.crop.image_hw
        drawn = torch.from_numpy(np.column_stack([indices, boxes, flips]))
        if device.type == "cuda":
            drawn = drawn.pin_memory().to(device, non_blocking=True)
        index, top, left, height, width, flip = drawn.to(device).unbind(dim=1)
        rows = torch.arange(h, device=device).expand(len(index), h)
        columns = torch.arange(w, device=device)
        columns = torch.where(flip[:, None] == 1, w - 1 - columns, columns)
        if self.crop.kind != "random_resized":
            rows, columns = top[:, None] + rows, left[:, None] + columns
            return (
                self.images[index[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()
            )
        down = self._matrices(0, top, height, rows)
        across = self._matrices(1, left, width, columns)
        pixels = self.images[index].transpose(2, 3).contiguous().double()  # (B, H, C, W)
        channels = pixels.shape[2]
        pixels = _rounded_product(pixels.flatten(1, 2), across.mT).view(len(index), -1, channels * w)
        pixels = _rounded_product(down, pixels).view(len(index), h, channels, w)
        return pixels.to(torch.uint8).transpose(1, 2).contiguous()

    def _matrices(self, axis: int, start: torch.Tensor, length: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Weights (B, size, side) of the pixels of an axis in the crop's pixels, these taken in `order` (B, size)."""
        positions, weights = (table[length[:, None] - 1, order] for table in self.filters[axis])
        matrices = weights.new_zeros(*order.shape, self.images.shape[1 + axis])
        return matrices.scatter_add_(2, positions + start[:, None, None], weights)


def _rounded_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The batched product, rounded half up to 0, 1, ..., 255 as in Pillow. It is double: TF32 and autocast spare it."""
    return torch.bmm(a, b).add_(0.5).floor_().clamp_(0, 255)
