"""Attentive probes show what the features of patches hold beyond their average."""

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from ldae.features.extraction import Features
from ldae.optimization import learning_rate, parameter_groups
from ldae.options import option
from ldae.probes.heads import BATCH_NORM_EPS, batches, choose_learning_rate, hold_out, percent_right
from ldae.probes.protocol import Protocol, register_protocol, score
from ldae.probes.subject import Subject
from ldae.seeds import mix_seed

WARMUP = 0.1  # part of the steps


class AttentiveHead(nn.Module, ABC):
    """Attention of learned queries over tokens (B, N, E), then a linear classifier: logits (B, classes).

    The queries do not depend on the image. So keys and values are not computed for every token: q . (K x) = (K^T q) . x and
    sum_n a_n V x_n = V sum_n a_n x_n. Both equations are exact.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.classifier = nn.Linear(width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @abstractmethod
    def directions(self) -> torch.Tensor:
        """The vectors (Q, E) whose products with tokens are the logits of the attention."""

    @abstractmethod
    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """Maps the weighted means of the tokens (B, Q, E) to the input of the classifier (B, E)."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.project(attend(tokens, self.directions())))


class OneQuery(AttentiveHead):
    """Multi-head cross-attention of one learned query, as in AIM (section 3.3), with an output projection and no biases.

    Each head has 64 dimensions where 64 divides E, as AIM's 12 heads of 768 have; otherwise there is one head.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__(width, num_classes)
        self.num_heads = width // 64 if width % 64 == 0 else 1
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def directions(self) -> torch.Tensor:
        query, key = (x.unflatten(0, (self.num_heads, -1)) for x in (self.query, self.key.weight))
        return torch.einsum("hd,hde->he", query, key) / math.sqrt(query.shape[1])

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.out(_project_each(pooled, self.value.weight))


class ManyQueries(AttentiveHead):
    """Efficient probing (arXiv 2506.10178): learned queries on the tokens themselves, each with a part of the values.

    The number of queries is the largest one up to `num_queries` that divides E. BatchNorm stands before the attention here
    and after it there; the queries and the classifier can undo the difference.
    """

    def __init__(self, width: int, num_classes: int, num_queries: int):
        super().__init__(width, num_classes)
        num_queries = max(q for q in range(1, min(num_queries, width) + 1) if width % q == 0)
        self.queries = nn.Parameter(0.02 * torch.randn(num_queries, width))
        self.value = nn.Linear(width, width, bias=False)

    def directions(self) -> torch.Tensor:
        return self.queries / math.sqrt(self.queries.shape[1])

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        return _project_each(pooled, self.value.weight)


def attend(tokens: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Averages tokens (B, N, E) to (B, Q, E), weighted by the softmax over the tokens of tokens . directions (Q, E)."""
    return (directions @ tokens.transpose(1, 2)).softmax(dim=2) @ tokens


def _project_each(pooled: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiplies the q-th mean of (B, Q, E) by the q-th of Q parts of the rows of a weight (E, E), to (B, E)."""
    return torch.einsum("bqe,qde->bqd", pooled, weight.unflatten(0, (pooled.shape[1], -1))).flatten(1)


def _tokens(features: Features) -> torch.Tensor:
    """The features (n, N, E) of every patch, of what was asked for with `tokens=True`."""
    return cast(torch.Tensor, features.tokens)


class AttentiveHeads(nn.Module):
    """Heads that share one BatchNorm without affine over all tokens, as AIM's: (B, N, E) -> logits (heads, B, classes)."""

    def __init__(self, heads: list[AttentiveHead], width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=BATCH_NORM_EPS)
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens.float().flatten(0, 1)).view(tokens.shape)
        # the passes over the tokens take the time: one for all heads
        pooled = attend(tokens, torch.cat([head.directions() for head in self.heads])).chunk(len(self.heads), dim=1)
        return torch.stack([h.classifier(h.project(p)) for h, p in zip(self.heads, pooled, strict=True)])

    @torch.no_grad()
    def predict(self, tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Predicts classes (heads, n) of tokens (n, N, E), on the CPU."""
        device = next(self.parameters()).device
        self.eval()
        return torch.cat([self(some.to(device)).argmax(dim=2).cpu() for some in tokens.split(batch_size)], dim=1)


class AttentiveProtocol(Protocol):
    """Trains a head on the tokens of centre crops by AdamW. The learning rate is chosen on held-out training images.

    Each subclass has options of its own, since two protocols cannot share an option of the command line.
    """

    needs_tokens = True
    prefix: ClassVar[str]

    @abstractmethod
    def head(self, width: int, num_classes: int) -> AttentiveHead:
        """Makes a head with initial values from torch's global generator."""

    def _option(self, name: str) -> Any:
        return getattr(self, f"{self.prefix}_{name}")

    def prepare(self, subject: Subject):
        """Validates that the tokens of all images fit into memory."""
        self.check_memory(len(subject.train) + len(subject.validation), *subject.encoder.token_shape)

    def check_memory(self, num_images: int, num_tokens: int, width: int):
        """Validates that tokens (num_images, num_tokens, width) in half precision fit into memory.

        Raises:
            ValueError: if they take more than the option allows.
        """
        gib, limit = num_images * num_tokens * width * 2 / 2**30, self._option("max_gib")
        if gib > limit:
            raise ValueError(
                f"{self.name} keeps every token in memory: {num_images} images x {num_tokens} tokens x {width} x 2 "
                f"bytes = {gib:.1f} GiB, more than the {limit:g} GiB of --{self.prefix}_max_gib; raise it where the "
                f"machine has as much, take fewer images, or leave {self.name} out of --protocols"
            )

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        """Trains heads to choose the learning rate, then one head on all training images, and measures that.

        Raises:
            ValueError: if there are fewer than 3 training images.
        """
        train, validation = subject.features("train", tokens=True), subject.features("validation", tokens=True)
        if train is None or validation is None:
            return None
        held_out, rates = hold_out(train, subject.seed), sorted(set(self._option("rates")))
        heads = self._train(subject, train, (~held_out).nonzero().flatten(), rates)
        labels, batch_size = train.labels[held_out], self._option("batch_size")
        accuracies = [percent_right(p, labels) for p in heads.predict(_tokens(train)[held_out], batch_size)]
        chosen = choose_learning_rate(dict(zip(rates, accuracies, strict=True)), f"{self.prefix}_rates")
        heads = self._train(subject, train, torch.arange(len(train)), [chosen["rate"]])
        predictions = heads.predict(_tokens(validation), batch_size)[0]
        return {**score(predictions, validation.labels), "settings": chosen}

    def _train(self, subject: Subject, train: Features, images: torch.Tensor, rates: list[float]) -> AttentiveHeads:
        """Trains a head for each learning rate on `images` (n,), from the same initial values and by the same batches."""
        tokens, epochs = _tokens(train), self._option("epochs")
        width = tokens.shape[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed)
            first = self.head(width, subject.num_classes)
        heads = AttentiveHeads([copy.deepcopy(first) for _ in rates], width).to(subject.device).train()
        groups = [
            {**group, "peak": rate}
            for rate, head in zip(rates, heads.heads, strict=True)
            for group in parameter_groups(head, self._option("weight_decay"))
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        for epoch in subject.progress_bar(range(epochs), desc=self.name, unit=" epochs"):
            generator = torch.Generator().manual_seed(mix_seed(subject.seed, epoch))
            order = images[torch.randperm(len(images), generator=generator)]
            parts = batches(order, self._option("batch_size"))
            for i, part in enumerate(parts):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate((epoch + i / len(parts)) / epochs, group["peak"], WARMUP)
                labels = train.labels[part].to(subject.device)
                with torch.enable_grad():
                    logits = heads(tokens[part].to(subject.device))
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(rates))) * len(rates)
                    optimizer.zero_grad()
                    loss.backward()
                optimizer.step()
        return heads


@register_protocol
@dataclass
class Attentive(AttentiveProtocol):
    """A probe by one learned query that attends to the patches, as AIM's and V-JEPA's. See `OneQuery`."""

    name = "attentive"
    title = "Attentive"
    position = 3
    prefix = "attentive"
    attentive_epochs: int = option(20, "attentive: epochs.", minimum=1)
    attentive_rates: list[float] = option(
        [3e-3, 1e-2, 3e-2, 0.1], "attentive: learning rates to choose from.", exclusive_minimum=0
    )
    attentive_weight_decay: float = option(0.05, "attentive: weight decay of matrices.", minimum=0)
    attentive_batch_size: int = option(256, "attentive: images in a batch.", minimum=2)
    attentive_max_gib: float = option(
        16.0, "attentive: the most memory that the tokens of all images may take.", exclusive_minimum=0
    )

    @property
    def description(self) -> str:
        return (
            "multi-head attention of one learned query over the patches' features after BatchNorm without affine, then a "
            f"linear layer, {self.attentive_epochs} epochs of AdamW, no augmentation, learning rate chosen on held-out "
            "training images"
        )

    def head(self, width: int, num_classes: int) -> AttentiveHead:
        return OneQuery(width, num_classes)


@register_protocol
@dataclass
class AttentiveEfficient(AttentiveProtocol):
    """A probe by many learned queries, which is efficient probing (arXiv 2506.10178). See `ManyQueries`."""

    name = "attentive-efficient"
    title = "Attentive (EP)"
    position = 4
    prefix = "attentive_efficient"
    attentive_efficient_queries: int = option(
        32,
        "attentive-efficient: learned queries at most; the largest number that divides the features' width is taken.",
        minimum=1,
    )
    attentive_efficient_epochs: int = option(20, "attentive-efficient: epochs.", minimum=1)
    attentive_efficient_rates: list[float] = option(
        [3e-3, 1e-2, 3e-2, 0.1], "attentive-efficient: learning rates to choose from.", exclusive_minimum=0
    )
    attentive_efficient_weight_decay: float = option(0.05, "attentive-efficient: weight decay of matrices.", minimum=0)
    attentive_efficient_batch_size: int = option(256, "attentive-efficient: images in a batch.", minimum=2)
    attentive_efficient_max_gib: float = option(
        16.0, "attentive-efficient: the most memory that the tokens of all images may take.", exclusive_minimum=0
    )

    @property
    def description(self) -> str:
        return (
            f"efficient probing: {self.attentive_efficient_queries} learned queries on the patches' features after "
            f"BatchNorm without affine, then a linear layer, {self.attentive_efficient_epochs} epochs of AdamW, no "
            "augmentation, learning rate chosen on held-out training images"
        )

    def head(self, width: int, num_classes: int) -> AttentiveHead:
        return ManyQueries(width, num_classes, self.attentive_efficient_queries)
