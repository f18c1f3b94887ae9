"""Encoders of folders: their image format, and what is refused."""

import json
import logging

import pytest
import torch
from encoder_models import MAE, MEAN, STD, TIMM, TINY, ldae_model, timm_model
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from ldae import LDAEForPreTraining
from ldae.features.encoders import Encoder, load_encoder


def test_load_ldae(tmp_path):
    model, pixel_values = ldae_model(LDAEForPreTraining), torch.rand(3, 3, 16, 16) * 2 - 1
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert not encoder.model.training
    assert (encoder.name, encoder.image_hw, encoder.num_channels) == (str(tmp_path), (16, 16), 3)
    assert encoder.mean is encoder.std is None
    torch.testing.assert_close(encoder(pixel_values), model.ldae(pixel_values).last_hidden_state)


def test_load_with_an_image_processor(tmp_path):
    ViTMAEForPreTraining(ViTMAEConfig(**TINY, **MAE)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.image_hw, list(encoder.mean), list(encoder.std)) == ((16, 16), MEAN, STD)


def test_weights_that_an_encoder_does_not_need_are_not_listed(tmp_path, monkeypatch):
    """transformers itself says of each weight of the decoder that it is not expected."""
    said = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [listener])
    ViTMAEForPreTraining(ViTMAEConfig(**TINY, **MAE)).save_pretrained(tmp_path)
    load_encoder(str(tmp_path))
    assert not any("decoder_layers" in text for text in said)
    AutoModel.from_pretrained(tmp_path)
    assert any("decoder_layers" in text for text in said)


def test_the_processors_size_comes_before_the_configurations(tmp_path):
    """DINOv2's configuration has the size on which its training ended, its processor the one that it is used at."""
    config = Dinov2WithRegistersConfig(**{**TINY, "image_size": 24})
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    sizes = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    for crops, expected in ((True, (16, 16)), (False, (20, 20))):
        ViTImageProcessor(**sizes, do_center_crop=crops).save_pretrained(tmp_path)
        encoder = load_encoder(str(tmp_path))
        assert encoder.image_hw == expected
        assert encoder(torch.zeros(1, 3, *expected)).shape == (1, expected[0] ** 2 // 16, 32)


@pytest.mark.parametrize(("config", "cls"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)])
def test_a_model_of_images_and_texts_is_taken_for_its_images(config, cls, tmp_path):
    vision = {**TINY, "intermediate_size": 64}
    text = {**{k: v for k, v in TINY.items() if "size" not in k}, "hidden_size": 32, "vocab_size": 9}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = cls(config(vision_config=vision, text_config=text)).eval()
    model.save_pretrained(tmp_path)
    encoder, pixel_values = load_encoder(str(tmp_path)), torch.rand(2, 3, 16, 16) * 2 - 1
    hidden = model.vision_model(pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(encoder(pixel_values), hidden[:, -16:])
    assert encoder.untrained().digest() != encoder.digest()


def test_load_without_an_image_processor(tmp_path, capsys):
    ViTModel(ViTConfig(**TINY)).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.image_hw, encoder.mean, encoder.std) == ((16, 16), None, None)
    assert "[-1, 1]" in capsys.readouterr().err


def test_a_model_without_image_size_takes_its_processors(tmp_path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 48}, do_normalize=False).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert (encoder.image_hw, encoder.num_channels, encoder.mean, encoder.std) == ((32, 48), 3, [0.0], [1.0])


@pytest.mark.parametrize("kind", TIMM)
def test_load_timm(kind, tmp_path):
    model = timm_model(kind)
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.num_channels == 3
    cfg = model.timm_model.pretrained_cfg
    assert (encoder.mean, encoder.std) == (list(cfg["mean"]), list(cfg["std"]))
    by_hand = Encoder(model, encoder.image_hw, 3, encoder.mean, encoder.std)
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(encoder(pixel_values), by_hand(pixel_values))
    assert encoder.digest() == by_hand.digest()


def test_timm_takes_images_as_its_configuration_says(tmp_path):
    """The Hub's timm models name theirs, which need not be those of the architecture (DINO's, CLIP's)."""
    model = timm_model("vit")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(str(tmp_path))
    assert (encoder.image_hw, encoder.num_channels, encoder.mean, encoder.std) == ((32, 32), 3, MEAN, STD)
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 24)


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="--model: there is no folder"):
        load_encoder(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"--encoder: .*config\.json"):
        load_encoder(str(tmp_path), name_of_option="--encoder")
    with pytest.raises(FileNotFoundError, match="neither a model's folder nor on the Hub"):
        load_encoder("nobody/nothing")


def test_missing_weights(tmp_path):
    """transformers would fill them with random numbers."""
    from safetensors.torch import load_file, save_file

    ldae_model(LDAEForPreTraining).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["ldae.layers.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 .*layers\.1\.mlp\.fc1\.weight"):
        load_encoder(str(tmp_path))


def test_code_of_a_model_is_not_run_unasked(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()
