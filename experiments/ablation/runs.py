"""What the runs of each rung gave over their seeds, with the standard error, and the settings that they had."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from configuration_ldae import LDAEConfig
from experiments.ablation.rungs import RUNGS, options, rung_of
from experiments.errors import pooled_variance
from ldae.options import RUN_DEFINING
from ldae.probes import Result, unpack
from ldae.probes.baselines import TITLES
from ldae.report.results import load_study

PROTOCOL = "linear-fast"  # by which rungs are compared
TOKENIZER_TRAINING = "the tokenizer's training"  # among the settings of a run
# The options that make a run beside its configuration. Images are compared by their fingerprint, and how a run's
# tokenizer was trained is read from that training's own result.
OPTIONS = tuple(
    name for name in RUN_DEFINING if name not in ("data", "held_out", "seed") and not name.startswith("tokenizer")
)
LOSSES = {  # terms of a tokenizer's loss, by their weight: options that count where the weight is not 0
    "tokenizer_perceptual_weight": ("tokenizer_lpips_net",),
    "tokenizer_adversarial_weight": ("tokenizer_discriminator_start", "tokenizer_discriminator_width"),
}

Run = dict[str, dict[str, Any]]  # the results of one run, by kind


@dataclass(frozen=True)
class Measured:
    """What the runs of a rung gave, over its seeds.

    Args:
        accuracy: the mean in %.
        image_error: the standard error that comes from the choice of the validation images, in points.
        seed_error: the one that comes from the choice of the seeds; None where no rung has several, so that it is not known.
        seeds: their number.
        baseline: the accuracy of the best network or image that learned nothing; None where none was measured.
        images: what tells the validation images from others: their fingerprint, and the classes of those that can be read.
        right: for each of them, the part of the seeds that classify it rightly (n,); None where predictions were not kept.
        distances: of generated images from real ones, by what it is measured on: values of the seeds.
        variance_held: the part of the patches' variance that the tokenizer holds; None where it was not measured.
        setting: what the runs had; where seeds differ, the values of all.
        differs: options in which the runs are not the rung, such as a loss whose weights could not be had.
    """

    accuracy: float
    image_error: float
    seed_error: float | None
    seeds: int
    baseline: float | None
    images: tuple[str | None, str | None]
    right: np.ndarray | None
    distances: dict[str, list[float]]
    variance_held: float | None
    setting: dict[str, Any]
    differs: dict[str, Any]

    @property
    def error(self) -> float:
        """The standard error of the accuracy, in points."""
        return math.hypot(self.image_error, self.seed_error or 0.0)


def load_runs(study: str | Path) -> dict[str, list[Run]]:
    """A study's runs by rung, in the order of the list of rungs, each with the result of its tokenizer's training.

    A run counts if it was trained and probed; what was measured of it, if it was measured on the run's own data.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for row in load_study(study):
        results.setdefault(row.run, []).append(row.result)
    runs: dict[str, list[Run]] = {}
    for name, found in results.items():
        train = next((result for result in found if result["kind"] == "train"), None)
        if (rung := rung_of(name)) is None or train is None:
            continue
        run = {result["kind"]: result for result in found if _is_of(result, train)}
        if tokenizer := train["arguments"].get("tokenizer"):
            for result in results.get(f"tokenizers/{Path(tokenizer).name}", ()):
                run["tokenizer"] = result
        if "probe" in run:
            runs.setdefault(rung, []).append(run)
    return {name: runs[name] for name in RUNGS if name in runs}


def _is_of(result: dict[str, Any], train: dict[str, Any]) -> bool:
    """Whether a result of a run was measured on the data that the run was trained on."""
    if result["kind"] == "generation":
        return result.get("data_fingerprint") == train["data"]["fingerprint"]
    return result["data"]["name"] == train["data"]["name"]


def measure(study: str | Path, also: Sequence[str | Path] = ()) -> dict[str, Measured]:
    """The rungs of a study that are done, by name.

    The standard error of a mean over n seeds is sqrt(b^2 + s^2 / n): b is the binomial one, of the validation images that all
    seeds share, s^2 the variance between seeds, pooled over all rungs that have several, of the studies in `also` too.
    """
    studies = [_probed(path) for path in (study, *also)]
    between = pooled_variance(_figures(done, "accuracy") for runs in studies for done in runs.values())
    probes = [run["probe"] for done in studies[0].values() for run in done]
    thumbnails = {  # of the images alone, so that they are a baseline of runs that have not measured them, too
        probe["data"].get("fingerprint"): probe["thumbnail"][PROTOCOL]["accuracy"]
        for probe in probes
        if PROTOCOL in probe.get("thumbnail", ())
    }
    return {name: _measured(name, done, between, thumbnails) for name, done in studies[0].items()}


def _probed(study: str | Path) -> dict[str, list[Run]]:
    """The runs that were measured by the protocol."""
    runs = load_runs(study)
    probed = {name: [run for run in done if PROTOCOL in run["probe"]["protocols"]] for name, done in runs.items()}
    return {name: done for name, done in probed.items() if done}


def _measured(name: str, done: list[Run], between: float | None, thumbnails: dict[str | None, float]) -> Measured:
    baselines = [best for run in done if (best := _best_baseline(run["probe"], thumbnails)) is not None]
    held = [value for run in done if (value := run["train"].get("variance_held")) is not None]
    distances: dict[str, list[float]] = {}
    for run in done:
        if "value" in (generation := run.get("generation", {})):
            distances.setdefault(_describe(generation), []).append(generation["value"])
    settings = [_setting_of(run) for run in done]
    setting = {key: [each.get(key) for each in settings] for each in settings for key in each}
    given = done[0]["train"]["arguments"]
    differs = {k: given[k] for k, v in options(RUNGS[name]).items() if k in given and given[k] != v}
    if (tokenizer := given.get("tokenizer")) and Path(tokenizer).parent.name != "tokenizers":
        differs["tokenizer"] = tokenizer  # one that was not trained here
    return Measured(
        accuracy=mean(_figures(done, "accuracy")),
        image_error=mean(_figures(done, "standard_error")),
        seed_error=None if between is None else math.sqrt(between / len(done)),
        seeds=len(done),
        baseline=mean(baselines) if baselines else None,
        images=_images_of(done[0]),
        right=_right(done),
        distances=distances,
        variance_held=mean(held) if held else None,
        setting={k: values[0] if all(v == values[0] for v in values) else values for k, values in setting.items()},
        differs=differs,
    )


def _best_baseline(probe: Result, thumbnails: dict[str | None, float]) -> float | None:
    measured = [probe[key][PROTOCOL]["accuracy"] for key in TITLES if PROTOCOL in probe.get(key, ())]
    measured += [accuracy for images, accuracy in thumbnails.items() if images == probe["data"].get("fingerprint")]
    return max(measured, default=None)


def _figures(done: list[Run], which: str) -> list[float]:
    return [run["probe"]["protocols"][PROTOCOL][which] for run in done]


def _images_of(run: Run) -> tuple[str | None, str | None]:
    data = run["probe"]["data"]
    return data.get("fingerprint"), data.get("labels")


def _right(done: list[Run]) -> np.ndarray | None:
    """Returns the share of the runs that are right on each validation image (n,), or None if a run kept no predictions."""
    probes = [run["probe"] for run in done]
    kept = all("labels" in probe["data"] and "predictions" in probe["protocols"][PROTOCOL] for probe in probes)
    if not kept or any(_images_of(run) != _images_of(done[0]) for run in done):
        return None
    labels = unpack(probes[0]["data"]["labels"])
    return np.mean([unpack(probe["protocols"][PROTOCOL]["predictions"]) == labels for probe in probes], axis=0)


def _describe(generation: dict[str, Any]) -> str:
    """Says on what a distance is measured."""
    text = "{metric}, {num_fake:,} generated and {num_real:,} real images, {sampler}, {num_inference_steps} steps"
    text += ", guidance {guidance_scale:g}" if generation.get("guidance_scale", 1) != 1 else ""
    return text.format(**generation)


def _setting_of(run: Run) -> dict[str, Any]:
    """What can make a difference between runs beside their seed.

    Left out is what follows from the rest: the number of classes from the images, an autoencoder's latent channels from the
    latent dimension. Its other fields, and the options of a tokenizer's loss, are there only for runs that have the like.
    """
    train, tokenizer = run["train"], run.get("tokenizer")
    setting = {k: v for k, v in train["config"].items() if k in LDAEConfig.__annotations__ and k != "num_classes"}
    autoencoder = dict(setting.pop("autoencoder", None) or {})
    if autoencoder.pop("latent_channels", None) is not None:  # completed, by a model that has one
        setting["autoencoder"] = autoencoder
    setting["the probe"] = run["probe"]["protocols"][PROTOCOL].get("description")
    setting |= _training_of(train) | {weight: train["arguments"].get(weight) for weight in LOSSES}
    setting[TOKENIZER_TRAINING] = None
    if tokenizer is not None:
        setting[TOKENIZER_TRAINING] = {**_training_of(tokenizer), "kl_weight": tokenizer["config"].get("kl_weight")}
        for weight, names in LOSSES.items():
            if tokenizer["arguments"].get(weight):
                setting |= {name: tokenizer["arguments"].get(name) for name in names}
    return setting


def _training_of(train: dict[str, Any]) -> dict[str, Any]:
    """How a training went, but for its model and its seed."""
    seen = {"images seen": train["images_seen"], "images": train["data"]["fingerprint"]}
    return {**{name: train["arguments"].get(name) for name in OPTIONS}, **seen}
