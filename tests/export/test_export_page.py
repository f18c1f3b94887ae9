"""The commands and snippets of docs/export.md work as they stand, on a tiny model in place of the trained one."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldae import LDAEModel
from ldae.export.command import main

PAGE = Path(__file__).parents[2] / "docs/export.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_page(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(LDAEModel, image_size=64, patch_size=8, num_hidden_layers=12)
    model.save_pretrained("model_cards/ldae-vit-small-tiny-imagenet64")
    Image.fromarray((torch.rand(80, 100, 3) * 255).byte().numpy()).save("image.jpg")
    (commands,) = blocks("bash")
    for line in commands.splitlines():
        assert line.startswith("python -m ldae.export ")
        main(shlex.split(line)[3:])
    snippets = blocks("python")
    assert len(snippets) == 6
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), {})
