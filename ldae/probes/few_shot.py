"""What an encoder tells from a few labelled images: logistic regression on random draws of some images of each class."""

from dataclasses import dataclass
from typing import Any

import torch

from ldae.options import option
from ldae.probes.linear_fast import batch_norm, logistic_regression, predict
from ldae.probes.protocol import Protocol, register_protocol, score
from ldae.probes.subject import Subject
from ldae.seeds import mix_seed

ITERATIONS = 200  # of L-BFGS at most: with the default l2, accuracies no longer change after 100


@register_protocol
@dataclass
class FewShot(Protocol):
    """`linear-fast` on a few training images of each class, drawn at random several times.

    BatchNorm has the statistics of all training features, which need no labels. The strength l2 is fixed, since no labelled
    images are left to choose it on.

    The result's figures are those of the largest number of shots; "shots" holds the figures of each. "accuracies" are those
    of the draws, which depend on the seed and the labels alone and so are the same for every encoder. "accuracy" is their
    mean, "deviation" that of one draw and "standard_error" that of the mean. With one draw the deviation is None and the
    standard error is the binomial one, of the validation images.
    """

    name = "few-shot"
    title = "Few-shot"
    position = 6
    few_shot_shots: list[int] = option(
        [1, 5, 10], "few-shot: labelled images of each class; numbers that are too many are left out.", minimum=1
    )
    few_shot_draws: int = option(20, "few-shot: random draws of these images.", minimum=1)
    few_shot_l2: float = option(1e-1, "few-shot: L2 strength of the logistic regression.", minimum=0)

    @property
    def description(self) -> str:
        shots = ", ".join(map(str, sorted(set(self.few_shot_shots))))
        return (
            f"logistic regression (L-BFGS, L2 strength {self.few_shot_l2:g}) on average-pooled features of {shots} images "
            f"of each class, where there are as many, after BatchNorm without affine, mean of {self.few_shot_draws} random draws"
        )

    def measure(self, subject: Subject) -> dict[str, Any] | None:
        train, validation = subject.features("train"), subject.features("validation")
        if train is None or validation is None:
            return None
        classes = torch.cat([train.labels, validation.labels]).unique()
        fewest = min(int((train.labels == number).sum()) for number in classes)
        numbers = [number for number in sorted(set(self.few_shot_shots)) if number <= fewest]
        if not numbers:
            raise ValueError(
                f"--few_shot_shots must be at most {fewest}, the training images of the smallest class, "
                f"got {min(self.few_shot_shots)}"
            )
        if left := [number for number in self.few_shot_shots if number > fewest]:
            print(
                f"few-shot: {', '.join(map(str, left))} shots are left out, since the smallest class has {fewest} images."
            )
        features = train.features.to(subject.device)
        normalise = batch_norm(features)
        features, queries = normalise(features), normalise(validation.features.to(subject.device))
        shots = {}
        bar = subject.progress_bar(desc=self.name, total=len(numbers) * self.few_shot_draws, unit=" fits")
        for number in numbers:
            scores = []
            for i in range(self.few_shot_draws):
                chosen = draw(train.labels, classes, number, mix_seed(subject.seed, number, i)).to(subject.device)
                labels = train.labels.to(subject.device)[chosen]
                weights = logistic_regression(
                    features[chosen], labels, subject.num_classes, self.few_shot_l2, ITERATIONS
                )
                scores.append(score(predict(queries, weights), validation.labels))
                bar.update()
            shots[str(number)] = _mean(scores)
        bar.close()
        largest = {key: shots[str(number)][key] for key in ("accuracy", "standard_error")}
        return {**largest, "shots": shots}


def draw(labels: torch.Tensor, classes: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """Draws `shots` images of each class without repetition, as indices (len(classes) * shots,)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == number][:shots] for number in classes])


def _mean(scores: list[dict[str, Any]]) -> dict[str, Any]:
    accuracies = torch.tensor([score["accuracy"] for score in scores], dtype=torch.float64)
    deviation = float(accuracies.std()) if len(scores) > 1 else None
    error = scores[0]["standard_error"] if deviation is None else deviation / len(scores) ** 0.5
    figures = {"accuracy": float(accuracies.mean()), "standard_error": error, "deviation": deviation}
    return {**figures, "accuracies": accuracies.tolist()}
