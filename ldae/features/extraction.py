"""Features of an encoder over a data set: one pass, in order, shared by the processes and kept in a cache."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import evaluation_loader
from ldae.features.encoders import Encoder, evaluating
from ldae.files import atomic_write, damage
from ldae.progress import progress_bar


@dataclass
class Features:
    """What a pass over n readable images gives, on the CPU, in order.

    Args:
        features: float32 (n, E), the mean of the patch tokens, or (n, …) as `represent` gives them.
        labels: int64 (n,); -1 stands for none.
        indices: int64 (n,), the numbers of these images in the data set; (0,) where they are of none.
        tokens: (n, N, E), the features of every patch, where asked for.
        names: the names of these images.
        bad: the names of the images that cannot be read, with the reason.
    """

    features: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    tokens: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


def extract_features(
    encoder: Encoder,
    images: ImageDataset,
    batch_size: int = 256,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
    tokens: bool = False,
    view: int = 0,
    progress: bool = True,
    tokens_dtype: torch.dtype = torch.float16,
    represent: Callable[[torch.Tensor], torch.Tensor] | None = None,
    on_bad_image: Literal["skip", "error"] = "skip",
    bar: tqdm | None = None,
) -> Features:
    """Computes the features of all images, or of those that `indices` number, in order.

    Args:
        tokens: keeps the features of every patch too, as `tokens_dtype`.
        view: which of the random crops is taken of each image, where `images` are cropped at random.
        progress: shows a progress bar.
        represent: pixel values (B, C, H, W) in [-1, 1] -> features (B, …), in place of the mean of the encoder's tokens.
        on_bad_image: whether an image that cannot be read is left out or stops the pass.
        bar: a progress bar that counts these images among others, in place of one of their own.

    Returns:
        The features of the readable images; where there are none, their shape is (0, 0).

    Raises:
        ValueError: for the first unreadable image, with on_bad_image="error".
    """
    loader = evaluation_loader(images, batch_size, num_workers, indices, view)
    if bar is None:
        total = None if images.streaming else len(images) if indices is None else len(indices)
        shown = features_bar(total, progress)
    else:
        shown = nullcontext(bar)
    parts = []
    with evaluating(encoder), shown as counter:
        for batch in loader:
            counter.update(len(batch["name"]) + len(batch["bad"]))
            if batch["bad"] and on_bad_image == "error":
                raise ValueError(f"unreadable image (--on_bad_image error): {batch['bad'][0]}")
            parts.append(_of_batch(encoder, batch, tokens_dtype if tokens else None, represent))
    return _joined(parts)


@torch.inference_mode()
def _of_batch(
    encoder: Encoder,
    batch: dict[str, Any],
    tokens_dtype: torch.dtype | None,
    represent: Callable[[torch.Tensor], torch.Tensor] | None,
) -> Features:
    """The features of a batch of `evaluation_loader`."""
    about = {"labels": batch["label"], "indices": batch["index"], "names": batch["name"], "bad": batch["bad"]}
    if batch["pixel_values"] is None:
        return Features(torch.empty(0, 0), **about)
    pixel_values = to_pixel_values(batch["pixel_values"].to(encoder.device, non_blocking=True))
    if represent is not None:
        return Features(represent(pixel_values).float().cpu(), **about)
    hidden = encoder(pixel_values)
    tokens = None if tokens_dtype is None else hidden.to(tokens_dtype).cpu()
    return Features(hidden.float().mean(dim=1).cpu(), tokens=tokens, **about)


def _joined(parts: Sequence[Features]) -> Features:
    """The features of one pass, of its parts in order; their shape is (0, 0) if no image can be read."""
    names, bad = ([entry for part in parts for entry in getattr(part, kind)] for kind in ("names", "bad"))
    read = [part for part in parts if len(part)]
    if not read:
        return Features(torch.empty(0, 0), torch.empty(0, dtype=torch.long), bad=bad)
    features, labels, indices = (
        torch.cat([getattr(part, name) for part in read]) for name in ("features", "labels", "indices")
    )
    tokens = None if read[0].tokens is None else torch.cat([cast(torch.Tensor, part.tokens) for part in read])
    return Features(features, labels, indices, tokens, names, bad)


def features_bar(total: int | None, shown: bool = True) -> tqdm:
    """Makes a bar that counts images, as `ldae.progress.progress_bar` does."""
    return progress_bar(shown=shown, desc="features", total=total, unit=" images")


def shared_features(
    encoder: Encoder,
    images: ImageDataset,
    accelerator: Accelerator,
    batch_size: int = 256,
    progress: bool = True,
    **kwargs,
) -> Features | None:
    """Computes the features of all images, of which every process of accelerate takes a share of the batches.

    The batches are those of one process, so features are the same for any number of processes.

    Args:
        progress: shows a progress bar, on the main process.
        kwargs: as of `extract_features`.

    Returns:
        The features on the main process, None on others.
    """
    if accelerator.num_processes == 1:
        return extract_features(encoder, images, batch_size, progress=progress, **kwargs)
    batches = [range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size)]
    per_process = -(-len(batches) // accelerator.num_processes)
    mine = batches[accelerator.process_index * per_process :][:per_process]
    indices = range(mine[0].start, mine[-1].stop) if mine else range(0)
    shown = progress and accelerator.is_main_process
    part = extract_features(encoder, images, batch_size, indices=indices, progress=shown, **kwargs)
    parts = [part] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(part, parts)  # accelerate's own would give every process all of them
    return None if parts is None else _joined(parts)


def cached_features(
    encoder: Encoder,
    images: ImageDataset,
    accelerator: Accelerator,
    folder: Path | None = None,
    view: int = 0,
    **kwargs,
) -> Features | None:
    """Reads features from `folder`, where the same encoder has seen the same images in the same way before, or computes them.

    A file that was damaged since it was written is named, and computed again.

    Args:
        folder: of safetensors files, pooled features only; None: nothing is read or kept. Features of patches are never
            kept: with `tokens`, what is read from the folder comes without them, and what is computed comes with them.
        kwargs: as of `shared_features`.
    """
    path = None
    if folder is not None and accelerator.is_main_process:
        key = f"{encoder.digest()} {images.version()} {images.transform} {view}"
        if accelerator.mixed_precision != "no":
            key += f" {accelerator.mixed_precision}"
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if decided_by_main(path is not None and _is_kept(path)):
        return None if path is None else _read(path)
    features = shared_features(encoder, images, accelerator, view=view, **kwargs)
    if path is not None and features is not None:
        _write(features, path)
    return features


def decided_by_main(decision: bool) -> bool:
    """The decision of the main process, on every process."""
    return broadcast_object_list([decision])[0]


def _is_kept(path: Path) -> bool:
    if not path.exists():
        return False
    if (reason := damage(path)) is not None:
        print(f"{path} is damaged ({reason}): its features are computed again.")
    return reason is None


def _read(path: Path) -> Features:
    with safe_open(path, "pt") as file:
        texts = {name: json.loads(file.metadata()[name]) for name in ("names", "bad")}
        return Features(*(file.get_tensor(name) for name in ("features", "labels", "indices")), **texts)


def _write(features: Features, path: Path):
    tensors = {name: getattr(features, name).contiguous() for name in ("features", "labels", "indices")}
    with atomic_write(path, sealed=True) as temporary:
        save_file(tensors, temporary, {name: json.dumps(getattr(features, name)) for name in ("names", "bad")})
