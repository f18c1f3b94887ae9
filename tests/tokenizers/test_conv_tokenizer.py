"""The convolutional tokenizer against diffusers called by hand, and its training's losses against naive formulas."""

import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import train_ldae
from experiments.ablation import rungs
from ldae import LDAEConfig, LDAEForPreTraining, LDAEModel, tokenizers
from ldae.features.encoders import Encoder
from ldae.optimization import parameter_groups
from ldae.options import parse_arguments
from ldae.tokenizers import conv_autoencoder
from ldae.tokenizers.conv_autoencoder import (
    ConvAutoencoder,
    ConvAutoencoderConfig,
    PatchDiscriminator,
    adaptive_weight,
)
from ldae.tokenizers.lpips import lpips
from tokenizers_ldae import ConvVAETokenizer

CONV = {"tokenizer_type": "conv_vae"}
TINY = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of torchvision's VGG16 with random weights; its classifier, which LPIPS has no use for, is left out."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    torch.manual_seed(0)
    features = torchvision.models.vgg16(weights=None).features
    save_file({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return str(path)


def autoencoder(**fields) -> ConvAutoencoder:
    kl = {**TINY, "latent_channels": 2}
    kl |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return ConvAutoencoder(ConvAutoencoderConfig(image_size=32, autoencoder=kl, **fields))


def batch(count=2):
    return 2 * torch.rand(count, 3, 32, 32) - 1


# ------------------------------------------------------------------------------------------------------- in an l-DAE


def test_it_is_diffusers(tiny_model, images):
    tokenizer = tiny_model(LDAEModel, **CONV).tokenizer
    x, kl = images(tiny_model(LDAEModel, **CONV).config), tokenizer.autoencoder
    latents = tokenizer.encode(x)
    assert latents.shape == (2, 6, 8)
    mode = kl.encode(x).latent_dist.mode()  # (2, 2, 4, 6)
    by_hand = [mode[:, :, i : i + 2, j : j + 2].flatten(1) for i in (0, 2) for j in (0, 2, 4)]
    assert_close(latents * tokenizer.scale, torch.stack(by_hand, dim=1))
    assert_close(tokenizer.decode(latents, (8, 12)), kl.decode(mode).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["component", "global", "none"])
def test_latents_have_unit_variance(tiny_config, images, scaling):
    config = tiny_config(**CONV, latent_scaling=scaling)
    tokenizer, x = ConvVAETokenizer(config), images(config, 40)
    assert not tokenizer.spectrum.any()  # as long as it is not fitted
    tokenizer.fit(x.split(7), config)
    variance = tokenizer.encode(x).var(dim=(0, 1), unbiased=False)
    if scaling == "component":
        assert_close(variance, torch.ones(8), rtol=1e-3, atol=0)
    elif scaling == "global":
        assert_close(variance.mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    else:
        assert_close(variance, tokenizer.spectrum, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_whole(tiny_model, tmp_path, dtype):
    """It holds the autoencoder, in float32 whatever the rest is in, and none of it is ever trained."""
    model = tiny_model(**CONV)
    model.save_pretrained(tmp_path)
    loaded = LDAEForPreTraining.from_pretrained(tmp_path, dtype=dtype).train()
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor if "tokenizer" in name else tensor.to(dtype)), name
    assert not loaded.ldae.tokenizer.autoencoder.training
    assert not list(loaded.ldae.tokenizer.parameters())
    trained = {p for group in parameter_groups(loaded, 0.0) for p in group["params"]}
    assert trained == set(loaded.parameters())
    encoder = Encoder(model)
    floor = encoder.untrained().model.tokenizer.state_dict()
    assert all(torch.equal(floor[name], tensor) for name, tensor in encoder.model.tokenizer.state_dict().items())
    assert encoder.blocks == list(model.ldae.layers)


def test_training_decodes_nothing(tiny_model, images):
    model = tiny_model(**CONV)
    x = images(model.config)
    assert model(x).reconstruction.shape == x.shape
    model.train().ldae.tokenizer.decode = None
    output = model(x)
    output.loss.backward()
    assert output.reconstruction is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 2}, r"patch_size must be 4, twice the autoencoder's stride of 2 .*\[8, 8\]\), got 2"),
        ({"latent_dim": 6}, "latent_dim must be 4 x the autoencoder's latent_channels .* got 6 and 1"),
        ({"input_space": "image"}, "needs input_space='latent'"),
        ({"prediction": "image"}, "prediction='noise' or 'latent'"),
        ({"autoencoder": {**TINY, "in_channels": 1}}, "in_channels must be num_channels=3, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_config, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**{**CONV, **fields})


@pytest.mark.parametrize("layout", ["ours", "diffusers", "pipeline"])
def test_trained_autoencoders_are_taken_as_they_are(tiny_config, tmp_path, layout):
    trained = autoencoder(adversarial_weight=0.5)
    place = tmp_path / "vae" if layout == "pipeline" else tmp_path
    (trained if layout == "ours" else trained.autoencoder).save_pretrained(place)
    config = tokenizers.configure(tiny_config(**CONV, image_size=32), str(tmp_path))
    tokenizer = ConvVAETokenizer(config)
    tokenizers.load(tokenizer, str(tmp_path), config)
    x = batch()
    trained.eval()
    assert_close(tokenizer.encode(x).sum(), trained.autoencoder.encode(x).latent_dist.mean.sum(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="does not fit the l-DAE: latent_dim must be"):
        tokenizers.configure(tiny_config(**CONV, latent_dim=12), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizers.configure(tiny_config(**CONV), str(tmp_path / "nowhere"))
    (place / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="is a VQModel"):
        tokenizers.configure(tiny_config(**CONV), str(tmp_path))


# --------------------------------------------------------------------------------------------------------- its training


def test_the_loss_is_latent_diffusions(vgg):
    """Sums over an image, averaged over images, in all divided by the numbers of an image."""
    model = autoencoder(kl_weight=0.25, perceptual_weight=0.5, lpips_weights=vgg).eval()
    x, noise = batch(), model.sample_noise(2)["noise"]
    assert noise.shape == (2, 2, 16, 16)
    mean, log_variance = model.autoencoder.quant_conv(model.autoencoder.encoder(x)).chunk(2, dim=1)
    y = model.autoencoder.decode(mean + torch.exp(log_variance / 2) * noise).sample
    total = 0
    for i in range(2):
        kl = 0.5 * (mean[i] ** 2 + log_variance[i].exp() - 1 - log_variance[i]).sum()
        distance = lpips(weights=vgg)(x[i : i + 1], y[i : i + 1]).squeeze()
        total += ((x[i] - y[i]) ** 2).sum() + 0.5 * 3 * 32 * 32 * distance + 0.25 * kl
    assert_close(model(x, noise=noise).loss, total / 2 / (3 * 32 * 32), rtol=1e-4, atol=0)


def test_the_adversarial_loss_is_vqgans():
    model = autoencoder(kl_weight=0.0, adversarial_weight=0.5, discriminator_start=1, discriminator_width=8).train()
    assert model.discriminator[0].out_channels == 8
    x, noise = batch(), model.sample_noise(2)["noise"]
    nothing, something = (model(x, noise=noise) for _ in range(2))
    y, last = something.reconstruction, model.autoencoder.decoder.conv_out.weight
    assert model.forwards == 2
    error = (x - y).square().sum() / 2
    assert_close(nothing.loss, error / x[0].numel())
    fake, real = model.discriminator(y), model.discriminator(x)
    generator = -fake.mean()
    gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (error, generator)]
    weight = gradients[0].square().sum().sqrt() / (gradients[1].square().sum().sqrt() + 1e-4)
    hinge = 0.5 * (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean())
    assert 0 < weight < 1e4
    assert_close(adaptive_weight(error, generator, last), weight, rtol=1e-4, atol=0)
    expected = (error + 0.5 * weight * generator) / x[0].numel() + hinge
    assert_close(something.loss, expected, rtol=1e-4, atol=0)


def test_no_gradient_reaches_the_other_player():
    model = autoencoder(adversarial_weight=0.5).train()
    x = batch()
    adversarial, discriminating = model.players(x, model(x).reconstruction)

    def reached(loss):
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        return {
            name.split(".")[0] for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None
        }

    assert reached(adversarial) == {"autoencoder"}
    assert reached(discriminating) == {"discriminator"}


def test_before_its_start_every_parameter_has_a_gradient():
    model = autoencoder(adversarial_weight=0.5, discriminator_start=9).train()
    model(batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in model.discriminator.parameters())


def test_an_autoencoder_reloads_with_its_count(tmp_path):
    model = autoencoder(adversarial_weight=0.5).train()
    model(batch())
    model.save_pretrained(tmp_path)
    state = ConvAutoencoder.from_pretrained(tmp_path).state_dict()
    assert state["forwards"] == 1
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_discriminator_is_the_70_x_70_patch_gan():
    convolutions = [layer for layer in PatchDiscriminator(3) if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
    field = 1
    for layer in reversed(convolutions):
        field = (field - 1) * layer.stride[0] + layer.kernel_size[0]
    assert field == 70
    norms = [layer for layer in PatchDiscriminator(3) if isinstance(layer, torch.nn.BatchNorm2d)]
    assert [layer.num_features for layer in norms] == [128, 256, 512]  # none on the first layer, as in pix2pix


def test_lpips_takes_a_file_of_vgg16(vgg, tmp_path):
    x, y = batch(), batch().requires_grad_()
    distance = lpips(weights=vgg)(x, y)
    distance.mean().backward()
    assert y.grad.any()
    assert not any(p.requires_grad for p in lpips(weights=vgg).parameters())
    # the layers by hand: relu1_2 to relu5_3 of the file's VGG16, unit length, and torchmetrics' own linear weights
    features = torchvision.models.vgg16(weights=None).features
    features.load_state_dict({n.removeprefix("features."): t for n, t in load_file(vgg).items()})
    shift, scale = (torch.tensor(v)[:, None, None] for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    a, b, expected = (x - shift) / scale, (y - shift) / scale, 0
    linear = {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}
    for i, layer in enumerate(features[:30]):
        a, b = layer(a), layer(b)
        if i in linear:
            units = [f / torch.sqrt(1e-8 + f.square().sum(1, keepdim=True)) for f in (a, b)]
            weight = lpips(weights=vgg).lins[linear[i]].model[-1].weight  # (1, channels, 1, 1)
            expected = expected + ((units[0] - units[1]).square() * weight).sum(1).mean((1, 2))
    assert_close(distance.flatten(), expected, rtol=1e-4, atol=1e-6)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is not torchvision's VGG16.*features\.0\.weight"):
        lpips(weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"there is no file '/nowhere\.pth'"):
        lpips(weights="/nowhere.pth")
    for name in ("torn.safetensors", "torn.pth"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(ValueError, match=r"torn\..* is not torchvision's VGG16"):
            lpips(weights=str(tmp_path / name))


def test_images_too_small_for_lpips_are_refused_before_training(vgg):
    options = "--tokenizer_type conv_vae --image_size 8 --patch_size 4 --latent_dim 8 --prediction latent --input_space latent "
    options += f"--tokenizer_perceptual_weight 1 --tokenizer_lpips_weights {vgg}"
    model, _, train = parse_arguments(["--data", "photos", *options.split(), "--autoencoder", json.dumps(TINY)])
    with pytest.raises(ValueError, match="image_size 8 are too small for VGG16"):
        conv_autoencoder.build(model.config(), train)


@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1")])
def test_lpips_takes_other_backbones(net, name, vgg, tmp_path):
    """Its first features by hand; a file of VGG16 is refused."""
    torch.manual_seed(1)
    features = getattr(torchvision.models, name)(weights=None).features
    save_file({f"features.{n}": t for n, t in features.state_dict().items()}, tmp_path / "net.safetensors")
    network, x = lpips(net, str(tmp_path / "net.safetensors")), batch()
    assert_close(network.net(x)[1], features[:5](x))
    assert (network(x, batch() + 0.1) > 0).all()
    with pytest.raises(ValueError, match=r"is not torchvision's (AlexNet|SqueezeNet 1.1) .*--tokenizer_lpips_weights"):
        lpips(net, vgg)


def test_lpips_without_its_weights_says_what_helps(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models.vgg, "VGG", offline)
    lpips.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"--tokenizer_lpips_weights.*--tokenizer_perceptual_weight 0"):
        lpips()


# ---------------------------------------------------------------------------------------------------- through the script


@pytest.fixture
def data(tmp_path):
    """Images of three classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "data" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / f"data/{'abc'[i % 3]}/{i:02d}.png")
    return tmp_path / "data"


def test_the_first_rung_end_to_end(data, vgg, tmp_path):
    """A class-conditional DiT on latents of a VAE trained with LPIPS and a GAN; then its tokenizer alone, and its reuse."""
    fixed = f"--data {data} --image_size 32 --patch_size 4 --hidden_size 16 --num_hidden_layers 1 --latent_dim 8 "
    fixed += "--num_attention_heads 2 --per_device_batch_size 4 --max_steps 2 --report_to none --no_probe "
    fixed += f"--tokenizer_epochs 1 --tokenizer_lpips_weights {vgg} --tokenizer_discriminator_start 1"
    options = [*fixed.split(), "--autoencoder", json.dumps(TINY)]
    options += rungs.as_arguments(rungs.options(rungs.RUNGS["dit"], LDAEConfig(patch_size=4)))
    run = train_ldae.main([*options, "--output_dir", str(tmp_path / "run")])
    trained = ConvAutoencoder.from_pretrained(tmp_path / "run-tokenizer")
    assert (trained.config.perceptual_weight, trained.config.adversarial_weight, trained.forwards) == (1.0, 0.5, 3)
    model = LDAEForPreTraining.from_pretrained(run)
    assert (model.config.num_classes, model.config.class_dropout) == (3, 0.1)
    state = model.ldae.tokenizer.autoencoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.autoencoder.state_dict().items())
    assert model.ldae.tokenizer.spectrum.all()
    alone = train_ldae.main([*options, "--output_dir", str(tmp_path / "alone"), "--tokenizer_only"])
    assert (alone / "model.safetensors").read_bytes() == (tmp_path / "run-tokenizer/model.safetensors").read_bytes()
    again = train_ldae.main([*options, "--output_dir", str(tmp_path / "again"), "--tokenizer", str(alone)])
    assert (again / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="tokenizer_only needs"):
        train_ldae.main([*options, "--output_dir", str(tmp_path / "no"), "--tokenizer_only", "--tokenizer", str(alone)])
