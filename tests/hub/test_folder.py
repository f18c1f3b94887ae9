"""Hub folders: what is written loads bit for bit, with its code and its image processor."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_folders import CODE, ROOT, TINY, assert_same_weights, tiny_model
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

import code_ldae
from code_ldae import AUTO_MAP
from ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from ldae.hub.cards import write_card
from ldae.hub.folder import save_hub_folder

MODELS = (LDAEForPreTraining, LDAEModel, LDAEForImageClassification, LDAEBackbone)


@pytest.mark.parametrize("model_class", MODELS)
def test_saved_folder_loads_bit_for_bit_and_carries_its_code(model_class, tmp_path):
    model = tiny_model(model_class)
    save_hub_folder(model, tmp_path)
    assert_same_weights(model, model_class.from_pretrained(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE)
    for name in AUTO_MAP.values():
        module, class_name = name.split(".")
        assert module + ".py" in CODE
        assert hasattr(importlib.import_module(module), class_name)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrapped_models_are_saved(wrap, tmp_path):
    model = tiny_model()
    save_hub_folder(wrap(model), tmp_path)
    assert_same_weights(model, LDAEForPreTraining.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("num_channels", "modes"), [(3, ["RGB", "L", "RGBA", "P", "1", "CMYK"]), (1, ["L"]), (4, ["RGBA"])]
)
def test_processor_makes_what_the_model_takes(num_channels, modes, tmp_path):
    model = tiny_model(LDAEModel, num_channels=num_channels)
    model.config.image_size = [32, 48]  # height and width must not change places
    save_hub_folder(model, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for mode in modes:
        black, white = (Image.new("RGB", (50, 40), colour).convert(mode) for colour in ("black", "white"))
        pixel_values = processor([black, white], return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (2, num_channels, 32, 48)
        assert torch.allclose(pixel_values[0, :3], torch.tensor(-1.0))
        assert torch.allclose(pixel_values[1], torch.tensor(1.0))


def test_a_baseline_of_transformers_is_saved_without_our_model_s_code(tmp_path):
    model = ViTMAEForPreTraining(ViTMAEConfig(**TINY, decoder_hidden_size=32, decoder_num_hidden_layers=1))
    save_hub_folder(model, tmp_path)
    assert_same_weights(model, ViTMAEForPreTraining.from_pretrained(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "image_processing_ldae.py",
        "model.safetensors",
        "preprocessor_config.json",
        "digests.sha256",
    }
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    card = ModelCard.load(write_card(tmp_path))
    assert "ViTMAEForPreTraining of transformers" in card.text
    assert "trust_remote_code" not in card.text
    assert "ldae" not in card.data.tags


OPENS = """
import sys, transformers
for folder in sys.argv[1:]:
    for name in ("AutoModel", "AutoModelForPreTraining", "AutoModelForImageClassification"):
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
    model.save_pretrained(f"{folder}-again")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert transformers.AutoBackbone.from_config(config, trust_remote_code=True).channels == [32]
"""


def test_what_save_pretrained_writes_opens_without_the_package(tmp_path):
    for model_class in MODELS:
        folder = tmp_path / model_class.__name__
        tiny_model(model_class).save_pretrained(folder)
        assert {path.name for path in folder.glob("*.py")} == CODE
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-c", OPENS, *(model_class.__name__ for model_class in MODELS)]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    for model_class in MODELS:  # its image processor, which was not loaded, writes its own code
        again = {path.name for path in tmp_path.glob(f"{model_class.__name__}-again/*.py")}
        assert again | {"image_processing_ldae.py"} == CODE


def test_code_is_not_copied_onto_itself(tmp_path, monkeypatch):
    for name in CODE:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(code_ldae, "__file__", str(tmp_path / "code_ldae.py"))
    tiny_model().save_pretrained(tmp_path)
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE)
