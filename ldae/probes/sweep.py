"""Where an encoder's best features are (paper, appendix A): accuracy by block and, for l-DAE, by t, clean and noisy."""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ldae.features.encoders import Encoder
from ldae.features.extraction import Features
from ldae.loading import load_model
from ldae.probes.knn import Knn
from ldae.probes.linear_fast import LinearFast
from ldae.probes.measure import Result, format_figure
from ldae.probes.protocol import Protocol
from ldae.probes.subject import Subject
from ldae.seeds import mix_seed
from modeling_ldae import LDAEForPreTraining, NoiseSchedule

TIMESTEPS = (0, 10, 20, 40, 80)

Known = dict[str, Features | None]  # of "train" and "validation"; None on other processes than the main one


def load_with_decoder(encoder: Encoder) -> LDAEForPreTraining | None:
    """The whole l-DAE of which `load_encoder` loaded the encoder; None for other models, or if its folder has no decoder."""
    if LDAEForPreTraining.__name__ not in (encoder.config.architectures or []):
        return None
    return load_model(encoder.name).to(encoder.device)


def sweep(
    subject: Subject,
    whole: LDAEForPreTraining | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    protocols: Sequence[Protocol] = (Knn(), LinearFast()),
    data_name: str = "data",
) -> Result | None:
    """Measures the mean of the tokens that come out of every block and, for an l-DAE, out of the encoder at every t.

    At every t the encoder is told t and sees the clean image or x_t. The noise of an image is the same at all t. The blocks
    see the clean image at `config.feature_timestep`. Their outputs are taken before the final LayerNorm, which is applied to
    the features at each t and to those of the untrained baseline.

    Args:
        whole: what `load_with_decoder` gives; the decoder's blocks follow the encoder's.
        timesteps: those of an l-DAE, in [0, T); other encoders have none.

    Returns:
        What `save_result` writes, without the environment: "kind", "model", "identity", "data", "depth" (a row
        for each block), "timesteps" (two rows for each t), "floor" (the usual output of the untrained baseline), "seed",
        "seconds". None on other processes than the main one.

    Raises:
        ValueError: for a t outside [0, T), an encoder without blocks, or features that are not finite; or as
            `Subject.features` does.
    """
    start, encoder = time.perf_counter(), subject.encoder
    if encoder.config.model_type != "ldae":
        timesteps = ()
    elif outside := [t for t in timesteps if not 0 <= t < encoder.config.num_train_timesteps]:
        raise ValueError(f"timesteps must be in [0, {encoder.config.num_train_timesteps}), got {outside[0]}")
    if not encoder.blocks:
        raise ValueError(f"--sweep measures an encoder by its blocks, and {encoder.name} has none; leave it out")

    # first, since it validates that the images have labels
    fresh = replace(subject, encoder=encoder.untrained(subject.seed), tokens=False, known={}, predictions={})
    floor = {"description": "the same network with fresh weights, at its usual output", **_measure(fresh, protocols)}

    def measure(known: Known) -> Result:
        bar.update()
        return _measure(replace(subject, tokens=False, progress=False, known=known, predictions={}), protocols)

    num_blocks = {"encoder": len(encoder.blocks), "decoder": 0 if whole is None else len(whole.decoder.layers)}
    places = [(part, i + 1) for part, count in num_blocks.items() for i in range(count)]
    total = len(places) + 2 * len(timesteps)
    blocks = _features(subject, lambda x: block_features(encoder, x, whole))
    bar = subject.progress_bar(desc="sweep", total=total, unit=" rows")
    depth = [
        {"block": block, "part": part, "protocols": measure(_row(blocks, i))} for i, (part, block) in enumerate(places)
    ]
    by_timestep = []
    for t in timesteps:
        for noisy in (False, True):
            if t == encoder.config.feature_timestep and not noisy:
                known = _row(blocks, len(places))
            else:
                represent = TimestepFeatures(encoder, t, noisy, subject.seed)
                known = _features(replace(subject, progress=False), represent)
            by_timestep.append({"t": t, "noisy": noisy, "protocols": measure(known)})
    bar.close()
    if not subject.is_main_process:
        return None
    passes = [features for features in (*blocks.values(), *fresh.known.values()) if features is not None]
    bad = {name for features in passes for name in features.bad}
    return {
        "kind": "sweep",
        "model": encoder.name,
        "identity": subject.identity,
        "data": {**subject.data(data_name), "unreadable": sorted(bad)},
        "depth": depth,
        "timesteps": by_timestep,
        "floor": floor,
        "seed": subject.seed,
        "seconds": time.perf_counter() - start,
    }


def format_sweep(result: Result) -> str:
    """The figures of a sweep as lines of text."""
    rows = [(f"{row['part']} block {row['block']}", row["protocols"]) for row in result["depth"]]
    for row in result["timesteps"]:
        rows.append((f"t = {row['t']}, {'noisy' if row['noisy'] else 'clean'}", row["protocols"]))
    names = list(rows[0][1])
    lines = [f"{'in %':<20}" + "".join(f"{name:>18}" for name in names)]
    for title, figures in [("untrained baseline", result["floor"]), *rows]:
        cells = (format_figure(name, figures[name]) for name in names)
        lines.append(f"{title:<20}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- features


def block_features(
    encoder: Encoder, pixel_values: torch.Tensor, whole: LDAEForPreTraining | None = None
) -> torch.Tensor:
    """(B, K, E): the mean of the tokens after each of K blocks; of an l-DAE (B, K + 1, E), its usual output the last.

    Args:
        pixel_values: images (B, C, H, W) in [-1, 1].
        whole: the l-DAE of the encoder, if the blocks of its decoder are asked for too.
    """
    if encoder.config.model_type != "ldae":
        hiddens = encoder.depths(pixel_values)
    elif whole is None:
        outputs = encoder.model(pixel_values, output_hidden_states=True, return_dict=True)
        hiddens = [*outputs.hidden_states[1:], outputs.last_hidden_state]  # without the embeddings
    else:
        hiddens = _outputs_in_predict(whole, pixel_values)
    return torch.stack([hidden.float().mean(dim=1) for hidden in hiddens], dim=1)


def _outputs_in_predict(model: LDAEForPreTraining, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The tokens (B, N, E) after every block of encoder and decoder, then after the encoder, in one call of `predict`."""
    places = [*model.ldae.layers, *model.decoder.layers, model.ldae.layernorm]
    outputs: dict[nn.Module, torch.Tensor] = {}
    handles = [
        place.register_forward_hook(lambda module, args, output: outputs.update({module: output})) for place in places
    ]
    try:
        t = torch.full((1,), model.config.feature_timestep, device=pixel_values.device)
        model.predict(model.ldae.tokenizer.encode(pixel_values), t, image_hw=tuple(pixel_values.shape[-2:]))
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[place] for place in places]


class TimestepFeatures:
    """Pixel values (B, C, H, W) -> (B, E), the mean of the tokens of an l-DAE that is told t.

    With `noisy` it sees z_t, or its x_t, as in `LDAEForPreTraining.forward`, with noise drawn from (seed, the image) alone.
    """

    def __init__(self, encoder: Encoder, t: int, noisy: bool, seed: int = 0):
        self.model, self.noisy, self.seed = encoder.model, noisy, seed
        self.timesteps = torch.full((1,), t, device=encoder.device)
        self.schedule = NoiseSchedule(encoder.config).to(encoder.device)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        latents = self.noisy_latents(pixel_values) if self.noisy else None
        return self.model(pixel_values, self.timesteps, latents=latents).last_hidden_state.float().mean(dim=1)

    def noisy_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """z_t (B, N, d) of clean images (B, C, H, W)."""
        latents = self.model.tokenizer.encode(pixel_values)
        noise = torch.stack([image_noise(image, latents.shape[1:], self.seed) for image in pixel_values])
        return self.schedule.add_noise(latents, noise, self.timesteps)


def image_noise(pixel_values: torch.Tensor, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal noise for one image (C, H, W), which batches, processes and the order of images do not change."""
    content = zlib.crc32(pixel_values.cpu().contiguous().numpy())
    generator = torch.Generator().manual_seed(mix_seed(seed, content))
    return torch.randn(*shape, generator=generator).to(pixel_values.device)


def _features(subject: Subject, represent: Callable[[torch.Tensor], torch.Tensor]) -> Known:
    represented = replace(subject, represent=represent, tokens=False, known={})
    return {split: represented.features(split) for split in ("train", "validation")}


def _row(known: Known, i: int) -> Known:
    """Features (n, E) of the i-th of several representations (n, K, E)."""
    return {
        split: None if features is None else replace(features, features=features.features[:, i].contiguous())
        for split, features in known.items()
    }


def _measure(subject: Subject, protocols: Sequence[Protocol]) -> Result:
    """Figures by protocol; predictions are left out, since those of every row would be most of the file."""
    figures = {protocol.name: protocol(subject) or {} for protocol in protocols}
    for part in figures.values():
        part.pop("predictions", None)
    return figures
