"""Model cards hold the figures of a folder's files, and nothing else."""

import json
import re

import pytest
import torch
from hub_folders import MODEL_ID, PROBE, TRAINING, make_folder, read_all
from huggingface_hub import ModelCard
from PIL import Image

from ldae import LDAEConfig, LDAEForPreTraining, LDAEModel
from ldae.hub import cards
from ldae.hub.cards import write_card
from ldae.hub.counts import count, count_encoder
from ldae.hub.energy import energy
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


def test_card_says_which_tokens_are_seen_and_in_which_units_the_loss_is(folder):
    text = (folder / "README.md").read_text()
    assert "| Loss | in the units of the scaled latents |" in text
    assert "| Tokens |" not in text
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "keep_ratio": 0.25, "loss_units": "image"}))
    text = write_card(folder).read_text()
    assert "| Tokens | the encoder sees 4 of 16 in training, and all in use |" in text
    assert "| Loss | in the units of the pixels (equation 4) |" in text


def test_card_elsewhere_takes_along_what_it_shows(folder, tmp_path):
    text, place = (folder / "README.md").read_text(), f"In place of `{folder.name}`, give the path of this folder"
    assert "![" not in text
    assert place in write_card(folder).read_text()
    Image.new("RGB", (4, 4)).save(folder / "denoised.png")
    output = tmp_path / "model_cards/tiny/README.md"
    cards.main(["--model", str(folder), "--hub_model_id", "me/mine", "--output", str(output)])
    assert "](denoised.png)" in output.read_text()
    assert 'model="me/mine"' in output.read_text()
    assert "In place of" not in output.read_text()
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


def test_a_card_names_the_images_that_were_trained_on_and_probed_alike(folder):
    """A folder's own name may say little; images with the training's fingerprint are the training's."""
    same = {**PROBE, "data": {**PROBE["data"], "name": "data", "fingerprint": TRAINING["data"]["fingerprint"] + "-89"}}
    save_result(folder / "results/probe-data.json", same)
    card = ModelCard.load(write_card(folder, data_name="birds"))
    assert [result.dataset_name for result in card.data.eval_results] == ["birds"] * 2 + ["imagenette"] * 2
    assert "| Data | birds, 9,469 images" in card.text
    assert "| birds | 3 | [probe-data.json]" in card.text
    card = ModelCard.load(write_card(folder))
    assert card.data.eval_results[0].dataset_name == "frgfm-imagenette"


@pytest.mark.parametrize(("block", "kept"), [(1, 6), (2, 8)])
def test_the_card_counts_the_tokens_that_training_keeps(folder, block, kept):
    config = json.loads((folder / "config.json").read_text())
    config |= {"keep_ratio": 0.4, "mask_block": block}
    (folder / "config.json").write_text(json.dumps(config))
    drawn = LDAEForPreTraining(LDAEConfig.from_pretrained(folder)).sample_noise(2)["keep"].shape[1]
    assert drawn == kept
    assert f"| Tokens | the encoder sees {kept} of 16 in training" in write_card(folder).read_text()


def test_the_card_says_what_the_model_costs(folder):
    """The tiny model by hand: 16 tokens of width 32 in 2 blocks, patches of 192 numbers, 16 latent dimensions."""
    model = LDAEModel.from_pretrained(folder)
    config, tokens, width = model.config, 16, 32
    block = tokens * width * 12 * width + 2 * tokens * tokens * width  # four products of a token, two of attention
    outputs = tokens * width * 9 * 2 + tokens * width  # 3 + 1 + 4 + 1 widths a block, and the embedding
    conditioning = [(256, 8), (8, 8), (8, 6 * width), (8, 6 * width)]  # of t, and what it does to each block
    latents = 2 * tokens * 192 * 16  # to them and back
    macs = 2 * block + tokens * 192 * width + latents + sum(i * o for i, o in conditioning)
    counts = count_encoder(config)
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counts.macs == macs
    assert counts.activations == outputs + sum(o for _, o in conditioning)
    text = (folder / "README.md").read_text()
    assert f"| Parameters of the encoder (M) | {counts.parameters / 1e6:.1f} |" in text
    assert f"| GMACs of an image | {macs / 1e9:.2f}, " in text
    assert f"| Activations of an image (M) | {counts.activations / 1e6:.1f}, " in text


def test_counts_are_those_of_timm_s_cards():
    """86.6 M parameters, 16.9 GMACs but for attention's, 16.5 M activations: huggingface.co/timm/vit_base_patch16_224..."""
    timm = pytest.importorskip("timm")
    counts = count(timm.create_model("vit_base_patch16_224"), torch.zeros(1, 3, 224, 224))
    attention = 12 * 2 * 197 * 197 * 768
    assert round(counts.parameters / 1e6, 1) == 86.6
    assert (counts.macs - attention) / 1e9 == pytest.approx(16.9, abs=0.06)  # theirs holds the norms
    assert round(counts.activations / 1e6, 1) == 16.5


@pytest.mark.parametrize(
    ("gpus", "more", "kwh"),
    [
        (["NVIDIA H200"], {"num_processes": 8}, "about 11 kWh"),  # 2 h x 8 x 700 W
        (["NVIDIA A100-SXM4-80GB"], {}, "about 0.8 kWh"),
        (["NVIDIA L40S"], {}, "about 0.7 kWh"),  # and no L4
        (["NVIDIA H100 PCIe"], {}, "about 0.7 kWh"),
        ([], {"clock": "wall"}, "about 0.08 kWh"),  # 2 h x 4 threads x 10 W
        ([], {"clock": "processor"}, "about 0.02 kWh"),  # 2 h of a core
    ],
)
def test_energy_is_estimated_from_published_power(gpus, more, kwh):
    text = energy({"seconds": 7200, "hardware": {"gpus": gpus, "threads": 4}, **more})
    assert text.startswith(f"{kwh}, an estimate: 2 hours of ")


def test_no_energy_is_claimed_for_unknown_hardware():
    assert energy({"seconds": 7200, "hardware": {"gpus": ["a new one"], "threads": 4}}) is None
