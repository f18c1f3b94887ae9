"""The worked example of a dense task, on a drawn image in place of the package's."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score
from torch.testing import assert_close

from experiments import segmentation
from experiments.segmentation import crops, joined, nuclei, overlaps, segmenter, table, tiles
from ldae import LDAEBackbone, LDAEForPreTraining
from ldae.hub.folder import save_hub_folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package stardist whose image has bright discs, which its mask numbers."""
    folder = tmp_path / "packages/stardist/data/images"
    folder.mkdir(parents=True)
    (tmp_path / "packages/stardist/__init__.py").write_text("raise AssertionError('its code is not run')")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    mask = np.zeros((64, 64), np.uint16)
    for number, (cy, cx) in enumerate(rng.integers(4, 60, (9, 2)), 1):
        mask[(y - cy) ** 2 + (x - cx) ** 2 < 30] = number
    image = (rng.integers(5, 30, mask.shape) + 100 * (mask > 0)).astype(np.uint16)
    Image.fromarray(image).save(folder / "img2d.tif")
    Image.fromarray(mask).save(folder / "mask2d.tif")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(segmentation, "COLUMN", 80)
    return image, mask


@pytest.fixture
def folder(tiny_model, tmp_path):
    model = tiny_model(LDAEForPreTraining, image_size=16, num_hidden_layers=4)
    save_hub_folder(model, tmp_path / "model")
    return tmp_path / "model"


def test_the_image_is_enlarged_with_its_mask(package):
    image, mask = nuclei()
    assert image.shape == (3, 128, 128)
    assert torch.equal(mask[::2, ::2], torch.from_numpy(package[1] > 0).long())
    assert torch.equal(mask[::2], mask[1::2])
    assert -1 <= image.min() < image.max() <= 1
    assert image[0][mask > 0].mean() > image[0][mask == 0].mean() + 0.5


def test_without_the_package_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "stardist", raising=False)
    with pytest.raises(ImportError, match="pip install --no-deps stardist"):
        nuclei()


def test_tiles_are_slices_and_are_joined_again():
    image = torch.arange(3 * 17 * 26.0).view(3, 17, 26)
    parts = tiles(image, 8)
    assert parts.shape == (6, 3, 8, 8)
    assert torch.equal(parts[4], image[:, 8:16, 8:16])
    assert torch.equal(joined(parts, 3), image[:, :16, :24])


def test_an_image_and_its_mask_are_turned_alike():
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)).gt(0.5).long()
    images, masks = crops(mask.float().expand(3, -1, -1), mask, 8, np.random.default_rng(0))
    assert images.shape == (segmentation.BATCH, 3, 8, 8)
    assert torch.equal(images[:, 1].long(), masks)
    assert len(masks.unique(dim=0)) == segmentation.BATCH


def test_overlaps_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    found, expected = (torch.randint(2, (4, 8, 8), generator=generator) for _ in range(2))
    of = [100 * jaccard_score(expected.flatten(), found.flatten(), pos_label=label) for label in (1, 0)]
    assert overlaps(found, expected) == pytest.approx({"nuclei": of[0], "background": of[1], "mean": sum(of) / 2})


def test_only_the_learned_weights_differ(folder):
    trained, random = segmenter(folder, True).backbone, segmenter(folder, False).backbone
    expected = LDAEBackbone.from_pretrained(folder, config=trained.config).state_dict()
    assert_close(trained.state_dict(), expected)
    for name, tensor in random.state_dict().items():
        if "tokenizer" in name:
            assert torch.equal(tensor, expected[name]), name
    name = "ldae.embeddings.projection.weight"
    assert not torch.equal(random.state_dict()[name], expected[name])


def test_encoders_of_few_layers_are_refused(tiny_model, tmp_path):
    save_hub_folder(tiny_model(LDAEForPreTraining), tmp_path / "small")
    with pytest.raises(ValueError, match="four layers"):
        segmenter(tmp_path / "small", True)


def test_the_experiment_writes_results_a_table_and_a_drawing(package, folder, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- segmentation -->\n<!-- segmentation -->\nb\n")
    options = f"{folder} --seeds 0 1 --steps 2 --results {tmp_path}/r.jsonl --write {page} --figure {tmp_path}/f.png"
    monkeypatch.setattr(sys, "argv", ["segmentation", *options.split()])
    segmentation.main()
    rows = table(tmp_path / "r.jsonl").splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| threshold", "1"],
        ["| random weights", "2"],
        ["| pre-trained", "2"],
    ]
    assert rows[0].split(" | ")[2] > "90"  # discs are bright
    assert rows[1] in page.read_text()
    assert Image.open(tmp_path / "f.png").width > 900
    before = page.read_text()
    monkeypatch.setattr(sys, "argv", ["segmentation", *options.split()[4:]])
    segmentation.main()  # the table alone
    assert page.read_text() == before


def test_the_page_says_what_the_results_hold():
    page = (segmentation.RESULTS.parents[2] / "docs/dense.md").read_text(encoding="utf-8")
    assert table(segmentation.RESULTS) in page
    mean = {(r["weights"], r["seed"]): r["iou"]["mean"] for r in map(json.loads, segmentation.RESULTS.open())}
    leads = sorted(mean["pre-trained", seed] - mean["random weights", seed] for seed in range(3))
    assert f"by {leads[0]:.1f} to {leads[-1]:.1f} points of mean IoU" in page
