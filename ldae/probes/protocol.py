"""What every protocol shares: its options, its result, and the table in which it is found by its name.

A protocol is one module of this package. It is found there, and its options appear in `probe_ldae.py --help`.
"""

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from ldae.options import validate
from ldae.probes.predictions import pack
from ldae.probes.subject import Subject

HELD_OUT = 0.2  # part of the training images on which learning rates and strengths are chosen


@dataclass
class Protocol(ABC):
    """A way to measure an encoder, made known by `register_protocol`.

    The fields of a subclass are its options, made by `ldae.options.option` with their bounds. Their names begin with the
    protocol's name.
    """

    name: ClassVar[str]  # in results and --protocols
    title: ClassVar[str]  # in tables and cards
    metric: ClassVar[str] = "accuracy"  # the key of the main figure
    position: ClassVar[float] = math.inf  # among the columns of tables and the options in --help
    needs_tokens: ClassVar[bool] = False  # it needs the features of every patch
    trains_encoder: ClassVar[bool] = False  # it needs the network itself

    @property
    @abstractmethod
    def description(self) -> str:
        """One sentence that says what was done, for results, tables and cards."""

    def check(self):
        """Validates the options against their bounds. A subclass adds what bounds cannot say.

        Raises:
            ValueError: naming the option, what was got and what is possible.
        """
        validate(self)

    def prepare(self, subject: Subject):
        """Validates, before any pass over the images, that the subject can be measured.

        Raises:
            ValueError: saying why it cannot and what to do.
        """

    @abstractmethod
    def measure(self, subject: Subject) -> dict[str, Any] | None:
        """Measures an encoder.

        Returns:
            "accuracy", or what `metric` names, and "standard_error", both in percent, and whatever else is to be written.
            "settings" holds what the protocol chose. A protocol that classifies adds "predictions" and "labels" (n,), class
            numbers of the readable validation images. On other processes than the main one the result is None.
        """

    def __call__(self, subject: Subject) -> dict[str, Any] | None:
        """`measure` with the description, the options as "settings", the packed predictions and the "seconds" it took."""
        start = time.perf_counter()
        result = self.measure(subject)
        if result is None:
            return None
        found = result.pop("settings", {})
        if "predictions" in result:
            subject.predictions[self.name], subject.labels = result["predictions"], result.pop("labels")
            result["predictions"] = pack(result["predictions"])
        return {
            "description": self.description,
            **result,
            "settings": {**dataclasses.asdict(self), **found},
            "seconds": time.perf_counter() - start,
        }


PROTOCOLS: dict[str, type[Protocol]] = {}  # by name, in the order of their positions
P = TypeVar("P", bound=type[Protocol])


def register_protocol(cls: P) -> P:
    """Makes a protocol known by its name, as a decorator above `@dataclass`.

    Raises:
        TypeError: if the class is not a dataclass of its own.
        ValueError: if the name is taken, or an option does not begin with it.
    """
    if "__dataclass_fields__" not in vars(cls):
        raise TypeError(f"{cls.__name__} must be a dataclass: put @dataclass below @register_protocol")
    if cls.name in PROTOCOLS:
        raise ValueError(f"the name {cls.name!r} of {cls.__name__} is that of {PROTOCOLS[cls.name].__name__}")
    prefix = cls.name.replace("-", "_") + "_"
    for field in dataclasses.fields(cls):
        if not field.name.startswith(prefix):
            raise ValueError(f"options of {cls.__name__} must begin with {prefix!r}, got {field.name!r}")
    PROTOCOLS[cls.name] = cls
    for name in sorted(PROTOCOLS, key=lambda name: PROTOCOLS[name].position):
        PROTOCOLS[name] = PROTOCOLS.pop(name)
    return cls


def score(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """{"accuracy", "standard_error", "predictions", "labels"} of class numbers (n,)."""
    from ldae.metrics import Accuracy  # evaluate takes seconds to import

    predictions, labels = predictions.cpu(), labels.cpu()
    figures = Accuracy().compute(predictions=predictions, references=labels)
    return {**figures, "predictions": predictions, "labels": labels}


def held_out_mask(n: int, seed: int) -> torch.Tensor:
    """(n,) bool, true for the random 20 % of training images, at least one, on which choices are made."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(n, dtype=torch.bool)
    mask[order[: max(1, round(HELD_OUT * n))]] = True
    return mask
