"""Models that generate."""

import pytest
from samplers import LATENT

from ldae import LDAEForPreTraining


@pytest.fixture
def make(tiny_model):
    """make(**fields): a model of noisy latents."""

    def model(**fields):
        return tiny_model(LDAEForPreTraining, **{**LATENT, **fields})

    return model
