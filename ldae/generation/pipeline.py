"""Images out of noise, by the l-DAEs that are diffusion models (paper, table 1 and the first steps of table 3).

    pipe = LDAEPipeline.from_model(model)
    images = pipe(batch_size=4, generator=torch.Generator().manual_seed(0)).images

A model that sees images, or whose gamma is 1, generates nothing; its `denoise` shows what it does in one step.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ldae.files import read_json, write_json
from ldae.generation.schedulers import SCHEDULERS, make_scheduler, respace, validate_generates, validate_scheduler
from modeling_ldae import LDAEForPreTraining

ALIGNMENT = 64  # bytes, of what torch allocates
# the module of a pipeline's folder in which diffusers, which runs it with trust_remote_code, looks for the class
CODE = '''"""Where diffusers finds the pipeline; it needs the package ldae."""

from ldae.generation.pipeline import LDAEPipeline

__all__ = ["LDAEPipeline"]
'''


class LDAEPipeline(DiffusionPipeline):
    """Samples images from an l-DAE that is a diffusion model: noise -> latents -> images.

    `save_pretrained` writes it as a folder, and `LDAEPipeline.from_pretrained` gives the same images, bit for bit. So does
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` of diffusers, where the package is installed.

    Args:
        model: the network, with the tokenizer that its latents come from.
        scheduler: a scheduler over the model's noise levels; `from_model` makes one.

    Raises:
        ValueError: for a model that cannot be sampled, or an unknown scheduler.
    """

    model: LDAEForPreTraining
    scheduler: SchedulerMixin

    def __init__(self, model: LDAEForPreTraining, scheduler: SchedulerMixin):
        super().__init__()
        validate_generates(model)
        validate_scheduler(type(scheduler).__name__)
        # safetensors puts loaded weights at odd addresses, where matrix products round otherwise than at aligned ones
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()
        self.register_modules(model=model, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_model(
        cls, model: LDAEForPreTraining, scheduler: Literal["ddim", "ddpm", "dpm"] = "ddim"
    ) -> "LDAEPipeline":
        """The pipeline of a model, with a scheduler over its noise levels."""
        return cls(model, make_scheduler(model, scheduler))

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        """Writes the pipeline as a folder, with the file in which diffusers finds its class."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        (folder / "pipeline_ldae.py").write_text(CODE)
        index = folder / "model_index.json"
        write_json(index, {**read_json(index), "_class_name": ["pipeline_ldae", "LDAEPipeline"]})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "LDAEPipeline":
        """The pipeline of a folder or Hub id, whose code is not run. Arguments are those of the model's `from_pretrained`.

        Raises:
            ValueError: for a model that cannot be sampled, or an unknown scheduler.
        """
        name = cls.load_config(pretrained_model_name_or_path)["scheduler"][1]
        validate_scheduler(name)
        scheduler = next(scheduler for scheduler in SCHEDULERS.values() if scheduler.__name__ == name)
        model = LDAEForPreTraining.from_pretrained(pretrained_model_name_or_path, subfolder="model", **kwargs)
        return cls(model, scheduler.from_pretrained(pretrained_model_name_or_path, subfolder="scheduler"))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Sequence[int] | torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        output_type: Literal["pil", "pt", "np"] = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            batch_size: B, the number of images; by default the number of labels, or 1.
            class_labels: the class of each image, in [0, num_classes]; `num_classes` stands for no class, the default.
            num_inference_steps: the number of noise levels that are visited; they are spread evenly.
            guidance_scale: s of classifier-free guidance, none + s (class - none), as in DiT; 1 gives the class alone.
            generator: draws the noise, one for all images or one for each; the same generator gives the same images.
            eta: DDIM's noise in each step: 0 is deterministic after the first noise, 1 is as noisy as DDPM.
            output_type: "pil"; or "pt", (B, C, H, W), or "np", (B, H, W, C), both in [0, 1].

        Raises:
            ValueError: for arguments that contradict the model, the scheduler or each other.
        """
        config, device = self.model.config, self._execution_device
        if output_type not in ("pil", "pt", "np"):
            raise ValueError(f"output_type must be 'pil', 'pt' or 'np', got {output_type!r}")
        classes = self._classes(batch_size, class_labels, guidance_scale)
        count = batch_size or 1 if classes is None else len(classes)
        scheduler, levels = respace(self.scheduler, num_inference_steps)
        accepted = inspect.signature(scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(f"eta={eta} is DDIM's: {type(scheduler).__name__} takes none")
        given = {"generator": generator, "eta": eta}
        given = {name: value for name, value in given.items() if name in accepted}

        num_patches = self.model.ldae.embeddings.position_embeddings.shape[1]
        latents = randn_tensor((count, num_patches, config.latent_dim), generator, device, torch.float32)
        latents = latents * scheduler.init_noise_sigma
        for t, level in zip(scheduler.timesteps, self.progress_bar(levels), strict=True):
            seen = scheduler.scale_model_input(latents, t)
            timesteps = torch.full((1,), level, device=device)
            prediction = self._predict(seen, timesteps, classes, guidance_scale)
            latents = scheduler.step(prediction, t, latents, **given).prev_sample

        images = self.model.ldae.tokenizer.decode(latents, config.image_hw)
        images = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor:
        """The prediction (B, N, d) for latents (B, N, d) and classes (B,) or none, with guidance unless its scale is 1."""
        if guidance_scale == 1:
            return self.model.predict(latents, timesteps, classes).float()
        both = torch.cat([classes, torch.full_like(classes, self.model.config.num_classes)])
        of_class, of_none = self.model.predict(torch.cat([latents, latents]), timesteps, both).float().chunk(2)
        return of_none + guidance_scale * (of_class - of_none)

    def _classes(
        self, batch_size: int | None, class_labels: Sequence[int] | torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor | None:
        """The labels as a tensor (B,), or None; raises a ValueError if they do not fit the model."""
        num_classes = self.model.config.num_classes
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if class_labels is None:
            if guidance_scale != 1:
                raise ValueError(
                    f"guidance_scale={guidance_scale} needs class_labels to guide to; give them, or leave it at 1"
                )
            return None
        if not num_classes:
            raise ValueError("class_labels are given to a model with num_classes=0, which is told no classes")
        classes = torch.as_tensor(class_labels, device=self._execution_device)
        if classes.ndim != 1 or not len(classes) or not 0 <= int(classes.min()) <= int(classes.max()) <= num_classes:
            raise ValueError(
                f"class_labels must be a list of numbers in [0, {num_classes}] ({num_classes}: none), got {class_labels}"
            )
        if batch_size not in (None, len(classes)):
            raise ValueError(f"batch_size={batch_size} contradicts the {len(classes)} class_labels; leave it out")
        return classes
