"""Images, and a fresh start of accelerate."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """22 smooth random images in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(22):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((25, 20), Image.Resampling.BICUBIC).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory) -> Path:
    """The same images in parquet files, three of them for training."""
    root, paths = tmp_path_factory.mktemp("files"), sorted(folder.glob("*/*.png"))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    for name, part in (
        ("train-0", paths[:8]),
        ("train-1", paths[8:15]),
        ("train-2", paths[15:]),
        ("validation", paths),
    ):
        rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in part], "label": [0] * len(part)}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / f"{name}.parquet", batch_size=2)
    return root


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(True)
