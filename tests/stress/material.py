"""Small images and the options of a run that takes a second or two."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

MODEL = [
    "--image_size=16", "--patch_size=4", "--hidden_size=32", "--num_hidden_layers=1", "--num_attention_heads=2",
    "--decoder_num_hidden_layers=1", "--latent_dim=4",
]  # fmt: skip
RUN = [
    "--per_device_batch_size=4", "--max_steps=8", "--checkpointing_steps=2", "--report_to=none", "--no_probe", "--image_steps=3",
]  # fmt: skip


def write_images(folder: Path, classes: int = 2, count: int = 40, seed: int = 0) -> Path:
    """Smooth random images of 20 x 16 px, in a folder for each class, and a validation split of half as many."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", count), ("val", count // 2)):
        for i in range(number):
            path = folder / split / f"class-{i % classes}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            coarse.resize((20, 16), Image.Resampling.BICUBIC).save(path)
    return folder


def write_parquet(images: Path, folder: Path):
    """The training images of a folder as a table."""
    folder.mkdir()
    paths = sorted((images / "train").rglob("*.png"))
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": int(path.parent.name[-1])} for path in paths
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "train-00000-of-00001.parquet")
