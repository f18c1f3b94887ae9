"""Images and data sets that the tests of the data room write."""

import io

import datasets
import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def noise(height: int = 20, width: int = 30, channels: int | None = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels) if channels else (height, width), dtype=np.uint8)


def save(path, colour=None, **options):
    """Writes an image of one colour, or of noise, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise()) if colour is None else Image.new("RGB", (30, 20), colour)
    image.save(path, **options)
    return path


def encoded(image: Image.Image, file_format: str, **options) -> dict:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return {"bytes": stream.getvalue(), "path": f"image.{file_format}"}


def examples(count: int, label: int = 0) -> datasets.Dataset:
    """`count` images of noise, undecoded, as `load_examples` gives them."""
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    rows = {"image": [encoded(Image.fromarray(noise()), "PNG") for _ in range(count)], "label": [label] * count}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet(folder, rows: dict, split: str = "train", batch_size: int | None = None, **features):
    """A folder with a parquet file, as on the Hub, in row groups of `batch_size`."""
    folder.mkdir(exist_ok=True)
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(**features))
    data.to_parquet(folder / f"{split}.parquet", batch_size=batch_size)
    return str(folder)
