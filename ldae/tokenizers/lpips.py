"""LPIPS, the perceptual distance of latent diffusion's autoencoder (paper, table 1), with weights from a file or a download."""

from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

LPIPS_BACKBONES = {"vgg": "VGG16", "alex": "AlexNet", "squeeze": "SqueezeNet 1.1"}


@cache
def lpips(
    net: Literal["vgg", "alex", "squeeze"] = "vgg",
    weights: str | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """LPIPS: two batches of images (B, 3, H, W) in [-1, 1] -> distances (B, 1, 1, 1); frozen, differentiable.

    Args:
        net: the backbone, of `LPIPS_BACKBONES`.
        weights: a file with torchvision's weights of it, .safetensors or .pth; by default torchvision's download. LPIPS's own
            weights come with torchmetrics.

    Raises:
        FileNotFoundError, ValueError: if the weights cannot be had, or are another network's.
    """
    backbone = f"torchvision's {LPIPS_BACKBONES[net]}"
    helps = (
        f"give a file of {backbone} by --tokenizer_lpips_weights, or leave LPIPS out by --tokenizer_perceptual_weight 0"
    )
    try:
        with torch.random.fork_rng(devices=[]):  # its initial weights must not move the random numbers of the run
            network = _NoTrainLpips(net=net, pnet_rand=weights is not None)
        if weights is not None:
            path = Path(weights).expanduser()
            safe = path.suffix == ".safetensors"
            state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
            # torchvision's "features.5.weight" is torchmetrics' "slice2.5.weight", or "slices.1.5.weight"
            parts = 2 if net == "squeeze" else 1
            names = {name: f"features.{name.split('.', parts)[-1]}" for name in network.net.state_dict()}
            network.net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
    except (OSError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        if weights is None or isinstance(error, OSError):
            source = f"{backbone} cannot be downloaded" if weights is None else f"there is no file {weights!r}"
            raise FileNotFoundError(f"tokenizer_lpips_weights: {source} ({error}); {helps}") from error
        raise ValueError(f"tokenizer_lpips_weights: {weights!r} is not {backbone} ({error}); {helps}") from error
    return network.to(device)
