"""Options of the training script: dataclasses for HfArgumentParser, which a YAML recipe fills before the command line."""

import argparse
import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

from configuration_ldae import SIZES, LDAEConfig
from ldae.report.results import short_name
from ldae.tokenizers import TRAINED

RUN_DEFINING = (  # what a resumed run must not change, since it goes on as if never stopped
    "data", "train_split", "crop", "flip", "per_device_batch_size", "gradient_accumulation_steps", "base_learning_rate",
    "learning_rate", "warmup_ratio", "adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm", "ema_decay", "seed",
    "class_conditional", "tokenizer", "tokenizer_kl_weight", "tokenizer_perceptual_weight", "tokenizer_adversarial_weight",
    "tokenizer_lpips_net", "tokenizer_discriminator_start", "tokenizer_discriminator_width", "tokenizer_epochs",
    "tokenizer_learning_rate",
)  # fmt: skip
LENGTHS = {"epochs", "max_steps", "max_minutes"}  # of a run: one that is given replaces those of a recipe
DEFAULT_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "photos.yaml"


def option(default: Any, text: str):
    """A field of a dataclass that HfArgumentParser makes an option of the command line, with its help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    data: str = option(
        "photos",
        "'photos' (embedded), a folder of images in any nesting with or without labels, a folder of parquet files, or "
        "the name of a Hub data set (NAME:CONFIGURATION where it has several).",
    )
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option("validation", "Labelled split for the probes; val, valid and test are found too.")
    image_column: str | None = option(None, "Column of the images; by default the first that holds images.")
    label_column: str | None = option(None, "Column of the labels; by default 'label' or the first that holds classes.")
    streaming: bool = option(
        False,
        "Read the training split of a Hub data set, or parquet files, as they come, without preparing them on disk; needs "
        "max_steps or max_minutes, and nothing is probed.",
    )
    crop: Literal["center", "random", "random_resized"] = option(
        "center",
        "What is cut out of an image: the centre (the paper's default), a random window, or a random part, resized.",
    )
    flip: bool = option(True, "Mirror half of the images (the paper does not say).")
    on_bad_image: Literal["skip", "error"] = option(
        "skip", "Unreadable images are counted, named and skipped, or stop the run."
    )
    num_workers: int = option(0, "Processes that read images, for each training process.")
    pca_patches: int = option(
        1_000_000, "Patches that PCA is fitted to, from images in random order; 0 takes all patches of all images."
    )


@dataclass
class TrainArguments:
    output_dir: str | None = option(
        None, "The run's folder and in the end the Hub folder; by default runs/ldae-SIZE-DATA."
    )
    overwrite: bool = option(False, "Replace another run's results in output_dir.")
    resume: bool = option(False, "Go on from the last checkpoint in output_dir, or start afresh where there is none.")
    init_from: str | None = option(
        None,
        "Start a new run from the weights and configuration of this folder or Hub model, its tokenizer among them: it is not "
        "fitted to the new images.",
    )
    tokenizer: str | None = option(
        None,
        "Folder of a trained tokenizer, for tokenizer_type patch_ae, patch_vae or conv_vae; by default one is trained first, "
        "into OUTPUT_DIR-tokenizer. For conv_vae also diffusers' AutoencoderKL or a pipeline with one, folder or Hub id.",
    )
    tokenizer_only: bool = option(False, "Train only the tokenizer, into output_dir.")
    tokenizer_epochs: float = option(10, "Passes over the images in the training of a tokenizer.")
    tokenizer_learning_rate: float = option(1e-3, "Peak learning rate of a tokenizer's training, for 256 images.")
    tokenizer_kl_weight: float | None = option(
        None,
        "Weight of the KL term of a VAE; by default 1 for patch_vae (as the paper writes it), 1e-6 for conv_vae (as latent "
        "diffusion).",
    )
    tokenizer_perceptual_weight: float = option(0.0, "Weight of LPIPS for conv_vae (latent diffusion: 1).")
    tokenizer_lpips_net: Literal["vgg", "alex", "squeeze"] = option(
        "vgg", "LPIPS's backbone, torchvision's VGG16 (as latent diffusion), AlexNet or SqueezeNet 1.1."
    )
    tokenizer_lpips_weights: str | None = option(
        None, "File of that backbone's weights, .safetensors or .pth; by default torchvision downloads it."
    )
    tokenizer_adversarial_weight: float = option(
        0.0, "Weight of the adversarial loss for conv_vae, beside its adaptive weight (latent diffusion: 0.5)."
    )
    tokenizer_discriminator_start: int = option(
        1000, "Batches of a tokenizer's training before the adversarial loss (latent diffusion: 50,001)."
    )
    tokenizer_discriminator_width: int = option(64, "Channels of the discriminator's first layer (VQGAN: 64).")
    class_conditional: bool = option(False, "Condition the blocks on the data's classes: num_classes is their number.")
    epochs: float = option(100, "Passes over the images; given here, it replaces a recipe's max_steps and max_minutes.")
    max_steps: int | None = option(None, "Optimizer steps, instead of epochs.")
    max_minutes: float | None = option(
        None,
        "Wall-clock budget of the run with PCA and without the probes, instead of epochs; the learning rate follows it. With "
        "max_steps, the run ends at what comes first.",
    )
    per_device_batch_size: int = option(64, "Images a batch of one process holds.")
    gradient_accumulation_steps: int = option(1, "Batches an optimizer step is made of.")
    base_learning_rate: float = option(
        2e-3,
        "Peak learning rate for 256 images a step, scaled linearly with them; chosen for the tiny size (paper: 1e-4).",
    )
    learning_rate: float | None = option(None, "Peak learning rate as it is, instead of base_learning_rate.")
    warmup_ratio: float = option(
        0.1, "Part of the run in which the rate rises linearly; it then falls by half a cosine."
    )
    adam_beta1: float = option(0.9, "AdamW's beta 1.")
    adam_beta2: float = option(0.999, "AdamW's beta 2.")
    weight_decay: float = option(0.0, "AdamW's weight decay of matrices (paper: none).")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 does not clip.")
    ema_decay: float = option(
        0.9999,
        "Decay of the averaged weights, which are the run's result; it rises to this by (1 + step) / (10 + step). 0: none.",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None, "As accelerate's; by default what accelerate's configuration says."
    )
    attn_implementation: str | None = option(
        None, "sdpa (default), eager, flash_attention_2 or flex_attention; transformers' names."
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.")
    torch_compile: bool = option(False, "Compile the model.")
    seed: int = option(0, "Seed of the weights, the order of the images, crops, noise and timesteps.")
    checkpointing_steps: int = option(500, "Steps between checkpoints; 0 keeps only the one at the end.")
    keep_checkpoints: int = option(2, "Number of checkpoints that are kept.")
    logging_steps: int = option(10, "Steps between two entries of the trackers; losses.jsonl holds every step.")
    report_to: list[str] = option(["tensorboard"], "Accelerate's trackers: tensorboard, trackio, wandb, ...; or none.")
    knn_steps: int = option(1000, "Steps between online k-NN probes, where there are labels; 0: none.")
    image_steps: int = option(1000, "Steps between images of clean | noisy | denoised; 0: only at the end.")
    probe: bool = option(True, "Measure k-NN and linear accuracy at the end, beside the untrained floor, given labels.")
    floor: bool = option(True, "Measure the untrained network beside the trained one.")
    push_to_hub: bool = option(
        False,
        "Upload output_dir when the run ends, checkpoints and logs left out: denoised.png shows eight of the training images, "
        "results name the data's folder.",
    )
    hub_model_id: str | None = option(
        None, "Where to: org/name; by default the name of output_dir in your own account."
    )
    hub_private: bool = option(False, "Make a new repository private.")


def _model_arguments() -> type:
    """A dataclass of the options that configure the model: `model_size` and every field of LDAEConfig, help and all."""
    documented = r"^        (\w+) \(.*?(?:defaults to (.*))?\):\n((?:            .*\n)+)"
    texts = {}
    for name, default, text in re.findall(documented, LDAEConfig.__doc__, re.MULTILINE):
        default = "that of model_size" if name in SIZES["tiny"] else default
        text = f"{text} (default: {default})" if default else text
        texts[name] = " ".join(text.split()).replace("`", "").replace("%", "%%")
    fields = [
        ("model_size", Literal[tuple(SIZES)], option("tiny", "Named size of the encoder; the decoder is as large."))
    ]
    for name, annotation in LDAEConfig.__annotations__.items():
        if name in texts:
            if name in ("image_size", "patch_size"):
                annotation = list[int]
            elif float in get_args(annotation):
                annotation = float
            elif dict in get_args(annotation):
                annotation = str  # JSON; a recipe holds it as it is
            optional = annotation if type(None) in get_args(annotation) else annotation | None
            fields.append((name, optional, option(None, texts[name])))
    return dataclasses.make_dataclass("ModelArguments", fields, namespace={"config": _config})


def _config(self) -> LDAEConfig:
    """The configuration: the named size with the options that were given."""
    return LDAEConfig.from_size(self.model_size, **self.overrides())


def _overrides(self) -> dict[str, Any]:
    """The options that were given, as fields of LDAEConfig."""
    given = {name: value for name, value in vars(self).items() if value is not None and name != "model_size"}
    for name in ("image_size", "patch_size"):
        if name in given and len(given[name]) == 1:
            given[name] = given[name][0]
    if isinstance(text := given.get("autoencoder"), str):
        try:
            given["autoencoder"] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"autoencoder must be JSON such as '{{\"layers_per_block\": 1}}', got {text!r}") from error
    return given


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults, but for None: there, the text says what is taken. What transformers says of --no_probe is what --probe does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[0].startswith("--no_"):
            return f"Switch --{action.dest} off."
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def option_parser(*types: type, description: str) -> HfArgumentParser:
    """A parser of dataclasses whose --help names the defaults."""
    return HfArgumentParser(types, description=description, formatter_class=_Help, allow_abbrev=False)


ModelArguments = _model_arguments()
ModelArguments.overrides = _overrides


def names_given(argv: list[str]) -> set[str]:
    """The options that a command line names, as fields: of --max-steps=3, max_steps."""
    options = (argument.split("=")[0] for argument in argv if argument.startswith("--"))
    return {option.removeprefix("--").replace("-", "_") for option in options}


def parse_arguments(argv: list[str] | None = None):
    """(ModelArguments, DataArguments, TrainArguments) of a command line: `[recipe.yaml] [--options]`, options win.

    Without a recipe and without --data, recipes/photos.yaml is run. An option that says how long a run is, such as --epochs,
    replaces whatever a recipe says of it.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        FileNotFoundError, ValueError: if the recipe is missing or has a key that is no option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = option_parser(
        ModelArguments,
        DataArguments,
        TrainArguments,
        description="Pre-trains l-DAE (arXiv 2401.14404) on images. Usage: train_ldae.py [recipe.yaml] [--options]; options "
        "win over the recipe. Without a recipe and without --data, recipes/photos.yaml is run.",
    )
    recipe = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    given = names_given(argv)
    if recipe is None and given.isdisjoint({"data", "help"}) and "-h" not in argv:
        recipe = DEFAULT_RECIPE
    if recipe is not None:
        defaults = _read_recipe(recipe, {action.dest: action for action in parser._actions})
        if not LENGTHS.isdisjoint(given):
            defaults = {name: value for name, value in defaults.items() if name not in LENGTHS}
        parser.set_defaults(**defaults)
    model, data, train = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    _validate(model, data, train)
    train.output_dir = train.output_dir or f"runs/ldae-{model.model_size}-{short_name(data.data)}"
    return model, data, train


def _read_recipe(path: Path, known: dict) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}")
    recipe = yaml.safe_load(path.read_text()) or {}
    for name, value in recipe.items():
        if name not in known:
            raise ValueError(f"recipe {str(path)!r}: {name!r} is no option of train_ldae.py; --help lists them")
        action = known[name]
        if action.nargs == "+" and not isinstance(value, list):
            recipe[name] = value = [value]
        if action.choices is not None and value not in action.choices:
            raise ValueError(
                f"recipe {str(path)!r}: {name} must be one of {', '.join(map(str, action.choices))}, got {value!r}"
            )
        if action.type is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            recipe[name] = float(value)  # YAML reads 1e-4 as text
    return recipe


def _validate(model, data, train):
    positive = {"per_device_batch_size", "gradient_accumulation_steps", "keep_checkpoints", "logging_steps", "epochs"}
    positive |= {"max_steps", "max_minutes", "base_learning_rate", "learning_rate", "tokenizer_epochs"}
    positive |= {"tokenizer_learning_rate", "tokenizer_kl_weight", "tokenizer_discriminator_width"}
    for name in positive:
        value = getattr(train, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be greater than 0, got {value}")
    not_negative = {"weight_decay", "max_grad_norm", "checkpointing_steps", "knn_steps", "image_steps"}
    not_negative |= {f"tokenizer_{name}" for name in ("perceptual_weight", "adversarial_weight", "discriminator_start")}
    for name in sorted(not_negative):
        if getattr(train, name) < 0:
            raise ValueError(f"--{name} must not be negative, got {getattr(train, name)}")
    for name in ("warmup_ratio", "ema_decay"):
        if not 0 <= getattr(train, name) < 1:
            raise ValueError(f"--{name} must be in [0, 1), got {getattr(train, name)}")
    if data.pca_patches < 0 or data.num_workers < 0:
        raise ValueError(
            f"--pca_patches and --num_workers must not be negative, got {data.pca_patches} and {data.num_workers}"
        )
    if train.init_from is not None:
        for name in ("tokenizer", "class_conditional", "tokenizer_perceptual_weight", "tokenizer_adversarial_weight"):
            if getattr(train, name):
                raise ValueError(f"--{name} is what --init_from brings with it; give one of the two")
        return
    try:
        config = model.config()
    except StrictDataclassError as error:  # its cause is the sentence that names the field
        raise ValueError(str(error.__cause__ or error)) from error
    for name in ("tokenizer_perceptual_weight", "tokenizer_adversarial_weight"):
        if getattr(train, name) and config.tokenizer_type != "conv_vae":
            raise ValueError(f"--{name} needs --tokenizer_type conv_vae, got {config.tokenizer_type!r}")
    if train.tokenizer and config.tokenizer_type not in TRAINED:
        raise ValueError(
            f"--tokenizer needs --tokenizer_type {', '.join(TRAINED)}, got {config.tokenizer_type!r}, which is not trained"
        )
