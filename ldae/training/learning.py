"""Whether a run learns, without labels: its loss on images that are held out, beside what needs no network.

Two closed-form predictions stand beside the loss, on the same images and the same noise. `mean`: every patch is the mean patch.
`linear`: the best linear map of each noisy patch alone (the Wiener filter), and the mean of those that the encoder does not see.
A network whose loss is below the second has learned what patches say of each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import evaluation_loader
from ldae.report import figures
from ldae.report.results import open_losses
from ldae.seeds import mix_seed
from modeling_ldae import LDAEForPreTraining
from moments_ldae import PatchMoments

if TYPE_CHECKING:
    import datasets

FEWEST, MOST = 8, 1_000  # images that are held out, of a data set that has enough
FEW = 100  # images, below which a run says that they are few
MARKS = 10  # parts of a run after each of which it is measured
FITTED = 65_536  # patches of training images to which the references are fitted
FEWEST_BETWEEN = 10  # images that are trained on for each that is measured, so that a run spends little time on it
BATCH = 64
HELD_OUT_FILE = "held_out.jsonl"
HELD_OUT = 1 << 33  # tells the noise of held-out images from that of steps, whose seeds have other numbers


def hold_out(
    examples: datasets.Dataset, validation: datasets.Dataset | None, share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset | None, str]:
    """Divides a data set into images that are trained on and images that are not.

    Where there is a validation split, these are at most 1,000 random images of it, and all others are trained on. Otherwise they
    are a random share of the images: at least 8, or a fifth of fewer than 40, and at most 1,000.

    Args:
        share: the part that is held out, in [0, 1); 0: nothing is.

    Returns:
        The images to train on, the held-out images or None, and in words what these are.
    """
    if not share:
        return examples, None, "nothing"
    source = examples if validation is None else validation
    origin = "of the training split" if validation is None else "of the validation split"
    count = len(source)
    if validation is None:
        count = max(int(share * count), min(FEWEST, count // 5))
    if not (count := min(count, MOST)):
        return examples, None, "nothing"
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(mix_seed(seed, HELD_OUT)))
    held = source.select(sorted(order[:count].tolist()))
    if validation is None:
        examples = examples.select(sorted(order[count:].tolist()))
    return examples, held, origin


def about_images(images: ImageDataset, held: ImageDataset | None, origin: str) -> list[str]:
    """What a run says of its images before it starts: whether they are few, and which are held out, a line each."""
    lines = []
    if not images.streaming and len(images) < FEW:
        lines.append(
            f"{len(images)} images are few to learn from: try an encoder from elsewhere first, or --init_from "
            "model_cards/ldae-vit-small-tiny-imagenet64; docs/own-images.md says more."
        )
    if held is not None:
        lines.append(
            f"{len(held):,} images {origin} are not trained on; loss.png and held_out.jsonl show what is learned."
        )
    return lines


class LinearDenoiser:
    """The best linear prediction of a token's target from that token's noisy latent alone, for each t: the Wiener filter.

    For latents z and targets y of clean tokens with means and covariances C, and z_t = gamma z + sigma eps:

        y' = E y + gamma C_yz (gamma^2 C_zz + sigma^2 I)^-1 (z_t - gamma E z)

    Where the network predicts the noise, eps' = sigma (gamma^2 C_zz + sigma^2 I)^-1 (z_t - gamma E z). It is the best one for any
    weights of the target's components. All numbers are float64, on the CPU.

    Args:
        moments: of the vectors (z, y) of clean tokens, (d + D,); of z alone, (d,), where the noise is predicted.
        gamma, sigma: the noise schedule's tables, (T,).
        predicts_noise: whether the target is the noise.
    """

    def __init__(self, moments: PatchMoments, gamma: torch.Tensor, sigma: torch.Tensor, d: int, predicts_noise: bool):
        mean = moments.sum / moments.count
        covariance = moments.second_moment(mean)
        variance, self.axes = torch.linalg.eigh(covariance[:d, :d])
        self.gamma, self.sigma = gamma.double().cpu(), sigma.double().cpu()
        self.predicts_noise, self.latent_mean = predicts_noise, mean[:d]
        self.target_mean = torch.zeros_like(mean[:d]) if predicts_noise else mean[d:]
        self.cross = self.axes if predicts_noise else covariance[d:, :d] @ self.axes
        total = self.gamma.square()[:, None] * variance.clamp(min=0) + self.sigma.square()[:, None]  # (T, d)
        kept = (self.sigma if predicts_noise else self.gamma)[:, None]
        # without noise, a direction without variance says nothing
        floor = 1e-12 * variance.max().clamp(min=1e-12)
        self.gain = torch.where(total > floor, kept / total.clamp(min=floor), 0)

    def __call__(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The predictions (B, N, D or d) for z_t (B, N, d) at timesteps (B,)."""
        timesteps = timesteps.cpu()
        centred = noisy_latents.double().cpu() - self.gamma[timesteps][:, None, None] * self.latent_mean
        return self.target_mean + (centred @ self.axes * self.gain[timesteps][:, None]) @ self.cross.T


def effective_rank(features: torch.Tensor) -> float:
    """How many directions features (n, E) use, from 1 to min(n - 1, E): exp of the entropy of their singular values (Roy and
    Vetterli, 2007) about their mean. Features that have collapsed to one point have none: 0."""
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double().cpu())
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def what_is_learned(result: dict[str, Any]) -> str:
    """What a `LearningCurve.result` says, in three short lines."""
    loss, mean, linear = result["loss"], result["loss_of_mean"], result["loss_of_linear"]
    if loss < linear:
        learned = "It has learned what patches say of each other."
    elif loss < mean:
        learned = (
            "So far it has learned less than single patches tell: train longer, or with another --base_learning_rate."
        )
    else:
        learned = "It has learned nothing: train longer, or with another --base_learning_rate."
    return (
        f"Loss on {result['images']:,} images that were not trained on: {loss:.4f}\n"
        f"Without a network: {mean:.4f} by the mean patch, {linear:.4f} by the best linear denoiser of single patches\n{learned}"
    )


class LearningCurve:
    """Measures a run's averaged l-DAE on held-out images: writes held_out.jsonl, and draws it as loss.png.

    Args:
        train, held: the images that are trained on, as the run crops them, and those that are not, as centre crops.
        origin: in words, what the held-out images are.
        folder: of the run; entries after the state's step are removed there, as of a run that goes on before them.
        state: the run's state, of which "step" is read, and in which "measured" says when it was last measured.
        images_per_step: of all processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        train: ImageDataset,
        held: ImageDataset,
        origin: str,
        folder: Path,
        state: dict[str, Any],
        images_per_step: int,
        seed: int,
        num_workers: int,
    ):
        self.accelerator, self.train, self.held, self.origin, self.folder = accelerator, train, held, origin, folder
        self.state, self.images_per_step = state, images_per_step
        self.seed, self.num_workers = seed, num_workers
        self.references: dict[str, float] = {}  # losses, by what they are of
        self.unreadable: set[str] = set()  # held-out images, "name: error"
        if accelerator.is_main_process:
            open_losses(self.path, state["step"]).close()

    @property
    def path(self) -> Path:
        """The file of what is measured."""
        return self.folder / HELD_OUT_FILE

    @property
    def points(self) -> list[dict[str, Any]]:
        """What has been measured, the earliest first: "step", "loss", "effective_rank" and "largest_rank", its bound."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def is_due(self, progress: float) -> bool:
        """Whether the run has come to its next tenth since this was last true; the first is its start. A short run has fewer."""
        step, tenth = self.state["step"], int(MARKS * min(progress, 1))
        if (last := self.state["measured"]) is not None:
            images = self.images_per_step * (step - last["step"])
            if tenth == last["tenth"] or images < FEWEST_BETWEEN * len(self.held):
                return False
        self.state["measured"] = {"step": step, "tenth": tenth}
        return True

    @torch.no_grad()
    def measure(self, model: LDAEForPreTraining, step: int):
        """Adds the loss and the effective rank of a model in evaluation mode, unless this step has been measured."""
        if not self.accelerator.is_main_process:
            return
        self.references = self.references or self._measure_references(model)
        if self.references and all(point["step"] != step for point in self.points):
            losses, features = [], []
            for pixel_values, noise in self._batches(model):
                with self.accelerator.autocast():
                    loss = model(pixel_values, **noise, return_reconstruction=False).loss
                    features.append(model.ldae(pixel_values).pooler_output.float())
                losses.append(loss.item() * len(pixel_values))
            seen = torch.cat(features)
            loss, rank = sum(losses) / len(seen), effective_rank(seen)
            point = {
                "step": step,
                "loss": loss,
                "effective_rank": rank,
                "largest_rank": min(len(seen) - 1, seen.shape[1]),
            }
            with self.path.open("a") as file:
                file.write(json.dumps(point) + "\n")
            self.accelerator.log({"held_out_loss": loss, "effective_rank": rank}, step)

    def draw(self):
        """Draws loss.png on the main process, where something has been measured."""
        if self.references:
            trained = [json.loads(line) for line in (self.folder / "losses.jsonl").read_text().splitlines()]
            figures.learning_curve(trained, self.points, self.references, self.folder / "loss.png")

    def result(self) -> dict[str, Any] | None:
        """What results/train.json says of it; None where no held-out image can be read."""
        if not self.references:
            return None
        last = self.points[-1]
        return {
            "images": len(self.held) - len(self.unreadable),
            "origin": self.origin,
            "loss": last["loss"],
            "loss_of_mean": self.references["mean"],
            "loss_of_linear": self.references["linear"],
            "effective_rank": last["effective_rank"],
            "largest_rank": last["largest_rank"],
        }

    def _batches(self, model: LDAEForPreTraining) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The held-out images (B, C, H, W) and what `forward` adds to them, which is the same every time."""
        generator = torch.Generator(model.device)
        for number, batch in enumerate(evaluation_loader(self.held, BATCH, self.num_workers)):
            generator.manual_seed(mix_seed(self.seed, number, HELD_OUT))
            noise = model.sample_noise(BATCH, generator=generator)
            self.unreadable.update(batch["bad"])
            if (images := batch["pixel_values"]) is not None:
                yield to_pixel_values(images.to(model.device)), {k: v[: len(images)] for k, v in noise.items()}

    def _measure_references(self, model: LDAEForPreTraining) -> dict[str, float]:
        """The losses on the held-out images of the mean and of the best linear denoiser, both fitted to training images."""
        denoiser, sums, count = self._fit(model), {"mean": 0.0, "linear": 0.0}, 0
        for pixel_values, drawn in self._batches(model):
            noise, timesteps = drawn["noise"], drawn["timesteps"]
            latents = model.ldae.tokenizer.encode(pixel_values)
            target = model.target(pixel_values, latents, noise)
            linear = denoiser(model.noise_schedule.add_noise(latents, noise, timesteps), timesteps)
            mean = denoiser.target_mean.expand_as(linear)
            if "keep" in drawn:  # of the other patches the network sees nothing either
                seen = torch.zeros(linear.shape[:2], dtype=torch.bool).scatter(1, drawn["keep"].cpu(), True)
                linear = torch.where(seen[..., None], linear, mean)
            for name, prediction in (("linear", linear), ("mean", mean)):
                loss = model.loss(target, prediction.float().to(target.device), timesteps)
                sums[name] += loss.item() * len(pixel_values)
            count += len(pixel_values)
        return {name: total / count for name, total in sums.items()} if count else {}

    def _fit(self, model: LDAEForPreTraining) -> LinearDenoiser:
        config, tokenizer = model.config, model.ldae.tokenizer
        predicts_noise = config.prediction == "noise"
        moments = PatchMoments(config.latent_dim + (0 if predicts_noise else config.output_dim))
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))
        count = math.ceil(FITTED / math.prod(config.grid_hw))
        for batch in evaluation_loader(self.train, BATCH, self.num_workers, order[:count].tolist()):
            if (images := batch["pixel_values"]) is not None:
                pixel_values = to_pixel_values(images.to(model.device))
                latents = tokenizer.encode(pixel_values)
                parts = [latents] if predicts_noise else [latents, model.target(pixel_values, latents, latents)]
                moments.update(torch.cat(parts, dim=-1).cpu())
        schedule = model.noise_schedule
        return LinearDenoiser(moments, schedule.gamma, schedule.sigma, config.latent_dim, predicts_noise)
