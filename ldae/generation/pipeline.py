"""Images out of noise, by models that are diffusion models (paper, table 1 and the first steps of table 3).

python -m ldae.generation.pipeline --model FOLDER --output_dir OUT                                    # images
python -m ldae.generation.pipeline --model FOLDER --output_dir OUT --data DATA --num_images 50000   # and their FID
python -m ldae.generation.pipeline --model FOLDER --output_dir OUT --data DATA --encoder ENCODER      # on an encoder's features

Models that see images, or whose gamma is 1, generate nothing; `denoise` shows what they do in one step.
"""

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from ldae.data.images import ImageDataset
from ldae.data.sources import load_examples
from ldae.features.encoders import evaluating, load_encoder
from ldae.generation.frechet import frechet_distance
from ldae.options import option, option_parser
from ldae.report.results import save_result
from ldae.training.models import load_model
from modeling_ldae import LDAEForPreTraining

SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler}
PREDICTION_TYPES = {"noise": "epsilon", "latent": "sample"}  # what diffusers calls them
DIFFUSIONS = ("ddpm", "linear_gamma2")  # noise schedules in which gamma^2 + sigma^2 = 1
ALIGNMENT = 64  # bytes, of what torch allocates
SHOWN = 64  # images drawn by the command line


def predict(
    model: LDAEForPreTraining,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's output (B, N, d or D) for z_t (B, N, d) at timesteps (B,) or (1,), with classes (B,) or none."""
    return model.predict(noisy_latents, timesteps, classes)


@torch.no_grad()
def denoise(
    model: LDAEForPreTraining,
    pixel_values: torch.Tensor,
    timesteps: torch.Tensor | int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step from noise to clean, which every model can do.

    Args:
        pixel_values: clean images (B, C, H, W) in [-1, 1].
        timesteps: noise level of each (B,), or one for all, in [0, T).
        generator: of the noise.

    Returns:
        The noisy and the denoised images, both (B, C, H, W) in [-1, 1].
    """
    timesteps = torch.as_tensor(timesteps, device=pixel_values.device).expand(len(pixel_values))
    with evaluating(model):
        outputs = model(pixel_values, timesteps=timesteps, generator=generator)
    return outputs.noisy_pixel_values.clamp(-1, 1), outputs.reconstruction.clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------------- schedulers


def make_scheduler(model: LDAEForPreTraining, name: Literal["ddim", "ddpm", "dpm"] = "ddim") -> SchedulerMixin:
    """diffusers' scheduler over the noise levels that a model was trained at.

    A last level with gamma = 0 ("linear_gamma2") is left out: epsilon would be divided by 0 there, DPM-Solver's sigma / gamma
    is infinite, and a model of the latent was trained at it with weight lambda = 0. Sampling starts one level before it,
    where z_t is 1/T image and 1 - 1/T noise.

    Raises:
        ValueError: for another name, or a model that `check_generates` refuses.
    """
    check_generates(model)
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}")
    gamma2 = model.noise_schedule.tables()[0].square()
    betas = _betas(gamma2[gamma2 > 0])
    settings = {"num_train_timesteps": len(betas), "trained_betas": betas, "timestep_spacing": "trailing"}
    if name != "dpm":  # latents have no range to be clipped to
        settings["clip_sample"] = False
    return SCHEDULERS[name](**settings, prediction_type=PREDICTION_TYPES[model.config.prediction])


def respace(scheduler: SchedulerMixin, num_inference_steps: int) -> tuple[SchedulerMixin, list[int]]:
    """The scheduler over only the `num_inference_steps` levels that are visited, and these levels, the noisiest first.

    As DiT's code does. diffusers' own choice of timesteps is right only for a number that divides T: DDIM's `step` goes back
    T // steps levels, where they lie further apart too, and trailing timesteps sometimes end in -1.
    """
    count = len(scheduler.alphas_cumprod)
    if not 1 <= num_inference_steps <= count:
        raise ValueError(f"num_inference_steps must be in [1, {count}], the noise levels, got {num_inference_steps}")
    n = num_inference_steps
    levels = [(2 * i * count + n) // (2 * n) - 1 for i in range(1, n + 1)]  # i count / n, rounded
    betas = _betas(scheduler.alphas_cumprod[levels].double())
    changed = {"num_train_timesteps": n, "trained_betas": betas, "timestep_spacing": "trailing", "steps_offset": 0}
    spaced = type(scheduler).from_config(scheduler.config, **changed)
    spaced.set_timesteps(n)  # n - 1, …, 0
    return spaced, levels[::-1]


def _betas(gamma2: torch.Tensor) -> list[float]:
    """gamma^2 (T,), falling, is the running product of 1 - beta."""
    return (1 - gamma2 / torch.cat([gamma2.new_ones(1), gamma2[:-1]])).tolist()


def generates(input_space: str, prediction: str, noise_schedule: str) -> bool:
    """Whether a configuration's values make it a diffusion model of latents, which can be sampled."""
    return input_space == "latent" and prediction in PREDICTION_TYPES and noise_schedule in DIFFUSIONS


def check_generates(model: LDAEForPreTraining):
    """Refuses, by a ValueError, a model that cannot be sampled."""
    fields = ("input_space", "prediction", "noise_schedule")
    if generates(*(getattr(model.config, name) for name in fields)):
        return
    got = ", ".join(f"{name}={getattr(model.config, name)!r}" for name in fields)
    raise ValueError(
        f"images are generated by models with input_space='latent', prediction='noise' or 'latent' and noise_schedule="
        f"'ddpm' or 'linear_gamma2'; this model has {got}. "
        "ldae.generation.pipeline.denoise shows what it does in one step"
    )


# --------------------------------------------------------------------------------------------------------------- pipeline


class LDAEPipeline(DiffusionPipeline):
    """Samples images from an l-DAE that is a diffusion model: noise -> latents -> images.

    `save_pretrained` writes it as a folder; `LDAEPipeline.from_pretrained` gives the same images, bit for bit.

    Args:
        model: with the tokenizer that its latents are of.
        scheduler: over the model's noise levels; `from_model` makes one.

    Raises:
        ValueError: for a model that `check_generates` refuses.
    """

    def __init__(self, model: LDAEForPreTraining, scheduler: SchedulerMixin):
        super().__init__()
        check_generates(model)
        # safetensors puts loaded weights at odd addresses, where matrix products round otherwise than at the usual ones
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()
        self.register_modules(model=model, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_model(
        cls, model: LDAEForPreTraining, scheduler: Literal["ddim", "ddpm", "dpm"] = "ddim"
    ) -> "LDAEPipeline":
        """The pipeline of a model, with a scheduler made from its noise levels."""
        return cls(model, make_scheduler(model, scheduler))

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
            batch_size: B, the number of images; by default that of the labels, or 1.
            class_labels: of each image, in [0, num_classes]; `num_classes` stands for none, the default.
            num_inference_steps: noise levels that are visited, spread evenly, the noisiest first.
            guidance_scale: s of classifier-free guidance, none + s (class - none), as DiT's; 1: the class alone.
            generator: of the noise, one or B; the same gives the same images.
            eta: of DDIM: 0, deterministic after the first noise, to 1, as DDPM.
            output_type: "pil"; or "pt", (B, C, H, W), or "np", (B, H, W, C), both in [0, 1].

        Raises:
            ValueError: for arguments that contradict the model, the scheduler or each other.
        """
        config, device = self.model.config, self._execution_device
        classes = self._classes(batch_size, class_labels, guidance_scale)
        count = batch_size or 1 if classes is None else len(classes)
        guided = guidance_scale != 1
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, config.num_classes)])
        if output_type not in ("pil", "pt", "np"):
            raise ValueError(f"output_type must be 'pil', 'pt' or 'np', got {output_type!r}")
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
            prediction = predict(self.model, torch.cat([seen, seen]) if guided else seen, timesteps, classes).float()
            if guided:
                of_class, of_none = prediction.chunk(2)
                prediction = of_none + guidance_scale * (of_class - of_none)
            latents = scheduler.step(prediction, t, latents, **given).prev_sample

        images = self.model.ldae.tokenizer.decode(latents, config.image_hw)
        images = self.image_processor.postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _classes(
        self, batch_size: int | None, class_labels: Sequence[int] | torch.Tensor | None, guidance_scale: float
    ) -> torch.Tensor | None:
        """Labels as a tensor (B,), or None; refuses those that do not fit."""
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


# ----------------------------------------------------------------------------------------------------------- command line


@dataclass
class GenerationArguments:
    model: str = option(MISSING, "Folder or Hub id of an l-DAE that generates.")
    output_dir: str = option(MISSING, "Folder of samples.png and results/generation.json.")
    data: str | None = option(None, "Real images to measure the Fréchet distance to; by default it is not measured.")
    split: str = option("train", "Split of the real images.")
    num_images: int = option(64, "Images to generate; the paper's FID is of 50,000.")
    sampler: Literal["ddim", "ddpm", "dpm"] = option("ddim", "DDIM, DDPM's ancestral sampling, or DPM-Solver++.")
    num_inference_steps: int = option(50, "Noise levels that are visited.")
    guidance_scale: float = option(1.0, "Classifier-free guidance, of a model with classes; 1: none.")
    encoder: str | None = option(
        None,
        "Encoder whose features the distance is taken on; by default Inception's, from torch-fidelity (the fid extra).",
    )
    seed: int = option(0, "Of the noise.")
    batch_size: int = option(64, "Images in a forward pass.")
    num_workers: int = option(0, "Processes that read images.")
    overwrite: bool = option(False, "Replace another run's result in output_dir.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Writes generated images and, beside real ones, how far they are from them. Classes take turns, where a model has any.

    Returns:
        The result, as in results/generation.json without the environment.

    Raises:
        FileExistsError: if output_dir holds another run's result.
        ValueError: for a model that does not generate, or a number that cannot be.
    """
    parser = option_parser(GenerationArguments, description="Generates images.")
    (given,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    for name, least in (("num_images", 1 if given.data is None else 2), ("batch_size", 1), ("num_workers", 0)):
        if getattr(given, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(given, name)}")
    if given.encoder is not None and given.data is None:
        raise ValueError("--encoder measures a distance to real images: name them by --data")
    output_dir, start = Path(given.output_dir).expanduser(), time.perf_counter()
    path = output_dir / "results" / "generation.json"
    if path.exists() and not given.overwrite:
        raise FileExistsError(f"{path} holds another run's result; choose another --output_dir or pass --overwrite")

    device = PartialState().device
    pipe = LDAEPipeline.from_model(load_model(given.model), given.sampler).to(device)
    respace(pipe.scheduler, given.num_inference_steps)  # refuses a number that cannot be
    if given.guidance_scale != 1 and not pipe.model.config.num_classes:
        raise ValueError(f"--guidance_scale needs a model that is told classes; got {given.model!r}")
    result = {
        "kind": "generation",
        **{name: getattr(given, name) for name in ("model", "data", "num_images", "batch_size", "sampler",
                                                   "num_inference_steps", "guidance_scale", "seed")},
    }  # fmt: skip
    shown: list[torch.Tensor] = []

    def generated() -> Iterator[torch.Tensor]:
        """Batches (B, C, H, W) in [-1, 1]; the first images are kept to be shown."""
        generator = torch.Generator().manual_seed(given.seed)
        pipe.set_progress_bar_config(disable=True)
        num_classes = pipe.model.config.num_classes
        with tqdm(total=given.num_images, desc="generated", unit=" images", disable=None) as bar:
            for first in range(0, given.num_images, given.batch_size):
                numbers = range(first, min(first + given.batch_size, given.num_images))
                images = pipe(
                    None if num_classes else len(numbers),
                    [i % num_classes for i in numbers] if num_classes else None,
                    num_inference_steps=given.num_inference_steps,
                    guidance_scale=given.guidance_scale,
                    generator=generator,
                    output_type="pt",
                ).images
                shown.append(images[: max(0, SHOWN - first)].cpu())
                bar.update(len(images))
                yield 2 * images - 1
        output_dir.mkdir(parents=True, exist_ok=True)
        drawn = torch.cat(shown)
        save_image(drawn, output_dir / "samples.png", nrow=max(1, round(len(drawn) ** 0.5)))

    if given.data is None:
        for _ in generated():
            pass
    else:
        examples = load_examples(given.data, given.split)
        if examples is None:
            raise ValueError(f"--split: data {given.data!r} has no validation split")
        config = pipe.model.config
        real = ImageDataset(examples, config.image_hw, config.num_channels)
        encoder = None if given.encoder is None else load_encoder(given.encoder, name_of_option="--encoder").to(device)
        measured = frechet_distance(real, generated(), encoder, given.batch_size, given.num_workers, device)
        result |= {"split": given.split, "data_fingerprint": real.fingerprint(), **measured}
        print(f"{measured['metric']}: {measured['value']:.2f}")
    result["seconds"] = time.perf_counter() - start
    save_result(path, result, given.overwrite)
    print(f"{given.num_images} images, {min(SHOWN, given.num_images)} of them drawn: {output_dir / 'samples.png'}")
    return result


if __name__ == "__main__":
    main()
