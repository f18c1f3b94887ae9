"""PCA: against scikit-learn and NumPy, for any way the images arrive."""

import io

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA

from configuration_ldae import LDAEConfig
from ldae.data.images import ImageDataset
from ldae.tokenizers.fitting import explained_variance, variance_held
from moments_ldae import PatchMoments
from tokenizers_ldae import PatchTokenizer, patchify


def images(n: int = 40, channels: int = 3, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    """Smooth random images in [-1, 1], of unlike channels and a mean that is not 0."""
    x = torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed)).cumsum(2).cumsum(3)
    return torch.tanh(0.3 * x * torch.arange(1, channels + 1)[:, None, None] / channels + 0.2)


def config(**kwargs) -> LDAEConfig:
    return LDAEConfig(**{"image_size": 16, "patch_size": 4, "latent_dim": 8, "hidden_size": 8, "num_attention_heads": 1,
                         **kwargs})  # fmt: skip


def fit(cfg: LDAEConfig, *batches: torch.Tensor) -> PatchTokenizer:
    return cfg.tokenizer_class(cfg).fit(batches, cfg)


def through(tokenizer: PatchTokenizer, pixel_values: torch.Tensor) -> torch.Tensor:
    """Images without what the latent space does not hold."""
    return tokenizer.decode(tokenizer.encode(pixel_values), pixel_values.shape[-2:])


def png(image: torch.Tensor) -> bytes:
    """An image (3, H, W) of whole numbers in [0, 255] as a file."""
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).byte().numpy()).save(stream, "PNG")
    return stream.getvalue()


def moments_of(patches: torch.Tensor) -> PatchMoments:
    moments = PatchMoments(patches.shape[-1])
    moments.update(patches)
    return moments


@settings(max_examples=15, deadline=None)
@given(channels=st.integers(1, 5), patch=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 99))
def test_components_are_those_of_scikit_learn(channels, patch, seed):
    x = images(20, channels, (4 * patch[0], 3 * patch[1]), seed)
    patches = patchify(x, patch).flatten(0, 1).double()
    mean, components, variance = (a.numpy() for a in moments_of(patches).components())
    reference = PCA(svd_solver="full").fit(patches.numpy())
    n = len(patches)
    np.testing.assert_allclose(mean, reference.mean_, atol=1e-12)
    np.testing.assert_allclose(variance, reference.explained_variance_ * (n - 1) / n, rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(components @ components.T, np.eye(len(components)), atol=1e-10)
    d = int(np.argmax(variance[:-1] / variance[1:].clip(1e-9))) + 1 if len(variance) > 1 else 1  # cut at the widest gap
    ours, theirs = components[:d], reference.components_[:d]
    np.testing.assert_allclose(ours.T @ ours, theirs.T @ theirs, atol=1e-5)
    assert (components[np.arange(len(components)), np.abs(components).argmax(1)] > 0).all()  # signs are fixed


@pytest.mark.parametrize(("contrast", "brightness"), [(1, 0), (0.01, 0.98)])
def test_float32_gives_the_smallest_variances_too(contrast, brightness):
    x = contrast * images(100, 3, (64, 64)) + brightness
    patches = patchify(x, (8, 8)).flatten(0, 1)  # (6400, 192): several chunks and blocks
    mean, components, variance = (a.numpy() for a in moments_of(patches).components())
    centred = patches.double().numpy()
    centred -= centred.mean(0)
    exact = np.linalg.eigvalsh(centred.T @ centred / len(patches))[::-1]
    assert exact[-1] < 2e-3 * exact.mean()
    np.testing.assert_allclose(variance, exact, rtol=1e-3)
    np.testing.assert_allclose(np.square(centred @ components.T).mean(0), exact, rtol=1e-3)
    np.testing.assert_allclose(mean, patches.double().mean(0), atol=1e-7)


def test_a_batch_of_any_length_is_added_up_in_float64():
    patches = torch.randn(1 << 18, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.01, 12)
    patches = patches.cumsum(1)  # so that the small variances lie along no axis
    variance = moments_of(patches).components()[2]
    exact = np.linalg.eigvalsh(np.cov(patches.double().numpy(), rowvar=False, bias=True))[::-1]
    np.testing.assert_allclose(variance, exact, rtol=1e-2)


def test_autocast_does_not_reach_the_fit():
    plain = fit(config(), images())
    with torch.autocast("cpu", torch.bfloat16):
        cast = fit(config(), images())
    for name, buffer in plain.named_buffers():
        assert torch.equal(cast.get_buffer(name), buffer)


def test_without_mean_it_is_the_svd_of_the_uncentred_patches():
    patches = patchify(images(), (4, 4)).flatten(0, 1).double()
    mean, components, variance = moments_of(patches).components(subtract_mean=False)
    _, singular, rows = np.linalg.svd(patches.numpy(), full_matrices=False)
    assert not mean.any()
    np.testing.assert_allclose(variance, singular**2 / len(patches), rtol=1e-8)
    np.testing.assert_allclose(np.abs((components.numpy()[:8] * rows[:8]).sum(1)), 1, atol=1e-8)


def same_fit(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    """Of components with nearly the same variance the directions are arbitrary, but not what all of them make together."""
    for name, buffer in one.items():
        if name == "residual":
            ours, theirs = (each[name].T @ each[name] for each in (one, other))
            assert (ours - theirs).norm() < 1e-3 * ours.norm()
        else:
            torch.testing.assert_close(buffer, other[name], atol=1e-5, rtol=1e-5)


def test_batches_and_their_order_do_not_matter():
    x = images()
    whole = fit(config(), x)
    for batches in (x.split(7), x.flip(0).split(1)):
        same_fit(fit(config(), *batches).state_dict(), whole.state_dict())


def _worker(rank: int, world: int, folder: str):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    share = images()[:9] if rank == 0 else images()[9:]
    torch.save(fit(config(), share).state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    mp.start_processes(_worker, (2, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    same_fit(first, fit(config(), images()).state_dict())


@pytest.mark.parametrize("kind", ["pca", "pixels"])
def test_scalings_give_the_latents_their_variances(kind):
    x = images()
    dim = 8 if kind == "pca" else 48

    def latents(scaling, **kwargs):
        cfg = config(tokenizer_type=kind, latent_dim=dim, latent_scaling=scaling, **kwargs)
        return fit(cfg, x).encode(x).flatten(0, 1).double()

    plain = latents("none")
    torch.testing.assert_close(latents("component").var(0, correction=0), torch.ones(dim).double(), atol=1e-4, rtol=0)
    factor = plain.var(0, correction=0).mean().sqrt()  # one for all
    torch.testing.assert_close(latents("global"), plain / factor, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain.var(0), torch.ones(dim).double(), atol=0.05)
    torch.testing.assert_close(plain.mean(0), torch.zeros(dim).double(), atol=1e-5, rtol=0)
    second_moment = latents("component", subtract_mean=False).square().mean(0)
    torch.testing.assert_close(second_moment, torch.ones(dim).double(), atol=1e-4, rtol=0)


def test_unscaled_pixels_about_zero_are_the_identity():
    x = images()
    tokenizer = fit(
        config(tokenizer_type="pixels", latent_dim=48, latent_scaling="none", subtract_mean=False), x
    )  # fmt: skip
    assert torch.equal(tokenizer.encode(x), patchify(x, (4, 4)))
    assert explained_variance(tokenizer) == pytest.approx(1)


@settings(max_examples=10, deadline=None)
@given(
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 5),
    scaling=st.sampled_from(["none", "global", "component"]),
    subtract_mean=st.booleans(),
    data=st.data(),
)
def test_decode_inverts_encode_on_the_latent_space(patch, channels, scaling, subtract_mean, data):
    dim = channels * patch[0] * patch[1]
    latent_dim = data.draw(st.integers(1, dim))
    size = (4 * patch[0], 3 * patch[1])
    cfg = config(image_size=size, patch_size=patch, num_channels=channels, latent_dim=latent_dim,
                 latent_scaling=scaling, subtract_mean=subtract_mean)  # fmt: skip
    x = images(10, channels, size)
    tokenizer = fit(cfg, x)
    projected = through(tokenizer, x)
    torch.testing.assert_close(through(tokenizer, projected), projected, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokenizer.V @ tokenizer.U, torch.eye(latent_dim), atol=1e-5, rtol=0)
    if latent_dim == dim:
        torch.testing.assert_close(projected, x, atol=1e-4, rtol=0)
    if subtract_mean:
        variance = patchify(x, patch).flatten(0, 1).double().var(0, correction=0).sum()
        lost = (x - projected).double().square().sum() / (x.numel() / dim)
        assert explained_variance(tokenizer) == pytest.approx(float(1 - lost / variance), abs=1e-5)


def test_variance_held_is_that_of_the_components():
    x = (images(30, 3, (16, 16)).clamp(-1, 1) * 127.5 + 127.5).round()
    rows = {"image": [{"bytes": png(image), "path": None} for image in x]}
    examples = datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(decode=False)))
    for kind, latent_dim in (("pca", 6), ("pixels", 48)):
        cfg = config(tokenizer_type=kind, image_size=16, patch_size=4, latent_dim=latent_dim)
        tokenizer = fit(cfg, x / 127.5 - 1)
        held = variance_held(tokenizer, ImageDataset(examples, (16, 16)), cfg.patch_hw)
        assert held == pytest.approx(explained_variance(tokenizer) if kind == "pca" else 1, abs=1e-6)
    tokenizer.U.zero_()
    tokenizer.mean.copy_(patchify(x / 127.5 - 1, (4, 4)).mean((0, 1)))
    assert variance_held(tokenizer, ImageDataset(examples, (16, 16)), cfg.patch_hw) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["pca", "pixels"])
@pytest.mark.parametrize("value", [0.1, -0.7, 1.0])
def test_constant_images_have_finite_latents(kind, value):
    x = torch.full((3, 3, 16, 16), value)
    tokenizer = fit(config(tokenizer_type=kind, latent_dim=8 if kind == "pca" else 48), x)
    assert tokenizer.encode(x).isfinite().all()
    torch.testing.assert_close(through(tokenizer, x), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_missing_or_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="at least one image"):
        fit(config())
    x = images()
    x[3, 1, 5, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        fit(config(), x)
