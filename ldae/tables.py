"""Tables made from results files, put between the markers of a text: no figure in them is typed.

python -m ldae.tables RESULTS [--write README.md]

RESULTS holds one folder a run, each with results/train.json and results/probe-*.json as the scripts write them.
"""

import argparse
from pathlib import Path
from typing import Any

from .results import load_results

Result = dict[str, Any]


def comparison(folder: str | Path) -> str:
    """A Markdown table of the runs below a folder, untrained floors first: pictures seen, k-NN and linear accuracy.

    Raises:
        FileNotFoundError: if no run below the folder has both a training and a probing result.
    """
    runs: dict[Path, dict[str, Result]] = {}
    for result in load_results(folder):
        runs.setdefault(Path(result["file"]).parent, {})[result["kind"]] = result
    whole = [run for run in runs.values() if {"train", "probe"} <= run.keys()]
    if not whole:
        raise FileNotFoundError(f"no run below {str(folder)!r} has results of its training and of a probe")
    floors = {}  # the same for all runs of the same network and tokenizer
    for run in whole:
        config = run["train"]["config"]
        name = "untrained ViT" if config["model_type"] != "ldae" else f"untrained l-DAE, d = {config['latent_dim']}"
        floors.setdefault(name, _row(name, None, run["probe"]["floor"]))
    rows = [_row(_name(run["train"]["config"]), run["train"], run["probe"]["protocols"]) for run in whole]
    head = ["| encoder | minutes | epochs | 20-NN | linear |", "|---|---:|---:|---:|---:|"]
    return "\n".join(head + sorted(floors.values()) + sorted(rows))


def _name(config: dict[str, Any]) -> str:
    if config["model_type"] != "ldae":
        return "ViTMAE (transformers), 75 % masked"
    if config["tokenizer_type"] == "pixels":
        return "classical DAE: noise on pixels"
    scaling = {"none": "unscaled", "global": "one global factor", "component": "each component scaled"}
    return f"l-DAE, d = {config['latent_dim']:>2}, {scaling[config['latent_scaling']]}"


def _row(name: str, training: Result | None, protocols: dict[str, Result]) -> str:
    cost = (f"{training['seconds'] / 60:.1f}", f"{training['epochs']:.1f}") if training else ("–", "0")
    accuracy = (f"{p['accuracy']:.1f} ± {p['standard_error']:.1f}" for p in (protocols["knn"], protocols["linear"]))
    return "| " + " | ".join([name, *cost, *accuracy]) + " |"


def fill(path: str | Path, marker: str, text: str):
    """Replaces what stands between two lines `<!-- marker -->` of a file."""
    path, line = Path(path), f"<!-- {marker} -->"
    before, _, after = path.read_text().split(line)
    path.write_text(f"{before}{line}\n{text}\n{line}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, help="folder of runs; its name is the marker's")
    parser.add_argument("--write", type=Path, help="the file whose markers are filled; otherwise the table is printed")
    options = parser.parse_args()
    table = comparison(options.results)
    if options.write:
        fill(options.write, options.results.name, table)
    else:
        print(table)


if __name__ == "__main__":
    main()
