"""Methods over seeds, each beside one of them on the same images.

python -m experiments.comparison.paired experiments/results/tiny-imagenet64.jsonl --reference mae [--write docs/comparison.md]

The study is a .jsonl of results, or a folder of runs, which are called METHOD-seedN. One table says what the methods are, and
one for each data set what they reach.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from experiments.comparison.tables import method_name, publish
from experiments.errors import paired_error, pooled_variance
from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.probes import PROTOCOLS, unpack
from ldae.report.results import load_study
from ldae.report.tables import MISSING, markdown

Measure = tuple[str, str]  # a data set, and a column of its table
STANDARDISED = "k-NN, standardised"  # beside the columns that are called as their protocols are


@dataclass
class PairedArguments:
    study: str = option(
        dataclasses.MISSING, "A .jsonl of results, or a folder of runs; its name is the marker's.", positional=True
    )
    reference: str = option(dataclasses.MISSING, "The method that the others stand beside.")
    without: list[str] = option(
        [], "Methods that are left out, such as one of which a seed has failed: the errors of all count every seed."
    )
    write: str | None = option(None, "File whose markers are filled; by default the table is printed.")


@dataclass
class Method:
    """What the runs of a method gave.

    Args:
        config: of its model.
        base_learning_rate: of 256 images in a step.
        minutes: how long each seed was trained; None if its length was not given as a time.
        images_seen: in training, by each seed.
        accuracies: in %, by each seed.
        right: for each validation image, whether a seed classifies it rightly (n,), by each seed.
    """

    config: dict[str, Any]
    base_learning_rate: float
    minutes: float | None
    images_seen: list[int] = field(default_factory=list)
    accuracies: dict[Measure, list[float]] = field(default_factory=lambda: defaultdict(list))
    right: dict[Measure, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    @property
    def measures(self) -> list[Measure]:
        """By what all seeds were measured: a mean over some of them would be another method's."""
        return [each for each, accuracies in self.accuracies.items() if len(accuracies) == len(self.images_seen)]


def methods(study: str | Path) -> dict[str, Method]:
    """The methods of a study that were trained, by the name of their runs without the seed."""
    rows = load_study(study)
    found: dict[str, Method] = {}
    for row in rows:
        if row.kind == "train" and (match := re.fullmatch(r"(.+)-seed\d+", row.run)):
            arguments = row.result["arguments"]
            method = found.setdefault(
                match[1], Method(row.result["config"], arguments["base_learning_rate"], arguments["max_minutes"])
            )
            method.images_seen.append(row.result["images_seen"])
    for row in rows:
        name = re.sub(r"-seed\d+$", "", row.run)
        if row.kind != "probe" or name not in found:
            continue
        data = row.result["data"]
        labels = unpack(data["labels"])
        for title, accuracy, predictions in _columns(row.result["protocols"]):
            found[name].accuracies[data["name"], title].append(accuracy)
            found[name].right[data["name"], title].append(unpack(predictions) == labels)
    return found


def _columns(protocols: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """The columns of a probe's figures: title, accuracy and packed predictions."""
    for name in PROTOCOLS:
        if (figures := protocols.get(name)) is None or "predictions" not in figures:
            continue
        yield PROTOCOLS[name].title, figures["accuracy"], figures["predictions"]
        if "predictions_standardised" in figures:
            yield STANDARDISED, figures["accuracy_standardised"], figures["predictions_standardised"]


def difference(method: Method, reference: Method, measure: Measure, between: float | None) -> tuple[float, float]:
    """A method's accuracy less that of another, and the standard error, in points.

    The error has two parts: the paired one of the validation images, which both share, and that of the seeds.

    Args:
        between: the variance between seeds; None where it is not known, which leaves that part out.
    """
    after, before = (each.accuracies[measure] for each in (method, reference))
    images = paired_error(*(np.mean(each.right[measure], axis=0) for each in (method, reference)))
    seeds = (between or 0.0) * (1 / len(after) + 1 / len(before))
    return mean(after) - mean(before), math.hypot(images, math.sqrt(seeds))


def table(study: str | Path, reference: str, without: Collection[str] = ()) -> str:
    """Markdown tables of a study's methods, and of their accuracies with the difference from the reference and its error.

    Args:
        without: methods that are left out, and with them the deviation of their seeds.

    Raises:
        ValueError: if the reference, or what is left out, is no method of the study; if the reference was measured by none of
            the protocols.
    """
    found = methods(study)
    if unknown := [name for name in without if name not in found]:
        raise ValueError(f"--without must be some of {', '.join(found) or 'none'}, got {unknown[0]!r}")
    found = {name: method for name, method in found.items() if name not in without}
    if reference not in found:
        raise ValueError(f"--reference must be one of {', '.join(found) or 'none'}, got {reference!r}")
    names = [reference, *sorted(name for name in found if name != reference and found[name].measures)]
    measures = found[reference].measures
    if not measures:
        raise ValueError(f"{reference} of {str(study)!r} was measured by no protocol that classifies; probe it first")
    between = {each: pooled_variance(method.accuracies.get(each, []) for method in found.values()) for each in measures}

    def about(name: str) -> dict[str, Any]:
        method = found[name]
        return {
            "run": f"`{name}`",
            "method": method_name(method.config),
            "decoder blocks": method.config.get("decoder_num_hidden_layers"),
            "base learning rate": f"{method.base_learning_rate:.0e}".replace("e-0", "e-"),
            "seeds": len(method.images_seen),
            "images seen, thousands": round(mean(method.images_seen) / 1000),
        }

    def cell(method: Method, each: Measure) -> str:
        if each not in method.measures:
            return MISSING
        text = f"{mean(method.accuracies[each]):.1f}"
        if method is not found[reference]:
            text += " ({:+.1f} ± {:.1f})".format(*difference(method, found[reference], each, between[each]))
        return text

    tables = [markdown(map(about, names), left=("run", "method"))]
    for data in dict.fromkeys(data for data, _ in measures):
        rows = [
            {data: f"`{name}`", **{each[1]: cell(found[name], each) for each in measures if each[0] == data}}
            for name in names
        ]
        tables.append(markdown(rows, left=(data,)))
    return "\n\n".join(tables)


def main(argv: list[str] | None = None):
    parser = option_parser(PairedArguments, description=__doc__.split("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    publish(table(options.study, options.reference, options.without), options.study, options.write)


if __name__ == "__main__":
    run_command(main)
