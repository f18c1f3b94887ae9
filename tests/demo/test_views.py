"""What the page shows of a model, against the model itself."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldae import LDAEForImageClassification, LDAEForPreTraining, LDAEModel
from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.demo.reference import Reference, stored_reference
from ldae.demo.views import Views, load_views
from ldae.features import command
from ldae.features.encoders import Encoder, load_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine images of noise in two classes; the fourth is no image."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(9):
        path = folder / "ab"[i > 4] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(path)
    (folder / "a/3.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def make(data, tiny_model):
    """make(cls, **fields): the views of a tiny model, with the images of `data` as reference."""

    def views(cls=LDAEForPreTraining, **fields):
        model = tiny_model(cls, **fields)
        encoder = Encoder(model)
        images = ImageDataset(load_examples(str(data), "train"), encoder.image_hw)
        indices = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
        reference = Reference(images, indices, torch.zeros(0), "images")
        with torch.no_grad():
            reference.features = encoder.pool(reference.pixel_values(list(range(8))))
        return Views(encoder, model if cls is LDAEForPreTraining else None, reference)

    return views


@pytest.fixture
def image(tiny_config, images):
    return images(tiny_config(), 1)


def pixels(picture):
    """A picture as numbers in [0, 255], one for each pixel of the model's image."""
    return np.asarray(picture.resize((12, 8), Image.Resampling.NEAREST)).astype(int)


def levels(pixel_values):
    return ((pixel_values[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)


def test_denoising_is_the_models(make, image):
    views = make()
    noisy, denoised, caption = views.denoise(image, sigma=0.7)
    t = int(np.abs(views.denoiser.noise_schedule.sigma.numpy() - 0.7).argmin())
    noise = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = views.denoiser(image, noise=noise, timesteps=torch.tensor([t]))
    assert (pixels(noisy)[..., :3] == levels(outputs.noisy_pixel_values)).all()
    assert (pixels(noisy)[..., 3] == 255).all()
    assert (pixels(denoised) == levels(outputs.reconstruction)).all()
    mse = (outputs.reconstruction.clamp(-1, 1) - image).square().mean().item()
    assert f"t = {t} of 1000" in caption
    assert f"**{10 * np.log10(4 / mse):.1f} dB**" in caption


def test_more_noise_is_the_same_noise(make, image):
    views = make()
    clean, weak, strong = (np.asarray(views.denoise(image, sigma)[0]).astype(int) for sigma in (0.0, 0.1, 0.2))
    inside = (strong % 255 != 0) & (weak % 255 != 0)
    assert np.abs((strong - clean) - 2 * (weak - clean))[inside].max() <= 3  # rounding


def test_patches_that_are_not_seen_are_transparent_and_change_nothing(make, image):
    views = make(keep_ratio=0.5)
    noisy, denoised, _ = views.denoise(image, 0.5, share=0.5)
    seen = pixels(noisy)[::4, ::4, 3] == 255
    assert seen.sum() == 3
    other = image.clone()
    for row, column in np.argwhere(~seen):
        other[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.3
    assert (pixels(views.denoise(other, 0.5, share=0.5)[1]) == pixels(denoised)).all()
    assert (pixels(views.denoise(image, 0.5)[1]) != pixels(denoised)).any()
    more = pixels(views.denoise(image, 0.5, share=0.7)[0])[::4, ::4, 3] == 255
    assert more.sum() == 4
    assert more[seen].all()


def test_patches_are_hidden_in_the_blocks_of_training(make, tiny_config, images):
    views = make(image_size=(16, 24), keep_ratio=0.5, mask_block=2)
    noisy, _, _ = views.denoise(images(views.config, 1), 0.5, share=0.01)
    alpha = np.asarray(noisy.resize((6, 4), Image.Resampling.NEAREST))[..., 3] == 255
    assert alpha.sum() == 4
    assert alpha.reshape(2, 2, 3, 2).transpose(0, 2, 1, 3).reshape(6, 4).all(axis=1).sum() == 1


def test_what_a_model_cannot_do_is_not_offered(make, image):
    full = make(keep_ratio=0.5)
    assert full.sigmas == pytest.approx((0, 2**0.5), abs=1e-6)
    assert full.drops_tokens
    assert len(full.filters()) == 8
    assert not make().drops_tokens
    assert make(noise_schedule="single_sigma").sigmas is None
    assert make(tokenizer_type="pixels", latent_dim=48).filters() == []
    assert make(tokenizer_type="conv_vae").filters() == []
    assert make(tokenizer_type="conv_vae").variance_held is None
    encoder = make(LDAEModel, keep_ratio=0.5)
    assert encoder.sigmas is None
    assert not encoder.drops_tokens
    with pytest.raises(ValueError, match="no decoder"):
        encoder.denoise(image, 0.5)
    with pytest.raises(ValueError, match="keep_ratio=1"):
        make().denoise(image, 0.5, share=0.5)


@pytest.mark.parametrize("tokenizer", ["pca", "pixels", "patch_ae", "conv_vae"])
def test_every_model_denoises_and_is_coloured(make, images, tokenizer):
    fields = {"pixels": {"latent_dim": 48}, "patch_ae": {"prediction": "latent"}}.get(tokenizer, {})
    views = make(tokenizer_type=tokenizer, **fields)
    image = images(views.config, 1)
    size = views.denoise(image, 0.5)[1].size
    assert size == views.colours(image).size == (384, 256)


def test_filters_are_the_rows_of_v(make):
    views = make()
    (picture, caption), *_ = views.filters()
    row = views.tokenizer.V[0].reshape(3, 4, 4).permute(1, 2, 0).numpy()
    drawn = np.asarray(picture.resize((4, 4), Image.Resampling.NEAREST)) / 127.5 - 1
    assert np.abs(drawn - row / np.abs(row).max()).max() < 0.01
    assert caption == "1"
    spectrum = views.tokenizer.spectrum.numpy()
    assert views.variance_held == pytest.approx(spectrum[:8].sum() / spectrum.sum(), rel=1e-5)


def test_colours_are_principal_components_of_the_reference(make):
    from sklearn.decomposition import PCA

    views = make()
    values = views.reference.pixel_values(list(range(8)))
    tokens = views.encoder(values).detach()
    centred = (tokens - tokens.mean(dim=0)).flatten(0, 1).numpy()
    wanted = PCA(3).fit(centred).transform(centred)
    drawn = np.concatenate(
        [np.asarray(views.colours(x[None])).astype(float)[64::128, 64::128].reshape(6, 3) for x in values]
    )
    for drawn_column, column in zip(drawn.T, wanted.T, strict=True):
        inside = (drawn_column > 0) & (drawn_column < 255)
        assert abs(np.corrcoef(drawn_column[inside], column[inside])[0, 1]) > 0.999


def test_the_nearest_image_of_one_is_itself(make):
    views = make()
    for row in range(8):
        (picture, caption), *others = views.nearest(views.reference.pixel_values([row]), 3)
        assert (np.asarray(picture) == levels(views.reference.pixel_values([row]))).all()
        assert caption == f"1.00 {'aaaabbbb'[row]}"
        assert len(others) == 2


def test_nearness_is_the_cosine_of_features_without_their_mean(make):
    reference = make().reference
    reference.features = reference.features + 100  # by which all images would be alike
    centred = (reference.features - reference.features.mean(dim=0)).numpy()
    cosines = centred @ centred[0] / np.linalg.norm(centred, axis=1) / np.linalg.norm(centred[0])
    found = [float(caption.split()[0]) for _, caption in reference.nearest(reference.features[0], 8)]
    assert found == pytest.approx(sorted(cosines, reverse=True), abs=0.006)


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_the_images_of_ldae_features_are_searched(data, tiny_model, tmp_path, monkeypatch, format):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model, features = tmp_path / "model", tmp_path / "features"
    tiny_model().save_pretrained(model)
    arguments = ["--model", str(model), "--data", str(data), "--output_dir", str(features)]
    command.main([*arguments, "--format", format, "--shard_size", "3"])
    views = load_views(str(model), str(features))
    assert views.reference.title == f"images of {data.name}"  # and not where the folder lies
    assert views.reference.indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]  # without the one that cannot be read
    with torch.no_grad():
        wanted = views.encoder.pool(views.reference.pixel_values(list(range(8))))
    assert torch.allclose(views.reference.features, wanted, atol=1e-5)

    tiny_model(image_size=(8, 8)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"--features: .*not the model"):
        load_views(str(tmp_path / "other"), str(features))
    shard = next(features.glob(f"features-00001-*.{format}"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        load_views(str(model), str(features))
    with pytest.raises(FileNotFoundError, match=r"--features: .* holds no _features\.json"):
        load_views(str(model), str(tmp_path))


def test_features_of_images_that_have_changed_are_refused(tiny_model, tmp_path, monkeypatch, data):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    images, features = tmp_path / "images", tmp_path / "features"
    images.mkdir()
    for name in ("0.png", "1.png"):
        (images / name).write_bytes((data / "a" / name).read_bytes())
    tiny_model().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(images), "--output_dir", str(features)]
    command.main([*arguments, "--features", "patches"])
    encoder = load_encoder(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="no pooled features"):
        stored_reference(str(features), encoder)
    command.main([*arguments, "--overwrite"])
    (images / "1.png").write_bytes((data / "b/5.png").read_bytes())
    with pytest.raises(ValueError, match="have changed since"):
        stored_reference(str(features), encoder)


def test_models_are_loaded_with_what_they_have(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("ldae.demo.reference.EMBEDDED", 13)
    tiny_model(dtype="float32").to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    views = load_views(str(tmp_path / "whole"))
    assert views.denoiser.dtype == views.encoder.model.dtype == torch.float32
    captions = {views.reference.caption(row) for row in range(13)}
    assert len(captions) == 13  # one of each photograph
    tiny_model(LDAEForImageClassification).save_pretrained(tmp_path / "classifier")
    assert load_views(str(tmp_path / "classifier")).denoiser is None


def test_other_models_are_refused(tiny_model, tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **size)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="is of type 'vit', and no l-DAE"):
        load_views(str(tmp_path / "vit"))
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/config.json").write_text('{"model_type": "foo", "auto_map": {"AutoConfig": "foo.Foo"}}')
    (tmp_path / "hostile/foo.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    with pytest.raises(ValueError, match="contains custom code"):
        load_views(str(tmp_path / "hostile"))
    assert not (tmp_path / "was_run").exists()
    tiny_model(num_channels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="2 channels"):
        load_views(str(tmp_path / "two"))
    with pytest.raises(FileNotFoundError, match="--model"):
        load_views(str(tmp_path / "missing"))
