"""Tables of a study that compares encoders, made from its results.

python -m experiments.comparison.tables experiments/results/imagenette64.jsonl [--write docs/comparison.md]

The study is a .jsonl of results, or a folder of runs. --details gives a row to each protocol of each run instead.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.probes import PROTOCOLS, Result, format_figure
from ldae.report.results import load_study
from ldae.report.tables import fill, markdown

SCALINGS = {"none": "unscaled", "global": "one global factor", "component": "each component scaled"}
BASELINES = {  # by the class in experiments/baselines; another stands in tables under the name of its class
    "ViTMAEBaseline": "ViTMAE (transformers)",
    "MoCoV3": "MoCo v3 (lightly's parts)",
    "Supervised": "supervised ViT",
}


@dataclass
class TableArguments:
    study: str = option(MISSING, "A .jsonl of results, or a folder of runs; its name is the marker's.", positional=True)
    protocols: list[str] = option(list(PROTOCOLS), "The table's columns.", choices=tuple(PROTOCOLS))
    write: str | None = option(None, "File whose markers are filled; by default the table is printed.")
    details: bool = option(False, "A row for each protocol of each run instead.")


def comparison(study: str | Path, protocols: Sequence[str] = tuple(PROTOCOLS)) -> str:
    """A Markdown table of a study's encoders: what each cost, and the `protocols` by which any was measured.

    Untrained encoders come first; that of an l-DAE, or of a ViT, is the same for all runs of its configuration.

    Raises:
        FileNotFoundError: if no run of the study has both a training and a probing result.
    """
    runs: dict[str, dict[str, Result]] = {}
    for found in load_study(study):
        runs.setdefault(found.run, {})[found.kind] = found.result
    whole = [run for run in runs.values() if {"train", "probe"} <= run.keys()]
    if not whole:
        raise FileNotFoundError(f"no run of {str(study)!r} has results of its training and of a probe")
    measured = {name for run in whole for name in run["probe"]["protocols"]}
    protocols = [name for name in protocols if name in measured]

    def row(name: str, minutes: float | None, epochs: str, figures: dict[str, Result]) -> dict[str, Any]:
        accuracies = {PROTOCOLS[p].title: format_figure(p, figures.get(p)) for p in protocols}
        return {"encoder": name, "minutes": minutes, "epochs": epochs, **accuracies}

    untrained: dict[str, dict[str, Any]] = {}
    trained = []
    for run in whole:
        training, probe = run["train"], run["probe"]
        name = method_name(training["config"])
        trained.append(row(name, training["seconds"] / 60, f"{training['epochs']:.1f}", probe["protocols"]))
        if any(name in probe["floor"] for name in protocols):
            name = _untrained_name(training["config"])
            untrained.setdefault(name, row(name, None, "0", probe["floor"]))
    parts = [
        pd.DataFrame(rows).sort_values("encoder", kind="stable") for rows in (list(untrained.values()), trained) if rows
    ]
    return markdown(pd.concat(parts))


def details(study: str | Path) -> str:
    """A Markdown table of all that a study's probes measured: figure, untrained figure, what was done and the seconds it took.

    The seconds of the first protocol of a run contain the pass over the images, which all others but fine-tuning share.
    """
    rows = [
        {
            "protocol": f"`{name}`",
            "%": format_figure(name, figures),
            "floor": format_figure(name, row.result["floor"].get(name)),
            "seconds": round(figures["seconds"]),
            "what was done": figures["description"],
        }
        for row in load_study(study)
        if row.kind == "probe"
        for name, figures in row.result["protocols"].items()
    ]
    return markdown(rows, left=("protocol", "what was done"))


def method_name(config: dict[str, Any]) -> str:
    """What tables call the method of a run, by the configuration of its model."""
    if config["model_type"] != "ldae":
        (architecture,) = config["architectures"]
        name = BASELINES.get(architecture, architecture)
        return f"{name}, {100 * config['mask_ratio']:.0f} % masked" if "mask_ratio" in config else name
    if config["tokenizer_type"] == "pixels":
        return "classical DAE: noise on pixels"
    name = f"l-DAE, d = {config['latent_dim']:>2}, {SCALINGS[config['latent_scaling']]}"
    if config.get("keep_ratio", 1) < 1:
        name += f", {config['keep_ratio']:.0%} of the tokens".replace("%", " %")
    name += ", loss in latent units" if config.get("loss_units", "image") == "latent" else ""
    noiseless = config.get("noise_schedule") == "single_sigma" and config["sigma_single"] == 0
    return name + (", no noise" if noiseless else "")


def _untrained_name(config: dict[str, Any]) -> str:
    if config["model_type"] != "ldae":
        return "untrained ViT"
    if config["tokenizer_type"] == "pixels":
        return "untrained classical DAE"
    return f"untrained l-DAE, d = {config['latent_dim']:>2}"


def publish(table: str, study: str, page: str | None):
    """Puts a study's table between the markers of its name in a page, or prints it where no page is given."""
    if page is None:
        print(table)
    else:
        fill(page, Path(study).stem, table)


def main(argv: list[str] | None = None):
    parser = option_parser(TableArguments, description=__doc__.split("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    table = details(options.study) if options.details else comparison(options.study, options.protocols)
    publish(table, options.study, options.write)


if __name__ == "__main__":
    run_command(main)
