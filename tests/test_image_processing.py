"""The image processor and the pipelines: features do not depend on the door by which an image comes in."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HTTPError
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F
from transformers import (
    AutoImageProcessor,
    ImageFeatureExtractionPipeline,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)

from image_processing_ldae import LDAEImageProcessor, fit, resize_short_side
from ldae import LDAEForImageClassification, LDAEForPreTraining
from ldae.data.images import ImageDataset, decode, to_pixel_values
from ldae.data.sources import load_examples
from ldae.features.encoders import load_encoder
from ldae.features.extraction import extract_features
from ldae.hub.folder import save_hub_folder

SIZE = {"height": 8, "width": 12}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of every kind, by name."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize((90, 70), Image.Resampling.BICUBIC)
    grey, alpha = rgb.convert("L"), Image.fromarray(np.arange(6300).astype(np.uint8).reshape(70, 90))
    rgba, exif = rgb.copy(), Image.Exif()
    rgba.putalpha(alpha)
    exif[0x0112] = 6
    images = {
        "rgb": rgb, "grey": grey, "rgba": rgba, "grey-alpha": Image.merge("LA", (grey, alpha)), "one-bit": grey.convert("1"),
        "grey16": Image.fromarray(rng.integers(0, 65536, (70, 90)).astype(np.uint16)), "palette": rgb.quantize(16),
        "long": rgb.resize((300, 13)), "small": rgb.resize((5, 4)),
    }  # fmt: skip
    for name, image in images.items():
        image.save(folder / f"{name}.png", **({"transparency": 3} if name == "palette" else {}))
    rgb.save(folder / "turned.jpg", exif=exif, quality=95)
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    return folder


@pytest.mark.parametrize("num_channels", [1, 3, 4])
def test_the_processor_makes_what_training_sees_bit_for_bit(files, num_channels):
    images = ImageDataset(load_examples(str(files), "train"), (8, 12), num_channels)
    batch = images.__getitems__([(0, index) for index in range(len(images))])
    assert not batch["bad"]
    processor = LDAEImageProcessor(SIZE, num_channels)
    expected = to_pixel_values(batch["pixel_values"])
    for given in (batch["name"], [Image.open(name) for name in batch["name"]]):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], expected)


def test_fit_is_torchvision_s_resize_and_crop():
    image = Image.effect_noise((31, 20), 80)
    expected = F.center_crop(F.resize(image, [15, 23], F.InterpolationMode.BICUBIC), [15, 12])
    assert np.array_equal(fit(image, 15, 12), expected)


def test_the_pipeline_gives_the_features_of_the_command(files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail(f"asked: {text}"))
    save_hub_folder(tiny_model(LDAEForPreTraining), tmp_path)
    encoder = load_encoder(str(tmp_path))
    expected = extract_features(encoder, ImageDataset(load_examples(str(files), "train"), (8, 12)))
    extract = pipeline("image-feature-extraction", model=str(tmp_path))
    for batch_size in (1, 4):
        features = torch.tensor(extract(expected.names, pool=True, batch_size=batch_size))[:, 0]
        torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=1e-5)
    large = extract(expected.names[0], image_processor_kwargs={"size": {"height": 8, "width": 12}}, pool=True)
    torch.testing.assert_close(torch.tensor(large)[0], expected.features[0], atol=1e-5, rtol=1e-5)


def test_the_classifier_s_pipeline_sees_images_as_they_are_stored(files, tiny_model, tmp_path):
    save_hub_folder(model := tiny_model(LDAEForImageClassification, num_labels=3), tmp_path)
    pixel_values = LDAEImageProcessor(SIZE)(str(files / "grey16.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values).logits.softmax(dim=1).max().item()
    (best,) = pipeline("image-classification", model=str(tmp_path))(str(files / "grey16.png"), top_k=1)
    assert best["score"] == pytest.approx(expected, abs=1e-5)


def test_pipelines_of_other_models_are_as_ever(files, tmp_path):
    vit = ViTModel(ViTConfig(image_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).eval()
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    ours = pipeline("image-feature-extraction", model=str(tmp_path))
    upstream = ImageFeatureExtractionPipeline(ours.model, image_processor=ours.image_processor)
    assert ours(str(files / "rgba.png")) == upstream(str(files / "rgba.png"))


def test_arrays_and_tensors_are_the_images_that_they_hold():
    processor, pixels = LDAEImageProcessor(SIZE), np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)

    def processed(image, **options):
        return processor(image, return_tensors="np", **options)["pixel_values"]

    expected = processed(Image.fromarray(pixels))
    tensor = torch.from_numpy(pixels)
    for image in (pixels, pixels.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1), tensor.long(), pixels / 255,
                  tensor.float() / 255, pixels.astype(np.uint16) * 257, pixels[None], [pixels]):  # fmt: skip
        assert np.array_equal(processed(image), expected)
    grey = processed(Image.fromarray(pixels[..., 0]))
    assert np.array_equal(processed(pixels[..., 0]), grey)
    assert np.array_equal(processed(pixels[..., :1]), grey)
    assert len(processed([pixels, [pixels, Image.fromarray(pixels)]])) == 3
    square = pixels[:3, :3]  # whose channels could lie anywhere
    last = processed(square, input_data_format="channels_last")
    assert np.array_equal(last, processed(Image.fromarray(square)))
    assert not np.array_equal(last, processed(square, input_data_format="channels_first"))


@pytest.mark.parametrize("number", [-1, 256, 1.5, -0.1, np.nan, True])
def test_numbers_outside_the_documented_ranges_are_refused(number):
    with pytest.raises(ValueError, match="floats from 0 to 1, integers from 0 to 255 or uint16, got"):
        LDAEImageProcessor(SIZE)(np.full((4, 4, 3), number))


@pytest.mark.parametrize("image", [None, 3, np.zeros((2, 2, 2, 2, 3), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_what_is_no_image_is_refused(image):
    with pytest.raises(TypeError, match="an image is one of Pillow"):
        LDAEImageProcessor(SIZE)(image)


def test_a_data_url_is_opened(files):
    processor, path = LDAEImageProcessor(SIZE), files / "rgba.png"
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    assert np.array_equal(processor(url)["pixel_values"], processor(str(path))["pixel_values"])


def test_a_path_is_opened(files):
    processor, path = LDAEImageProcessor(SIZE), files / "rgba.png"
    assert np.array_equal(processor(path)["pixel_values"], processor(Image.open(path))["pixel_values"])


def test_an_address_without_an_image_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # of the tests
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which answers 501 to all
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/no.png"
        with pytest.raises(HTTPError, match=url):
            LDAEImageProcessor()(url)
        server.shutdown()


def test_the_processor_keeps_its_settings(tmp_path):
    processor = LDAEImageProcessor(SIZE, num_channels=1)
    assert LDAEImageProcessor.from_dict(processor.to_dict()).to_dict() == processor.to_dict()
    processor.save_pretrained(tmp_path)
    for backend in (None, "torchvision", "pil"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert isinstance(loaded, LDAEImageProcessor)
        assert (loaded.size, loaded.num_channels, loaded.model_input_names) == (SIZE, 1, ["pixel_values"])
    assert AutoImageProcessor.from_pretrained(tmp_path, size={"height": 4, "width": 4}).size["height"] == 4
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert content["auto_map"] == {"AutoImageProcessor": "image_processing_ldae.LDAEImageProcessor"}
    assert (tmp_path / "image_processing_ldae.py").is_file()


def test_wrong_settings_are_named():
    assert LDAEImageProcessor(8).size == {"height": 8, "width": 8}
    for size in ({"shortest_edge": 8}, "8", {"height": 8}):
        with pytest.raises(ValueError, match="size must be"):
            LDAEImageProcessor(size)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        LDAEImageProcessor({"height": 0, "width": 8})
    with pytest.raises(ValueError, match=r"num_channels must be one of \[1, 3, 4\], got 2"):
        LDAEImageProcessor(num_channels=2)


def test_broken_exif_is_no_reason_to_leave_an_image_out(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "exif\n8\nno\nhexadecimal")
    Image.new("RGB", (20, 10), "red").save(tmp_path / "x.png", pnginfo=text)
    with pytest.raises(ValueError, match="hexadecimal"):
        Image.open(tmp_path / "x.png").getexif()
    pixel_values = LDAEImageProcessor(SIZE)(str(tmp_path / "x.png"))["pixel_values"][0]
    assert (pixel_values[0] == 1).all()


def test_a_strip_is_not_resized_without_bound(monkeypatch):
    strip = Image.new("L", (1, 100_000))
    for bound in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        with pytest.raises(ValueError, match="1x100000 is too long to resize"):
            resize_short_side(strip, 224, 224)


def test_postscript_is_opened_under_no_name(tmp_path):
    """Pillow alone would tell it by its content, and run Ghostscript."""
    path = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    assert Image.open(path).format == "EPS"
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for image in (str(path), data):
        with pytest.raises(UnidentifiedImageError):
            LDAEImageProcessor(SIZE).fetch_images(image)
    with pytest.raises(UnidentifiedImageError):
        decode({"bytes": path.read_bytes(), "path": None}, 3)
