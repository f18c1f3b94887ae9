"""Trains, probes and measures the rungs from DiT to l-DAE (paper, tables 1 to 3).

python -m experiments.ablation.run recipes/ablation64.yaml --output_dir runs/ablation --dry_run # what would be run, and the cost
python -m experiments.ablation.run recipes/ablation64.yaml --output_dir runs/ablation --seeds 0 1 --workers 2 -- --epochs 10

--generate 50000 adds the distance of generated images to real ones, --sweep what l-DAE reaches by timestep and block.
A rung that is done is not run again, and one that was stopped goes on. Options after `--` are train_ldae.py's, for all rungs.
"""

import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from configuration_ldae import LDAEConfig
from experiments.ablation.processes import Processes
from experiments.ablation.rungs import (
    END,
    RUNGS,
    Rung,
    as_arguments,
    folder_name,
    main_path,
    options,
    rung_of,
    tokenizer_of,
)
from experiments.ablation.tables import tables
from ldae.data.sources import load_train, load_validation, why_not_probed
from ldae.files import validate_writable
from ldae.interruption import Interruption
from ldae.mistakes import run_command
from ldae.names import duration
from ldae.options import DataArguments, names_given, option, option_parser, parse_arguments
from ldae.probes.baselines import TITLES
from ldae.report.results import load_study

# The options of train_ldae.py that the ablation gives itself, beside those that rungs change.
OWN = {
    "num_classes", "output_dir", "seed", "resume", "overwrite", "tokenizer", "tokenizer_only", "init_from", "probe", "no_probe",
}  # fmt: skip

Job = tuple[Path, Rung, int]  # folder, rung and seed
Command = tuple[Path, list[str]]  # the folder that it writes to, and the command line


@dataclass
class AblationArguments:
    recipe: str = option(MISSING, "Recipe of train_ldae.py: the options that all rungs share.", positional=True)
    output_dir: str = option("runs/ablation", "Holds a folder for each run.")
    rungs: list[str] = option(
        [], f"all, or some of {', '.join(RUNGS)}; by default those from DiT to l-DAE, without side branches."
    )
    seeds: list[int] = option([0, 1], "Seeds with which each rung is run.", minimum=0)
    workers: int | None = option(None, "Runs at a time; by default one for each GPU, or one.", minimum=1)
    dry_run: bool = option(False, "Only say what would be run, and what it costs, once some of it is done.")
    without_lpips: bool = option(
        False, "Train the first two rungs' tokenizer without LPIPS, where its weights cannot be had."
    )
    autoencoder: str | None = option(
        None,
        "Folder or Hub id of a trained AutoencoderKL with LPIPS and GAN, such as Stable Diffusion's, for the first two rungs' "
        "tokenizer.",
    )
    generate: int = option(
        0,
        "Images that each rung with an FID in the paper (there of 50,000) generates, to measure their distance to the training "
        "images; 0: none.",
        minimum=0,
    )
    encoder: str | None = option(
        None,
        "Encoder on whose features --generate measures, such as a run of the ablation; by default Inception, for the FID.",
    )
    sweep: bool = option(False, "Also measure l-dae by timestep and block, with the first seed.")


@dataclass(frozen=True)
class Ablation:
    """What is to be run: rungs of a recipe with `extra` options of train_ldae.py.

    Args:
        rungs: those that the options name.
        config, data: of the recipe with `extra`; rungs' latent dimensions and image sizes are parts of the former's.
    """

    given: AblationArguments
    rungs: list[Rung]
    config: LDAEConfig
    data: DataArguments
    extra: list[str]

    @property
    def output_dir(self) -> Path:
        return Path(self.given.output_dir)

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(self.given.seeds))

    @property
    def workers(self) -> int:
        return self.given.workers or max(1, torch.cuda.device_count())

    @property
    def lpips(self) -> bool:
        return not self.given.without_lpips

    def jobs(self) -> list[Job]:
        """The runs that are not done."""
        return [job for job in self._every() if not finished(job[0])]

    def _every(self) -> list[Job]:
        return [(self.output_dir / folder_name(r.name, seed), r, seed) for seed in self.seeds for r in self.rungs]

    def measurements(self) -> list[Command]:
        """What is to be measured of runs beside their probe and is not yet."""
        found = []
        names = ("data", "train_split", "validation_split", "image_column", "label_column")
        data = {name: value for name in names if (value := getattr(self.data, name)) is not None}
        for folder, rung, seed in self._every():
            if self.given.generate and rung.fid is not None and not (folder / "results/generation.json").is_file():
                asked = {"data": self.data.data, "split": self.data.train_split, "num_images": self.given.generate}
                asked |= {} if self.given.encoder is None else {"encoder": self.given.encoder}
                found.append((folder, ["ldae.generation", *as_arguments({"output_dir": folder, **asked})]))
            swept = any(folder.glob("results/sweep-*.json"))
            if self.given.sweep and not swept and (rung.name, seed) == (END, self.seeds[0]):
                found.append((folder, ["probe_ldae", *as_arguments({**data, "seed": seed}), "--sweep"]))
        return [(folder, [sys.executable, "-m", *command, "--model", str(folder)]) for folder, command in found]

    def tokenizer(self, rung: Rung, seed: int) -> Path | str | None:
        """The folder of the trained tokenizer that a rung needs, or the autoencoder that is given; None: it needs none."""
        name = tokenizer_of(rung, self.lpips)
        if name is not None and name == main_path()[0].name and self.given.autoencoder is not None:
            return self.given.autoencoder
        return None if name is None else self.output_dir / "tokenizers" / folder_name(name, seed)

    def tokenizer_jobs(self) -> list[Job]:
        """The tokenizers that rungs need and that are not trained, each once, as the rung that names it trains it."""
        needed = {
            folder: (folder, RUNGS[name], seed)
            for _, rung, seed in self.jobs()
            if isinstance(folder := self.tokenizer(rung, seed), Path)
            and (name := tokenizer_of(rung, self.lpips)) is not None
        }
        return [job for folder, job in needed.items() if not _trained(folder)]

    def command(self, folder: Path, rung: Rung, seed: int, *more: str | Path) -> list[str]:
        """The command line of one training."""
        command = [sys.executable, "-m", "train_ldae", self.given.recipe, "--output_dir", folder, "--seed", seed]
        command += ["--resume", "--probe", "--report_to", "none", *more]
        if seed != self.seeds[0]:
            command.append("--no_baseline")  # untrained, all seeds of a rung are about the same
        return [*map(str, command), *self.extra, *as_arguments(options(rung, self.config, self.lpips))]

    def run(self) -> list[str]:
        """Trains and probes what is not done, tokenizers first, each once for all rungs that share it; then measures.

        Returns:
            The runs that failed, tokenizers among them, as paths below `output_dir`; their logs say why.
        """
        stages: tuple[tuple[Callable[..., str | None], list], ...] = (
            (self._train_tokenizer, self.tokenizer_jobs()),
            (self._train_rung, self.jobs()),
            (self._measure, self.measurements()),
        )
        failed, processes = [], Processes(self.workers)
        with tqdm(total=sum(len(jobs) for _, jobs in stages), desc="runs") as bar:
            for work, jobs in stages:
                failed += self._run_stage(lambda *job, work=work: work(processes, *job), processes, jobs, bar)
        return [name for name in failed if name]

    def _run_stage(
        self, work: Callable[..., str | None], processes: Processes, jobs: list, bar: tqdm
    ) -> list[str | None]:
        """What the work returns for each job.

        Only this thread starts jobs, and none before there is a worker for it, so that nothing is started after Ctrl-C.
        What runs then is ended, and waited for.
        """
        started: list[Future] = []
        running: dict[Future, str] = {}
        waiting = deque(jobs)
        with ThreadPoolExecutor(self.workers) as pool, processes:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    folder, *_ = job = waiting.popleft()
                    started.append(pool.submit(work, *job))
                    running[started[-1]] = folder.name
                # what refreshes the bar, which else stands still for minutes
                bar.set_postfix_str(", ".join(running.values()))
                for future in wait(running, timeout=5, return_when=FIRST_COMPLETED).done:
                    future.result()  # raises what the work raised
                    del running[future]
                    bar.update()
        return [future.result() for future in started]

    def _train_tokenizer(self, processes: Processes, folder: Path, rung: Rung, seed: int) -> str | None:
        return self._execute(processes, folder, self.command(folder, rung, seed, "--tokenizer_only"))

    def _train_rung(self, processes: Processes, folder: Path, rung: Rung, seed: int) -> str | None:
        tokenizer = self.tokenizer(rung, seed)
        if isinstance(tokenizer, Path) and not _trained(tokenizer):
            return f"{folder.name} (its tokenizer failed)"
        given = [] if tokenizer is None else ["--tokenizer", tokenizer]
        return self._execute(processes, folder, self.command(folder, rung, seed, *given))

    def _measure(self, processes: Processes, folder: Path, command: list[str]) -> str | None:
        if not finished(folder):  # its run has failed, and is named
            return None
        return self._execute(processes, folder, command)

    def _execute(self, processes: Processes, folder: Path, command: list[str]) -> str | None:
        """Runs a command, its output in the run's log; its name if it fails."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        status = processes.run(command, Path(f"{folder}.log"))
        return None if status == 0 else str(folder.relative_to(self.output_dir))

    def plan(self) -> str:
        """What would be run, as lines of text, each with its change; the cost from all runs below `output_dir` that are done."""
        lines = []
        for rung in self.rungs:
            done = sum(finished(self.output_dir / folder_name(rung.name, seed)) for seed in self.seeds)
            paper = "–" if rung.paper is None else f"{rung.paper:.1f}"
            before = {} if rung.before is None else options(RUNGS[rung.before], self.config, self.lpips)
            given = options(rung, self.config, self.lpips)
            changed = " ".join(as_arguments({k: v for k, v in given.items() if before.get(k) != v}))
            lines.append(f"{rung.name:<20} {done}/{len(self.seeds)} done  paper {paper:>4}  {rung.what}: {changed}")
        for what, folder, jobs in (("tokenizers", "tokenizers/*", self.tokenizer_jobs()), ("runs", "*", self.jobs())):
            if jobs or what == "runs":
                number = f"{len(jobs)} {what if len(jobs) != 1 else what.removesuffix('s')}"
                lines.append(f"{number} to do, {self.workers} at a time: {self._cost(folder, jobs)}")
        if measurements := self.measurements():
            lines.append(f"{len(measurements)} measurements to do after them, of which the cost is not known")
        return "\n".join(lines)

    def _cost(self, pattern: str, jobs: list[Job]) -> str:
        """The time that jobs take, from the runs that are done: those with the same kind of tokenizer, where there are any."""
        seconds: dict[str, list[float]] = {}
        for path in self.output_dir.glob(f"{pattern}-seed*"):
            if _trained(path) and (name := rung_of(path.name)) is not None:
                taken = sum(_seconds(row.result) for row in load_study(path))
                seconds.setdefault(options(RUNGS[name])["tokenizer_type"], []).append(taken)
        every = [taken for kind in seconds.values() for taken in kind]
        if not every:
            return "unknown until one is done"
        ends = [0.0] * self.workers
        for _, rung, _ in jobs:  # the worker that is free first takes the next
            expected = mean(seconds.get(options(rung)["tokenizer_type"], every))
            ends[ends.index(min(ends))] += expected
        return f"{duration(max(ends))}, from {len(every)} that are done"


def finished(folder: Path) -> bool:
    """Whether a run was trained and probed to its end."""
    return any(folder.glob("results/probe-*.json"))


def _trained(folder: Path) -> bool:
    return (folder / "results" / "train.json").is_file()


def _seconds(result: dict[str, Any]) -> float:
    """How long a training, or the protocols of a probe with its baselines, took."""
    if result["kind"] == "probe":
        parts = [result.get(key, {}) for key in ("protocols", *TITLES)]
        return sum(figures["seconds"] for part in parts for figures in part.values() if isinstance(figures, dict))
    return result["seconds"] if result["kind"] == "train" else 0.0


def _validate(given: AblationArguments, extra: list[str]):
    """Raises a ValueError for options that contradict each other."""
    if unknown := [name for name in given.rungs if name not in (*RUNGS, "all")]:
        raise ValueError(f"--rungs: {unknown[0]!r} is none of all, {', '.join(RUNGS)}")
    if given.generate == 1:
        raise ValueError("--generate must be 0 or at least 2, got 1")
    if given.encoder and not given.generate:
        raise ValueError("--encoder is the one that --generate measures with: give both, or neither")
    if given.autoencoder and given.without_lpips:
        raise ValueError("--autoencoder is trained already, --without_lpips is for training one: give one of the two")
    own = OWN.union(*(rung.change for rung in RUNGS.values()))
    if decided := own & names_given(extra):
        raise ValueError(f"rungs, or the ablation itself, decide {', '.join(sorted(decided))}: leave them out after --")


def main(argv: list[str] | None = None):
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    parser, extra = option_parser(AblationArguments, description=__doc__.split("\n")[0]), argv[end + 1 :]
    (given,) = parser.parse_args_into_dataclasses(argv[:end])
    _validate(given, extra)
    rungs = [RUNGS[name] for name in dict.fromkeys(given.rungs) if name != "all"] or main_path()
    if "all" in given.rungs:
        rungs = list(RUNGS.values())
    model_args, data_args, _ = parse_arguments([given.recipe, *extra])
    if model_args.num_classes:
        raise ValueError("rungs decide whether there are classes: leave num_classes out of the recipe")
    ablation = Ablation(given, rungs, model_args.config(), data_args, extra)
    print(ablation.plan())
    if given.dry_run:
        return
    validate_writable(ablation.output_dir)
    if data_args.streaming:
        raise ValueError("rungs are probed, which --streaming cannot be: leave it out")
    train = load_train(data_args)
    validation = load_validation(data_args.data, data_args.validation_split, **data_args.columns)
    if (reason := why_not_probed(train, validation)) is not None:
        raise ValueError(f"rungs are probed, which data {data_args.data!r} cannot be: {reason}")
    print(f"What each run says: {ablation.output_dir}/*.log")
    with Interruption("the same command goes on"):
        failed = ablation.run()
    if any(finished(path) for path in ablation.output_dir.glob("*-seed*")):
        print(*tables(ablation.output_dir).values(), sep="\n\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their logs in {ablation.output_dir} say why")


if __name__ == "__main__":
    run_command(main)
