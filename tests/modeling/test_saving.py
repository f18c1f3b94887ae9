"""Models as they start, are cast, saved and loaded, and what pipelines make of their folders."""

import copy

import pytest
import torch
from naive_method import draw
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, pipeline

from ldae import LDAEBackbone, LDAEForImageClassification, LDAEForPreTraining, LDAEImageProcessor, LDAEModel
from modeling_ldae import NoiseSchedule
from tokenizers_ldae import PCATokenizer


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(
    ("cls", "auto"),
    [
        (LDAEModel, AutoModel),
        (LDAEForPreTraining, AutoModelForPreTraining),
        (LDAEForImageClassification, AutoModelForImageClassification),
        (LDAEBackbone, LDAEBackbone),  # AutoBackbone of a local folder is broken in transformers 5.24
    ],
)
@pytest.mark.parametrize("noise_schedule", ["linear_sigma", "ddpm"])
def test_every_class_loads_a_pretraining_folder(tiny_model, images, tmp_path, cls, auto, noise_schedule):
    model = tiny_model(noise_schedule=noise_schedule)
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    new = {"classifier.weight", "classifier.bias"} if cls is LDAEForImageClassification else set()
    assert set(info["missing_keys"]) == new
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    saved = tensors(model)  # non-persistent buffers are among them
    for name, tensor in tensors(loaded).items():
        if name not in new:
            assert torch.equal(tensor, saved[f"ldae.{name}" if cls is LDAEModel else name]), name
    if cls is LDAEForPreTraining:
        assert tensors(loaded).keys() == saved.keys()
        x, drawn = images(model.config), draw(model)
        assert torch.equal(loaded(x, **drawn).loss, model(x, **drawn).loss)
    if new:
        assert loaded.classifier.weight.isfinite().all()
        assert loaded.classifier.weight.any()


def test_fields_changed_on_loading_are_heeded(tiny_model, images, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    fields = {"noise_schedule": "single_sigma", "image_size": (12, 8), "num_train_timesteps": 20}
    loaded, made = LDAEForPreTraining.from_pretrained(tmp_path, **fields), tiny_model(**fields)
    x, drawn = images(made.config), draw(made)
    assert torch.equal(loaded(x, **drawn).loss, made(x, **drawn).loss)


def test_bfloat16_leaves_tokenizer_and_noise_in_float32(tiny_model, images, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for kept in (PCATokenizer, NoiseSchedule):
        (original,), (module,) = ([m for m in each.modules() if isinstance(m, kept)] for each in (model, loaded))
        for name, buffer in original.named_buffers():
            assert module.get_buffer(name).dtype == torch.float32
            assert torch.equal(module.get_buffer(name), buffer)
    x, drawn = images(model.config), draw(model)
    output, expected = loaded(x, **drawn), model(x, **drawn)
    assert torch.equal(output.noisy_pixel_values, expected.noisy_pixel_values)
    assert_close(output.loss, expected.loss, rtol=0.03, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokenizer_type", ["pca", "conv_vae"])
def test_a_cast_leaves_tokenizer_and_noise_in_float32(tiny_model, images, dtype, tokenizer_type):
    rung = {"input_space": "latent", "prediction": "noise"} if tokenizer_type == "conv_vae" else {}
    model = tiny_model(tokenizer_type=tokenizer_type, **rung)
    x, drawn = images(model.config), draw(model)
    expected = model(x, **drawn)
    cast = copy.deepcopy(model).to(dtype)
    assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
    for name, buffer in model.ldae.tokenizer.named_buffers():
        assert torch.equal(cast.ldae.tokenizer.get_buffer(name), buffer), name
    output = cast(x, **drawn)
    assert torch.equal(output.noisy_pixel_values, expected.noisy_pixel_values)
    assert_close(output.loss, expected.loss, rtol=0.03, atol=0)


def test_a_new_model_starts_as_adaln_zero(tiny_config, images):
    model = LDAEForPreTraining(tiny_config(conditioning_size=128, initializer_range=0.03))
    for linear in (model.ldae.timestep_embedding.fc1, model.ldae.timestep_embedding.fc2):
        assert linear.weight.std().item() == pytest.approx(0.03, rel=0.03)
    bound = (6 / (16 + 3 * 16)) ** 0.5  # Xavier's
    assert model.decoder.layers[0].attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    x = images(model.config)
    output = model(x, **draw(model), output_hidden_states=True, return_reconstruction=True)
    assert not output.reconstruction.any()
    assert torch.equal(output.hidden_states[0], output.hidden_states[-1])
    assert output.hidden_states[0].any()


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A folder as one would publish it, with an image processor."""
    folder = tmp_path_factory.mktemp("published")
    tiny_model(LDAEForImageClassification, num_labels=3).save_pretrained(folder)
    size = {"height": 8, "width": 12}
    LDAEImageProcessor(size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pipelines_take_any_image(folder, mode):
    image = Image.effect_noise((30, 20), 80).convert(mode)
    features = torch.tensor(pipeline("image-feature-extraction", model=str(folder))(image, pool=True))
    assert features.shape == (1, 16)
    pixel_values = LDAEImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = LDAEModel.from_pretrained(folder)(pixel_values).pooler_output
        logits = LDAEForImageClassification.from_pretrained(folder)(pixel_values).logits
    assert_close(features, expected, atol=1e-5, rtol=1e-5)
    best = pipeline("image-classification", model=str(folder))(image, top_k=3)
    scores = torch.tensor([entry["score"] for entry in best])
    assert_close(scores, logits.softmax(dim=1)[0].sort(descending=True).values, atol=1e-5, rtol=1e-5)
