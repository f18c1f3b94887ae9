"""The Fréchet distance against scipy's square root."""

import pytest
import torch
from samplers import naive_distance, randn, seeded
from torch import nn

from ldae import LDAEModel
from ldae.features.encoders import Encoder
from ldae.generation import frechet
from ldae.generation.frechet import frechet_distance


class Means(nn.Module):
    """An encoder whose features are the first numbers of an image."""

    image_hw, width, name, device = (2, 2), 4, "means", torch.device("cpu")

    def pool(self, pixel_values):
        return pixel_values.flatten(1)


def test_frechet_distance_against_scipy():
    mix = randn(4, 4, seed=3)
    real, fake = randn(300, 4), randn(200, 4, seed=1) @ mix + 0.5
    batches = iter(fake.reshape(-1, 1, 2, 2).split(33))
    result = frechet_distance([real.reshape(-1, 1, 2, 2)], batches, Means())
    assert result["value"] == pytest.approx(naive_distance(real.double().numpy(), fake.double().numpy()), rel=1e-6)
    assert result["metric"] == "Fréchet distance on features of means"
    assert (result["num_real"], result["num_fake"], result["num_features"]) == (300, 200, 4)
    same = frechet_distance([real.reshape(-1, 1, 2, 2)], real.reshape(-1, 1, 2, 2).split(7), Means())
    assert same["value"] == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_few_images():
    real = randn(300, 1, 2, 2)
    with pytest.raises(ValueError, match="fake holds 1 readable images"):
        frechet_distance([real], [real[:1]], Means())
    with pytest.warns(UserWarning, match="fake holds 4 images, too few for the 4 dimensions"):
        frechet_distance([real], [real[:4]], Means())


@pytest.mark.filterwarnings("ignore:Matrix is singular")  # of grey images' equal channels
@pytest.mark.parametrize("channels", [1, 3])
def test_fid_sees_what_inception_takes(channels, monkeypatch):
    """Three channels of whole numbers in [0, 255]; the rest is the distance of any features."""

    class Corners(nn.Module):
        num_features = 6

        def forward(self, images):
            assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 2, 2))
            return torch.cat([images[:, :, 0, 0], images[:, :, 1, 1]], dim=1).double()

    monkeypatch.setattr(frechet, "_inception", lambda: frechet.FrechetInceptionDistance(Corners()))
    monkeypatch.setattr(frechet, "INCEPTION_DIM", 6)
    real, fake = (0.4 * randn(200, channels, 2, 2, seed=seed) for seed in (0, 1))
    result = frechet_distance([real], [fake])
    levels = [((x.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1).double() for x in (real, fake)]
    features = [torch.cat([x[:, :, 0, 0], x[:, :, 1, 1]], dim=1).numpy() for x in levels]
    assert (result["metric"], result["num_features"]) == ("FID", 6)
    assert result["value"] == pytest.approx(naive_distance(*features), rel=1e-4)


def test_fid_names_what_is_missing(monkeypatch):
    def missing(error):
        def metric(*args, **kwargs):
            raise error

        monkeypatch.setattr(frechet, "FrechetInceptionDistance", metric)

    missing(ModuleNotFoundError("torch-fidelity"))
    with pytest.raises(ImportError, match=r"pip install torch-fidelity.*--encoder"):
        frechet_distance(iter(()), iter(()))
    missing(OSError("no network"))
    with pytest.raises(OSError, match=r"no network.*--encoder"):
        frechet_distance(iter(()), iter(()))


def test_images_are_resized_to_the_encoder(tiny_model):
    encoder = Encoder(tiny_model(LDAEModel), name="tiny")
    real = 2 * torch.rand(20, 3, 16, 24, generator=seeded()) - 1
    assert frechet_distance([real], [real], encoder)["value"] == pytest.approx(0, abs=1e-4)
