"""Collects the results of a folder of runs into a study's .jsonl, from which its tables are made.

python -m experiments.collect runs/ablation experiments/results/ablation.jsonl

The rows of a run that the study has already are replaced; those of other runs stay.
"""

from collections.abc import Collection
from dataclasses import MISSING, dataclass
from pathlib import Path

from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.report.results import Row, load_study, save_study


@dataclass
class CollectArguments:
    folder: str = option(MISSING, "Folder of runs, each with its results/*.json.", positional=True)
    study: str = option(MISSING, "The .jsonl file; a new one where there is none.", positional=True)
    runs: list[str] = option([], "Only these runs; by default all.")


def collect(folder: Path, study: Path, runs: Collection[str] = ()) -> list[Row]:
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
    rows = [row for row in load_study(folder) if not runs or row.run in runs]
    found = {row.run for row in rows}
    if missing := sorted(set(runs) - found) or ([] if found else ["any run"]):
        raise FileNotFoundError(f"{str(folder)!r} holds no results of {', '.join(missing)}")
    kept = [row for row in load_study(study) if row.run not in found] if study.exists() else []
    save_study(study, kept + rows)
    return rows


def main(argv: list[str] | None = None):
    parser = option_parser(CollectArguments, description=__doc__.split("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    rows = collect(Path(options.folder), Path(options.study), options.runs)
    print(f"{options.study}: {len(rows)} results of {len({row.run for row in rows})} runs")


if __name__ == "__main__":
    run_command(main)
