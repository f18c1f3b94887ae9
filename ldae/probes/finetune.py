"""Fine-tuning trains the whole encoder, with a linear classifier on the mean of its patch tokens."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

from ldae import launch
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import StepSampler, training_loader
from ldae.features.encoders import Encoder, evaluating
from ldae.features.extraction import shared_features
from ldae.hub.folder import save_hub_folder
from ldae.optimization import layer_decay_groups, learning_rate
from ldae.options import option
from ldae.probes.protocol import Protocol, register_protocol, score
from ldae.probes.subject import Subject
from ldae.seeds import mix_seed
from modeling_ldae import LDAEForImageClassification

GREY = 127  # fills what an operation leaves empty


class Classifier(nn.Module):
    """An encoder with a linear layer on its pooled features: images (B, C, H, W) in [-1, 1] -> logits (B, num_classes)."""

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, num_classes, device=encoder.device)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's code
        nn.init.zeros_(self.head.bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder.pool(pixel_values))


@register_protocol
@dataclass
class FineTune(Protocol):
    """Fine-tuning as in the paper's appendix and, where that is silent, as in MAE (label smoothing, warm-up, erasing).

    Images are random resized crops of at least 0.08 of the area, half of them mirrored. RandAugment follows, then mixup or
    cutmix, one of them for each batch. Validation images are seen once, after the last step, by the averaged weights, so
    they choose nothing. Stochastic depth drops whole blocks, where timm drops each of a block's two branches by itself.

    RandAugment is timm's `rand-m9` without its noise of the magnitude (mstd 0.5): two operations, each done with
    probability 0.5, at `magnitude` tenths of their range.

    All that is drawn depends on (seed, step) alone, with two exceptions for several processes: an image is mixed with those
    of its own process's part of the batch, and each process draws the blocks that it drops. What pre-training does not
    train, such as an l-DAE's tokenizer, is not trained here either.
    """

    name = "finetune"
    title = "Fine-tuning"
    trains_encoder = True
    position = 5
    finetune_epochs: int = option(100, "finetune: passes over the training images.", minimum=1)
    finetune_warmup_epochs: int = option(
        5, "finetune: epochs of linear warm-up, at most a tenth of the run.", minimum=0
    )
    finetune_batch_size: int = option(64, "finetune: images in a step of all processes (paper: 1024).", minimum=1)
    finetune_base_learning_rate: float = option(
        1e-3, "finetune: peak learning rate for 256 images in a step (paper: 4e-3 for 1024).", minimum=0
    )
    finetune_weight_decay: float = option(0.05, "finetune: AdamW's weight decay.", minimum=0)
    finetune_layer_decay: float = option(
        0.85,
        "finetune: a block's learning rate over the next one's (paper, ViT-L: 0.65).",
        exclusive_minimum=0,
        maximum=1,
    )
    finetune_drop_path: float = option(
        0.1, "finetune: how often the last block is dropped; the first never is.", minimum=0, exclusive_maximum=1
    )
    finetune_mixup: float = option(0.8, "finetune: alpha of mixup; 0: none.", minimum=0)
    finetune_cutmix: float = option(1.0, "finetune: alpha of cutmix; 0: none.", minimum=0)
    finetune_randaugment: int = option(9, "finetune: magnitude of RandAugment, of 10; 0: none.", minimum=0, maximum=10)
    finetune_label_smoothing: float = option(0.1, "finetune: label smoothing.", minimum=0, exclusive_maximum=1)
    finetune_ema_decay: float = option(
        0.9999,
        "finetune: decay of the averaged weights, at most (1 + step) / (10 + step); 0: none.",
        minimum=0,
        exclusive_maximum=1,
    )
    finetune_erasing: float = option(
        0.25, "finetune: how often a random part of an image is made grey (MAE).", minimum=0, maximum=1
    )
    finetune_max_grad_norm: float = option(0.0, "finetune: longer gradients are cut to this; 0: never.", minimum=0)
    finetune_output_dir: str | None = option(
        None, "finetune: new folder for the fine-tuned l-DAE, an image classifier in Hub form."
    )

    @property
    def description(self) -> str:
        return (
            f"fine-tuning of the whole encoder with a linear classifier on average-pooled features, {self.finetune_epochs} "
            f"epochs, {'averaged' if self.finetune_ema_decay else 'last'} weights"
        )

    def check(self):
        super().check()
        if self._folder is not None and not _is_new(self._folder):
            raise ValueError(f"--finetune_output_dir must be new or empty, got {str(self._folder)!r}")

    @property
    def _folder(self) -> Path | None:
        return Path(self.finetune_output_dir).expanduser() if self.finetune_output_dir else None

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        encoder, accelerator = subject.encoder, subject.accelerator
        # the folder was new at the start: once it holds a model, that is the encoder, and this one is its untrained baseline
        folder = self._folder if self._folder is not None and _is_new(self._folder) else None
        accelerator.wait_for_everyone()
        with _seeded(mix_seed(subject.seed), subject.device):
            classifier = Classifier(copy.deepcopy(encoder).float(), subject.num_classes)
        if (attention := launch.attention(accelerator)) is not None:
            classifier.encoder.model.set_attn_implementation(attention)  # of the copy
        settings = self._train(classifier, subject)
        features = shared_features(
            classifier.encoder, subject.validation, accelerator, subject.batch_size, subject.progress,
            num_workers=subject.num_workers,
        )  # fmt: skip
        if features is None:
            return None
        features.bad += settings.pop("bad")
        subject.known[self.name] = features  # so that the result names the unreadable images
        if not len(features):
            raise ValueError("a probe needs validation images, got none that can be read")
        with torch.no_grad():
            predictions = classifier.head(features.features.to(subject.device)).argmax(dim=1)
        if folder is not None:
            save_hub_folder(_ldae_classifier(classifier, subject), folder)
            print(f"Classifier: {folder}")
        return {**score(predictions, features.labels), "settings": settings}

    def prepare(self, subject: Subject):
        """Validates that this encoder, these images and this number of processes can be fine-tuned."""
        processes = subject.accelerator.num_processes
        channels = subject.encoder.num_channels
        if self.finetune_batch_size % processes:
            raise ValueError(
                f"--finetune_batch_size must be a multiple of the {processes} processes, got {self.finetune_batch_size}"
            )
        if self.finetune_randaugment and channels not in (1, 3):
            raise ValueError(
                f"RandAugment takes images of 1 or 3 channels, got {channels}: pass --finetune_randaugment 0"
            )
        if self._folder is not None and subject.encoder.config.model_type != "ldae":
            raise ValueError(
                f"--finetune_output_dir saves an l-DAE as image classifier, got a {subject.encoder.config.model_type}"
            )
        if subject.train.labels is None or subject.train.labels.min() < 0:
            raise ValueError("the training images have no labels; fine-tuning needs them")

    def _images(self, subject: Subject) -> ImageDataset:
        images = copy.copy(subject.random_crops)  # which other protocols take without these transforms
        transforms = []
        if magnitude := self.finetune_randaugment:  # 11 bins, since timm counts in tenths
            bilinear = v2.InterpolationMode.BILINEAR
            operation = v2.RandAugment(1, magnitude, num_magnitude_bins=11, interpolation=bilinear, fill=GREY)
            transforms += 2 * [v2.RandomApply([operation], p=0.5)]
        if self.finetune_erasing:
            transforms.append(v2.RandomErasing(self.finetune_erasing, scale=(0.02, 1 / 3), value=GREY))
        images.augment = v2.Compose(transforms) if transforms else None
        return images

    def _mix(self, num_classes: int):
        """Mixup or cutmix of pixel_values (B, C, H, W) and labels (B,), which become (B, num_classes) where any mixing is on."""
        alphas = ((v2.MixUp, self.finetune_mixup), (v2.CutMix, self.finetune_cutmix))
        kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in alphas if alpha]
        return v2.RandomChoice(kinds) if kinds else v2.Identity()

    def _train(self, classifier: Classifier, subject: Subject) -> dict[str, Any]:
        """Trains in place, to the averaged weights, and returns "steps", "loss" and "bad", the images that cannot be read."""
        from diffusers.training_utils import EMAModel

        accelerator, device, seed = subject.accelerator, subject.device, subject.seed
        images, mix = self._images(subject), self._mix(subject.num_classes)
        steps = math.ceil(self.finetune_epochs * len(images) / self.finetune_batch_size)
        peak = self.finetune_base_learning_rate * self.finetune_batch_size / 256
        warmup = min(self.finetune_warmup_epochs / self.finetune_epochs, 0.1)
        freeze_unused(classifier)
        blocks = classifier.encoder.blocks
        drop_blocks(blocks, self.finetune_drop_path)
        groups = layer_decay_groups(
            classifier, blocks, classifier.head, self.finetune_weight_decay, self.finetune_layer_decay
        )
        model, optimizer = accelerator.prepare(classifier, torch.optim.AdamW(groups, lr=peak, fused=True))
        ema = EMAModel(model.parameters(), self.finetune_ema_decay) if self.finetune_ema_decay else None
        rank, world = accelerator.process_index, accelerator.num_processes
        sampler = StepSampler(images, 0, steps, self.finetune_batch_size // world, rank=rank, world=world)
        batches = training_loader(sampler, subject.num_workers)
        mean, bad = None, set()
        model.train()
        with subject.progress_bar(batches, desc=self.name, unit=" steps") as bar:
            for step, batch in enumerate(bar):
                bad.update(batch["bad"])
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step / steps, peak, warmup) * group["lr_scale"]
                pixel_values = to_pixel_values(batch["pixel_values"].to(device))
                with _seeded(mix_seed(seed, step), device):
                    pixel_values, labels = mix(pixel_values, batch["label"].to(device))
                with _seeded(mix_seed(seed, step, 1 + rank), device):
                    logits = model(pixel_values)
                loss = nn.functional.cross_entropy(
                    logits.float(), labels, label_smoothing=self.finetune_label_smoothing
                )
                value = accelerator.reduce(loss.detach(), "mean").item()
                if not math.isfinite(value):
                    raise ValueError(
                        f"the loss of fine-tuning is {value} at step {step + 1} of {steps}: lower "
                        "--finetune_base_learning_rate, or set --finetune_max_grad_norm, to 1 for instance"
                    )
                accelerator.backward(loss)
                if self.finetune_max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), self.finetune_max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    ema.step(model.parameters())
                mean = value if mean is None else 0.98 * mean + 0.02 * value
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if ema is not None:
            ema.copy_to(model.parameters())
        accelerator.free_memory()
        return {"steps": steps, "loss": mean, "bad": gather_object(sorted(bad))}


def freeze_unused(classifier: Classifier):
    """Freezes what the classifier does not use, such as a pooler or mask token, since processes would wait for its gradient."""
    encoder = classifier.encoder
    with evaluating(classifier), torch.enable_grad():
        blank = torch.zeros(2, encoder.num_channels, *encoder.image_hw, device=encoder.device)
        classifier(blank).sum().backward()
    for parameter in classifier.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def drop_blocks(blocks: list[nn.Module], rate: float):
    """Adds stochastic depth to blocks: in training, block i of L is skipped with probability rate * i / (L - 1).

    Each image is drawn by itself. A block whose output has another shape than its input is never skipped.
    """

    def hook(p: float):
        def skip(block, arguments, options, output):
            hidden = next(iter((*arguments, *options.values())))
            result = output[0] if isinstance(output, tuple) else output
            if not block.training or result.shape != hidden.shape:
                return None
            result = hidden + stochastic_depth(result - hidden, p, "row")
            return (result, *output[1:]) if isinstance(output, tuple) else result

        return skip

    for i, block in enumerate(blocks):
        if p := rate * i / max(1, len(blocks) - 1):
            block.register_forward_hook(hook(p), with_kwargs=True)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds what is drawn inside, and leaves the generators outside as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _is_new(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _ldae_classifier(classifier: Classifier, subject: Subject) -> LDAEForImageClassification:
    """The same classifier as a model of transformers, with the names of the classes where the data have any."""
    from datasets import ClassLabel

    config, label = copy.deepcopy(classifier.encoder.config), subject.train.examples.features["label"]
    names = label.names if isinstance(label, ClassLabel) else map(str, range(subject.num_classes))
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    model = LDAEForImageClassification(config)
    model.ldae.load_state_dict(classifier.encoder.model.state_dict())
    model.classifier.load_state_dict(classifier.head.state_dict())
    return model.eval()
