"""Model cards hold the figures of a folder's files, and nothing else."""

import json
import re
import sys

import pytest
from hub_folders import MODEL_ID, PROBE, TRAINING, make_folder, read_all
from huggingface_hub import ModelCard
from PIL import Image

from ldae.hub import cards
from ldae.hub.cards import write_card
from ldae.report.results import save_result


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "ldae-vit-tiny")


def accuracies(card):
    return [result.metric_value for result in card.data.eval_results or []]


def test_card_holds_the_numbers_of_the_results(folder):
    second = json.loads(json.dumps(PROBE))
    second["seed"], second["protocols"] = 4, {"linear": {**PROBE["protocols"]["linear"], "accuracy": 56.5}}
    save_result(folder / "results/probe_seed4.json", second)
    card = ModelCard.load(write_card(folder, MODEL_ID))
    assert accuracies(card) == [43.210191, 55.03184713375796, 56.5]
    assert {(result.dataset_type, result.metric_type) for result in card.data.eval_results} == {
        ("imagenette", "accuracy")
    }
    assert len({result.metric_name for result in card.data.eval_results}) == 3
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert (card.data.pipeline_tag, card.data.model_name) == ("image-feature-extraction", "ldae-vit-tiny")
    assert card.data.datasets == ["frgfm/imagenette"]
    for text in ("| Protocol | This model | Untrained | Thumbnail |", "| 43.2 ± 0.8 | 34.9 ± 0.8 | 29.5 ± 0.7 |",
                 "| 55.0 ± 0.8 | 47.6 ± 0.8 | – |", "- Thumbnail: the image itself", "9,469 images", "1,480 steps",
                 "1.5 hours, ", "learning_rate: 0.0001", "2401.14404",
                 f'"{MODEL_ID}", trust_remote_code=True'):  # fmt: skip
        assert text in card.text


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("probe.json", ("protocols", "linear", "accuracy")),
        ("probe.json", ("protocols", "knn", "standard_error")),
        ("probe.json", ("floor", "linear", "accuracy")),
        ("probe.json", ("floor", "knn", "standard_error")),
        ("probe.json", ("thumbnail", "knn", "accuracy")),
        ("probe.json", ("data", "num_validation")),
        ("probe.json", ("seed",)),
        ("train.json", ("arguments", "learning_rate")),
        ("train.json", ("data", "num_images")),
        ("train.json", ("images_seen",)),
        ("train.json", ("loss",)),
        ("train.json", ("seconds",)),
    ],
)
def test_card_follows_the_results(folder, file, keys):
    before = (folder / "README.md").read_text()
    result = json.loads((folder / "results" / file).read_text())
    holder = result
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] += 1000
    (folder / "results" / file).write_text(json.dumps(result))
    assert write_card(folder, MODEL_ID).read_text() != before
    if keys[-1] == "accuracy" and keys[0] == "protocols":
        assert accuracies(ModelCard.load(folder / "README.md")) == [43.210191, holder["accuracy"]]


def test_card_without_results_claims_nothing(tmp_path):
    card = ModelCard.load(make_folder(tmp_path / "new", results=False) / "README.md")
    assert accuracies(card) == []
    assert card.data.datasets is None
    assert "not been evaluated" in card.text
    assert "±" not in card.text
    assert "## Training" not in card.text


def test_card_of_a_folder_without_code_imports_the_package(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    text = write_card(folder, MODEL_ID).read_text()
    assert "trust_remote_code" not in text
    assert "```python\nimport ldae  #" in text
    assert f'AutoModel.from_pretrained("{MODEL_ID}")' in text


def test_card_says_where_the_commit_is_unknown(folder):
    for commit, text in [("abc123", "| commit `abc123` |"), (None, "| commit not recorded |")]:
        result = {**json.loads((folder / "results/train.json").read_text()), "commit": commit}
        (folder / "results/train.json").write_text(json.dumps(result))
        assert text in write_card(folder).read_text()


def test_card_of_a_streamed_training(folder):
    data = {**TRAINING["data"], "num_images": None}
    save_result(folder / "results/train.json", {**TRAINING, "data": data, "epochs": None}, overwrite=True)
    text = write_card(folder).read_text()
    assert "imagenette, streamed" in text
    assert "94,690 images in 1,480 steps |" in text


def test_card_says_what_goes_beyond_the_paper(folder):
    assert not re.search(r"^\| (Tokens|Loss) \|", (folder / "README.md").read_text(), re.MULTILINE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "keep_ratio": 0.25, "loss_units": "latent"}))
    text = write_card(folder).read_text()
    assert "| Tokens | the encoder sees 25% of them in training, and all in use |" in text
    assert "| Loss | in the units of the scaled latents |" in text


def test_card_elsewhere_takes_along_what_it_shows(folder, tmp_path, monkeypatch):
    assert "![" not in (folder / "README.md").read_text()
    Image.new("RGB", (4, 4)).save(folder / "denoised.png")
    output = tmp_path / "model_cards/tiny/README.md"
    monkeypatch.setattr(sys, "argv", ["cards", str(folder), "--repo_id", "me/mine", "--output", str(output)])
    cards.main()
    assert "](denoised.png)" in output.read_text()
    assert 'model="me/mine"' in output.read_text()
    assert (output.parent / "denoised.png").read_bytes() == (folder / "denoised.png").read_bytes()
    assert (output.parent / "results/probe.json").read_bytes() == (folder / "results/probe.json").read_bytes()
    assert read_all(output.parent).keys() == {"README.md", "denoised.png", "results/probe.json", "results/train.json"}


def test_card_of_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        write_card(tmp_path)


def test_a_card_says_that_no_baseline_was_measured(folder):
    probe = {name: value for name, value in PROBE.items() if name != "thumbnail"} | {"floor": {}}
    save_result(folder / "results/probe.json", probe, overwrite=True)
    text = write_card(folder).read_text()
    assert "| Protocol | This model | Data |" in text
    assert "No baseline" in text
