"""Class numbers as text, so that a results file holds what a paired test of two encoders needs."""

import base64
import io
import zlib

import numpy as np
import torch


def pack(numbers: torch.Tensor | np.ndarray) -> str:
    """Packs class numbers of any shape into base64 text: the smallest unsigned integers, as .npy, compressed by zlib.

    Raises:
        ValueError: for a number below 0.
    """
    numbers = np.asarray(numbers)
    if (least := numbers.min(initial=0)) < 0:
        raise ValueError(f"class numbers must be at least 0, got {least}")
    buffer = io.BytesIO()
    np.save(buffer, numbers.astype(np.min_scalar_type(int(numbers.max(initial=0)))), allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """The class numbers that `pack` made text of."""
    return np.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), allow_pickle=False)
