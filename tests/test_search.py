"""Search by features: docs/search.md as it stands, and the figures of experiments.search."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import ldae
from experiments import search
from ldae.features import command
from ldae.features.extraction import Features

ROOT = Path(ldae.__file__).resolve().parents[1]
MODEL = "model_cards/ldae-vit-small-tiny-imagenet64"


@pytest.fixture
def workplace(few_photos, tmp_path, monkeypatch):
    """A folder from which the examples find the model."""
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each example of a page."""
    return re.findall(r"```(python|bash)\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_works_as_it_stands(workplace, capsys):
    pytest.importorskip("faiss")
    names: dict = {}
    for language, text in blocks("docs/search.md"):
        if language == "python":
            exec(text, names)
            continue
        program, *arguments = shlex.split(text.removeprefix("python -m "))
        if program == "ldae.features":  # the others made the page
            command.main(arguments)
    by_numpy = np.argsort(-names["asked"] @ names["features"].T, axis=1)[:, :7]
    np.testing.assert_array_equal(names["nearest"], by_numpy)
    np.testing.assert_allclose(np.linalg.norm(names["features"], axis=1), 1, rtol=1e-4)
    assert names["frame"]["cluster"].nunique() == 13
    assert "is like" in capsys.readouterr().out
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "docs/search.md").read_text(encoding="utf-8"))
    assert len(pictures) == 3
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


# ----------------------------------------------------------------------------------------------------------- the figures


def test_the_tables_of_the_page_are_those_of_its_results(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "docs/search", tmp_path / "search")
    page, text = tmp_path / "search.md", (ROOT / "docs/search.md").read_text(encoding="utf-8")
    page.write_text(re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["search", "--write", str(page)])
    search.main()
    assert page.read_text(encoding="utf-8") == text


def clouds(count: int, seed: int) -> Features:
    """Features of three classes, far from the origin and close to three points beside it."""
    labels = torch.arange(count) % 3
    generator = torch.Generator().manual_seed(seed)
    features = 10 + torch.eye(3)[labels] @ torch.eye(3, 8) + 0.05 * torch.randn(count, 8, generator=generator)
    return Features(features, labels)


def test_figures_of_classes_that_are_apart(monkeypatch):
    monkeypatch.setattr(search, "PAIRS", 200_000)
    gallery, queries, originals = clouds(60, 0), clouds(30, 1), torch.tensor([5, 7])
    copies = {"same": gallery.features[originals], "other": gallery.features[originals + 1]}
    raw, centred = (search.measure(gallery, queries, copies, originals, kind, seed=0) for kind in ("raw", "centred"))
    assert raw["mean_cosine"] > 0.99
    assert abs(centred["mean_cosine"]) < 0.1
    assert (centred["precision_at_10"], centred["knn"], round(centred["clusters"])) == (100, 100, 100)
    assert centred["copies"]["same"] == {"nearest": 100, "above_limit": 100}
    assert centred["copies"]["other"] == {"nearest": 0, "above_limit": 0}
    unit = torch.nn.functional.normalize(gallery.features - gallery.features.mean(0))
    products = (unit @ unit.T)[~torch.eye(60, dtype=torch.bool)]
    assert centred["mean_cosine"] == pytest.approx(products.mean().item(), abs=5e-3)
    assert centred["limit"] == pytest.approx(products.quantile(1 - search.RARE).item(), abs=1e-3)


@pytest.mark.parametrize("name", search.ALTERATIONS)
def test_alterations_change_an_image_and_not_its_content(name):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((50, 40))
    altered = search.ALTERATIONS[name](image)
    assert altered.mode == "RGB"
    assert altered.size == {"half the size": (25, 20), "a tenth cut off": (46, 36)}.get(name, (50, 40))
    before, after = (np.asarray(x.resize((50, 40)).convert("L"), float).ravel() for x in (image, altered))
    assert not np.array_equal(np.asarray(altered.resize((50, 40))), np.asarray(image))
    if name != "mirrored":
        assert np.corrcoef(before, after)[0, 1] > 0.8


def test_data_without_labels_is_refused(workplace, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images/a.png")
    with pytest.raises(ValueError, match="--data 'images' cannot be searched: it has no validation split"):
        search.run(search.SearchArguments(model=MODEL, data="images"))
