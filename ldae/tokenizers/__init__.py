"""What fits and trains the tokenizers of `tokenizers_ldae`.

PCA and pixels are fitted to images by `fitting.fit_to_images`. The others are autoencoders that the loop of all trainings trains
before the l-DAE, into OUTPUT_DIR-tokenizer (`ldae.training.tokenizer_stage`), or that are there already: `--tokenizer FOLDER`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from configuration_ldae import LDAEConfig
from tokenizers_ldae import TOKENIZERS, Tokenizer

if TYPE_CHECKING:
    from ldae.options import TrainArguments


def trained_tokenizers() -> list[str]:
    """The names of the tokenizers that are trained before the l-DAE."""
    return [name for name, tokenizer in TOKENIZERS.items() if tokenizer.trainer is not None]


def _trainer(config: LDAEConfig) -> ModuleType:
    """The module of this package that the configuration's tokenizer names, with its `build`, `configure` and `load`."""
    name = config.tokenizer_class.trainer
    if name is None:
        raise ValueError(f"tokenizer_type={config.tokenizer_type!r} is fitted, not trained")
    return importlib.import_module(f"{__name__}.{name}")


def build(config: LDAEConfig, train_args: TrainArguments) -> nn.Module:
    """A new autoencoder for the trained tokenizer that an l-DAE's configuration names, its losses from `TrainArguments`."""
    return _trainer(config).build(config, train_args)


def configure(config: LDAEConfig, source: str) -> LDAEConfig:
    """An l-DAE's configuration with the architecture of the trained tokenizer in a folder or Hub id.

    Raises:
        FileNotFoundError: if there is no autoencoder.
        ValueError: if it is another model, or does not fit the l-DAE.
    """
    return _trainer(config).configure(config, str(Path(source).expanduser()))


def load(tokenizer: Tokenizer, source: str | Path, config: LDAEConfig):
    """Fills an l-DAE's tokenizer with the weights of a trained one, from a folder or Hub id.

    Raises:
        FileNotFoundError: if there is no autoencoder.
        ValueError: if it is another model, or does not fit the l-DAE.
    """
    _trainer(config).load(tokenizer, str(Path(source).expanduser()), config)
