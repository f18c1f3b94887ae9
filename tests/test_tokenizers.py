"""Trained tokenizers against naive formulas and PCA, and as a stage of the training script."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import train_ldae
from configuration_ldae import LDAEConfig
from ldae import LDAEForPreTraining
from ldae.pca import PatchMoments, fit_tokenizer
from ldae.tokenizers import PatchAutoencoder, PatchAutoencoderConfig, load_into
from modeling_ldae import PatchTokenizer, patchify

SIZE = {"image_size": 16, "patch_size": 4, "latent_dim": 6}


def pictures(n=60, seed=0):
    """Smooth random pictures (n, 3, 16, 16) in [-1, 1] with a mean that is not 0."""
    x = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).cumsum(2).cumsum(3)
    return torch.tanh(0.3 * x + 0.2)


def autoencoder(**kwargs) -> PatchAutoencoder:
    model = PatchAutoencoder(PatchAutoencoderConfig(**SIZE, **kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("kl_weight", [0.0, 0.25])
def test_the_loss_is_the_papers(kl_weight):
    """Section 4.2, one patch and one dimension at a time, in float64."""
    model, x = autoencoder(kl_weight=kl_weight), pictures(2)
    noise = model.sample_noise(2)["noise"]
    V, U, mean, log_variance = (p.detach().double() for p in (model.V, model.U, model.mean, model.log_variance))
    losses = []
    for patches, epsilon in zip(patchify(x, (4, 4)).double(), noise.double(), strict=True):
        for patch, e in zip(patches, epsilon, strict=True):
            mu = V @ (patch - mean)
            z, divergence = mu.clone(), 0
            for i in range(6) if kl_weight else ():
                s2 = torch.exp(log_variance[i])
                z[i] = mu[i] + torch.sqrt(s2) * e[i]
                divergence += (mu[i] ** 2 + s2 - 1 - torch.log(s2)) / 2
            losses.append(sum((patch - (U @ z + mean)) ** 2) + kl_weight * divergence)
    assert_close(model(x, noise=noise).loss.double(), sum(losses) / len(losses), rtol=1e-5, atol=0)


def test_an_ae_at_its_optimum_spans_the_pca_subspace():
    """Eckart and Young: the best linear autoencoder projects onto the leading principal components."""
    x = pictures()
    model = PatchAutoencoder(PatchAutoencoderConfig(**SIZE))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2000, history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    moments = PatchMoments(48)
    moments.update(patchify(x, (4, 4)))
    _, components, variance = moments.components()
    assert_close(model(x).loss.double(), variance[6:].sum(), rtol=1e-3, atol=1e-5)
    projection = components[:6].T @ components[:6]
    assert_close((model.U @ model.V).double(), projection, atol=0.02, rtol=0)


def test_latents_of_a_trained_tokenizer_have_unit_variance(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    for scaling, expected in (("component", torch.ones(6)), ("global", None)):
        config = LDAEConfig(**SIZE, tokenizer_type="patch_ae", prediction="latent", latent_scaling=scaling)
        tokenizer = PatchTokenizer(config)
        load_into(tokenizer, tmp_path, config)
        U = tokenizer.U.clone()
        fit_tokenizer(tokenizer, config, pictures().split(7))
        square = tokenizer.encode(pictures()).square().mean(dim=(0, 1))
        assert_close(square.mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
        if expected is not None:
            assert_close(square, expected, rtol=1e-4, atol=0)
        assert torch.equal(tokenizer.U, U)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    config = LDAEConfig(**{**SIZE, "latent_dim": 5}, tokenizer_type="patch_ae", prediction="latent")
    with pytest.raises(ValueError, match="latent_dim 6, the l-DAE needs 5"):
        load_into(PatchTokenizer(config), tmp_path, config)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_into(PatchTokenizer(config), tmp_path / "nowhere", config)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / "data" / f"{i:02d}.png")
    return tmp_path / "data"


def test_the_script_trains_a_tokenizer_first_and_reuses_it(data, tmp_path):
    options = f"--data {data} --image_size 16 --patch_size 4 --hidden_size 16 --num_hidden_layers 1 --latent_dim 4 "
    options += "--num_attention_heads 2 --per_device_batch_size 4 --max_steps 2 --report_to none --prediction noise "
    options += "--input_space latent --noise_schedule linear_gamma2 --tokenizer_type patch_vae --tokenizer_epochs 3"
    run = train_ldae.main([*options.split(), "--output_dir", str(tmp_path / "run")])
    trained = PatchAutoencoder.from_pretrained(tmp_path / "run-tokenizer")
    assert trained.config.kl_weight == 1e-6
    tokenizer = LDAEForPreTraining.from_pretrained(run).ldae.tokenizer
    assert torch.equal(tokenizer.V, trained.V)
    assert torch.equal(tokenizer.U, trained.U)
    again = train_ldae.main(
        [*options.split(), "--output_dir", str(tmp_path / "again"), "--tokenizer", str(tmp_path / "run-tokenizer")]
    )
    assert not (tmp_path / "again-tokenizer").exists()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, again)]
    assert weights[0] == weights[1]
