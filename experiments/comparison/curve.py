"""Accuracy against the time of training, from studies of several lengths.

python -m experiments.comparison.curve --studies STUDY... --methods METHOD... --output docs/comparison.png

A study is a .jsonl of results, or a folder of runs, as of `experiments.comparison.paired`.
"""

import itertools
import math
from collections import defaultdict
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from experiments.comparison.paired import Measure, methods
from experiments.errors import paired_error, pooled_variance
from ldae.files import validate_writable
from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.report.drawing import BLUE, GREEN, LINE, ORANGE, RED, panels, save_figure

COLOURS = (ORANGE, BLUE, GREEN, RED)
Point = tuple[float, float, float]  # minutes, the accuracy in %, and its standard error


@dataclass
class CurveArguments:
    studies: list[str] = option(MISSING, "Studies, each a .jsonl of results or a folder of runs.")
    methods: list[str] = option(MISSING, "What is drawn, one line each.")
    output: str = option(MISSING, "PNG to write.")


def curves(studies: list[str], names: list[str]) -> dict[Measure, dict[str, list[Point]]]:
    """The points of each method by data set and column, in the order of time.

    The standard error has two parts: that of the images, and that of the seeds. A method of one seed takes the latter's
    variance from those of several.

    Raises:
        ValueError: if a study has none of the methods, or one whose length was not given as a time.
    """
    found = {study: methods(study) for study in studies}
    groups: dict[Measure, list[list[float]]] = defaultdict(list)
    for method in (method for study in found.values() for method in study.values()):
        for measure, accuracies in method.accuracies.items():
            groups[measure].append(accuracies)
    lines: dict[Measure, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for study, known in found.items():
        if not known.keys() & set(names):
            raise ValueError(f"--methods: {study!r} has none of {', '.join(names)}, but {', '.join(known)}")
        for name in (name for name in names if name in known):
            method = known[name]
            if method.minutes is None:
                raise ValueError(f"--methods: {name} of {study!r} was not trained by --max_minutes")
            for measure in method.measures:
                accuracies = method.accuracies[measure]
                right = np.mean(method.right[measure], axis=0)
                images = paired_error(right, np.zeros_like(right))
                seeds = (pooled_variance(groups[measure]) or 0.0) / len(accuracies)
                error = math.hypot(images, math.sqrt(seeds))
                lines[measure][name].append((method.minutes, mean(accuracies), error))
    return {
        measure: {name: sorted(points) for name, points in of_measure.items()} for measure, of_measure in lines.items()
    }


def draw(lines: dict[Measure, dict[str, list[Point]]], names: list[str], path: str | Path) -> Path:
    """Writes a row of panels for each data set: lines, with bands of one standard error.

    Raises:
        ValueError: if no method has several points.
    """
    shown = {measure: found for measure, found in lines.items() if max(map(len, found.values())) > 1}
    if not shown:
        raise ValueError("--methods: none of them was trained for several times, so that there is no line to draw")
    rows, columns = (list(dict.fromkeys(part)) for part in zip(*shown, strict=True))
    figure, axes = panels(len(columns), 2.8 * len(columns), 2.8 * len(rows), rows=len(rows))
    for panel, (data, column) in zip(axes, itertools.product(rows, columns), strict=True):
        if (found := shown.get((data, column))) is None:
            panel.set_axis_off()
            continue
        for name, colour in zip(names, itertools.cycle(COLOURS), strict=False):
            if points := found.get(name):
                minutes, accuracies, errors = map(np.array, zip(*points, strict=True))
                panel.plot(minutes, accuracies, color=colour, label=name, **LINE)
                panel.fill_between(minutes, accuracies - errors, accuracies + errors, color=colour, alpha=0.2)
        ticks = sorted({minutes for points in found.values() for minutes, _, _ in points})
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_title(f"{data}: {column}", fontsize=9)
    figure.supxlabel("minutes of training on one core", fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    return save_figure(figure, path)


def main(argv: list[str] | None = None):
    parser = option_parser(CurveArguments, description=__doc__.split("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    validate_writable(Path(options.output).parent, "--output")
    print(draw(curves(options.studies, options.methods), options.methods, options.output))


if __name__ == "__main__":
    run_command(main)
