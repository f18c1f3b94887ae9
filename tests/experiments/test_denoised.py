"""The picture at the head of README.md is what the command that it names draws."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.denoised import main

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("shipped_model")
def test_the_picture_of_the_readme_is_made_by_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    main([str(tmp_path / "made.png")])
    made, shown = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float)
        for path in (tmp_path / "made.png", ROOT / "docs/denoised.png")
    )
    assert made.shape == shown.shape
    assert np.abs(made - shown).max() <= 4  # of 255: processors round differently


def test_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch, tiny_model):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"--image: .*x.png. cannot be used"):
        main([str(tmp_path / "made.png"), "--model", str(tmp_path / "model"), "--image", str(tmp_path / "x.png")])
