"""Features of overlapping classes, and what a protocol measures on them."""

from types import SimpleNamespace

import torch

from ldae.features.extraction import Features
from ldae.probes import Knn, Subject


def blobs(n, seed, num_classes=4, width=12, spread=2.5):
    """Overlapping classes in features of very different scales."""
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    features = centres[labels] + spread * torch.randn(n, width, generator=generator) + 1
    return Features(features * torch.logspace(-3, 2, width), labels)


def subject_of(train, validation, seed=0):
    """What protocols read of a subject whose features are known."""
    images = [SimpleNamespace(labels=part.labels.numpy()) for part in (train, validation)]
    encoder, known = SimpleNamespace(device=torch.device("cpu")), {"train": train, "validation": validation}
    return Subject(encoder, *images, seed=seed, known=known)


def measure(protocol, train, validation, seed=0):
    return protocol(subject_of(train, validation, seed))


def accuracy(train, validation, **options):
    return measure(Knn(**options), train, validation)["accuracy"]
