"""The linear probe in a small part of the time, by logistic regression on features that are computed once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldae.options import option
from ldae.probes.protocol import Protocol, held_out_mask, register_protocol, score
from ldae.probes.subject import Subject

BATCH_NORM_EPS = 1e-5  # torch's own; heads that are trained in steps take MAE's


@register_protocol
@dataclass
class LinearFast(Protocol):
    """BatchNorm without affine, then multinomial logistic regression by L-BFGS.

    The normalisation is the paper's and MAE's, with the statistics of all training features. The fit minimises the mean
    cross-entropy + l2/2 ||W||^2 and leaves the bias free; scikit-learn's C is 1 / (l2 n). The strength l2 is the one of the
    least cross-entropy on a random 20 % of the training features; their accuracy is too coarse a measure, and picked strengths
    that cost up to 1.5 points (docs/comparison.md). The fit that is measured is on all of them. Features are those of centre
    crops, so there is no augmentation.
    """

    name = "linear-fast"
    title = "Linear (L-BFGS)"
    position = 2
    linear_fast_l2: list[float] = option(
        [1e-2, 1e-3, 1e-4, 1e-5, 1e-6], "linear-fast: L2 strengths to choose from.", minimum=0
    )
    linear_fast_iterations: int = option(
        1000,
        "linear-fast: L-BFGS iterations at most; tens suffice, and stopped early it reads low.",
        minimum=1,
    )

    @property
    def description(self) -> str:
        return (
            "logistic regression (L-BFGS) on average-pooled features after BatchNorm without affine, no augmentation, "
            "L2 strength chosen by cross-entropy on held-out training images"
        )

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        train, validation = subject.features("train"), subject.features("validation")
        if train is None or validation is None:
            return None
        if len(train) < 2:
            raise ValueError(f"a linear probe needs at least 2 training images, got {len(train)}")
        features, labels = train.features.to(subject.device), train.labels.to(subject.device)
        normalise = batch_norm(features)
        features, num_classes = normalise(features), subject.num_classes
        held_out = held_out_mask(len(train), subject.seed).to(subject.device)
        losses = {}
        bar = subject.progress_bar(desc=self.name, total=len(self.linear_fast_l2) + 1, unit=" fits")
        for l2 in sorted(self.linear_fast_l2, reverse=True):
            weights = logistic_regression(
                features[~held_out], labels[~held_out], num_classes, l2, self.linear_fast_iterations
            )
            bar.update()
            loss = nn.functional.cross_entropy(logits(features[held_out], weights), labels[held_out])
            losses[l2] = float(loss)
        l2 = min(losses, key=losses.__getitem__)
        weights = logistic_regression(features, labels, num_classes, l2, self.linear_fast_iterations)
        bar.close()
        predictions = predict(normalise(validation.features.to(subject.device)), weights)
        chosen = {"l2": l2, "held_out_cross_entropy": {f"{l2:g}": loss for l2, loss in losses.items()}}
        return {**score(predictions, validation.labels), "settings": chosen}


def batch_norm(features: torch.Tensor):
    """BatchNorm without affine as a function, with the statistics of features (n, E)."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    return lambda x: (x - mean) / (variance + BATCH_NORM_EPS).sqrt()


def logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, num_classes: int, l2: float, iterations: int = 1000
) -> torch.Tensor:
    """Fits weights (E + 1, num_classes), the bias last, to features (n, E) and labels (n,).

    Pooled features are ill-conditioned, so L-BFGS works in coordinates in which the loss curves about alike in all directions.
    """
    basis = _conditioning(features, num_classes, l2)
    features, scale = features @ basis, num_classes**0.5  # of the bias
    solution = features.new_zeros(features.shape[1] + 1, num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=iterations,
        max_eval=2 * iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logits = torch.addmm(scale * solution[-1], features, solution[:-1])
        loss = nn.functional.cross_entropy(logits, labels) + l2 / 2 * (basis @ solution[:-1]).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return torch.cat([basis @ solution[:-1], scale * solution[-1:]]).detach()


def _conditioning(features: torch.Tensor, num_classes: int, l2: float) -> torch.Tensor:
    """L^-T (E, E) of L L^T = X^T X / (n K) + l2, which is the Hessian of the loss where all K classes are as likely."""
    # In float32 the products would round by more than l2. The parts bound the memory, and some devices have no float64.
    parts = (part.cpu().double() for part in features.split(1 << 16))
    hessian = sum(part.T @ part for part in parts) / (len(features) * num_classes)
    floor = 1e-7 * hessian.diagonal().mean() + 1e-12  # features may be constant, and l2 0
    hessian.diagonal().add_(l2 + floor)
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(hessian).T, identity, upper=True).to(features)


def logits(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The logits (n, num_classes) of features (n, E)."""
    return torch.addmm(weights[-1], features, weights[:-1])


def predict(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Predicts classes (n,) of features (n, E)."""
    return logits(features, weights).argmax(dim=1)
