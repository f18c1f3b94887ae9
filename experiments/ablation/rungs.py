"""The rungs from DiT to l-DAE (paper, tables 1 to 3, figure 5): each is a change to the one before it.

This list is all that there is of a rung: the plan, the runs and the report are made from it.
"""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from configuration_ldae import LDAEConfig
from ldae.tokenizers import trained_tokenizers

FIRST = {
    "tokenizer_type": "conv_vae",
    "latent_dim": "16/768",  # of a patch's numbers
    "tokenizer_perceptual_weight": 1.0,
    "tokenizer_adversarial_weight": 0.5,
    "class_conditional": True,
    "input_space": "latent",
    "prediction": "noise",
    "noise_schedule": "ddpm",
}
END = "l-dae"  # the last rung, from which side branches start, and whose blocks and timesteps are measured
# table 2: the paper's accuracies by latent dimension, for the rung on the main path that has the tokenizer
TABLE2 = {
    "linear-gamma2": {8: 54.5, 16: 63.4, 32: 62.8, 64: 57.0, 128: 48.1},
    "patch-vae": {8: 58.3, 16: 64.9, 32: 64.8, 64: 56.8},
    "patch-ae": {8: 59.9, 16: 64.7, 32: 64.6, 64: 59.9},
    "patch-pca": {8: 56.0, 16: 63.4, 32: 65.1, 64: 60.0, 128: 53.9},
}
ON_PATH = {"linear-gamma2": 16, "patch-vae": 16, "patch-ae": 16, "patch-pca": 32}  # the dimension of that rung
TOKENIZERS = {  # what these tokenizers are called
    "linear-gamma2": "convolutional VAE",
    "patch-vae": "patch-wise VAE",
    "patch-ae": "patch-wise AE",
    "patch-pca": "patch-wise PCA",
}
PIXELS = {768: 1, 192: 2, 48: 4, 12: 8}  # figure 5: dimension, and the part of its size to which an image is shrunk
# what several rungs tell together
KIND = "which patch-wise tokenizer hardly matters"
TOO_FEW, TOO_MANY = "fewer than 16 latent dimensions lose", "64 latent dimensions and more lose"
ALIKE = "16 and 32 latent dimensions are about as good"
SPACE = "latents or images as input and as output are as good"
PIXEL_NOISE, PIXEL_DIMENSIONS = "noise on pixels learns little", "noise on pixels does best in 48 dimensions"


@dataclass(frozen=True)
class Rung:
    """One step of the ablation: options of train_ldae.py that change what the rung `before` it does.

    Args:
        what: the change in a few words, for the tables.
        change: the options, by name. A `latent_dim` is a part of a patch's numbers, such as "32/768"; `shrink` divides the
            sides of images and patches.
        paper: the paper's linear accuracy on ImageNet, in %; None where it gives none.
        before: the name of the rung that is changed; None for the first.
        fid: the FID-50K that the paper gives for its images.
        side: whether it is a side branch, on which no rung of the main path is built.
        sign: of the change in accuracy that the paper claims without a figure; 0: no change.
        fact: what the paper learns from it, where several rungs tell the same; None: from this rung alone.
    """

    name: str
    what: str
    change: dict[str, Any]
    paper: float | None = None
    before: str | None = None
    fid: float | None = None
    side: bool = False
    sign: int | None = None
    fact: str | None = None

    @property
    def claim(self) -> float | None:
        """The paper's change in accuracy, in points, or its sign; None where it claims nothing."""
        if self.sign is not None:
            return float(self.sign)
        before = RUNGS[self.before].paper if self.before else None
        return None if before is None or self.paper is None else round(self.paper - before, 1)


def _main_path() -> list[Rung]:
    first = "DiT: convolutional VAE with LPIPS and GAN, classes, DDPM's noise and prediction"
    steps = [
        Rung("dit", first, FIRST, 57.5, fid=11.6),
        Rung("no-classes", "no class conditioning", {"class_conditional": False}, 62.5, fid=30.9),
        Rung("no-perceptual", "tokenizer without LPIPS", {"tokenizer_perceptual_weight": 0.0}, 58.4, fid=54.3),
        Rung("no-adversarial", "tokenizer without the GAN", {"tokenizer_adversarial_weight": 0.0}, 59.0, fid=75.6),
        Rung("linear-gamma2", "γ² falls linearly", {"noise_schedule": "linear_gamma2"}, 63.4, fid=93.2),
        Rung("patch-vae", "patch-wise VAE", {"tokenizer_type": "patch_vae"}, 64.9),
        Rung("patch-ae", "patch-wise AE", {"tokenizer_type": "patch_ae"}, 64.7, fact=KIND),
        Rung("patch-pca", "patch-wise PCA, d = 32", {"tokenizer_type": "pca", "latent_dim": "32/768"}, 65.1, fact=KIND),
        Rung("clean-latent", "predict the clean latent, λ = γ²", {"prediction": "latent"}, 62.4),
        Rung("no-input-scaling", "γ = 1, σ linear to √2, λ = 1/(1 + σ²)", {"noise_schedule": "linear_sigma"}, 63.6),
        Rung("image-input", "image input by inverse PCA", {"input_space": "image"}, 63.6, fact=SPACE),
        Rung("image-output", "image output by inverse PCA", {"prediction": "projected_image"}, 63.9, fact=SPACE),
        Rung("l-dae", "predict the original image", {"prediction": "image"}, 64.5),
    ]
    return [steps[0], *(replace(rung, before=before.name) for before, rung in pairwise(steps))]


def _branches() -> list[Rung]:
    """The side branches of the last rung, and what figure 5 and table 2 have beside the main path."""
    pixels = {"tokenizer_type": "pixels", "latent_dim": "768/768"}
    branches = [
        Rung("one-level", "one noise level", {"noise_schedule": "single_sigma"}, 61.5, "l-dae"),
        Rung("predict-noise", "noise prediction again (footnote 4)", {"prediction": "noise"}, None, "l-dae", sign=0),
        Rung("random-crop", "random crops", {"crop": "random"}, 65.0, "l-dae"),
        Rung("classical-dae", "noise on pixels: the classical DAE", pixels, 23.6, "l-dae", fact=PIXEL_NOISE),
        Rung("pixels-d768", "noise on pixels", pixels, 23.6, "patch-pca", fact=PIXEL_NOISE),
    ]
    for d, before, sign in ((48, 768, 1), (192, 48, -1), (12, 48, -1)):  # the paper: best at 48
        change = {"latent_dim": f"{d}/768", "shrink": PIXELS[d]}
        what = f"noise on pixels, images 1/{PIXELS[d]} as large"
        branches.append(Rung(f"pixels-d{d}", what, change, None, f"pixels-d{before}", sign=sign, fact=PIXEL_DIMENSIONS))
    for name, row in TABLE2.items():
        for d in sorted(row.keys() - {ON_PATH[name]}):
            fact = TOO_FEW if d < 16 else TOO_MANY if d > 32 else ALIKE
            change = {"latent_dim": f"{d}/768"}
            branches.append(Rung(at_dimension(name, d), f"d = {d}", change, row[d], name, fact=fact))
    return [replace(rung, side=True) for rung in branches]


def at_dimension(rung: str, d: int) -> str:
    """The name of the rung of table 2 that has the tokenizer of a rung of the main path, and d latent dimensions."""
    return rung if d == ON_PATH[rung] else f"{rung.replace('linear-gamma2', 'conv-vae')}-d{d}"


RUNGS: dict[str, Rung] = {rung.name: rung for rung in _main_path() + _branches()}


def main_path() -> list[Rung]:
    """The rungs from DiT to l-DAE, in order."""
    return [rung for rung in RUNGS.values() if not rung.side]


def branches() -> list[Rung]:
    """The side branches that are not table 2's, in order; pixels of figure 5 come last, by falling dimension."""
    pixels = [f"pixels-d{d}" for d in PIXELS]
    table2 = {at_dimension(name, d) for name, row in TABLE2.items() for d in row}
    found = [rung for rung in RUNGS.values() if rung.side and rung.name not in table2]
    return sorted(found, key=lambda rung: pixels.index(rung.name) if rung.name in pixels else -1)


def options(rung: Rung, recipe: LDAEConfig | None = None, lpips: bool = True) -> dict[str, Any]:
    """All options of train_ldae.py by which a rung differs from a recipe, by default that of `LDAEConfig`.

    A latent dimension is the same part of a patch's numbers as in the paper, and a multiple of 4 in a convolutional VAE, so
    that some rungs of table 2 coincide on small patches. A rung that shrinks the images shrinks their patches too, so that
    the number of tokens stays. Without `lpips` the first two rungs leave LPIPS out, as the third does.

    Raises:
        ValueError: if the recipe's images or patches cannot be shrunk so far.
    """
    recipe, chain = recipe or LDAEConfig(), [rung]
    while chain[-1].before is not None:
        chain.append(RUNGS[chain[-1].before])
    merged = {name: value for link in reversed(chain) for name, value in link.change.items()}
    part, whole = map(int, merged["latent_dim"].split("/"))
    unit = 4 if merged["tokenizer_type"] == "conv_vae" else 1
    merged["latent_dim"] = unit * max(1, round(part * recipe.patch_dim / whole / unit))
    if (shrink := merged.pop("shrink", 1)) > 1:
        for name, (height, width) in (("image_size", recipe.image_hw), ("patch_size", recipe.patch_hw)):
            if height % shrink or width % shrink:
                raise ValueError(f"{rung.name} needs a {name} divisible by {shrink}, got {height}x{width}")
            merged[name] = [height // shrink, width // shrink]
    if not lpips:
        merged["tokenizer_perceptual_weight"] = 0.0
    return merged


def as_arguments(given: dict[str, Any]) -> list[str]:
    """`options` as a command line of train_ldae.py."""
    parts = []
    for name, value in given.items():
        parts += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def tokenizer_of(rung: Rung, lpips: bool = True) -> str | None:
    """The first rung whose trained tokenizer is this rung's too, and after which it is named; None if the rung trains none."""
    wanted = _tokenizer_options(options(rung, lpips=lpips))
    if wanted["tokenizer_type"] not in trained_tokenizers():
        return None
    return next(name for name, other in RUNGS.items() if _tokenizer_options(options(other)) == wanted)


def _tokenizer_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that a rung's tokenizer depends on, beside the seed."""
    return {k: v for k, v in given.items() if k.startswith("tokenizer") or k == "latent_dim"}


def folder_name(rung: str, seed: int) -> str:
    """What a run's folder is called."""
    return f"{rung}-seed{seed}"


def rung_of(folder: str) -> str | None:
    """The rung of a folder of that name; None for other folders."""
    match = re.fullmatch(r"(.+)-seed\d+", folder)
    return match[1] if match and match[1] in RUNGS else None
