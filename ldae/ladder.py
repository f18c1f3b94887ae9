"""Walks the road from DiT to l-DAE (paper, tables 1 to 3): trains and probes its rungs, then tabulates and draws them.

python -m ldae.ladder recipes/ladder64.yaml --output_dir runs/ladder --dry_run                # what would be run, and the cost
python -m ldae.ladder recipes/ladder64.yaml --output_dir runs/ladder --seeds 0 1 --workers 2 -- --epochs 10
python -m ldae.ladder --output_dir runs/ladder --report docs/ladder.md                         # from the results files

Rungs that are done are not run again, one that was stopped goes on. Options after `--` are train_ldae.py's, for all rungs.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from configuration_ldae import LDAEConfig

from .arguments import parse_arguments
from .results import load_results
from .rungs import RUNGS, Rung, command_line, options, tokenizer_of
from .verdicts import tables, write


def run(
    recipe: str,
    output_dir: Path,
    rungs: list[Rung],
    seeds: list[int],
    workers: int,
    config: LDAEConfig,
    extra: list[str],
) -> list[str]:
    """Trains and probes rungs, `workers` at a time, their tokenizers first, each once for all rungs that share it.

    Returns:
        The runs that failed, tokenizers among them, as paths below `output_dir`; their logs say why.
    """
    rung_jobs = _to_do(output_dir, rungs, seeds)
    tokenizer_jobs = _tokenizers_to_do(output_dir, rung_jobs)
    slots: Queue[int] = Queue()
    for slot in range(workers):
        slots.put(slot)

    def job(folder: Path, rung: Rung, seed: int, *more: str | Path) -> str | None:
        slot = slots.get()
        try:
            command = [sys.executable, "-m", "train_ldae", recipe, "--output_dir", folder, "--seed", seed, "--resume"]
            command += ["--probe", "--report_to", "none", *more]
            command += [] if seed == seeds[0] else ["--no_floor"]  # all seeds of a rung have about the same floor
            command += command_line(rung, config)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with Path(f"{folder}.log").open("w") as log:
                done = subprocess.run(
                    [*map(str, command), *extra], stdout=log, stderr=subprocess.STDOUT, env=_environment(slot, workers)
                )
            return None if done.returncode == 0 else str(folder.relative_to(output_dir))
        finally:
            slots.put(slot)

    def tokenizer_job(folder: Path, rung: Rung, seed: int) -> str | None:
        return job(folder, rung, seed, "--tokenizer_only")

    def rung_job(folder: Path, rung: Rung, seed: int) -> str | None:
        if tokenizer_of(rung) is None:
            return job(folder, rung, seed)
        tokenizer = _tokenizer_folder(output_dir, rung, seed)
        if not _trained(tokenizer):
            return f"{folder.name} (its tokenizer failed)"
        return job(folder, rung, seed, "--tokenizer", tokenizer)

    failed = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(tokenizer_jobs) + len(rung_jobs), desc="runs") as bar:
        for work, jobs in ((tokenizer_job, tokenizer_jobs), (rung_job, rung_jobs)):
            for future in [pool.submit(work, *one) for one in jobs]:
                failed.append(future.result())
                bar.update()
    return [name for name in failed if name]


Job = tuple[Path, Rung, int]  # folder, rung and seed


def _to_do(output_dir: Path, rungs: list[Rung], seeds: list[int]) -> list[Job]:
    jobs = [(output_dir / f"{rung.name}-seed{seed}", rung, seed) for seed in seeds for rung in rungs]
    return [job for job in jobs if not finished(job[0])]


def _tokenizers_to_do(output_dir: Path, jobs: list[Job]) -> list[Job]:
    """The tokenizers that rungs need and that are not trained, each once."""
    needed = {_tokenizer_folder(output_dir, rung, seed): (rung, seed) for _, rung, seed in jobs if tokenizer_of(rung)}
    return [(folder, *job) for folder, job in needed.items() if not _trained(folder)]


def _tokenizer_folder(output_dir: Path, rung: Rung, seed: int) -> Path:
    return output_dir / "tokenizers" / f"{tokenizer_of(rung)}-seed{seed}"


def _trained(folder: Path) -> bool:
    """Whether a tokenizer was trained to its end."""
    return (folder / "results" / "train.json").is_file()


def _environment(slot: int, workers: int) -> dict[str, str]:
    """A share of the cores, and a GPU of its own where there are several."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    return environment


def finished(folder: Path) -> bool:
    """Whether a run was trained and probed to its end."""
    return any(folder.glob("results/probe-*.json"))


def plan(output_dir: Path, rungs: list[Rung], seeds: list[int], workers: int, config: LDAEConfig) -> str:
    """What would be run, as lines of text, each with its change; the cost from all runs below `output_dir` that are done."""
    lines = []
    for rung in rungs:
        folders = [output_dir / f"{rung.name}-seed{seed}" for seed in seeds]
        done = [folder for folder in folders if finished(folder)]
        paper = "–" if rung.paper is None else f"{rung.paper:.1f}"
        given = options(rung, config)
        changed = " ".join(f"--{name} {given[name]}" for name in rung.change if name in given)
        lines.append(f"{rung.name:<20} {len(done)}/{len(folders)} done  paper {paper:>4}  {rung.what}: {changed}")
    jobs = _to_do(output_dir, rungs, seeds)
    first = len(_tokenizers_to_do(output_dir, jobs))
    times = [sum(map(_seconds, load_results(folder))) for folder in output_dir.glob("*-seed*") if finished(folder)]
    cost = "unknown until one is done"
    if times:
        minutes = mean(times) * -(-len(jobs) // workers) / 60
        cost = f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
        cost += f", from {len(times)} that are done"
    lines.append(f"{len(jobs)} runs to do, {workers} at a time: {cost}")
    return "\n".join([*lines, f"{first} tokenizers to train before them"] if first else lines)


def _seconds(result: dict[str, Any]) -> float:
    """What a training, or the protocols of a probe, took."""
    if result["kind"] == "probe":
        return sum(figures.get("seconds", 0) for part in ("protocols", "floor") for figures in result[part].values()
                   if isinstance(figures, dict))  # fmt: skip
    return result["seconds"] if result["kind"] == "train" else 0


def main(argv: list[str] | None = None):
    argv = list(sys.argv[1:] if argv is None else argv)
    extra = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(
        "ldae.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="of train_ldae.py; what no rung changes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ladder"), help="holds a folder for each run")
    parser.add_argument(
        "--rungs",
        nargs="+",
        choices=[*RUNGS, "all"],
        metavar="RUNG",
        help=f"all, or some of {', '.join(RUNGS)}; by default the road without its side branches",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of each rung")
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count()), help="runs side by side")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be run, and the cost")
    parser.add_argument(
        "--report", type=Path, help="only write the tables of what is done to this file, the figures beside it"
    )
    given = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    if given.report:
        print(*write(given.output_dir, given.report), sep="\n")
        return
    if given.recipe is None:
        parser.error("a recipe is needed, such as recipes/imagenette64.yaml")
    if given.workers < 1:
        parser.error(f"--workers must be at least 1, got {given.workers}")
    if given.rungs is None:
        rungs = [rung for rung in RUNGS.values() if not rung.side]
    else:
        rungs = list(RUNGS.values()) if "all" in given.rungs else [RUNGS[name] for name in given.rungs]
    config = parse_arguments([given.recipe, *extra])[0].config()  # refuses what train_ldae.py refuses
    print(plan(given.output_dir, rungs, given.seeds, given.workers, config))
    if given.dry_run:
        return
    failed = run(given.recipe, given.output_dir, rungs, given.seeds, given.workers, config, extra)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their logs in {given.output_dir} say why")
    print(*tables(given.output_dir).values(), sep="\n\n")


if __name__ == "__main__":
    main()
