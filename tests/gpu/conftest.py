"""What the tests on a GPU share. LDAE_TEST_DEVICE=cpu runs them on the CPU, where their code can be tried without a GPU."""

import os

import pytest
import torch

DEVICE = os.environ.get("LDAE_TEST_DEVICE", "cuda")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, read when CUDA starts
if DEVICE == "cpu":
    os.environ["ACCELERATE_USE_CPU"] = "true"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the tests run on."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.fail("there is no GPU; LDAE_TEST_DEVICE=cpu tries the tests' code on the CPU")
    return torch.device(DEVICE)


@pytest.fixture
def deterministic():
    """Inside the test, equal inputs give equal bits; where PyTorch has no deterministic kernel, it warns."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
