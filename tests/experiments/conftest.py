"""What the tests of the experiments share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def recipe(tmp_path):
    """Images of two classes in two splits, and a recipe that names them."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(6):
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                coarse.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / f"data/{split}/{name}/{i}.png")
    (tmp_path / "tiny.yaml").write_text(f"data: {tmp_path / 'data'}\n")
    return str(tmp_path / "tiny.yaml")
