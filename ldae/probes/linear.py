"""The paper's linear probe: BatchNorm and a linear layer, trained on random crops."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ldae.optimization import learning_rate
from ldae.options import option
from ldae.probes.heads import BATCH_NORM_EPS, batches, choose_learning_rate, hold_out, percent_right
from ldae.probes.protocol import Protocol, register_protocol, score
from ldae.probes.subject import Subject
from ldae.seeds import mix_seed

RATES = {  # per 256 images; MAE's is 0.1 with LARS
    "sgd": [3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0],
    "lars": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0],
    "adamw": [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0],
}
PAPER_STEPS = 90 * 1_281_167 // 16384  # 90 epochs of ImageNet by 16384 images


@register_protocol
@dataclass
class Linear(Protocol):
    """The linear probe of the paper (appendix) and of MAE (main_linprobe.py).

    A linear layer learns from average-pooled features after BatchNorm without affine. It sees random resized crops and
    flips, by a cosine after a linear warm-up and without weight decay, and is measured on centre crops. Unlike there, the
    learning rate is chosen from a grid: heads learn from 80 % of the training images, and the one that is best on the
    centre crops of the other 20 % decides. The head that is measured learns from all training images. All heads learn in
    one pass over the epochs.
    """

    name = "linear"
    title = "Linear"
    position = 1
    linear_epochs: int = option(90, "linear: epochs.", minimum=1)
    linear_warmup_epochs: float = option(10, "linear: epochs of warm-up, at most a ninth of all.", minimum=0)
    linear_batch_size: int | None = option(
        None,
        f"linear: images in a batch; by default as many as make the paper's {PAPER_STEPS} steps, 16384 of ImageNet.",
        minimum=2,
    )
    linear_optimizer: Literal["sgd", "lars", "adamw"] = option("sgd", "linear: sgd, lars (MAE's, needs timm) or adamw.")
    linear_rates: list[float] = option(
        [],
        f"linear: learning rates per 256 images to choose from; by default "
        f"{', '.join(f'{min(rates):g} to {max(rates):g} ({optimizer})' for optimizer, rates in RATES.items())}.",
        exclusive_minimum=0,
    )
    linear_momentum: float = option(0.9, "linear: momentum of sgd and lars.", minimum=0, exclusive_maximum=1)
    linear_weight_decay: float = option(0.0, "linear: weight decay.", minimum=0)
    linear_views: int = option(
        0,
        "linear: random crops of each image, which the epochs take in turn; 0: another one in every epoch, as in the "
        "paper. An approximation: the encoder sees the images this often instead of once per epoch.",
        minimum=0,
    )

    @property
    def description(self) -> str:
        views = f"{self.linear_views} random crops" if self.linear_views else "another random crop in every epoch"
        return (
            f"linear layer on average-pooled features after BatchNorm without affine, {self.linear_epochs} epochs of "
            f"{self.linear_optimizer}, {views}, learning rate chosen on held-out training images"
        )

    def check(self):
        super().check()
        if self.linear_optimizer == "lars":
            _lars()

    @property
    def rates(self) -> list[float]:
        """The learning rates per 256 images to choose from, the smallest first."""
        return sorted(set(self.linear_rates or RATES[self.linear_optimizer]))

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        """Trains heads for every learning rate and measures the one of the best.

        Raises:
            ValueError: if there are fewer than 3 training images, or a random crop can be read where the centre crop
                cannot.
        """
        train, validation = subject.features("train"), subject.features("validation")
        groups: list[Heads] = []
        if train is not None:
            held_out = hold_out(train, subject.seed)
            batch_size = self.linear_batch_size or max(2, min(16384, self.linear_epochs * len(train) // PAPER_STEPS))
            groups = [self._heads(train.features.shape[1], batch_size, subject) for _ in range(2)]
        bar = subject.progress_bar(desc=self.name, total=self.linear_epochs * len(subject.train), unit=" images")
        for epoch in range(self.linear_epochs):
            view = subject.view(*self._view(epoch), bar)  # on every process: they share the pass
            bar.update((epoch + 1) * len(subject.train) - bar.n)  # those of other processes, and those that were known
            if view is None or train is None:
                continue
            if not torch.equal(view.labels, train.labels):
                raise ValueError("linear: the random crops are not of the images of which there are centre crops")
            features, labels = view.features.to(subject.device), view.labels.to(subject.device)
            generator = torch.Generator().manual_seed(mix_seed(subject.seed, epoch))
            order = torch.randperm(len(train), generator=generator)
            for heads, some in zip(groups, (order[~held_out[order]], order), strict=True):
                self._epoch(heads, features, labels, batches(some.to(subject.device), batch_size), epoch)
        bar.close()
        if train is None or validation is None:
            return None
        choosing, final = groups
        labels = train.labels[held_out]
        accuracies = [percent_right(p, labels) for p in choosing.predict(train.features[held_out])]
        chosen = choose_learning_rate(dict(zip(self.rates, accuracies, strict=True)), "linear_rates")
        predictions = final.predict(validation.features)[self.rates.index(chosen["rate"])]
        return {**score(predictions, validation.labels), "settings": {**chosen, "batch_size": batch_size}}

    def _view(self, epoch: int) -> tuple[int, bool]:
        """The number of the view that an epoch takes, and whether a later epoch takes it again."""
        number = epoch % self.linear_views if self.linear_views else epoch
        return number, 0 < self.linear_views < self.linear_epochs

    def _heads(self, width: int, batch_size: int, subject: Subject) -> "Heads":
        heads = Heads(width, subject.num_classes, len(self.rates), subject.seed).to(subject.device)
        groups = [
            # as in MAE, LARS adapts the learning rate of matrices only
            {"params": [parameter], "peak": rate * batch_size / 256, "always_adapt": parameter.ndim > 1}
            for rate, head in zip(self.rates, heads.heads, strict=True)
            for parameter in head.parameters()
        ]
        settings: dict[str, Any] = {"lr": 0.0, "weight_decay": self.linear_weight_decay}
        if self.linear_optimizer == "adamw":
            heads.optimizer = torch.optim.AdamW(groups, **settings)
        else:
            optimizer = _lars() if self.linear_optimizer == "lars" else torch.optim.SGD
            heads.optimizer = optimizer(groups, momentum=self.linear_momentum, **settings)
        return heads

    def _epoch(
        self, heads: "Heads", features: torch.Tensor, labels: torch.Tensor, parts: list[torch.Tensor], epoch: int
    ):
        """Trains for one epoch on features (n, E) and labels (n,); each of `parts` numbers the images of a batch."""
        warmup = min(self.linear_warmup_epochs / self.linear_epochs, 1 / 9)
        for i, part in enumerate(parts):
            progress = (epoch + i / len(parts)) / self.linear_epochs
            for group in heads.optimizer.param_groups:
                group["lr"] = learning_rate(progress, group["peak"], warmup)
            heads.step(features[part], labels[part])


class Heads(nn.Module):
    """Linear classifiers that share one BatchNorm without affine: (B, E) -> logits (heads, B, classes).

    All start from the same weights, so none depends on which others there are.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, width: int, num_classes: int, count: int, seed: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        self.heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, num_classes) for _ in range(count))
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(head.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        weight, bias = (torch.cat([getattr(head, name) for head in self.heads]) for name in ("weight", "bias"))
        logits = nn.functional.linear(self.norm(features), weight, bias)  # one product for all heads
        return logits.unflatten(1, (len(self.heads), -1)).transpose(0, 1)

    def step(self, features: torch.Tensor, labels: torch.Tensor):
        """Takes one step of every head on its own mean cross-entropy."""
        with torch.enable_grad():
            logits = self.train()(features)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits))) * len(logits)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Predicts classes (heads, n) of features (n, E), on the CPU."""
        return self.eval()(features.to(self.heads[0].weight.device)).argmax(dim=2).cpu()


def _lars() -> type[torch.optim.Optimizer]:
    """timm's LARS.

    Raises:
        ImportError: without timm.
    """
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise ImportError("--linear_optimizer lars needs timm: pip install timm") from error
    return Lars
