"""What the ablation's results say beside the paper: accuracies, verdicts, tables 1 to 3, figures 3 to 8.

python -m experiments.ablation.report experiments/results/ablation.jsonl --also experiments/results/crops.jsonl

A study is a .jsonl of results, or a folder of runs. --write docs/ablation.md puts tables and figures there; figures that need
the weights of runs are drawn from --runs.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from configuration_ldae import LDAEConfig
from experiments.ablation import figures
from experiments.ablation.rungs import END, PIXELS, RUNGS, TABLE2, TOKENIZERS, at_dimension
from experiments.ablation.runs import measure
from experiments.ablation.tables import tables
from ldae.data.images import ImageDataset
from ldae.data.photos import load_photos
from ldae.mistakes import run_command
from ldae.options import option, option_parser
from ldae.report.figures import save_denoising
from ldae.report.tables import fill
from modeling_ldae import LDAEForPreTraining

NUM_SHOWN = 6  # images in drawings of noise
FILTERS = ("patch-pca", "patch-ae", "patch-vae")  # whose tokenizers' filters are drawn
PIXEL_NOISE = "classical-dae"  # whose noise is drawn beside that of the last rung


@dataclass
class ReportArguments:
    study: str = option(MISSING, "A .jsonl of results, or a folder of runs.", positional=True)
    also: list[str] = option([], "Other ablations, on other images, for the claims that this one has not run.")
    write: str | None = option(
        None,
        "The .md file whose markers are filled, the figures in a folder of its name; by default the tables are printed.",
    )
    runs: str | None = option(None, "Folder of the runs with weights, for figures of what models see.")


def write(study: str | Path, path: Path, also: Sequence[str | Path] = (), runs: str | Path | None = None) -> list[Path]:
    """Fills the markers of a Markdown file, a new one where there is none; the figures go into a folder of its name.

    Args:
        also: as for `tables`.
        runs: as for `draw`.

    Raises:
        FileNotFoundError: if no rung is done.
        ValueError: if the file is not Markdown, or a marker stands there another number of times than two.
    """
    if path.suffix != ".md":
        raise ValueError(f"--write must be a Markdown file such as docs/ablation.md, got {str(path)!r}")
    texts = tables(study, also)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = path.read_text() if path.exists() else "# The ablation\n"
    missing = [f"\n<!-- {name} -->\n<!-- {name} -->\n" for name in texts if f"<!-- {name} -->" not in found]
    path.write_text(found + "".join(missing))
    for name, text in texts.items():
        fill(path, name, text)
    return [path, *draw(study, path.with_suffix(""), also, runs)]


def draw(
    study: str | Path, folder: Path, also: Sequence[str | Path] = (), runs: str | Path | None = None
) -> list[Path]:
    """The paper's figures as PNG in a folder, and their paths.

    These are schedules (figure 3), rungs (6), dimensions (5 and table 2); with weights also filters (4), noise (7) and
    denoised (8).

    Args:
        also: as for `measure`.
        runs: the folder of the runs that hold their weights; by default the study, if it is a folder.
    """
    return [
        figures.schedules(folder / "schedules.png"),
        *_draw_results(study, folder, also),
        *_draw_models(Path(runs or study), folder),
    ]


def _draw_results(study: str | Path, folder: Path, also: Sequence[str | Path]) -> list[Path]:
    found = measure(study, also)
    bars = {name: (each.accuracy, each.error) for name, each in found.items()}
    shown = [rung for rung in RUNGS.values() if rung.name in bars and (not rung.side or rung.before == END)]
    steps = [(rung.name, rung.paper, bars[rung.name], found[rung.name].baseline) for rung in shown]
    rows = {TOKENIZERS[name]: {d: at_dimension(name, d) for d in sorted(row)} for name, row in TABLE2.items()}
    rows["pixels"] = {d: f"pixels-d{d}" for d in sorted(PIXELS)}
    paper = {
        title: {d: figure for d, name in row.items() if (figure := RUNGS[name].paper) is not None}
        for title, row in rows.items()
    }
    here = {title: {d: bars[name] for d, name in row.items() if name in bars} for title, row in rows.items()}
    drawn = [figures.rungs(steps, folder / "rungs.png")] if steps else []
    return [*drawn, figures.dimensions(paper, here, folder / "dimensions.png")]


def _draw_models(runs: Path, folder: Path) -> list[Path]:
    models = {name: model for name in (*FILTERS, END, PIXEL_NOISE) if (model := _model(runs, name)) is not None}
    drawn = []
    if any(name in models for name in FILTERS):
        config: LDAEConfig = next(iter(models.values())).config
        tokenizers = {TOKENIZERS[name]: models[name].ldae.tokenizer for name in FILTERS if name in models}
        path = folder / "filters.png"
        drawn.append(figures.compared_filters(tokenizers, config.patch_hw, config.num_channels, path))
    if END in models:
        pixel_values = _photos(models[END].config)
        drawn.append(save_denoising(models[END], pixel_values, folder / "denoised.png"))
        if PIXEL_NOISE in models:
            both = {"on pixels": models[PIXEL_NOISE], "on latents": models[END]}
            drawn.append(figures.noise_spaces(both, pixel_values, folder / "noise.png"))
    return drawn


def _model(runs: Path, rung: str) -> LDAEForPreTraining | None:
    for folder in sorted(runs.glob(f"{rung}-seed*")):
        if (folder / "model.safetensors").is_file():
            return LDAEForPreTraining.from_pretrained(folder).eval()
    return None


def _photos(config: LDAEConfig) -> torch.Tensor:
    """Some of the embedded photographs (B, C, H, W) in [-1, 1]: images that may be shown."""
    images = ImageDataset(load_photos("validation"), config.image_hw, config.num_channels)
    return images.pixel_values(range(0, len(images), len(images) // NUM_SHOWN)[:NUM_SHOWN])


def main(argv: list[str] | None = None):
    parser = option_parser(ReportArguments, description=__doc__.split("\n")[0])
    (options,) = parser.parse_args_into_dataclasses(argv)
    if options.write:
        print(*write(options.study, Path(options.write), options.also, options.runs), sep="\n")
    else:
        print(*tables(options.study, options.also).values(), sep="\n\n")


if __name__ == "__main__":
    run_command(main)
