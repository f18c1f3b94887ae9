"""Collects the results of a folder of runs into a study's .jsonl, from which its tables are made.

python -m experiments.collect runs/ablation experiments/results/ablation.jsonl

The rows of a run that the study has already are replaced; those of other runs stay.
"""

import argparse
from collections.abc import Collection
from pathlib import Path

from ldae.mistakes import run_command
from ldae.report.results import Row, load_study, save_study


def collect(folder: Path, study: Path, runs: Collection[str] | None = None) -> list[Row]:
    """Puts the results of the runs below a folder into a study, and returns their rows.

    Args:
        runs: the runs' names; by default all.

    Raises:
        NotADirectoryError: if `folder` is not one.
        FileNotFoundError: if a run has no results.
        ValueError: if `study` is not called .jsonl.
    """
    if study.suffix != ".jsonl":
        raise ValueError(f"study must be a .jsonl file, got {str(study)!r}")
    if not folder.is_dir():
        raise NotADirectoryError(f"folder must be a folder of runs, got {str(folder)!r}")
    rows = [row for row in load_study(folder) if runs is None or row.run in runs]
    found = {row.run for row in rows}
    if missing := sorted(set(runs or ()) - found) or ([] if found else ["any run"]):
        raise FileNotFoundError(f"{str(folder)!r} holds no results of {', '.join(missing)}")
    kept = [row for row in load_study(study) if row.run not in found] if study.exists() else []
    save_study(study, kept + rows)
    return rows


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser("experiments.collect", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the folder of runs, each with its results/*.json")
    parser.add_argument("study", type=Path, help="the .jsonl file; a new one where there is none")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="only these runs (default: all)")
    options = parser.parse_args(argv)
    rows = collect(options.folder, options.study, options.runs)
    print(f"{options.study}: {len(rows)} results of {len({row.run for row in rows})} runs")


if __name__ == "__main__":
    run_command(main)
