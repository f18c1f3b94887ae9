"""How good a frozen encoder is: its features once over a labelled data set, then k-NN and a linear probe on them."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from .data import Pictures, evaluation_loader, to_pixel_values
from .metrics import Accuracy

L2_GRID = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # strengths that the linear probe tries, in this order
HELD_OUT = 0.2  # part of the training pictures on which it chooses
BATCH_NORM_EPS = 1e-5
MAX_ITERATIONS = 1000  # of L-BFGS: pooled features are ill-conditioned, and a probe that is stopped early reads too low


# ------------------------------------------------------------------------------------------------------------- features


@dataclass
class Features:
    """float32 features (n, E) and int64 labels (n,), on the CPU, in order; `bad` names unreadable pictures."""

    features: torch.Tensor
    labels: torch.Tensor
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.features)


def pool_features(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """The representation of pictures (B, C, H, W) by any vision model of transformers: (B, E).

    l-DAE, with any head: the mean of the encoder's tokens. Other models: the mean of the patch tokens of
    `last_hidden_state`, without the tokens that stand before them (class, registers), or over height and width where
    it has these. ViTMAE sees all patches, in their order. Models with a head are taken without it.

    Raises:
        ValueError: if the model has no `last_hidden_state`, or gives tokens without naming its `patch_size`.
    """
    encoder = model.base_model  # `.ldae`, `.vit`, … of a model with a head, or the model itself
    if encoder.config.model_type == "ldae":
        return encoder(pixel_values).pooler_output
    pixel_values = pixel_values.to(encoder.dtype)
    if encoder.config.model_type == "vit_mae":
        hidden = _all_of_vit_mae(encoder, pixel_values)
    else:
        hidden = getattr(encoder(pixel_values), "last_hidden_state", None)
    if hidden is None:
        raise ValueError(f"{type(encoder).__name__} gives no last_hidden_state: it is no encoder of pictures alone")
    if hidden.ndim == 4:
        return hidden.mean(dim=(2, 3))
    patch_size = getattr(encoder.config, "patch_size", None)
    if patch_size is None:
        raise ValueError(
            f"{type(encoder).__name__} names no patch_size, so its patch tokens cannot be told from others"
        )
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    num_patches = (pixel_values.shape[-2] // p) * (pixel_values.shape[-1] // q)
    return hidden[:, -num_patches:].mean(dim=1)  # a hierarchy, as Swin's, has fewer tokens: all are taken


def _all_of_vit_mae(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    mask_ratio, num_patches = encoder.config.mask_ratio, encoder.embeddings.patch_embeddings.num_patches
    noise = torch.arange(num_patches, device=pixel_values.device).expand(
        len(pixel_values), -1
    )  # its order is the tokens'
    try:
        encoder.config.mask_ratio = 0.0
        return encoder(pixel_values, noise=noise).last_hidden_state
    finally:
        encoder.config.mask_ratio = mask_ratio


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def extract_features(
    model: PreTrainedModel,
    pictures: Pictures,
    batch_size: int = 256,
    num_workers: int = 0,
    indices: list[int] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Features:
    """Features of all pictures, or those of `indices`, in order.

    Args:
        device: where the model is moved and run; by default where it is.
        mean, std: per channel, of pictures in [0, 1], as the model's image processor has them (`image_mean`,
            `image_std`). Without, pictures are in [-1, 1], which is right for l-DAE.

    Returns:
        The features of the readable pictures, which may be none: (0, 0).
    """
    device = model.device if device is None else torch.device(device)
    model.to(device)
    features, labels, bad = [], [], []
    loader = evaluation_loader(pictures, batch_size, num_workers, indices)
    total = None if pictures.streaming else len(loader)
    with (
        evaluating(model),
        tqdm(loader, "features", total=total, disable=None if progress else True, leave=False) as batches,
    ):
        for batch in batches:
            bad += batch["bad"]
            if batch["pixel_values"] is None:
                continue
            pixel_values = to_pixel_values(batch["pixel_values"].to(device, non_blocking=True))
            if mean is not None or std is not None:
                pixel_values = _standardise(pixel_values, mean, std)
            features.append(pool_features(model, pixel_values).float().cpu())
            labels.append(batch["label"])
    if not features:
        return Features(torch.empty(0, 0), torch.empty(0, dtype=torch.long), bad)
    return Features(torch.cat(features), torch.cat(labels), bad)


def _standardise(pixel_values: torch.Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> torch.Tensor:
    """Pictures (B, C, H, W) in [-1, 1] -> (x - mean) / std of the same in [0, 1]."""
    mean, std = (pixel_values.new_tensor(v).reshape(-1, 1, 1) for v in (0.0 if mean is None else mean, std or 1.0))
    return ((pixel_values + 1) / 2 - mean) / std


# ------------------------------------------------------------------------------------------------------------ protocols


@torch.no_grad()
def knn_accuracy(
    train: Features,
    validation: Features,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Weighted k-nearest-neighbour vote by cosine similarity s, each neighbour with weight exp(s / temperature).

    The protocol of InstDisc (Wu et al., 2018, section 3.4) and DINO; k is at most the number of training pictures.

    Returns:
        {"description", "accuracy", "standard_error", "settings"}, in percent.
    """
    num_classes = _check(train, validation)
    k = min(k, len(train))
    keys, values = nn.functional.normalize(train.features.to(device)), train.labels.to(device)
    predictions = []
    for queries in nn.functional.normalize(validation.features.to(device)).split(256):
        similarity, neighbours = (queries @ keys.T).topk(k)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor changes no vote
        votes = weights.new_zeros(len(queries), num_classes).scatter_add_(1, values[neighbours], weights)
        predictions.append(votes.argmax(dim=1).cpu())
    return {
        "description": f"weighted {k}-NN by cosine similarity, temperature {temperature:g}, on average-pooled features",
        **Accuracy().compute(predictions=torch.cat(predictions), references=validation.labels),
        "settings": {"k": k, "temperature": temperature},
    }


def linear_accuracy(
    train: Features, validation: Features, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Linear probe: BatchNorm without affine, then multinomial logistic regression by L-BFGS, on cached features.

    The normalisation is the paper's and MAE's, with the statistics of all training features. Minimised is the mean
    cross-entropy + l2/2 ||W||^2 (the bias is free; scikit-learn's C is 1 / (l2 n)). l2 is the one of `L2_GRID` that is
    best on a random 20 % of the training features; the fit that counts is on all of them. Unlike the paper's 90 epochs
    of SGD there is no augmentation: features are computed once.

    Returns:
        {"description", "accuracy", "standard_error", "settings"}, in percent.
    """
    num_classes = _check(train, validation)
    if len(train) < 2:
        raise ValueError(f"a linear probe needs at least 2 training pictures, got {len(train)}")
    features, labels = train.features.to(device), train.labels.to(device)
    variance, mean = torch.var_mean(features, dim=0, correction=0)

    def batch_norm(x: torch.Tensor) -> torch.Tensor:
        return (x.to(device) - mean) / (variance + BATCH_NORM_EPS).sqrt()

    features = batch_norm(features)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(device)
    held_out, rest = order.tensor_split([max(1, round(HELD_OUT * len(train)))])
    accuracies, weights = {}, None
    for l2 in L2_GRID:
        weights = _logistic_regression(features[rest], labels[rest], num_classes, l2, weights)
        accuracies[l2] = 100 * float((_predict(features[held_out], weights) == labels[held_out]).float().mean())
    l2 = max(accuracies, key=accuracies.get)  # the first, and so strongest, of equals
    weights = _logistic_regression(features, labels, num_classes, l2)
    predictions = _predict(batch_norm(validation.features), weights).cpu()
    return {
        "description": "logistic regression (L-BFGS) on average-pooled features after BatchNorm without affine, no "
        "augmentation, L2 strength chosen on held-out training pictures",
        **Accuracy().compute(predictions=predictions, references=validation.labels),
        "settings": {
            "l2": l2,
            "held_out": HELD_OUT,
            "held_out_accuracy": {f"{l2:g}": accuracy for l2, accuracy in accuracies.items()},
            "batch_norm_eps": BATCH_NORM_EPS,
            "max_iterations": MAX_ITERATIONS,
        },
    }


def _logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, l2: float, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights (E + 1, num_classes), the bias last, for features (n, E)."""
    if start is None:
        start = features.new_zeros(features.shape[1] + 1, num_classes)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logits = torch.addmm(weights[-1], features, weights[:-1])
        loss = nn.functional.cross_entropy(logits, labels) + l2 / 2 * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


def _predict(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.addmm(weights[-1], features, weights[:-1]).argmax(dim=1)


def _check(train: Features, validation: Features) -> int:
    """The number of classes."""
    for name, part in (("training", train), ("validation", validation)):
        if not len(part):
            first = f"; the first is {part.bad[0]}" if part.bad else ""
            raise ValueError(f"a probe needs {name} pictures, got none that can be read{first}")
        if part.labels.min() < 0:
            raise ValueError(f"the {name} pictures have no labels; a probe needs them")
        if not torch.isfinite(part.features).all():
            raise ValueError(f"the {name} features are not all finite")
    return int(torch.cat([train.labels, validation.labels]).max()) + 1


PROTOCOLS = ("knn", "linear")


def evaluate_features(
    train: Features,
    validation: Features,
    protocols: Sequence[str] = PROTOCOLS,
    k: int = 20,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Any]]:
    """The named protocols' results on features, by name."""
    run = {
        "knn": lambda: knn_accuracy(train, validation, k, device=device),
        "linear": lambda: linear_accuracy(train, validation, seed, device),
    }
    if unknown := [name for name in protocols if name not in run]:
        raise ValueError(f"protocols must be of {', '.join(run)}, got {unknown[0]!r}")
    return {name: run[name]() for name in protocols}


# ---------------------------------------------------------------------------------------------------------------- probe


def untrained(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The floor: a model of the same class and configuration with fresh weights.

    What is not trained is kept: an l-DAE's tokenizer, which is fitted to pictures, and fixed positions. An l-DAE's fresh
    blocks are the identity (adaLN-Zero), so its floor is a random linear embedding of the patches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        floor = type(model)(copy.deepcopy(model.config))
    if model.config.model_type == "ldae":
        floor.base_model.tokenizer.load_state_dict(model.base_model.tokenizer.state_dict())
    trained = model.state_dict()
    fixed = {name: trained[name] for name, parameter in floor.named_parameters() if not parameter.requires_grad}
    floor.load_state_dict(fixed, strict=False)
    return floor.to(model.device)


def probe(
    model: PreTrainedModel,
    floor_model: PreTrainedModel,
    train_pictures: Pictures,
    validation_pictures: Pictures,
    k: int = 20,
    seed: int = 0,
    protocols: Sequence[str] = PROTOCOLS,
    model_name: str | None = None,
    data_name: str = "data",
    extract: Callable[[PreTrainedModel, Pictures], Features | None] = extract_features,
) -> dict[str, Any] | None:
    """Probes a frozen encoder and, beside it, the floor.

    Args:
        floor_model: `untrained(model)`.
        extract: gives the features of a model on pictures; `functools.partial(extract_features, batch_size=…)` sets its
            options. None stands for a process that only helped another one to extract.

    Returns:
        What `ldae.results.save_result` writes, without the environment: "kind", "model", "data", "protocols", "floor",
        "seed", "seconds". None where `extract` gave None.
    """
    start = time.perf_counter()
    pairs = [[extract(m, pictures) for pictures in (train_pictures, validation_pictures)] for m in (model, floor_model)]
    if any(part is None for pair in pairs for part in pair):
        return None
    encoder, floor = (
        evaluate_features(train, validation, protocols, k, seed, model.device) for train, validation in pairs
    )
    train, validation = pairs[0]
    return {
        "kind": "probe",
        "model": model_name or model.config.name_or_path or type(model).__name__,
        "data": {
            "name": data_name,
            "fingerprint": train_pictures.fingerprint(),
            "validation_fingerprint": validation_pictures.fingerprint(),
            "num_train": len(train),
            "num_validation": len(validation),
            "num_classes": len(train.labels.unique()),
            "unreadable": train.bad + validation.bad,
        },
        "protocols": encoder,
        "floor": {
            **floor,
            "description": "the same network with fresh weights"
            + (" and the same tokenizer" if model.config.model_type == "ldae" else ""),
        },
        "seed": seed,
        "seconds": time.perf_counter() - start,
    }


def format_probe(result: dict[str, Any]) -> str:
    """The accuracies of a probe as lines of text, the floor beside the encoder."""
    lines = [f"{'accuracy in %':<14}{'untrained floor':>18}{'encoder':>18}"]
    for name, encoder in result["protocols"].items():
        cells = (f"{part['accuracy']:.1f} ± {part['standard_error']:.1f}" for part in (result["floor"][name], encoder))
        lines.append(f"{name:<14}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
