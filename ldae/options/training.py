"""The options of a pre-training run: its images, and how it trains."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from ldae.options.declaration import option
from ldae.options.shared import HUB, ColumnArguments, HubArguments

RUN, OPTIMIZATION, TOKENIZER_TRAINING = "Run", "Optimization", "Tokenizer and its training"
COMPUTE, RECORDS = "Precision and memory", "Checkpoints, logs and probes"


@dataclass
class DataArguments(ColumnArguments):
    """The options that say which images a run reads, and how."""

    title: ClassVar[str] = "Data"

    data: str = option(
        "photos",
        "'photos' (embedded), a folder of images in any nesting with or without labels, a folder of parquet files, or "
        "the name of a Hub data set (NAME:CONFIGURATION where it has several).",
        defines_run=True,
    )
    data_name: str | None = option(
        None,
        "What the results and the card call the images; by default the folder's own name or the Hub id.",
    )
    train_split: str = option("train", "Split to train on.", defines_run=True)
    validation_split: str = option(
        "validation", "Labelled split that the probes are measured on; val, valid and test are found too."
    )
    held_out: float = option(
        0.01,
        "Part of the images that is not trained on, where there is no validation split: 8 to 1,000 images, or a fifth of "
        "fewer than 40. On these, or on 1,000 images of the validation split, the loss is measured; with 0, it is not.",
        minimum=0,
        exclusive_maximum=1,
        defines_run=True,
    )
    streaming: bool = option(
        False,
        "Read the training split of a Hub data set, or parquet files, as they come, without preparing them on disk. A stream "
        "needs max_steps or max_minutes, and nothing is probed.",
    )
    crop: Literal["center", "random", "random_resized"] = option(
        "center",
        "Part of an image that is trained on: the centre (the paper's default), a random window, or a random part, resized.",
        defines_run=True,
    )
    flip: bool = option(True, "Mirror half of the images (the paper does not say).", defines_run=True)
    on_bad_image: Literal["skip", "error"] = option(
        "skip", "Unreadable images are counted, named and skipped, or they stop the run."
    )
    num_workers: int = option(0, "Processes that read images, for each training process.", minimum=0)
    pca_patches: int = option(
        1_000_000,
        "Patches that PCA is fitted to, from images in random order; 0 takes all patches of all images.",
        minimum=0,
    )


@dataclass
class TrainArguments(HubArguments):
    """The options that say how a run trains, and what it leaves."""

    output_dir: str | None = option(
        None,
        "Folder of the run, which in the end is a Hub folder; by default runs/ldae-SIZE-DATA.",
        group=RUN,
    )
    dry_run: bool = option(
        False,
        "Only say what would be trained on what, with how much memory and in how long, from a few steps; nothing is written.",
        group=RUN,
    )
    overwrite: bool = option(False, "Replace another run's results in output_dir.", group=RUN)
    resume: bool = option(
        False, "Go on from the last checkpoint in output_dir, or start afresh where there is none.", group=RUN
    )
    init_from: str | None = option(
        None,
        "Start a new run from the weights and the configuration of this folder or Hub model. Its tokenizer is taken as it "
        "is, whatever a recipe says of it, without a fit to the new images.",
        group=RUN,
    )
    epochs: float = option(
        100,
        "Passes over the images; given here, it replaces a recipe's max_steps and max_minutes.",
        group=RUN,
        exclusive_minimum=0,
    )
    max_steps: int | None = option(None, "Optimizer steps, instead of epochs.", group=RUN, minimum=1)
    max_minutes: float | None = option(
        None,
        "Budget of time of training, instead of epochs; the learning rate follows it. What comes before the first step, such as "
        "PCA, does not count, nor do probes, pictures and the loss on held-out images. With max_steps, the run ends at what "
        "comes first.",
        group=RUN,
        exclusive_minimum=0,
    )
    clock: Literal["wall", "processor"] = option(
        "wall",
        "The time that max_minutes counts: the wall clock's, or a process's processor time, all its threads together, "
        "the mean of several processes, which other work on the machine does not lengthen.",
        group=RUN,
    )
    seed: int = option(
        0,
        "Seed of the weights, the order of the images, crops, noise and timesteps.",
        group=RUN,
        minimum=0,
        maximum=2**32 - 1,
        defines_run=True,
    )
    class_conditional: bool = option(
        False,
        "Condition the blocks on the data's classes; num_classes is then their number.",
        group=RUN,
        defines_run=True,
    )

    per_device_batch_size: int = option(
        64, "Images in a batch of one process.", group=OPTIMIZATION, minimum=1, maximum=1_000_000, defines_run=True
    )
    gradient_accumulation_steps: int = option(
        1, "Batches in an optimizer step.", group=OPTIMIZATION, minimum=1, maximum=1_000_000, defines_run=True
    )
    base_learning_rate: float | None = option(
        None,
        "Peak learning rate for 256 images in a step, scaled linearly with them; by default 2e-3 for the tiny size, 4e-4 for "
        "small, and the paper's 1e-4 for larger ones.",
        group=OPTIMIZATION,
        exclusive_minimum=0,
        defines_run=True,
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate as it is, instead of base_learning_rate.",
        group=OPTIMIZATION,
        exclusive_minimum=0,
        defines_run=True,
    )
    warmup_ratio: float = option(
        0.1,
        "Part of the run in which the learning rate rises linearly; it then falls by half a cosine.",
        group=OPTIMIZATION,
        minimum=0,
        exclusive_maximum=1,
        defines_run=True,
    )
    adam_beta1: float = option(
        0.9, "AdamW's beta 1.", group=OPTIMIZATION, minimum=0, exclusive_maximum=1, defines_run=True
    )
    adam_beta2: float = option(
        0.999, "AdamW's beta 2.", group=OPTIMIZATION, minimum=0, exclusive_maximum=1, defines_run=True
    )
    weight_decay: float = option(
        0.0, "AdamW's weight decay of matrices (paper: none).", group=OPTIMIZATION, minimum=0, defines_run=True
    )
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0 does not clip.", group=OPTIMIZATION, minimum=0, defines_run=True
    )
    ema_decay: float = option(
        0.9999,
        "Decay of the averaged weights, which are the run's result; it rises to this by (1 + step) / (10 + step). With 0, "
        "nothing is averaged.",
        group=OPTIMIZATION,
        minimum=0,
        exclusive_maximum=1,
        defines_run=True,
    )

    tokenizer: str | None = option(
        None,
        "Folder of a trained tokenizer, for tokenizer_type patch_ae, patch_vae or conv_vae; by default one is trained first, "
        "into OUTPUT_DIR-tokenizer. For conv_vae it may also be diffusers' AutoencoderKL or a pipeline with one, as a folder "
        "or a Hub id.",
        group=TOKENIZER_TRAINING,
        defines_run=True,
    )
    tokenizer_only: bool = option(False, "Train only the tokenizer, into output_dir.", group=TOKENIZER_TRAINING)
    tokenizer_epochs: float = option(
        10,
        "Passes over the images in the training of a tokenizer.",
        group=TOKENIZER_TRAINING,
        exclusive_minimum=0,
        defines_run=True,
    )
    tokenizer_learning_rate: float = option(
        1e-3,
        "Peak learning rate of a tokenizer's training, for 256 images in a step.",
        group=TOKENIZER_TRAINING,
        exclusive_minimum=0,
        defines_run=True,
    )
    tokenizer_kl_weight: float | None = option(
        None,
        "Weight of the KL term of a VAE; by default 1 for patch_vae (as the paper writes it), 1e-6 for conv_vae (as latent "
        "diffusion).",
        group=TOKENIZER_TRAINING,
        exclusive_minimum=0,
        defines_run=True,
    )
    tokenizer_perceptual_weight: float = option(
        0.0,
        "Weight of LPIPS for conv_vae (latent diffusion: 1).",
        group=TOKENIZER_TRAINING,
        minimum=0,
        defines_run=True,
    )
    tokenizer_lpips_net: Literal["vgg", "alex", "squeeze"] = option(
        "vgg",
        "Backbone of LPIPS: torchvision's VGG16 (as latent diffusion), AlexNet or SqueezeNet 1.1.",
        group=TOKENIZER_TRAINING,
        defines_run=True,
    )
    tokenizer_lpips_weights: str | None = option(
        None,
        "File of that backbone's weights, .safetensors or .pth; by default torchvision downloads it.",
        group=TOKENIZER_TRAINING,
    )
    tokenizer_adversarial_weight: float = option(
        0.0,
        "Weight of the adversarial loss for conv_vae, beside its adaptive weight (latent diffusion: 0.5).",
        group=TOKENIZER_TRAINING,
        minimum=0,
        defines_run=True,
    )
    tokenizer_discriminator_start: int = option(
        1000,
        "Batches of a tokenizer's training before the adversarial loss (latent diffusion: 50,001).",
        group=TOKENIZER_TRAINING,
        minimum=0,
        defines_run=True,
    )
    tokenizer_discriminator_width: int = option(
        64,
        "Channels of the discriminator's first layer (VQGAN: 64).",
        group=TOKENIZER_TRAINING,
        minimum=1,
        defines_run=True,
    )

    mixed_precision: Literal["no", "bf16", "fp16"] | None = option(
        None,
        "Precision of products, as accelerate's; by default bf16 where it is faster, unless accelerate's configuration says "
        "another.",
        group=COMPUTE,
    )
    attn_implementation: str | None = option(
        None,
        "Attention by transformers' name: sdpa, eager, flash_attention_2 or flex_attention; by default sdpa, but eager in bf16 "
        "on a CPU.",
        group=COMPUTE,
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.", group=COMPUTE)
    torch_compile: bool | None = option(
        None,
        "Compile the blocks, which takes up to a minute and then makes steps faster; by default on a GPU.",
        group=COMPUTE,
    )

    checkpointing_steps: int = option(
        500, "Steps between checkpoints; 0 keeps only the one at the end.", group=RECORDS, minimum=0
    )
    checkpointing_minutes: float = option(
        15.0,
        "Minutes of the run's clock after which a checkpoint is due, too; 0: only steps count.",
        group=RECORDS,
        minimum=0,
    )
    keep_checkpoints: int = option(2, "Number of checkpoints that are kept.", group=RECORDS, minimum=1)
    logging_steps: int = option(
        10,
        "Steps between two entries of the trackers; losses.jsonl holds every step.",
        group=RECORDS,
        minimum=1,
    )
    report_to: list[str] = option(
        ["tensorboard"], "Accelerate's trackers, such as tensorboard, trackio or wandb; or none.", group=RECORDS
    )
    image_steps: int = option(
        1000,
        "Steps between drawings of images, clean, noisy and denoised; with 0, they are drawn at the end only.",
        group=RECORDS,
        minimum=0,
    )
    knn_steps: int = option(
        1000,
        "Steps between k-NN probes in training, where there are labels; with 0, there are none.",
        group=RECORDS,
        minimum=0,
    )
    probe: bool = option(True, "Measure k-NN and linear accuracy at the end, where there are labels.", group=RECORDS)
    baseline: bool = option(True, "Measure the untrained baseline beside the trained encoder.", group=RECORDS)

    push_to_hub: bool = option(
        False,
        "Upload the model, its code, card, drawings and results when the run ends, and list them. denoised.png shows eight of "
        "the training images.",
        group=HUB,
    )


LEARNING_RATES = {192: 2e-3, 384: 4e-4}  # by the width up to which they hold: those of the recipes for tiny and small


def default_learning_rate(hidden_size: int) -> float:
    """The peak learning rate for 256 images in a step of a network of some width; the paper's for all above the small size."""
    return next((rate for width, rate in LEARNING_RATES.items() if hidden_size <= width), 1e-4)


# The options of the data and the training that a resumed run must keep. Those of the model it must keep, too.
RUN_DEFINING = tuple(f.name for f in (*fields(DataArguments), *fields(TrainArguments)) if f.metadata["defines_run"])
