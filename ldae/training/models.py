"""An l-DAE to start with: new, or with all of its weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from configuration_ldae import LDAEConfig
from ldae.data.sources import count_classes
from ldae.tokenizers import autoencoders
from modeling_ldae import LDAEForPreTraining

# what a fitted tokenizer is; PCA also has its mean or not, a convolutional one its architecture
FITTED = ("tokenizer_type", "num_channels", "patch_hw", "latent_dim", "latent_scaling")


def build_model(model_args, train_args, examples: datasets.Dataset | datasets.IterableDataset) -> LDAEForPreTraining:
    """A new model of the options, with its trained tokenizer where it has one; or `--init_from`'s weights.

    Args:
        examples: the training images, whose classes `--class_conditional` counts.

    Raises:
        ValueError: for options that contradict `--init_from`'s tokenizer, or ask for weights that it has not.
    """
    attention = {"attn_implementation": train_args.attn_implementation}
    if source := train_args.init_from:
        return load_model(source, "--init_from", config=_changed(source, model_args.overrides()), **attention)
    if train_args.class_conditional:
        model_args = replace(model_args, num_classes=count_classes(examples))
    config = model_args.config()
    if config.tokenizer_type == "conv_vae":
        config = autoencoders.with_autoencoder(config, train_args.tokenizer)
    model = LDAEForPreTraining._from_config(config, **attention)
    if config.tokenizer_type in autoencoders.TRAINED:
        autoencoders.load_into(model.ldae.tokenizer, train_args.tokenizer, model.config)
    return model


def _changed(source: str, given: dict[str, Any]) -> LDAEConfig:
    """The configuration of a folder or Hub id with other options, none of which changes its fitted tokenizer."""
    source = Path(source).expanduser()
    there = LDAEConfig.from_pretrained(source)
    parts = given.pop("autoencoder", {}).items() if there.tokenizer_type == "conv_vae" else ()
    config = LDAEConfig.from_pretrained(source, **{k: v for k, v in given.items() if k != "autoencoder"})
    names = (*FITTED, "subtract_mean") if there.tokenizer_type == "pca" else FITTED
    pairs = {name.replace("_hw", "_size"): (getattr(config, name), getattr(there, name)) for name in names}
    pairs |= {f"autoencoder: {name}": (value, there.autoencoder_config.get(name)) for name, value in parts}
    for name, (asked, was) in pairs.items():
        if asked != was:
            raise ValueError(f"--{name} {asked} contradicts --init_from, whose tokenizer has {was}; leave it out")
    return config


def load_model(source: str, name_of_option: str = "--model", **kwargs) -> LDAEForPreTraining:
    """An l-DAE, encoder and decoder, of a folder or Hub id.

    Args:
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if weights are missing or of another shape, which transformers would replace by random ones.
    """
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, loaded = LDAEForPreTraining.from_pretrained(Path(source).expanduser(), **kwargs)
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, there, needed = mismatched[0]
        raise ValueError(f"{name_of_option}: {name} of {source!r} is {tuple(there)}, the options need {tuple(needed)}")
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{name_of_option}: {source!r} lacks {len(missing)} of the l-DAE's weights, such as {missing[0]}"
        )
    return model
