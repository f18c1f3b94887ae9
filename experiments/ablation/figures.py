"""The drawings of the ablation: the paper's figures 3, 4, 5, 6 and 7."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configuration_ldae import LDAEConfig
from ldae.report.drawing import (
    BLUE,
    GAP,
    GREEN,
    INK,
    LINE,
    ORANGE,
    RED,
    image_columns,
    image_sheet,
    panels,
    save_figure,
    save_image,
)
from ldae.report.figures import filter_sheet
from modeling_ldae import LDAEForPreTraining, NoiseSchedule
from tokenizers_ldae import PatchTokenizer

SCHEDULES = {  # the paper's
    "ddpm": "DDPM: β linear",
    "linear_gamma2": "γ² linear",
    "linear_sigma": "γ = 1, σ linear to √2",
    "single_sigma": "γ = 1, σ = √(1/3)",
}
LARGEST_RATIO = 4.0  # of noise to signal that is drawn
MOST_FILTERS = 16  # of each tokenizer

Bar = tuple[float, float]  # an accuracy and its standard error, in %


def compared_filters(
    tokenizers: Mapping[str, PatchTokenizer],
    patch_hw: tuple[int, int],
    num_channels: int,
    path: str | Path,
) -> Path:
    """Writes the filters of several tokenizers side by side, each below its name (paper, figure 4).

    Raises:
        ValueError: if `num_channels` is not 1, 3 or 4.
    """
    count = min(MOST_FILTERS, *(len(tokenizer.V) for tokenizer in tokenizers.values()))
    sheets = [filter_sheet(tokenizer, patch_hw, num_channels, count) for tokenizer in tokenizers.values()]
    return save_image(image_sheet([sheets], GAP, tokenizers), path)


def rungs(steps: Sequence[tuple[str, float | None, Bar, float | None]], path: str | Path) -> Path:
    """Writes the paper's figure 6 in bars: each rung's linear accuracy in the paper and here, its baseline across ours.

    Args:
        steps: (name, the paper's accuracy or None, ours, its baseline's or None), in %.

    Raises:
        ValueError: if there is none.
    """
    if not steps:
        raise ValueError("there is no rung to draw")
    names, papers, ours, baselines = zip(*steps, strict=True)
    places = np.arange(len(steps))
    figure, (axes,) = panels(1, max(4.0, 0.9 * len(steps) + 1.5), 3.8, grid=False)
    known = [i for i, paper in enumerate(papers) if paper is not None]
    axes.bar(places[known] - 0.2, [papers[i] for i in known], 0.38, color="#c9d3de", label="paper (ImageNet)")
    values, errors = zip(*ours, strict=True)
    axes.bar(places + 0.2, values, 0.38, yerr=errors, color=BLUE, ecolor=INK, capsize=2, label="here")
    measured = [i for i, baseline in enumerate(baselines) if baseline is not None]
    left, right = places[measured] + 0.01, places[measured] + 0.39
    axes.hlines([baselines[i] for i in measured], left, right, color=ORANGE, linestyle=(0, (2, 1.5)), label="baseline")
    axes.set_xticks(places, names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel("linear accuracy (%)")
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    return save_figure(figure, path)


def dimensions(
    paper: Mapping[str, Mapping[int, float]], here: Mapping[str, Mapping[int, Bar]], path: str | Path
) -> Path:
    """Writes accuracy by latent dimension, a line for each tokenizer: the paper's (table 2) beside ours (with figure 5).

    Args:
        paper: tokenizer -> {latent dimension: accuracy}, in %.
        here: tokenizer -> {latent dimension: accuracy}.
    """
    figure, axes = panels(2, 9, 3.8, sharex=True)
    colours = dict(zip(dict.fromkeys([*paper, *here]), (BLUE, GREEN, ORANGE, RED, INK), strict=False))
    for name, row in paper.items():
        axes[0].plot(list(row), list(row.values()), color=colours[name], label=name, **LINE)
    for name, bars in here.items():
        if bars:
            values, errors = zip(*bars.values(), strict=True)
            axes[1].errorbar(list(bars), values, errors, color=colours[name], label=name, capsize=2.5, **LINE)
    shown = sorted({d for row in (*paper.values(), *here.values()) for d in row})
    for panel, title in zip(axes, ("paper (ImageNet)", "here"), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(shown, [str(d) for d in shown], fontsize=8)
        panel.minorticks_off()
        panel.set_xlabel("latent dimension d of a token")
        if panel.get_legend_handles_labels()[1]:
            panel.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("linear accuracy (%)")
    return save_figure(figure, path)


def schedules(path: str | Path) -> Path:
    """Writes how much of the latent the paper's noise schedules keep, and how strong the noise beside it is, by t (figure 3)."""
    figure, (kept, ratio) = panels(2, 9, 3.4)
    for (schedule, label), colour in zip(SCHEDULES.items(), (INK, BLUE, RED, GREEN), strict=True):
        gamma, sigma, _ = NoiseSchedule(LDAEConfig(noise_schedule=schedule)).tables()
        dashes = "--" if schedule == "single_sigma" else "-"
        style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "linestyle": dashes, "label": label}
        kept.plot(gamma.square(), **style)
        ratio.plot(sigma / gamma, **style)
    kept.set_ylabel("signal kept, γ²")
    ratio.set_ylabel("noise to signal, σ / γ")
    ratio.set_ylim(0, LARGEST_RATIO)
    for axes in (kept, ratio):
        axes.set_xlabel("timestep t")
    kept.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


@torch.no_grad()
def noise_spaces(models: Mapping[str, LDAEForPreTraining], pixel_values: torch.Tensor, path: str | Path) -> Path:
    """Writes images beside what models see of them at the middle timestep: noise added where each adds it (paper, figure 7).

    Args:
        models: by the title of their column; they see images, of one size.
        pixel_values: clean images (B, C, H, W) in [-1, 1].
    """
    columns = {"clean": pixel_values}
    for name, model in models.items():
        generator = torch.Generator(model.device).manual_seed(0)
        t = model.config.num_train_timesteps // 2
        columns[name] = model.denoise(pixel_values.to(model.device), t, generator)[0].cpu()
    return save_image(image_columns(columns), path)
