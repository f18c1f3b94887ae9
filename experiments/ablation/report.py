"""What the road's results say beside the paper's tables 1 to 3 and figures 3 to 8: accuracies, verdicts, tables, drawings.

All of it is made from results files; images that need weights are drawn where the runs still hold them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch

from configuration_ldae import LDAEConfig
from experiments.ablation.rungs import PIXELS, RUNGS, TABLE2, Rung, at_dimension, options, rung_of
from ldae.data.images import ImageDataset
from ldae.data.order import to_pixel_values
from ldae.data.photos import load_photos
from ldae.options import RUN_DEFINING
from ldae.probes import format_figure
from ldae.report import figures as plots
from ldae.report.results import load_results
from ldae.report.tables import fill
from modeling_ldae import LDAEForPreTraining

PROTOCOL = "linear-fast"  # by which rungs are compared
PAPER_TIMESTEPS = {  # appendix A: accuracy by the fixed t, on clean and on noisy images
    "clean": {0: 64.1, 10: 64.5, 20: 64.1, 40: 63.3, 80: 62.2},
    "noisy": {0: 64.2, 10: 65.0, 20: 65.0, 40: 65.0, 80: 64.5},
}
# of 24 blocks, encoder and decoder together
PAPER_BLOCKS = {9: 58.5, 10: 62.0, 11: 64.1, 12: 64.5, 13: 63.6, 14: 61.9, 15: 59.7}
TOKENIZERS = {
    "linear-gamma2": "convolutional VAE",
    "patch-vae": "patch-wise VAE",
    "patch-ae": "patch-wise AE",
    "patch-pca": "patch-wise PCA",
}
END = "l-dae"  # whose blocks and timesteps are measured
SIDES = ("one-level", "predict-noise", "random-crop", "classical-dae")  # of the end
NO_CHANGE = 0.5  # points of accuracy: what changes less in the paper, which has one seed, is taken for no change
NUM_SHOWN = 6  # images in drawings of noise
TRAINING = "the tokenizer's training"  # among the settings of a run
PLAYERS = {  # settings of a tokenizer's loss, which count where it has a weight
    "tokenizer_perceptual_weight": {"tokenizer_lpips_net"},
    "tokenizer_adversarial_weight": {"tokenizer_discriminator_start", "tokenizer_discriminator_width"},
}
CHANGED_WITH = {  # what an option of a rung changes in the configuration beside itself
    "shrink": {"image_size", "patch_size"},
    "class_conditional": {"num_classes"},
    "tokenizer_type": {"autoencoder", TRAINING}.union(*PLAYERS.values()),
    "latent_dim": {"autoencoder"},
    **PLAYERS,
}
# what makes a run beside its configuration; how its tokenizer was trained is read from that training's own result
NOT_COMPARED = {"data", "seed", *(name for name in RUN_DEFINING if name.startswith("tokenizer"))}
OPTIONS = tuple(name for name in RUN_DEFINING if name not in NOT_COMPARED)

Results = dict[str, dict[str, Any]]  # of one run, by kind


@dataclass(frozen=True)
class Measured:
    """What the runs of a rung gave, over its seeds.

    Args:
        accuracy, error: the mean in %, and its standard error.
        whole: whether the error has the part of the seeds, which is unknown where no rung has several.
        floor: of the untrained network; None where it was not measured.
        distances: of generated images from real ones, by what it is measured on: values of the seeds.
        variance_held: the part of the patches' variance that the tokenizer holds; None where it was not measured.
        setting: the options that the runs had; where they differ between seeds, all of them.
        differs: options in which the runs are not the rung, such as a loss whose weights could not be had.
    """

    accuracy: float
    error: float
    whole: bool
    seeds: int
    floor: float | None
    distances: dict[str, list[float]]
    variance_held: float | None
    setting: dict[str, Any]
    differs: dict[str, Any]


def load_runs(output_dir: str | Path) -> dict[str, list[Results]]:
    """The results of the runs that lie directly below a folder, by rung, with that of its tokenizer's training in tokenizers/.

    What was measured of a run counts if it is of the run's own data.
    """
    runs: dict[str, list[Results]] = {}
    for folder in sorted(Path(output_dir).glob("*-seed*")):
        if (rung := rung_of(folder.name)) is None:
            continue
        results = load_results(folder)
        if (train := next((result for result in results if result["kind"] == "train"), None)) is None:
            continue
        found = {"train": train}
        for result in results:
            kind = result["kind"]
            if kind == "generation":
                own = result.get("data_fingerprint") == train["data"]["fingerprint"]
            else:
                own = kind in ("probe", "sweep") and result["data"]["name"] == train["data"]["name"]
            if own:
                found[kind] = result
        if tokenizer := train["arguments"].get("tokenizer"):
            for result in load_results(Path(output_dir) / "tokenizers" / Path(tokenizer).name):
                found["tokenizer"] = result
        if "probe" in found:
            runs.setdefault(rung, []).append(found)
    return {name: runs[name] for name in RUNGS if name in runs}


def measured(output_dir: str | Path, also: Sequence[str | Path] = ()) -> dict[str, Measured]:
    """The rungs that are done below a folder, by name.

    The standard error of a mean over n seeds is sqrt(b^2 + s^2 / n): b is the binomial one, of the validation images that all
    seeds share, s^2 the variance between seeds, pooled over all rungs that have several, of the ablations in `also` too.
    """
    ablations = [_probed(folder) for folder in (output_dir, *also)]
    between = _between(_figures(done, "accuracy") for runs in ablations for done in runs.values())
    found = {}
    for name, done in ablations[0].items():
        binomial = mean(_figures(done, "standard_error"))
        floors = [run["probe"]["floor"][PROTOCOL]["accuracy"] for run in done if PROTOCOL in run["probe"]["floor"]]
        distances: dict[str, list[float]] = {}
        for run in done:
            if "value" in (generation := run.get("generation", {})):
                what = "{metric}, {num_fake:,} generated and {num_real:,} real images, {sampler}, {num_inference_steps} steps"
                what += ", guidance {guidance_scale:g}" if generation.get("guidance_scale", 1) != 1 else ""
                distances.setdefault(what.format(**generation), []).append(generation["value"])
        held = [value for run in done if (value := run["train"].get("variance_held")) is not None]
        settings = [_setting_of(run) for run in done]
        same = all(setting == settings[0] for setting in settings)
        given = done[0]["train"]["arguments"]
        differs = {k: given[k] for k, v in options(RUNGS[name]).items() if k in given and given[k] != v}
        if (tokenizer := given.get("tokenizer")) and Path(tokenizer).parent.name != "tokenizers":
            differs["tokenizer"] = tokenizer  # one that was not trained here
        found[name] = Measured(
            accuracy=mean(_figures(done, "accuracy")),
            error=math.sqrt(binomial**2 + (between or 0) / len(done)),
            whole=between is not None,
            seeds=len(done),
            floor=mean(floors) if floors else None,
            distances=distances,
            variance_held=mean(held) if held else None,
            setting=settings[0] if same else {"seeds": settings},
            differs=differs,
        )
    return found


def _probed(output_dir: str | Path) -> dict[str, list[Results]]:
    """The runs that were measured by the protocol."""
    runs = load_runs(output_dir)
    probed = {name: [run for run in done if PROTOCOL in run["probe"]["protocols"]] for name, done in runs.items()}
    return {name: done for name, done in probed.items() if done}


def _figures(done: list[Results], which: str) -> list[float]:
    return [run["probe"]["protocols"][PROTOCOL][which] for run in done]


def _between(figures: Iterable[list[float]]) -> float | None:
    """The variance between the seeds of a rung, pooled over all rungs that have several; None where none has."""
    repeated = [(len(values) - 1, variance(values)) for values in figures if len(values) > 1]
    return sum(n * v for n, v in repeated) / sum(n for n, _ in repeated) if repeated else None


def _setting_of(run: Results) -> dict[str, Any]:
    """What can make a difference between runs beside their seed."""
    train = run["train"]
    config = {k: v for k, v in train["config"].items() if k in LDAEConfig.__annotations__}
    setting = {**config, **_training_of(train), **{name: train["arguments"].get(name) for name in PLAYERS}}
    if tokenizer := run.get("tokenizer"):
        setting[TRAINING] = {**_training_of(tokenizer), "kl_weight": tokenizer["config"].get("kl_weight")}
        for loss, names in PLAYERS.items():
            if tokenizer["arguments"].get(loss):
                setting |= {name: tokenizer["arguments"].get(name) for name in names}
    return setting


def _training_of(train: dict[str, Any]) -> dict[str, Any]:
    """How a training went, but for its model and its seed."""
    seen = {"images seen": train["images_seen"], "images": train["data"]["fingerprint"]}
    return {**{name: train["arguments"].get(name) for name in OPTIONS}, **seen}


def compare(rung: Rung, figures: dict[str, Measured]) -> tuple[float, float] | str | None:
    """A rung's change in accuracy and its standard error; None where one of the two is not run.

    Both rungs are measured on the same images, whose share of the error is counted as if they were not: it is too large
    rather than too small. Where the runs differ in more or in less than the rung's change, a sentence that says so.
    """
    after, before = figures.get(rung.name), figures.get(rung.before or "")
    if after is None or before is None:
        return None
    names = after.setting.keys() | before.setting.keys()
    differ = {name for name in names if after.setting.get(name) != before.setting.get(name)}
    changed = set(rung.change).union(*(CHANGED_WITH.get(name, set()) for name in rung.change))
    if stray := differ - changed:
        return f"`{rung.name}` and `{rung.before}` also differ in {', '.join(sorted(stray))}"
    if not differ:
        return f"`{rung.name}` and `{rung.before}` are the same run here"
    return after.accuracy - before.accuracy, math.hypot(after.error, before.error)


def verdict(rung: Rung, figures: dict[str, Measured]) -> str:
    """Whether a rung's change does here what it does in the paper: at two standard errors of the difference.

    "none seen": the paper sees no difference, or one below `NO_CHANGE`, and none is seen. "one seed": no rung has several, so
    that nothing is known of the deviation between seeds.
    """
    difference = compare(rung, figures)
    if difference is None:
        return "not run"
    if isinstance(difference, str):
        return "not comparable"
    if not figures[rung.name].whole:
        return "one seed"
    claims = rung.sign if rung.sign is not None else rung.claim if abs(rung.claim) >= NO_CHANGE else 0
    if abs(difference[0]) <= 2 * difference[1]:
        return "undecided" if claims else "none seen"
    return "agrees" if claims * difference[0] > 0 else "does not"


# --------------------------------------------------------------------------------------------------------------- tables


def tables(output_dir: str | Path, also: Sequence[str | Path] = ()) -> dict[str, str]:
    """Markdown by the marker that it stands at: "setting", "claims", "table 1" to "table 3", "branches", "timesteps", "blocks".

    Args:
        also: folders of other ablations, on other images or at another size: claims that this one has not run are judged there.

    Raises:
        FileNotFoundError: if no rung directly below a folder is done.
    """
    folders = (output_dir, *also)
    ablations = {str(folder): measured(folder, [other for other in folders if other != folder]) for folder in folders}
    for folder, found in ablations.items():
        if not found:
            raise FileNotFoundError(f"no rung in {folder!r} is trained and probed by {PROTOCOL}")
    runs, figures = load_runs(output_dir), ablations[str(output_dir)]
    road = [name for name, rung in RUNGS.items() if not rung.side]
    tokenizers, branches = road.index("patch-vae"), [*SIDES, *(f"pixels-d{d}" for d in PIXELS)]
    return {
        "setting": _setting(runs),
        "claims": _claims(ablations),
        "table 1": _generating(road[:tokenizers], figures),
        "table 2": _table2(figures),
        "table 3": _rungs(road[tokenizers:], figures),
        "branches": "\n".join(
            [_rungs(branches, figures), *filter(None, (_elsewhere(RUNGS[name], ablations) for name in branches))]
        ),
        "timesteps": _timesteps(runs),
        "blocks": _blocks(runs),
    }


def _setting(runs: dict[str, list[Results]]) -> str:
    """What the runs have seen and when they were made, as one sentence."""
    trainings = [run["train"] for done in runs.values() for run in done]

    def span(values: Iterable[float], form: str) -> str:
        low, high = (form.format(value) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    config = trainings[0]["config"]
    epochs = span([run["epochs"] for run in trainings], "{:.1f}")
    minutes = span([run["seconds"] / 60 for run in trainings], "{:.0f}")
    seeds = span([len(done) for done in runs.values()], "{}")
    return (
        f"{len(trainings)} runs of {len(runs)} rungs with {seeds} seeds each; {epochs} epochs of "
        f"{trainings[0]['data']['num_images']:,} images in {minutes} minutes, {config['num_hidden_layers']} encoder and "
        f"{config['decoder_num_hidden_layers']} decoder blocks of width {config['hidden_size']}; L-BFGS linear probe; errors are "
        "one standard error."
    )


def _claims(ablations: dict[str, dict[str, Measured]]) -> str:
    """A row for each claim of the paper: its sign, ours with its error, the verdict; and how many there are of each.

    A claim is judged in the first ablation that has run it.
    """
    rows = [["rung", "after", "change", "paper", "here", "verdict"], ["---"] * 3 + ["---:"] * 2 + ["---"]]
    counts: dict[str, int] = {}
    notes = []
    for rung in RUNGS.values():
        if rung.claim is None:
            continue
        figures = ablations[_judged_in(rung, ablations)]
        result, difference = verdict(rung, figures), compare(rung, figures)
        counts[result] = counts.get(result, 0) + 1
        paper = f"{rung.claim:+.1f}" if rung.sign is None else {1: "+", 0: "0", -1: "−"}[rung.sign]
        here = "{:+.1f} ± {:.1f}".format(*difference) if isinstance(difference, tuple) else "–"
        rows.append([f"`{rung.name}`", f"`{rung.before}`", rung.what, paper, here, result])
        if isinstance(difference, str):
            notes.append(f"\n{difference}.")
        notes.append(_elsewhere(rung, ablations))
    order = ("agrees", "none seen", "undecided", "does not", "one seed", "not comparable", "not run")
    summary = ", ".join(f"{counts[name]} {name}" for name in order if name in counts)
    return "\n".join([f"{sum(counts.values())} claims: {summary}.\n", *_markdown(rows), *filter(None, notes)])


def _judged_in(rung: Rung, ablations: dict[str, dict[str, Measured]]) -> str:
    """The first ablation that has run a rung and the one before it; the first of all where none has."""
    return next(
        (name for name, figures in ablations.items() if compare(rung, figures) is not None), next(iter(ablations))
    )


def _elsewhere(rung: Rung, ablations: dict[str, dict[str, Measured]]) -> str:
    """A sentence on a rung that is not judged in the first ablation."""
    ablation = _judged_in(rung, ablations)
    if ablation == next(iter(ablations)):
        return ""
    names, figures = (rung.name, rung.before), ablations[ablation]
    after, before = (f"`{name}` reaches {_accuracy(figures[name])}" for name in names)
    sentence = f"\n`{rung.name}` is judged in another ablation, {ablation}: {after}, {before}."
    return "\n".join([sentence, *(_differs(name, figures[name]) for name in names if figures[name].differs)])


def _differs(name: str, found: Measured) -> str:
    return f"\n`{name}` was run with {', '.join(f'`--{k} {v}`' for k, v in found.differs.items())}."


def _rungs(names: Iterable[str], figures: dict[str, Measured], *more: tuple[str, Callable[[str], str]]) -> str:
    """A row for each rung; `more` are further columns, as their head and what stands there for a rung's name."""
    head = ["rung", "change", "paper", "here", "floor", "seeds", *(title for title, _ in more)]
    rows, notes = [head, ["---", "---", *["---:"] * (len(head) - 2)]], []
    for name in names:
        rung, found = RUNGS[name], figures.get(name)
        seeds = str(found.seeds if found else 0)
        cells = [f"`{name}`", rung.what, _number(rung.paper), _accuracy(found), _number(found and found.floor), seeds]
        rows.append([*cells, *(cell(name) for _, cell in more)])
        if found and found.differs:
            notes.append(_differs(name, found))
    return "\n".join([*_markdown(rows), *notes])


def _generating(names: Iterable[str], figures: dict[str, Measured]) -> str:
    """`_rungs` with the paper's FID and our distances, a column for each that was measured."""
    names = list(names)
    measures = dict.fromkeys(what for name in names if name in figures for what in figures[name].distances)

    def distance(what: str) -> Callable[[str], str]:
        between = _between(found.distances.get(what, []) for found in figures.values())

        def cell(name: str) -> str:
            values = figures[name].distances.get(what) if name in figures else None
            error = "" if between is None or not values else f" ± {math.sqrt(between / len(values)):.1f}"
            return _number(mean(values) if values else None) + error

        return cell

    columns = [(f"distance {i}", distance(what)) for i, what in enumerate(measures, 1)]
    notes = [f"\nDistance {i}: {what}." for i, what in enumerate(measures, 1)]
    return "\n".join([_rungs(names, figures, ("paper's FID", lambda name: _number(RUNGS[name].fid)), *columns), *notes])


def _table2(figures: dict[str, Measured]) -> str:
    """Tokenizers by latent dimension, "the paper's / ours" in each cell; and the part of the patches' variance they hold."""
    dims = sorted({d for row in TABLE2.values() for d in row})
    rows = [["tokenizer", *(f"d = {d}" for d in dims)], ["---", *["---:"] * len(dims)]]
    for name, row in TABLE2.items():
        ours = {d: _accuracy(figures.get(at_dimension(name, d))) for d in row}
        rows.append([TOKENIZERS[name], *(f"{row[d]:.1f} / {ours[d]}" if d in row else "–" for d in dims)])
    held = [["variance held, in %", *rows[0][1:]], rows[1]]
    for name, row in TABLE2.items():
        found = {d: figures.get(at_dimension(name, d)) for d in dims if d in row}
        parts = {d: 100 * f.variance_held for d, f in found.items() if f and f.variance_held is not None}
        held.append([TOKENIZERS[name], *(_number(parts.get(d)) for d in dims)])
    every = [figures[rung] for name, row in TABLE2.items() for d in row if (rung := at_dimension(name, d)) in figures]
    floors = [found.floor for found in every if found.floor is not None]
    note = [f"\nUntrained, these networks reach {min(floors):.1f} to {max(floors):.1f} %."] if floors else []
    return "\n".join([*_markdown(rows), *note, "", *_markdown(held)])


def _sweep(runs: dict[str, list[Results]]) -> dict[str, Any]:
    """The first sweep of the end of the road by the protocol; without rows where there is none."""
    sweeps = (run["sweep"] for run in runs.get(END, []) if "sweep" in run)
    empty = {"depth": [], "timesteps": []}
    return next((found for found in sweeps if PROTOCOL in found["depth"][0]["protocols"]), empty)


def _timesteps(runs: dict[str, list[Results]]) -> str:
    """Accuracy by the t that features are taken at, "the paper's / ours" in each cell."""
    rows = [
        ["images", *(f"t = {t}" for t in PAPER_TIMESTEPS["clean"])],
        ["---", *["---:"] * len(PAPER_TIMESTEPS["clean"])],
    ]
    for images, row in PAPER_TIMESTEPS.items():
        measures = [m for m in _sweep(runs)["timesteps"] if m["noisy"] == (images == "noisy")]
        ours = {m["t"]: m["protocols"][PROTOCOL] for m in measures}
        rows.append([images, *(f"{paper:.1f} / {format_figure(PROTOCOL, ours.get(t))}" for t, paper in row.items())])
    return "\n".join(_markdown(rows))


def _blocks(runs: dict[str, list[Results]]) -> str:
    """Accuracy by the block that features are taken from, counted through encoder and decoder: two rows for each side."""
    rows = [["paper", *(f"block {block} of 24" for block in PAPER_BLOCKS)], ["---", *["---:"] * len(PAPER_BLOCKS)]]
    rows.append(["linear", *map(_number, PAPER_BLOCKS.values())])
    depth = _sweep(runs)["depth"]
    if not depth:
        return "\n".join(_markdown(rows))
    ours = [
        ["here", *(f"block {i} of {len(depth)}" for i in range(1, len(depth) + 1))],
        ["---", *["---:"] * len(depth)],
    ]
    ours.append([PROTOCOL, *(format_figure(PROTOCOL, row["protocols"][PROTOCOL]) for row in depth)])
    return "\n".join([*_markdown(rows), "", *_markdown(ours)])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _accuracy(found: Measured | None) -> str:
    return "–" if found is None else f"{found.accuracy:.1f} ± {found.error:.1f}"


def _markdown(lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in lines]


# -------------------------------------------------------------------------------------------------------------- drawings


def draw(output_dir: str | Path, folder: Path, also: Sequence[str | Path] = ()) -> list[Path]:
    """The paper's figures 3 to 8 as PNG in a folder; 4, 7 and 8 only where runs still hold their weights.

    Args:
        also: as for `measured`.

    schedules (3), filters (4), dimensions (5, with table 2), road (6), noise (7) and denoised (8).
    """
    output_dir, figures = Path(output_dir), measured(output_dir, also)
    road = [name for name, rung in RUNGS.items() if name in figures and (not rung.side or name in SIDES)]
    drawn = [plots.schedules(folder / "schedules.png")]
    if road:
        steps = [(name, RUNGS[name].paper, _bar(figures[name]), figures[name].floor) for name in road]
        drawn.append(plots.road(steps, folder / "road.png"))
    pixels = {d: RUNGS[f"pixels-d{d}"].paper for d in sorted(PIXELS)}
    paper = {TOKENIZERS[name]: row for name, row in TABLE2.items()}
    paper["pixels"] = {d: figure for d, figure in pixels.items() if figure is not None}
    rungs = {TOKENIZERS[name]: {d: at_dimension(name, d) for d in row} for name, row in TABLE2.items()}
    rungs["pixels"] = {d: f"pixels-d{d}" for d in sorted(PIXELS)}
    here = {name: {d: _bar(figures[rung]) for d, rung in row.items() if rung in figures} for name, row in rungs.items()}
    drawn.append(plots.dimensions(paper, here, folder / "dimensions.png"))
    models = {name: model for name in ("patch-pca", "patch-ae", "patch-vae", END, "classical-dae")
              if (model := _model(output_dir, name)) is not None}  # fmt: skip
    linear = {TOKENIZERS[name]: models[name] for name in ("patch-pca", "patch-ae", "patch-vae") if name in models}
    if linear:
        config: LDAEConfig = next(iter(linear.values())).config
        tokenizers = {name: model.ldae.tokenizer for name, model in linear.items()}
        drawn.append(
            plots.compared_filters(tokenizers, config.patch_hw, config.num_channels, folder / "filters.png", 16)
        )
    if END in models:
        pixel_values = _photos(models[END].config)
        drawn.append(plots.save_denoising(models[END], pixel_values, folder / "denoised.png"))
        if "classical-dae" in models:
            both = {"on pixels": models["classical-dae"], "on latents": models[END]}
            drawn.append(plots.noise_spaces(both, pixel_values, folder / "noise.png"))
    return drawn


def _bar(found: Measured) -> tuple[float, float]:
    return found.accuracy, found.error


def _model(output_dir: Path, rung: str) -> LDAEForPreTraining | None:
    for folder in sorted(output_dir.glob(f"{rung}-seed*")):
        if (folder / "model.safetensors").is_file():
            return LDAEForPreTraining.from_pretrained(folder).eval()
    return None


def _photos(config: LDAEConfig) -> torch.Tensor:
    """Some of the embedded photographs (B, C, H, W) in [-1, 1]: images that may be shown."""
    images = ImageDataset(load_photos("validation"), config.image_hw, config.num_channels)
    chosen = [images[0, i]["pixel_values"] for i in range(0, len(images), len(images) // NUM_SHOWN)][:NUM_SHOWN]
    return to_pixel_values(torch.stack(chosen))


def write(output_dir: str | Path, path: Path, also: Sequence[str | Path] = ()) -> list[Path]:
    """Fills the markers of a Markdown file, a new one where there is none; the figures go into a folder of its name.

    Args:
        also: as for `tables`.

    Raises:
        FileNotFoundError: if no rung is done.
        ValueError: if the file is not Markdown, or a marker stands there another number of times than two.
    """
    if path.suffix != ".md":
        raise ValueError(f"--report must be a Markdown file such as docs/ablation.md, got {str(path)!r}")
    texts = tables(output_dir, also)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = path.read_text() if path.exists() else "# The road\n"
    missing = [f"\n<!-- {name} -->\n<!-- {name} -->\n" for name in texts if f"<!-- {name} -->" not in found]
    path.write_text(found + "".join(missing))
    for name, text in texts.items():
        fill(path, name, text)
    return [path, *draw(output_dir, path.with_suffix(""), also)]
