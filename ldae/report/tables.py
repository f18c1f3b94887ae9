"""Tables made from results files, put between the markers of a text: no figure in them is typed.

python -m ldae.report.tables RESULTS [--write README.md] [--protocols knn linear] [--details]

RESULTS holds one folder a run, each with results/train.json and results/probe-*.json as the scripts write them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldae.probes import PROTOCOLS, Result, format_figure
from ldae.report.results import load_results

SCALINGS = {"none": "unscaled", "global": "one global factor", "component": "each component scaled"}
BASELINES = {  # of experiments/baselines
    "ViTMAEBaseline": "ViTMAE (transformers), 75 % masked",
    "MoCoV3": "MoCo v3 (lightly's parts)",
    "Supervised": "supervised ViT",
}


def comparison(folder: str | Path, protocols: Sequence[str] = tuple(PROTOCOLS)) -> str:
    """A Markdown table of the runs below a folder: what each cost, and those of `protocols` by which any was measured.

    Untrained floors come first; the floor of an l-DAE, or of a ViT, is the same for all runs of its configuration.

    Raises:
        FileNotFoundError: if no run below the folder has both a training and a probing result.
    """
    runs: dict[Path, dict[str, Result]] = {}
    for result in load_results(folder):
        runs.setdefault(Path(result["file"]).parent, {})[result["kind"]] = result
    whole = [run for run in runs.values() if {"train", "probe"} <= run.keys()]
    if not whole:
        raise FileNotFoundError(f"no run below {str(folder)!r} has results of its training and of a probe")
    measured = {name for run in whole for name in run["probe"]["protocols"]}
    protocols = [name for name in protocols if name in measured]
    floors = {}
    for run in whole:
        if any(name in run["probe"]["floor"] for name in protocols):
            floors.setdefault(_floor_name(run["train"]["config"]), run["probe"]["floor"])
    head = ["encoder", "minutes", "epochs", *(PROTOCOLS[name].title for name in protocols)]
    rows = [[name, "–", "0", *_figures(floor, protocols)] for name, floor in sorted(floors.items())]
    for run in sorted(whole, key=lambda run: _name(run["train"]["config"])):
        training = run["train"]
        cost = [f"{training['seconds'] / 60:.1f}", f"{training['epochs']:.1f}"]
        rows.append([_name(training["config"]), *cost, *_figures(run["probe"]["protocols"], protocols)])
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def details(folder: str | Path) -> str:
    """A Markdown table of all that probes below a folder measured: figure, floor, what was done and the seconds it took.

    The seconds of the first protocol of a run contain the pass over the images, which all others but fine-tuning share.
    """
    lines = ["| protocol | % | floor | seconds | what was done |", "| --- | ---: | ---: | ---: | --- |"]
    for result in load_results(folder):
        for name, figures in result["protocols"].items() if result["kind"] == "probe" else ():
            measured = [format_figure(name, part.get(name)) for part in (result["protocols"], result["floor"])]
            lines.append(f"| `{name}` | {' | '.join(measured)} | {figures['seconds']:.0f} | {figures['description']} |")
    return "\n".join(lines)


def _name(config: dict[str, Any]) -> str:
    if config["model_type"] != "ldae":
        return BASELINES[config["architectures"][0]]
    if config["tokenizer_type"] == "pixels":
        return "classical DAE: noise on pixels"
    return f"l-DAE, d = {config['latent_dim']:>2}, {SCALINGS[config['latent_scaling']]}"


def _floor_name(config: dict[str, Any]) -> str:
    if config["model_type"] != "ldae":
        return "untrained ViT"
    if config["tokenizer_type"] == "pixels":
        return "untrained classical DAE"
    return f"untrained l-DAE, d = {config['latent_dim']:>2}"


def _figures(measured: dict[str, Result], protocols: list[str]) -> list[str]:
    return [format_figure(name, measured.get(name)) for name in protocols]


def fill(path: str | Path, marker: str, text: str):
    """Replaces what stands between two lines `<!-- marker -->` of a file.

    Raises:
        ValueError: if there are not two of them.
    """
    path, line = Path(path), f"<!-- {marker} -->"
    parts = path.read_text().split(line)
    if len(parts) != 3:
        raise ValueError(f"{path} must hold the line {line!r} twice, got it {len(parts) - 1} times")
    before, _, after = parts
    path.write_text(f"{before}{line}\n{text}\n{line}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder of runs; its name is the marker's")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="its columns")
    parser.add_argument("--write", type=Path, help="the file whose markers are filled; otherwise the table is printed")
    parser.add_argument("--details", action="store_true", help="a row for each protocol of each run instead")
    options = parser.parse_args()
    table = details(options.results) if options.details else comparison(options.results, options.protocols)
    if options.write:
        fill(options.write, options.results.name, table)
    else:
        print(table)


if __name__ == "__main__":
    main()
