"""The l-DAE that a run starts with: a new one, or one with weights from a folder or the Hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from configuration_ldae import LDAEConfig
from ldae.data.images import count_classes
from ldae.tokenizers import autoencoders
from modeling_ldae import LDAEForPreTraining

# options that a fitted tokenizer settles; subtract_mean is one more for PCA, the architecture for a convolutional tokenizer
FITTED = ("tokenizer_type", "num_channels", "patch_hw", "latent_dim", "latent_scaling")


def build_model(model_args, train_args, examples: datasets.Dataset | datasets.IterableDataset) -> LDAEForPreTraining:
    """Builds the model that the options describe.

    It is new, with the weights of a trained tokenizer if it needs one, or it has the weights of `--init_from`.

    Args:
        examples: the training images; `--class_conditional` counts their classes.

    Raises:
        FileNotFoundError: if there is no trained tokenizer where `--tokenizer` says.
        ValueError: if options contradict the tokenizer of `--init_from`, or need weights that it does not have.
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
    """The configuration of a folder or Hub id, changed by the given options.

    Raises:
        ValueError: if an option contradicts the fitted tokenizer.
    """
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
    """Loads an l-DAE, encoder and decoder, from a folder or Hub id.

    Args:
        name_of_option: what error messages call `source`.
        kwargs: arguments of `from_pretrained`.

    Raises:
        ValueError: if weights are missing or have another shape; transformers would replace them by random ones.
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
