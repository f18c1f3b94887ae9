"""Models as commands load them: whole, of folders that hold what was written to them, with weights that are numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, logging

from configuration_ldae import LDAEConfig
from ldae.files import DIGESTS, damage
from ldae.mistakes import reading
from ldae.names import is_path
from ldae.retries import retried
from modeling_ldae import LDAEForPreTraining


def load_config(source: str | Path, name_of_option: str = "--model") -> LDAEConfig:
    """The configuration of an l-DAE's folder or Hub id. No code that comes with it is run.

    Args:
        name_of_option: what error messages call `source`.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is no l-DAE.
    """
    with reading(name_of_option, source):
        config = _from_pretrained(AutoConfig, source, name_of_option, trust_remote_code=False)
    if not isinstance(config, LDAEConfig):
        raise ValueError(f"{name_of_option}: {str(source)!r} is of type {config.model_type!r}, and no l-DAE")
    return config


def load_model(
    source: str | Path,
    name_of_option: str = "--model",
    model_class: Any = LDAEForPreTraining,
    unused: tuple[str, ...] = (),
    **kwargs,
) -> Any:
    """A model of a folder or Hub id, in evaluation mode; by default an l-DAE, encoder and decoder.

    Its weights are in float32, however they are stored: precision is a choice of the run's, made by autocast, and training in
    weights of bf16 would lose most steps to rounding.

    Args:
        name_of_option: what error messages call `source`.
        model_class: a class with `from_pretrained`.
        unused: weights may be missing whose names begin with one of these.
        kwargs: of `from_pretrained`.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if weights are missing or of another shape, which transformers would replace by random ones; if they are
            not finite, or files of the folder are not those that were written.
    """
    validate_folder(source, name_of_option)
    kwargs = {"dtype": torch.float32, **kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(name_of_option, source), _without_load_report():
        model, loaded = _from_pretrained(model_class, source, name_of_option, **kwargs)
    if mismatched := sorted(loaded["mismatched_keys"]):
        name, there, needed = mismatched[0]
        raise ValueError(
            f"{name_of_option}: {name} of {str(source)!r} is {tuple(there)}, the configuration needs {tuple(needed)}"
        )
    if missing := sorted(name for name in loaded["missing_keys"] if not name.startswith(unused)):
        raise ValueError(
            f"{name_of_option}: {str(source)!r} lacks {len(missing)} of the weights of {type(model).__name__}, "
            f"such as {missing[0]}"
        )
    validate_weights(model, source, name_of_option)
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from listing every weight that a model does not need, such as a decoder's of an encoder.

    What is missing or does not fit is looked at here.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _from_pretrained(auto_class: Any, source: str | Path, name_of_option: str, **kwargs) -> Any:
    folder = Path(source).expanduser()
    if folder.is_file():
        raise FileNotFoundError(f"{name_of_option}: {str(source)!r} is a file; give the model's folder")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{name_of_option}: {str(source)!r} holds no {CONFIG_NAME}, as models do; a run writes its model at its end"
        )
    if not folder.is_dir() and is_path(str(source)):
        raise FileNotFoundError(f"{name_of_option}: there is no folder {str(source)!r}")
    try:
        return retried(lambda: auto_class.from_pretrained(str(folder) if folder.is_dir() else str(source), **kwargs))
    except OSError as error:
        raise FileNotFoundError(
            f"{name_of_option}: {str(source)!r} is neither a model's folder nor on the Hub ({error})"
        ) from error


def validate_folder(source: str | Path, name_of_option: str):
    """Validates that a sealed folder is as it was written. Another folder, or a Hub id, is not looked at.

    Raises:
        ValueError: naming the file that is missing or has changed.
    """
    folder = Path(source).expanduser()
    if (folder / DIGESTS).is_file() and (reason := damage(folder)) is not None:
        raise ValueError(
            f"{name_of_option}: {str(source)!r} is damaged: {reason}; if you have changed it yourself, remove its {DIGESTS}"
        )


def validate_weights(model: nn.Module, source: str | Path, name_of_option: str):
    """Validates that all weights and buffers are finite, and that no tokenizer divides by 0.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name_of_option}: {name} of {str(source)!r} holds NaN or infinity; give another model")
        if f".{name}".endswith(".tokenizer.scale") and not value.all():
            raise ValueError(f"{name_of_option}: {name} of {str(source)!r} holds 0, by which latents are divided")
