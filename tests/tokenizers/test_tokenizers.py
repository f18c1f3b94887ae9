"""Trained tokenizers against naive formulas and PCA, and as a stage of the training script."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import train_ldae
from configuration_ldae import LDAEConfig
from ldae import LDAEForPreTraining, tokenizers
from ldae.tokenizers.patch_autoencoder import PatchAutoencoder, PatchAutoencoderConfig
from moments_ldae import PatchMoments
from tokenizers_ldae import patchify

SIZE = {"image_size": 16, "patch_size": 4, "latent_dim": 6}


def images(n=60, seed=0):
    """Smooth random images (n, 3, 16, 16) in [-1, 1] with a mean that is not 0."""
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
    """Section 4.2, one patch at a time, in float64; the VAE's as a mean over drawn z."""
    model, x = autoencoder(kl_weight=kl_weight), images(2)
    V, U, mean = (p.detach().double() for p in (model.V, model.U, model.mean))
    epsilon = torch.randn(20_000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    epsilon = torch.cat([epsilon, -epsilon])
    s2 = torch.tensor([kl_weight / (2 * (U[:, i] @ U[:, i]) + kl_weight) for i in range(6)])
    losses = []
    for patch in patchify(x, (4, 4)).double().flatten(0, 1):
        mu = V @ (patch - mean)
        z = mu + s2.sqrt() * epsilon
        divergence = sum(mu[i] ** 2 + s2[i] - 1 - torch.log(s2[i]) for i in range(6)) / 2 if kl_weight else 0
        losses.append(((patch - (z @ U.T + mean)) ** 2).sum(1).mean() + kl_weight * divergence)
    assert_close(model(x).loss.double(), sum(losses) / len(losses), rtol=1e-2 if kl_weight else 1e-5, atol=0)


def test_a_vaes_deviation_is_the_best_for_its_decoder():
    """The loss of any other s, written out, is larger."""
    model, x, weight = autoencoder(kl_weight=0.25).double(), images().double(), 0.25
    patches = patchify(x, (4, 4))
    latents = (patches - model.mean) @ model.V.T
    square = model.U.square().sum(0)

    def loss(s2):
        error = (patches - latents @ model.U.T - model.mean).square().sum(-1).mean() + (s2 * square).sum()
        return (error + weight / 2 * (latents.square() + s2 - 1 - s2.log()).sum(-1).mean()).item()

    best = weight / (2 * square + weight)
    assert model(x).loss.item() == pytest.approx(loss(best))
    for i in range(6):
        for factor in (0.9, 1.1):
            other = best.clone()
            other[i] *= factor
            assert loss(other) > loss(best)


def optimum(x, **kwargs) -> PatchAutoencoder:
    model = PatchAutoencoder(PatchAutoencoderConfig(**SIZE, **kwargs)).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=700, history_size=50, line_search_fn="strong_wolfe", tolerance_grad=1e-9,
        tolerance_change=1e-13,
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def principal_components(x):
    moments = PatchMoments(48)
    moments.update(patchify(x, (4, 4)))
    return moments.components()


def test_an_ae_at_its_optimum_spans_the_pca_subspace():
    """Eckart and Young: the best linear autoencoder projects onto the leading principal components."""
    x = images().double()
    model = optimum(x)
    _, components, variance = principal_components(x)
    assert_close(model(x).loss, variance[6:].sum(), rtol=1e-4, atol=0)
    assert_close(model.U @ model.V, components[:6].T @ components[:6], atol=2e-3, rtol=0)


def test_a_vae_at_its_optimum_has_the_principal_components_for_axes():
    """Probabilistic PCA: a component of variance v keeps (1 - w / 2v) of itself, those below w / 2 are given up."""
    x = images().double()
    _, components, variance = principal_components(x)
    weight = float(variance[3] + variance[4])  # four components are kept, with w / 2 between the fourth and the fifth
    model = optimum(x, kl_weight=weight)
    kept = 1 - weight / 2 / variance[:4]
    expected = components[:4].T @ torch.diag(kept) @ components[:4]
    assert_close(model.U @ model.V, expected, atol=2e-3, rtol=0)
    overlap = (model.V @ components.T).abs()
    strong = model.U.norm(dim=0).argsort(descending=True)
    assert model.U.norm(dim=0)[strong[4:]].max() < 1e-2
    for row in overlap[strong[:4]]:
        assert row.max() / row.norm() > 0.99  # one component alone: KL leaves no freedom to rotate


def test_latents_of_a_trained_tokenizer_have_unit_variance(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    for scaling, expected in (("component", torch.ones(6)), ("global", None)):
        config = LDAEConfig(**SIZE, tokenizer_type="patch_ae", prediction="latent", latent_scaling=scaling)
        tokenizer = config.tokenizer_class(config)
        tokenizers.load(tokenizer, tmp_path, config)
        U = tokenizer.U.clone()
        tokenizer.fit(images().split(7), config)
        square = tokenizer.encode(images()).square().mean(dim=(0, 1))
        assert_close(square.mean(), torch.tensor(1.0), rtol=1e-4, atol=0)
        if expected is not None:
            assert_close(square, expected, rtol=1e-4, atol=0)
        assert torch.equal(tokenizer.U, U)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    config = LDAEConfig(**{**SIZE, "latent_dim": 5}, tokenizer_type="patch_ae", prediction="latent")
    with pytest.raises(ValueError, match=r"has latent_dim 6, .* needs 5"):
        tokenizers.load(config.tokenizer_class(config), tmp_path, config)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tokenizers.load(config.tokenizer_class(config), tmp_path / "nowhere", config)
    config = LDAEConfig(**SIZE, tokenizer_type="patch_vae", prediction="latent")
    with pytest.raises(ValueError, match="has a KL term: False, the l-DAE with tokenizer_type='patch_vae' needs True"):
        tokenizers.load(config.tokenizer_class(config), tmp_path, config)


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
    assert trained.config.kl_weight == 1.0
    tokenizer = LDAEForPreTraining.from_pretrained(run).ldae.tokenizer
    assert torch.equal(tokenizer.V, trained.V)
    assert torch.equal(tokenizer.U, trained.U)
    again = train_ldae.main(
        [*options.split(), "--output_dir", str(tmp_path / "again"), "--tokenizer", str(tmp_path / "run-tokenizer")]
    )
    assert not (tmp_path / "again-tokenizer").exists()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, again)]
    assert weights[0] == weights[1]
    before = (tmp_path / "run-tokenizer/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"run's own options, but tokenizer_epochs was 3.0, is 4.0"):
        train_ldae.main([*options.split(), "--output_dir", str(run), "--resume", "--tokenizer_epochs", "4"])
    assert (tmp_path / "run-tokenizer/model.safetensors").read_bytes() == before
    with pytest.raises(
        ValueError, match=r"run's own options, but tokenizer was '.*run-tokenizer', is '.*again-tokenizer'"
    ):
        train_ldae.main([*options.split(), "--output_dir", str(again), "--resume"])
    assert not (tmp_path / "again-tokenizer").exists()
