"""What the road's results say beside the paper's tables 1 to 3 and figures 3 to 8: accuracies, verdicts, tables, drawings.

All of it is made from results files; pictures that need weights are drawn where the runs still hold them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch

from configuration_ldae import LDAEConfig
from modeling_ldae import LDAEForPreTraining

from . import plots
from .data import Pictures, load_examples, to_pixel_values
from .probes import format_figure
from .results import load_results
from .rungs import PIXELS, RUNGS, TABLE2, Rung, at_dimension, options
from .tables import fill

PAPER_TIMESTEPS = {  # appendix A: accuracy by the fixed t, on clean and on noisy pictures
    "clean": {0: 64.1, 10: 64.5, 20: 64.1, 40: 63.3, 80: 62.2},
    "noisy": {0: 64.2, 10: 65.0, 20: 65.0, 40: 65.0, 80: 64.5},
}
PAPER_FID = {"dit": 11.6, "no-classes": 30.9, "no-perceptual": 54.3, "no-adversarial": 75.6, "linear-gamma2": 93.2}
TOKENIZERS = {
    "linear-gamma2": "convolutional VAE",
    "patch-vae": "patch-wise VAE",
    "patch-ae": "patch-wise AE",
    "patch-pca": "patch-wise PCA",
}
TABLE3 = (
    "patch-vae",
    "patch-ae",
    "patch-pca",
    "clean-latent",
    "no-input-scaling",
    "image-input",
    "image-output",
    "l-dae",
)
SIDES = ("one-level", "predict-noise", "random-crop", "classical-dae")  # of the end point
NUM_SHOWN = 6  # pictures in drawings of noise


@dataclass(frozen=True)
class Measured:
    """What the runs of a rung gave, over its seeds.

    Args:
        accuracy, error: the mean in %, and its standard error.
        floor: of the untrained network; None where it was not measured.
        frechet: (value, what it is measured on, the same for both or more seeds) of its generated pictures; None: none.
        differs: options in which the runs are not the rung, such as a loss whose weights could not be had.
    """

    accuracy: float
    error: float
    seeds: int
    floor: float | None = None
    frechet: tuple[float, str] | None = None
    differs: tuple[tuple[str, Any], ...] = ()


def measured(output_dir: str | Path, protocol: str = "linear-fast") -> dict[str, Measured]:
    """The rungs that are done below a folder, by name.

    The standard error of a mean over n seeds is sqrt(s^2 / n), s^2 being the variance between seeds pooled over all rungs that
    have several, or the binomial one where that is larger: all seeds are measured on the same pictures.
    """
    runs: dict[str, list[dict[str, dict]]] = {}
    folders: dict[Path, dict[str, dict]] = {}
    for result in load_results(output_dir):
        folders.setdefault(Path(result["file"]).parent, {})[result["kind"]] = result
    for folder, results in folders.items():
        name = folder.parent.name.rsplit("-seed", 1)[0]
        if name in RUNGS and protocol in results.get("probe", {}).get("protocols", {}):
            runs.setdefault(name, []).append(results)
    accuracies = {
        name: [run["probe"]["protocols"][protocol]["accuracy"] for run in done] for name, done in runs.items()
    }
    repeated = [(len(values) - 1, variance(values)) for values in accuracies.values() if len(values) > 1]
    between = sum(n * v for n, v in repeated) / sum(n for n, _ in repeated) if repeated else 0.0
    found = {}
    for name, done in runs.items():
        binomial = mean(run["probe"]["protocols"][protocol]["standard_error"] for run in done)
        floors = [
            run["probe"]["floor"][protocol]["accuracy"] for run in done if protocol in run["probe"].get("floor", {})
        ]
        distances = [(run["generation"]["value"], run["generation"]["metric"]) for run in done
                     if "value" in run.get("generation", {})]  # fmt: skip
        given = [run["train"]["arguments"] for run in done if "train" in run]
        wanted = options(RUNGS[name])
        differs = {(k, a[k]) for a in given for k, v in wanted.items() if k in a and a[k] != v}
        found[name] = Measured(
            mean(accuracies[name]),
            max(binomial, math.sqrt(between / len(done))),
            len(done),
            mean(floors) if floors else None,
            (mean(value for value, _ in distances), distances[0][1]) if distances else None,
            tuple(sorted(differs)),
        )
    return found


def verdict(rung: Rung, figures: dict[str, Measured]) -> str:
    """Whether a rung's change does here what it does in the paper: at two standard errors of the difference.

    Where the paper sees no difference at all, "agrees" says that none is seen here.
    """
    before = RUNGS.get(rung.before or "")
    if before is None or rung.paper is None or before.paper is None:
        return "–"
    difference = _difference(rung, figures)
    if difference is None:
        return "not run"
    claim = rung.paper - before.paper
    if abs(difference[0]) <= 2 * difference[1]:
        return "undecided" if claim else "agrees"
    return "agrees" if claim * difference[0] > 0 else "does not"


def _difference(rung: Rung, figures: dict[str, Measured]) -> tuple[float, float] | None:
    """The change in accuracy and its standard error; None where one is not run, or they differ in more than the change."""
    after, before = figures.get(rung.name), figures.get(rung.before or "")
    if after is None or before is None or after.differs != before.differs:
        return None
    return after.accuracy - before.accuracy, math.hypot(after.error, before.error)


# --------------------------------------------------------------------------------------------------------------- tables


def tables(output_dir: str | Path) -> dict[str, str]:
    """Markdown by the marker that it stands at: "setting", "table 1", "table 2", "table 3", "branches", "timesteps" and "claims".

    Raises:
        FileNotFoundError: if no rung below the folder is done.
    """
    figures = measured(output_dir)
    if not figures:
        raise FileNotFoundError(f"no rung below {str(output_dir)!r} is done")
    names = list(RUNGS)
    first = names[: names.index("patch-vae")]
    return {
        "setting": _setting(output_dir),
        "table 1": _rungs(first, figures, frechet=True),
        "table 2": _table2(figures),
        "table 3": _rungs(TABLE3, figures),
        "branches": _rungs([*SIDES, *(f"pixels-d{d}" for d in PIXELS)], figures),
        "timesteps": _timesteps(output_dir),
        "claims": _claims(figures),
    }


def _setting(output_dir: str | Path) -> str:
    """What the runs have seen and when they were made, as one sentence."""
    runs = [r for r in load_results(output_dir) if r["kind"] == "train" and r["config"]["model_type"] == "ldae"]

    def span(values: Iterable[float], form: str) -> str:
        low, high = (form.format(value) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    config = runs[0]["config"]
    epochs = span([run["epochs"] for run in runs], "{:.1f}")
    minutes = span([run["seconds"] / 60 for run in runs], "{:.0f}")
    seeds = len({run["seed"] for run in runs})
    return (
        f"{len(runs)} runs of {seeds} seeds, each {epochs} epochs of {runs[0]['data']['num_pictures']:,} pictures in {minutes} "
        "minutes; "
        f"{config['num_hidden_layers']} encoder and {config['decoder_num_hidden_layers']} decoder blocks of width "
        f"{config['hidden_size']}; L-BFGS linear probe; errors are one standard error."
    )


def _rungs(names: Iterable[str], figures: dict[str, Measured], frechet: bool = False) -> str:
    """A row for each rung; with `frechet`, two columns for the quality of what it generates."""
    names = list(names)
    measures = sorted({f.frechet[1] for name in names if (f := figures.get(name)) and f.frechet})
    head = ["rung", "change", "paper", "here", "floor", "seeds", "paper's change", "change here", "verdict"]
    if frechet:
        head[4:4] = ["paper's FID", "distance here"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 3), "---"]]
    notes = [f"Distance here: {measure}." for measure in measures] if frechet else []
    for name in names:
        rung, found = RUNGS[name], figures.get(name)
        before, difference = RUNGS.get(rung.before or ""), _difference(rung, figures)
        known = before is not None and None not in (rung.paper, before.paper)
        cells = [f"`{name}`", rung.what, _number(rung.paper), _accuracy(found), _number(found and found.floor),
                 str(found.seeds if found else 0), f"{rung.paper - before.paper:+.1f}" if known else "–",
                 "–" if difference is None else "{:+.1f} ± {:.1f}".format(*difference), verdict(rung, figures)]  # fmt: skip
        if frechet:
            cells[4:4] = [_number(PAPER_FID.get(name)), f"{found.frechet[0]:.1f}" if found and found.frechet else "–"]
        lines.append(cells)
        if found and found.differs:
            notes.append(f"`{name}` was run with {', '.join(f'`--{k} {v}`' for k, v in found.differs)}.")
    return "\n".join([*_markdown(lines), *(f"\n{note}" for note in notes)])


def _table2(figures: dict[str, Measured]) -> str:
    """Tokenizers by latent dimension, "the paper's / ours" in each cell."""
    dims = sorted({d for row in TABLE2.values() for d in row})
    lines = [["tokenizer", *(f"d = {d}" for d in dims)], ["---", *["---:"] * len(dims)]]
    for tokenizer, row in TABLE2.items():
        cells = [
            f"{row[d]:.1f} / {_accuracy(figures.get(at_dimension(tokenizer, d)))}" if d in row else "–" for d in dims
        ]
        lines.append([TOKENIZERS[tokenizer], *cells])
    return "\n".join(_markdown(lines))


def _timesteps(output_dir: str | Path, protocol: str = "linear-fast") -> str:
    """Accuracy by the t that features are taken at, "the paper's / ours" in each cell, of the first rung that has a sweep."""
    sweeps = [result for result in load_results(output_dir) if result["kind"] == "sweep"]
    lines = [
        ["pictures", *(f"t = {t}" for t in PAPER_TIMESTEPS["clean"])],
        ["---", *["---:"] * len(PAPER_TIMESTEPS["clean"])],
    ]
    for pictures, row in PAPER_TIMESTEPS.items():
        ours = {
            r["t"]: r["protocols"][protocol]
            for s in sweeps[:1]
            for r in s["timesteps"]
            if r["noisy"] == (pictures == "noisy")
        }
        lines.append([pictures, *(f"{paper:.1f} / {format_figure(protocol, ours.get(t))}" for t, paper in row.items())])
    return "\n".join(_markdown(lines))


def _claims(figures: dict[str, Measured]) -> str:
    """How many of the paper's signs are seen here, and which."""
    verdicts: dict[str, list[str]] = {}
    for rung in RUNGS.values():
        verdicts.setdefault(verdict(rung, figures), []).append(f"`{rung.name}`")
    verdicts.pop("–", None)
    total = sum(map(len, verdicts.values()))
    lines = [["verdict", f"of {total} claims", "which"], ["---", "---:", "---"]]
    for name in ("agrees", "does not", "undecided", "not run"):
        lines.append([name, str(len(verdicts.get(name, []))), ", ".join(verdicts.get(name, ["–"]))])
    return "\n".join(_markdown(lines))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _accuracy(found: Measured | None) -> str:
    return "–" if found is None else f"{found.accuracy:.1f} ± {found.error:.1f}"


def _markdown(lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in lines]


# -------------------------------------------------------------------------------------------------------------- drawings


def draw(output_dir: str | Path, folder: Path) -> list[Path]:
    """The paper's figures 3 to 8 as PNG in a folder; 4, 7 and 8 only where runs still hold their weights.

    schedules (3), filters (4), dimensions (5, with table 2), road (6), noise (7) and denoised (8).
    """
    output_dir, figures = Path(output_dir), measured(output_dir)
    road = [name for name, rung in RUNGS.items() if name in figures and (not rung.side or name in SIDES)]
    drawn = [
        plots.schedules(folder / "schedules.png"),
        plots.road([(name, RUNGS[name].paper, _bar(figures[name])) for name in road], folder / "road.png"),
    ]
    paper = {TOKENIZERS[name]: row for name, row in TABLE2.items()}
    rungs = {TOKENIZERS[name]: {d: at_dimension(name, d) for d in row} for name, row in TABLE2.items()}
    rungs["pixels"] = {d: f"pixels-d{d}" for d in sorted(PIXELS)}
    here = {name: {d: _bar(figures[rung]) for d, rung in row.items() if rung in figures} for name, row in rungs.items()}
    drawn.append(plots.dimensions(paper, here, folder / "dimensions.png"))
    models = {name: model for name in ("patch-pca", "patch-ae", "patch-vae", "l-dae", "classical-dae")
              if (model := _model(output_dir, name)) is not None}  # fmt: skip
    linear = {TOKENIZERS[name]: models[name] for name in ("patch-pca", "patch-ae", "patch-vae") if name in models}
    if linear:
        config: LDAEConfig = next(iter(linear.values())).config
        tokenizers = {name: model.ldae.tokenizer for name, model in linear.items()}
        drawn.append(
            plots.compared_filters(tokenizers, config.patch_hw, config.num_channels, folder / "filters.png", 16)
        )
    if "l-dae" in models:
        pixel_values = _photos(models["l-dae"].config)
        drawn.append(plots.save_denoising(models["l-dae"], pixel_values, folder / "denoised.png"))
        if "classical-dae" in models:
            both = {"on pixels": models["classical-dae"], "on latents": models["l-dae"]}
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
    """Some of the embedded photographs (B, C, H, W) in [-1, 1]: pictures that may be shown."""
    pictures = Pictures(load_examples("photos", "validation"), config.image_hw, config.num_channels)
    chosen = [pictures[0, i]["pixel_values"] for i in range(0, len(pictures), len(pictures) // NUM_SHOWN)][:NUM_SHOWN]
    return to_pixel_values(torch.stack(chosen))


def write(output_dir: str | Path, path: Path) -> list[Path]:
    """Fills the markers of a Markdown file, a new one where there is none; the figures go into a folder of its name."""
    texts = tables(output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = path.read_text() if path.exists() else "# The road\n"
    missing = [f"\n<!-- {name} -->\n<!-- {name} -->\n" for name in texts if f"<!-- {name} -->" not in found]
    path.write_text(found + "".join(missing))
    for name, text in texts.items():
        fill(path, name, text)
    return [path, *draw(output_dir, path.with_suffix(""))]
