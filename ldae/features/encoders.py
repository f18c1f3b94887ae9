"""One surface for any vision encoder: l-DAE, transformers' models and, through transformers' wrapper, timm's."""

import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel

from configuration_ldae import pair
from ldae.loading import load_model
from ldae.mistakes import reading
from ldae.retries import retried

INCIDENTAL = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")  # of a configuration


class Encoder(nn.Module):
    """An encoder of images (B, C, H, W) in [-1, 1] to patch tokens (B, N, E), without class and register tokens.

    The representation of an image is the mean of its tokens, as in the paper (section 4.1: average pooling, no class
    token). A model with a head is taken without it. An l-DAE is told its fixed t. A ViTMAE sees all patches, in their order.

    Args:
        model: a vision model of transformers, l-DAE and timm's wrapped models (`TimmWrapperModel`) among them.
        image_hw: height and width of the images it takes, in pixels; by default what the configuration says, or 224.
        num_channels: channels of the images; by default what the configuration says, or 3.
        mean, std: of each channel of images in [0, 1], as the model's image processor has them; None: the model takes images
            in [-1, 1].
        name: what results call the encoder; by default the model's own name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_hw: tuple[int, int] | None = None,
        num_channels: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        name: str | None = None,
    ):
        super().__init__()
        base = model.base_model  # `.ldae`, `.vit`, … of a model with a head, or the model itself
        self.model = base if isinstance(base, PreTrainedModel) else model  # timm's wrapper calls timm's model its base
        config = self.model.config
        self.image_hw = pair(image_hw or getattr(config, "image_size", None) or 224)
        configured: int = getattr(config, "num_channels", 3)
        self.num_channels = num_channels or configured
        self.name = name or config.name_or_path or type(model).__name__
        self.mean, self.std = mean, std

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model, without a head."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @cached_property
    def token_shape(self) -> tuple[int, int]:
        """(N, E): the number of an image's patch tokens and their width, found on a blank image."""
        blank = torch.zeros(1, self.num_channels, *self.image_hw, device=self.device)
        with torch.no_grad(), evaluating(self):
            return tuple(self(blank).shape[1:])

    @property
    def width(self) -> int:
        """E, the numbers in the representation of an image."""
        return self.token_shape[1]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes patch tokens (B, N, E) of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: if the model has no `last_hidden_state`, or gives tokens without naming its `patch_size`.
        """
        pixel_values = self._standardise(pixel_values)
        if self.config.model_type == "ldae":
            return self.model(pixel_values).last_hidden_state
        pixel_values = pixel_values.to(self.model.dtype)
        if self.config.model_type == "vit_mae":
            with _nothing_masked(self.model, pixel_values) as noise:
                hidden = self.model(pixel_values, noise=noise).last_hidden_state
        else:
            hidden = getattr(self.model(pixel_values), "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"{type(self.model).__name__} gives no last_hidden_state: it is no encoder of images alone"
            )
        return self._patch_tokens(hidden, pixel_values.shape[-2:])

    def pool(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes the representation (B, E), the mean of the patch tokens."""
        return self(pixel_values).mean(dim=1)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in their order: the longest list of modules of one class, which in a hierarchy is its longest stage."""
        if self.config.model_type == "ldae":  # a convolutional tokenizer has lists of its own
            return list(self.model.layers)
        lists = [
            list(module)
            for module in self.model.modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in module}) == 1
        ]
        return max(lists, key=len, default=[])

    def depths(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Computes the patch tokens (B, N, E) after each block, without the final LayerNorm, in one pass."""
        outputs: list[torch.Tensor] = []

        def keep(module, arguments, output):
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            self(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
        return [self._patch_tokens(output, pixel_values.shape[-2:]) for output in outputs]

    def digest(self) -> str:
        """A digest of what the encoder computes: its class, configuration, input format and every weight and buffer."""
        config = {key: value for key, value in self.config.to_dict().items() if key not in INCIDENTAL}
        takes = [self.image_hw, self.num_channels, self.mean, self.std]
        text = f"{type(self.model).__name__} {json.dumps([config, takes], sort_keys=True, default=str)}"
        digest = hashlib.sha256(text.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith("pooler."):  # not used here, and random where a checkpoint has none
                continue
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def untrained(self, seed: int = 0) -> "Encoder":
        """Makes the untrained baseline: an encoder of the same class and configuration with fresh weights.

        What is not trained is kept, such as fixed positions and an l-DAE's tokenizer, which is fitted to images. Fresh
        blocks of an l-DAE are the identity (adaLN-Zero), so its baseline is a random linear embedding of the patches.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(self.model)(copy.deepcopy(self.config))
        if self.config.model_type == "ldae":
            fresh.tokenizer.load_state_dict(self.model.tokenizer.state_dict())
        trained = self.model.state_dict()
        fixed = {name: trained[name] for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
        fresh.load_state_dict(fixed, strict=False)
        return Encoder(fresh, self.image_hw, self.num_channels, self.mean, self.std, self.name).to(self.device)

    def _standardise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps images (B, C, H, W) in [-1, 1] to [0, 1], and then to (x - mean) / std."""
        if self.mean is None and self.std is None:
            return pixel_values
        mean, std = (pixel_values.new_tensor(v).reshape(-1, 1, 1) for v in (self.mean or [0.0], self.std or [1.0]))
        return ((pixel_values + 1) / 2 - mean) / std

    def _patch_tokens(self, hidden: torch.Tensor, image_hw: tuple[int, int]) -> torch.Tensor:
        """The patch tokens (B, N, E) of a hidden state or feature map, without the tokens that stand before those of patches."""
        timm = getattr(self.model, "timm_model", None)
        if hidden.ndim == 4:  # feature maps
            channels_last = str(getattr(timm, "output_fmt", "NCHW")).endswith("NHWC")
            return hidden.flatten(1, 2) if channels_last else hidden.flatten(2).transpose(1, 2)
        if timm is not None:
            return hidden[:, timm.num_prefix_tokens :]
        patch_size = getattr(self.config, "patch_size", None)
        if patch_size is None:
            raise ValueError(
                f"{type(self.model).__name__} names no patch_size, so its patch tokens cannot be told from others"
            )
        p, q = pair(patch_size)
        num_patches = (image_hw[0] // p) * (image_hw[1] // q)
        return hidden[:, -num_patches:]  # a hierarchy, as Swin's, has fewer tokens: all are taken


@contextmanager
def _nothing_masked(model: PreTrainedModel, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Sets ViTMAE's mask ratio to 0 inside, and gives the `noise` (B, N) that keeps its tokens in their order."""
    mask_ratio, num_patches = model.config.mask_ratio, model.embeddings.patch_embeddings.num_patches
    try:
        model.config.mask_ratio = 0.0
        yield torch.arange(num_patches, device=pixel_values.device).expand(len(pixel_values), -1)
    finally:
        model.config.mask_ratio = mask_ratio


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module in evaluation mode inside, and afterwards in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def load_encoder(name: str, trust_remote_code: bool = False, name_of_option: str = "--model") -> Encoder:
    """Loads the encoder of a folder or Hub id.

    It takes images in the format that its image processor names, or else its configuration. Of a model of images and texts,
    such as CLIP or SigLIP, it is the encoder of images.

    Args:
        trust_remote_code: runs the code that comes with the model.
        name_of_option: what error messages call `name`.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if weights are missing, which transformers would replace by random ones; if they are not finite, or files
            of the folder are not those that were written.
    """
    # a pooler on the class token is often missing; it is not used here
    model = load_model(name, name_of_option, AutoModel, unused=("pooler.",), trust_remote_code=trust_remote_code)
    tower = getattr(model, "vision_model", None)
    model = tower if isinstance(tower, PreTrainedModel) else model
    with reading(name_of_option, name):
        image_format = _input_format(model, name, trust_remote_code)
    return Encoder(model.eval(), *image_format, name=name)


def _input_format(
    model: PreTrainedModel, name: str, trust_remote_code: bool
) -> tuple[tuple[int, int], int, list[float] | None, list[float] | None]:
    """(image_hw, num_channels, mean, std) of the images that a model takes; without mean and std they are in [-1, 1]."""
    config = model.config
    if config.model_type == "ldae":
        return config.image_hw, config.num_channels, None, None
    if config.model_type == "timm_wrapper":
        cfg = (
            getattr(config, "pretrained_cfg", None) or model.timm_model.pretrained_cfg
        )  # the Hub's; the architecture's
        channels, height, width = cfg["input_size"]
        size = (config.model_args or {}).get("img_size") or (height, width)
        return pair(size), channels, list(cfg["mean"]), list(cfg["std"])
    try:
        processor = retried(
            lambda: AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code).to_dict()
        )
    except (OSError, ValueError):  # a model without one
        print(f"{name} has no image processor: images are given in [-1, 1]", file=sys.stderr)
        processor = {}
    size = (processor.get("do_center_crop") and processor.get("crop_size")) or processor.get("size") or {}
    height = size.get("height") or size.get("shortest_edge")
    # DINOv2's configuration names 518 px, on which it ended, its processor the 224 px that it is used at
    image_hw = (height, size.get("width") or height) if height else getattr(config, "image_size", None) or 224
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor and not processor.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    return pair(image_hw), getattr(config, "num_channels", 3), mean, std
