"""What the tests of export share: an l-DAE that computes in float64, the trained one, and how close is exact."""

import pytest
import torch
from torch.testing import assert_close

from ldae import LDAEModel


@pytest.fixture(scope="session")
def in_float64():
    """in_float64(model): the model with its tokenizer's maps written out in float64, which it computes in float32."""

    def make(model):
        model = model.double()
        encoder = model.base_model
        (p, q), tokenizer = encoder.config.patch_hw, encoder.tokenizer
        V, U, mean, scale = (getattr(tokenizer, name).double() for name in ("V", "U", "mean", "scale"))

        def encode(images):
            patches = torch.nn.functional.unfold(images, (p, q), stride=(p, q)).transpose(1, 2)
            return torch.einsum("bnD,dD->bnd", patches - mean, V) / scale

        tokenizer.encode = encode
        tokenizer.decode_patches = lambda latents: torch.einsum("bnd,Dd->bnD", latents * scale, U) + mean
        return model

    return make


@pytest.fixture(scope="session")
def exactly():
    """exactly(found, expected): equal to the rounding of float64."""
    return lambda found, expected: assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.fixture
def trained(shipped_model):
    """The trained encoder of the repository, in float32."""
    return LDAEModel.from_pretrained(shipped_model, dtype=torch.float32).eval()
