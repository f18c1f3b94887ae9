"""What the tests share: no network, one thread, and tiny models in which nothing has its initial value."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
# as a user's own choice: commands would take all cores, and bf16 on some machines
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}

import pytest
import torch

from ldae import LDAEConfig, LDAEForPreTraining
from ldae.data import photos

collect_ignore = ["common"]  # upstream's tests: `bash tests/common/run.sh` collects those

torch.set_num_threads(1)
# seconds that workers of a run that was stopped are waited for, and after which dead ones are noticed; they are 5
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.5,)


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The folder of the trained model that comes with the repository, and with a source distribution only without its weights."""
    root = Path(__file__).parents[1]
    if (root / "PKG-INFO").exists():  # setuptools writes it into source distributions alone
        pytest.skip("needs a checkout: MANIFEST.in leaves weights out of a source distribution, to keep it small")
    return root / "model_cards/ldae-vit-small-tiny-imagenet64"


@pytest.fixture
def few_photos(monkeypatch):
    """The data `photos` has two crops of each photograph in place of hundreds."""
    monkeypatch.setattr(photos, "CROPS", {"train": 2, "validation": 2})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(**fields): a configuration of 6 tokens, not square; a convolutional tokenizer is tiny too."""

    def make(**fields) -> LDAEConfig:
        tiny = {
            "image_size": (8, 12), "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "decoder_num_hidden_layers": 1, "latent_dim": 8,
        }  # fmt: skip
        if fields.get("tokenizer_type") == "conv_vae":
            autoencoder = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
            tiny |= {"input_space": "latent", "prediction": "noise", "autoencoder": autoencoder}
        return LDAEConfig(**{**tiny, **fields})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """tiny_model(cls, **fields): a seeded model, random weights everywhere and a tokenizer as if fitted by PCA."""

    def make(cls=LDAEForPreTraining, **fields):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        config = tiny_config(**fields)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.2 * randn(*parameter.shape))
            tokenizer = model.tokenizer if hasattr(model, "tokenizer") else model.ldae.tokenizer
            D, d = config.patch_dim, config.latent_dim
            if config.tokenizer_type == "conv_vae":
                tokenizer.scale.copy_(torch.linspace(0.5, 2, d))
                tokenizer.spectrum.copy_(tokenizer.scale.square())
                return model
            basis = torch.eye(D) if config.tokenizer_type == "pixels" else torch.linalg.qr(randn(D, D)).Q
            V = basis[:d]
            spectrum = torch.linspace(2, 0.1, D)
            scale = {"none": torch.ones(d), "global": spectrum[:d].mean().sqrt(), "component": spectrum[:d].sqrt()}
            tokenizer.V.copy_(V)
            tokenizer.U.copy_(randn(D, d) if config.tokenizer_type in ("patch_ae", "patch_vae") else V.T)
            tokenizer.mean.copy_(0.3 * randn(D) * config.subtract_mean)
            tokenizer.scale.copy_(scale[config.latent_scaling])
            tokenizer.spectrum.copy_(spectrum)
            if config.whitens_residual:
                tokenizer.residual.copy_(basis[d:] / spectrum[d:, None].sqrt())
        return model

    return make


@pytest.fixture(scope="session")
def images():
    """images(config, count=2): random pixel values (count, C, H, W) in [-1, 1]."""

    def make(config, count=2, seed=1):
        shape = (count, config.num_channels, *config.image_hw)
        return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1

    return make


@pytest.fixture
def recorded(monkeypatch):
    """recorded(module, name): from now on, a list of the instances that the module makes of one of its classes."""

    def record(module, name: str) -> list:
        made, cls = [], getattr(module, name)

        class Recorded(cls):
            def __init__(self, *args):
                super().__init__(*args)
                made.append(self)

        monkeypatch.setattr(module, name, Recorded)
        return made

    return record


@pytest.fixture(scope="session")
def state():
    """state(module): all its parameters and buffers as one vector."""
    return lambda module: torch.cat([value.flatten().float() for value in module.state_dict().values()])
