"""The road from DiT to l-DAE (paper, tables 1 to 3): rungs, each a change to the one before, trained, probed, tabulated, drawn.

python -m ldae.ladder recipes/imagenette64.yaml --output_dir runs/ladder --dry_run    # what would be run, and the cost
python -m ldae.ladder recipes/imagenette64.yaml --output_dir runs/ladder --seeds 0 1 --workers 2 --epochs 10
python -m ldae.ladder --output_dir runs/ladder --report docs/ladder.md                 # from the results files alone

Rungs that are done are not run again, one that was stopped goes on. Options after `--` are train_ldae.py's, for all rungs.
"""

import argparse
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from statistics import mean, stdev
from typing import Any

import torch
from tqdm import tqdm

from configuration_ldae import LDAEConfig

from .arguments import parse_arguments
from .plots import road
from .probes import Result
from .results import load_results
from .tokenizers import TRAINED

FIRST = {
    "tokenizer_type": "conv_vae", "latent_dim": "16/768", "tokenizer_perceptual_weight": 1.0, "tokenizer_adversarial_weight": 0.5,
    "class_conditional": True, "input_space": "latent", "prediction": "noise", "noise_schedule": "ddpm",
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """One step of the road: options of train_ldae.py that change what the rung `before` it does.

    Args:
        paper: the paper's linear accuracy on ImageNet, in %; None where it gives none.
        side: whether the road goes on without it.
    """

    name: str
    what: str
    change: dict[str, Any]
    paper: float | None
    before: str | None = None
    side: bool = False


def _road() -> dict[str, Rung]:
    steps = [
        Rung("dit", "DiT: convolutional VAE with LPIPS and GAN, classes, DDPM's noise and prediction", FIRST, 57.5),
        Rung("no-classes", "no class conditioning", {"class_conditional": False}, 62.5),
        Rung("no-perceptual", "tokenizer without the perceptual loss", {"tokenizer_perceptual_weight": 0.0}, 58.4),
        Rung("no-adversarial", "tokenizer without the adversarial loss", {"tokenizer_adversarial_weight": 0.0}, 59.0),
        Rung("linear-gamma2", "γ² falls linearly", {"noise_schedule": "linear_gamma2"}, 63.4),
        Rung("patch-vae", "patch-wise VAE", {"tokenizer_type": "patch_vae"}, 64.9),
        Rung("patch-ae", "patch-wise AE", {"tokenizer_type": "patch_ae"}, 64.7),
        Rung("patch-pca", "patch-wise PCA, d = 32", {"tokenizer_type": "pca", "latent_dim": "32/768"}, 65.1),
        Rung("clean-latent", "predict the clean latent, λ = γ²", {"prediction": "latent"}, 62.4),
        Rung("no-input-scaling", "γ = 1, σ linear to √2, λ = 1/(1 + σ²)", {"noise_schedule": "linear_sigma"}, 63.6),
        Rung("image-input", "image input by inverse PCA", {"input_space": "image"}, 63.6),
        Rung("image-output", "image output by inverse PCA", {"prediction": "projected_image"}, 63.9),
        Rung("l-dae", "predict the original image", {"prediction": "image"}, 64.5),
    ]
    rungs, before = {}, None
    for rung in steps:
        rungs[rung.name] = Rung(rung.name, rung.what, rung.change, rung.paper, before)
        before = rung.name
    return rungs


def _branches() -> list[Rung]:
    """Side branches of the end point, and what figure 5 and table 2 have beside the road: other latents, other dimensions."""
    end = [
        Rung("one-level", "one noise level", {"noise_schedule": "single_sigma"}, 61.5, "l-dae", True),
        Rung("predict-noise", "noise prediction again (footnote 4)", {"prediction": "noise"}, None, "l-dae", True),
        Rung("random-crop", "random crops", {"crop": "random"}, 65.0, "l-dae", True),
        Rung("classical-dae", "noise on pixels: the classical DAE", dict(PIXELS), 23.6, "l-dae", True),
    ]
    pixels = [
        Rung(
            f"pixels-d{768 // shrink**2}",
            f"pixels, resized to 1/{shrink}" if shrink > 1 else "pixels",
            {**PIXELS, "latent_dim": f"{768 // shrink**2}/768", **({"shrink": shrink} if shrink > 1 else {})},
            23.6 if shrink == 1 else None,
            "patch-pca",
            True,
        )
        for shrink in (1, 2, 4, 8)
    ]
    dimensions = [
        Rung(name, f"d = {d}", {"latent_dim": f"{d}/768"}, figure, before, True)
        for before, row in TABLE2.items()
        for d, (name, figure) in row.items()
        if name != before
    ]
    return end + pixels + dimensions


def _row(before: str, prefix: str, own: int, figures: dict[int, float]) -> dict[int, tuple[str, float]]:
    return {d: (before if d == own else f"{prefix}-d{d}", figure) for d, figure in figures.items()}


PIXELS = {"tokenizer_type": "pixels", "latent_dim": "768/768"}
# table 2: the road's rung with a tokenizer -> {latent dimension, in 768: (rung, the paper's accuracy)}
TABLE2 = {
    "linear-gamma2": _row("linear-gamma2", "conv-vae", 16, {8: 54.5, 16: 63.4, 32: 62.8, 64: 57.0, 128: 48.1}),
    "patch-vae": _row("patch-vae", "patch-vae", 16, {8: 58.3, 16: 64.9, 32: 64.8, 64: 56.8}),
    "patch-ae": _row("patch-ae", "patch-ae", 16, {8: 59.9, 16: 64.7, 32: 64.6, 64: 59.9}),
    "patch-pca": _row("patch-pca", "patch-pca", 32, {8: 56.0, 16: 63.4, 32: 65.1, 64: 60.0, 128: 53.9}),
}
RUNGS: dict[str, Rung] = {**_road(), **{rung.name: rung for rung in _branches()}}


def options(rung: Rung, recipe: LDAEConfig) -> dict[str, Any]:
    """All options of train_ldae.py by which a rung differs from a recipe.

    A latent dimension is the paper's part of a patch's numbers, in a convolutional VAE a multiple of 4: on small patches some
    rungs of table 2 coincide. A rung that shrinks the pictures shrinks their patches too: tokens stay as many.
    """
    chain = [rung]
    while chain[-1].before is not None:
        chain.append(RUNGS[chain[-1].before])
    merged = {name: value for link in reversed(chain) for name, value in link.change.items()}
    part, whole = map(int, merged["latent_dim"].split("/"))
    unit = 4 if merged["tokenizer_type"] == "conv_vae" else 1
    merged["latent_dim"] = unit * max(1, round(part * recipe.patch_dim / whole / unit))
    if shrink := merged.pop("shrink", None):
        for name, (height, width) in (("image_size", recipe.image_hw), ("patch_size", recipe.patch_hw)):
            if height % shrink or width % shrink:
                raise ValueError(f"{rung.name} needs a {name} divisible by {shrink}, got {height}x{width}")
            merged[name] = [height // shrink, width // shrink]
        merged["latent_dim"] = recipe.num_channels * merged["patch_size"][0] * merged["patch_size"][1]
    return merged


def tokenizer_of(rung: Rung) -> str | None:
    """The first rung of the road whose trained tokenizer is this rung's too, which gives it its name; None: it trains none."""
    wanted = _tokenizer_options(rung)
    if wanted["tokenizer_type"] not in TRAINED:
        return None
    return next(name for name, other in RUNGS.items() if _tokenizer_options(other) == wanted)


def _tokenizer_options(rung: Rung) -> dict[str, Any]:
    """The options that a rung's tokenizer depends on; the seed is another."""
    return {k: v for k, v in options(rung, LDAEConfig()).items() if k.startswith("tokenizer") or k == "latent_dim"}


# ------------------------------------------------------------------------------------------------------------------ run


def run(
    recipe: str, output_dir: Path, rungs: list[Rung], seeds: list[int], workers: int, config: LDAEConfig, extra: list[str]
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
            for name, value in options(rung, config).items():
                command += [f"--{name}", *(value if isinstance(value, list) else [value])]
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
    """What would be run, as lines of text, each with its change; the cost from the runs that are done."""
    lines, times = [], []
    for rung in rungs:
        folders = [output_dir / f"{rung.name}-seed{seed}" for seed in seeds]
        done = [folder for folder in folders if finished(folder)]
        times += [r["seconds"] for folder in done for r in load_results(folder) if r["kind"] == "train"]
        paper = "–" if rung.paper is None else f"{rung.paper:.1f}"
        given = options(rung, config)
        changed = " ".join(f"--{name} {given[name]}" for name in rung.change if name in given)
        lines.append(f"{rung.name:<20} {len(done)}/{len(folders)} done  paper {paper:>4}  {rung.what}: {changed}")
    jobs = _to_do(output_dir, rungs, seeds)
    first = len(_tokenizers_to_do(output_dir, jobs))
    cost = "unknown until one is done"
    if times:
        cost = f"{mean(times) * math.ceil(len(jobs) / workers) / 3600:.1f} hours, from {len(times)} that are done"
    lines.append(f"{len(jobs)} runs to do, {workers} at a time: {cost}")
    return "\n".join([*lines, f"{first} tokenizers to train before them"] if first else lines)


# --------------------------------------------------------------------------------------------------------------- report


def measured(output_dir: Path, protocol: str = "linear-fast") -> dict[str, tuple[float, float, int]]:
    """Accuracy of each rung that is done: (mean over its seeds, standard error of the mean, number of seeds), in %.

    The standard error is the seeds' deviation / sqrt(seeds), or the binomial one where that is larger: all seeds are
    measured on the same pictures.
    """
    by_rung: dict[str, list[Result]] = {}
    for result in load_results(output_dir):
        name = Path(result["file"]).parent.parent.name.rsplit("-seed", 1)[0]
        if result["kind"] == "probe" and name in RUNGS and protocol in result["protocols"]:
            by_rung.setdefault(name, []).append(result["protocols"][protocol])
    figures = {}
    for name, results in by_rung.items():
        accuracies = [result["accuracy"] for result in results]
        error = mean(result["standard_error"] for result in results)
        if len(results) > 1:
            error = max(error, stdev(accuracies) / len(results) ** 0.5)
        figures[name] = mean(accuracies), error, len(results)
    return figures


def verdict(rung: Rung, figures: dict[str, tuple[float, float, int]]) -> str:
    """Whether a rung's change does here what it does in the paper: at two standard errors of the difference."""
    before = RUNGS.get(rung.before or "")
    if before is None or rung.paper is None or before.paper is None:
        return "–"
    if rung.name not in figures or before.name not in figures:
        return "not run"
    difference = figures[rung.name][0] - figures[before.name][0]
    error = math.hypot(figures[rung.name][1], figures[before.name][1])
    claim = rung.paper - before.paper
    if abs(difference) <= 2 * error:
        return "undecided"
    return "agrees" if claim * difference > 0 else "does not"


def report(output_dir: Path) -> str:
    """A Markdown table: each rung's accuracy in the paper and here, its change and the verdict."""
    figures = measured(output_dir)
    if not figures:
        raise FileNotFoundError(f"no rung below {str(output_dir)!r} is done")
    lines = ["| rung | change | paper | here | seeds | change in the paper | here | verdict |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for rung in RUNGS.values():
        if rung.name not in figures:
            continue
        value, error, seeds = figures[rung.name]
        before = RUNGS.get(rung.before or "")
        claim = change = "–"
        if before is not None and None not in (rung.paper, before.paper):
            claim = f"{rung.paper - before.paper:+.1f}"
        if before is not None and before.name in figures:
            other = figures[before.name]
            change = f"{value - other[0]:+.1f} ± {math.hypot(error, other[1]):.1f}"
        paper = "–" if rung.paper is None else f"{rung.paper:.1f}"
        cells = [rung.name, rung.what, paper, f"{value:.1f} ± {error:.1f}", str(seeds), claim, change]
        lines.append(f"| {' | '.join([*cells, verdict(rung, figures)])} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None):
    argv = list(sys.argv[1:] if argv is None else argv)
    extra = argv[argv.index("--") + 1 :] if "--" in argv else []
    parser = argparse.ArgumentParser(
        "ldae.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", help="of train_ldae.py; what no rung changes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ladder"), help="holds a folder for each run")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, metavar="RUNG", help=f"of {', '.join(RUNGS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of each rung")
    parser.add_argument("--workers", type=int, default=max(1, torch.cuda.device_count()), help="runs side by side")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be run, and the cost")
    parser.add_argument("--report", type=Path, help="only write the table of what is done to this file, and road.png")
    given = parser.parse_args(argv[: argv.index("--")] if "--" in argv else argv)
    if given.report:
        given.report.parent.mkdir(parents=True, exist_ok=True)
        given.report.write_text(f"{report(given.output_dir)}\n")
        figures = measured(given.output_dir)
        steps = [(rung.name, rung.paper, figures[name][:2]) for name, rung in RUNGS.items() if name in figures]
        print(given.report, road(steps, given.report.with_name("road.png")))
        return
    if given.recipe is None:
        parser.error("a recipe is needed, such as recipes/imagenette64.yaml")
    if given.workers < 1:
        parser.error(f"--workers must be at least 1, got {given.workers}")
    rungs = [RUNGS[name] for name in given.rungs] if given.rungs else [r for r in RUNGS.values() if not r.side]
    config = parse_arguments([given.recipe, *extra])[0].config()  # refuses what train_ldae.py refuses
    print(plan(given.output_dir, rungs, given.seeds, given.workers, config))
    if given.dry_run:
        return
    failed = run(given.recipe, given.output_dir, rungs, given.seeds, given.workers, config, extra)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their logs in {given.output_dir} say why")
    print(report(given.output_dir))


if __name__ == "__main__":
    main()
