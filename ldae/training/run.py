"""A pre-training run: what is validated and built before its first step, and what is done between two steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from transformers import PreTrainedModel

from configuration_ldae import pair
from ldae import launch
from ldae.data.images import ImageDataset, to_pixel_values
from ldae.data.order import StepSampler, training_loader
from ldae.data.sources import label_fault, load_train, load_validation
from ldae.interruption import Interruption
from ldae.mistakes import reading
from ldae.optimization import ENDLESS, Length, compile_blocks, parameter_groups
from ldae.options import RUN_DEFINING, default_learning_rate
from ldae.seeds import mix_seed
from ldae.tokenizers.fitting import explained_variance, fit_to_images
from ldae.training.checkpoints import FULL, Checkpoints, full_state, read_state, validate_unchanged
from ldae.training.clock import Clock
from ldae.training.folder import open_folder, validate
from ldae.training.learning import HELD_OUT_FILE, LearningCurve, about_images, hold_out
from ldae.training.models import build_model
from ldae.training.probing import RunProbes
from ldae.training.recorder import Recorder
from modeling_ldae import LDAEForPreTraining

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class Run:
    """A run that is ready for its next step: new, or resumed from its last checkpoint.

    `state` is what a checkpoint holds beside tensors: the number of the last "step", the run's "seconds", its "loss" (a running
    mean), the unreadable images ("bad_images"), its "options" and "images_per_step", where the lanes of a "stream" stand, and the
    "fingerprint" of its images.

    A run is a context that holds its folder, so that no other run writes to it. In it, SIGINT and SIGTERM end the run with a line
    that says how to go on.

    Args:
        model_args, data_args, train_args: as `ldae.options.parse_arguments` gives them.
        model: replaces the l-DAE of the options (see `train_ldae.train`).

    Raises:
        FileExistsError, FileNotFoundError, ValueError: before any training, for what cannot work.
    """

    def __init__(self, model_args, data_args, train_args, model: torch.nn.Module | None = None):
        validate(train_args)
        self.clock = Clock(train_args.clock)
        self.model_args, self.data_args, self.train_args = model_args, data_args, train_args
        self.output_dir = Path(train_args.output_dir).expanduser()
        self.checkpoints = Checkpoints(self.output_dir / "checkpoints", train_args.keep_checkpoints)
        with ExitStack() as held:
            self.interruption = held.enter_context(Interruption("the same command with --resume goes on"))
            self.accelerator = _accelerator(train_args, self.output_dir)
            self._build(model)
            last = open_folder(self.output_dir, self.checkpoints, train_args, self.accelerator, held)
            self.state = self._started() if last is None else self._resumed(last)
            if (bad_images := self.state["bad_images"]) and data_args.on_bad_image == "error":
                raise ValueError(f"unreadable images (--on_bad_image error): {'; '.join(bad_images[:5])}")
            self._prepare(last)
            self.place, self.saved_at = self.state["stream"], self.state["seconds"]
            self._held = held.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception):
        self._held.close()

    # ------------------------------------------------------------------------------------------------- before the first step

    def _build(self, model: torch.nn.Module | None):
        """Loads the images and the model."""
        data_args, train_args, accelerator = self.data_args, self.train_args, self.accelerator
        set_seed(train_args.seed)
        examples = load_train(data_args, data_args.streaming)
        attention = train_args.attn_implementation or launch.attention(accelerator)
        if model is None:
            model = build_model(self.model_args, train_args, examples, attention)
        elif attention is not None and isinstance(model, PreTrainedModel):
            with reading("--attn_implementation", attention):
                model.set_attn_implementation(attention)
        self.unwrapped = model
        config = self.unwrapped.config
        self.is_ldae = isinstance(self.unwrapped, LDAEForPreTraining)
        self.uses_labels = getattr(self.unwrapped, "uses_labels", False)
        self.num_classes = getattr(config, "num_classes", None) or config.num_labels
        if self.uses_labels:
            self._validate_labels(examples)
        self._divide(examples, pair(config.image_size), config.num_channels)
        self.images_per_batch = train_args.per_device_batch_size * accelerator.num_processes
        self.images_per_step = self.images_per_batch * train_args.gradient_accumulation_steps
        if train_args.base_learning_rate is None:
            train_args.base_learning_rate = default_learning_rate(config.hidden_size)
        self.peak_learning_rate = train_args.learning_rate or train_args.base_learning_rate * self.images_per_step / 256
        self.length = self._length()

    def _validate_labels(self, examples: Dataset | IterableDataset):
        if "label" not in (examples.features or {}):
            raise ValueError("--data has no labels, which this model needs: give --label_column or a folder a class")
        if not self.data_args.streaming and (fault := label_fault(examples, self.num_classes)):
            raise ValueError(f"--num_classes {self.num_classes}: {fault}")

    def _divide(self, examples: Dataset | IterableDataset, image_hw: tuple[int, int], num_channels: int):
        """Divides the images into those that are trained on, held out and probed."""
        data_args, seed = self.data_args, self.train_args.seed
        validation, held, self.held_origin = self._validation_split(), None, "nothing"
        if not data_args.streaming:
            examples, held, self.held_origin = hold_out(examples, validation, data_args.held_out, seed)
        self.images = ImageDataset(examples, image_hw, num_channels, data_args.crop, data_args.flip, seed)
        self.held = None if held is None else ImageDataset(held, image_hw, num_channels)
        for line in about_images(self.images, self.held, self.held_origin) if self.is_ldae else ():
            self.accelerator.print(line)
        self.probes = RunProbes(
            self.accelerator, self.images, validation, image_hw, data_args, self.train_args, name=str(self.output_dir)
        )

    def _validation_split(self) -> Dataset | None:
        """The images that are probed or held out, where there is such a split and one of both is wanted."""
        data_args, train_args = self.data_args, self.train_args
        if data_args.streaming or not (data_args.held_out or train_args.probe or train_args.knn_steps):
            return None
        return load_validation(data_args.data, data_args.validation_split, **data_args.columns)

    def _length(self) -> Length:
        max_steps, max_minutes = self.train_args.max_steps, self.train_args.max_minutes
        if max_steps is None:
            if max_minutes is not None:
                max_steps = ENDLESS
            elif self.images.streaming:
                raise ValueError("a stream has no length: give max_steps or max_minutes")
            else:
                max_steps = math.ceil(self.train_args.epochs * len(self.images) / self.images_per_step)
        return Length(max_steps, max_minutes)

    def _options(self) -> dict[str, Any]:
        """The options that a resumed run must not change."""
        given = {**vars(self.data_args), **vars(self.train_args)}
        return {**vars(self.model_args), **{name: given[name] for name in RUN_DEFINING}}

    def _started(self) -> dict[str, Any]:
        """The state of a new run, whose tokenizer is fitted here."""
        bad_images = []
        if self.is_ldae and self.train_args.init_from is None:
            data_args, model = self.data_args, self.unwrapped.to(self.accelerator.device)
            bad_images = fit_to_images(model, self.images, data_args.pca_patches, data_args.num_workers)
            for name in sorted(bad_images):
                self.accelerator.print(f"Skipping {name}")
            if model.ldae.tokenizer.linear and not model.ldae.tokenizer.fitted:
                raise ValueError(
                    f"--data {data_args.data!r}: all patches are the same, so there is nothing to learn from them"
                )
            if model.ldae.tokenizer.orthonormal and model.config.latent_dim < model.config.patch_dim:
                held = f"{explained_variance(model.ldae.tokenizer):.1%} of the patches' variance"
                self.accelerator.print(f"The {model.config.latent_dim} components of the latent space hold {held}.")
        return {
            "step": 0, "seconds": 0.0, "bad_images": bad_images, "loss": None, "measured": None, "options": self._options(),
            "images_per_step": self.images_per_step, "stream": [], "fingerprint": self.images.fingerprint(),
            "version": self._version(),
        }  # fmt: skip

    def _resumed(self, last: Path) -> dict[str, Any]:
        """The state of a checkpoint, if its run had the same options."""
        state = read_state(last)
        given = {**self._options(), "images per step": self.images_per_step}
        if self.is_ldae:  # `ldae.training.tokenizer_stage` compares how its tokenizer is trained
            given = {name: value for name, value in given.items() if not name.startswith("tokenizer_")}
        validate_unchanged({**state["options"], "images per step": state["images_per_step"]}, given)
        if (now := self._version()) != state["version"]:
            self.accelerator.print(
                f"The images of --data {self.data_args.data!r} have changed since the run was started: from step "
                f"{state['step'] + 1} on it learns from those that are there now, in another order."
            )
            state |= {"version": now, "fingerprint": self.images.fingerprint(), "measured": None}
            if self.accelerator.is_main_process:  # other images were held out
                (self.output_dir / HELD_OUT_FILE).unlink(missing_ok=True)
        return state

    def _version(self) -> str:
        """A digest of the images that are trained on and of those that are held out, which changes with any of them."""
        return "-".join(images.version() for images in (self.images, self.held) if images is not None)

    def _prepare(self, last: Path | None):
        """Builds the optimizer and the averaged weights, and loads the checkpoint `last` into them."""
        from diffusers.training_utils import EMAModel  # takes a second to import, which --help need not wait for

        train_args, accelerator, model = self.train_args, self.accelerator, self.unwrapped
        on_gpu = accelerator.device.type == "cuda"
        self.averaged = type(model)(model.config)
        self.sample_noise = model.sample_noise
        if train_args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(
            parameter_groups(model, train_args.weight_decay),
            lr=self.peak_learning_rate,
            betas=(train_args.adam_beta1, train_args.adam_beta2),
            fused=accelerator.scaler is None,  # with fp16, accelerate cannot see that a fused step was skipped
        )
        if on_gpu if train_args.torch_compile is None else train_args.torch_compile:
            compile_blocks(model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = None
        if train_args.ema_decay:
            # a GPU would spend more time on launching one operation for each tensor; there is none for many of FSDP's
            foreach = on_gpu and accelerator.distributed_type is not DistributedType.FSDP
            self.ema = EMAModel(self.model.parameters(), train_args.ema_decay, foreach=foreach)
        if last is not None:
            self.checkpoints.load(last, self.model, self.optimizer, self.ema)
            accelerator.print(f"Going on from {last}.")
        arguments = {**vars(self.data_args), **vars(train_args)}
        accelerator.init_trackers("ldae", {name: str(value) for name, value in arguments.items()})
        self.generator = torch.Generator(accelerator.device)
        self.recorder = Recorder(
            accelerator, self.state, self.length, self.output_dir / "losses.jsonl", self.checkpoints,
            self.clock, self.images_per_step, train_args.logging_steps,
        )  # fmt: skip
        self.curve = None
        if self.held is not None and self.is_ldae:
            self.curve = LearningCurve(
                accelerator, self.images, self.held, self.held_origin, self.output_dir, self.state,
                self.images_per_step, train_args.seed, self.data_args.num_workers,
            )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- between two steps

    @property
    def progress(self) -> float:
        """The part of the run that is done, by steps or by the clock: 0 at its start, at least 1 when it is over."""
        return self.length.progress(self.state["step"], self.state["seconds"])

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps is due after the last one; 0: never."""
        return bool(every) and self.state["step"] % every == 0

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint is due after the last step, by its number or by the minutes since the one before."""
        minutes, seconds = self.train_args.checkpointing_minutes, self.state["seconds"] - self.saved_at
        return self.is_due(self.train_args.checkpointing_steps) or 0 < 60 * minutes <= seconds

    def advance(self):
        """Counts the step whose weights were just updated."""
        self.state["step"] += 1
        self.state["stream"] = self.place

    @property
    def ends(self) -> bool:
        """Whether a signal has reached this process, or a worker of its loader has died."""
        return self.interruption.number is not None or self.loader.death is not None

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What is done in it takes no time of the run: it is not training, and other methods do without."""
        with self.clock.stopped():
            yield
            self.accelerator.wait_for_everyone()

    def end_if_interrupted(self):
        """Ends the run with a checkpoint of the last step, if a signal or the death of a worker has reached one of its processes.

        Raises:
            SystemExit: for a signal.
            ChildProcessError: for a worker that died.
        """
        if not self.recorder.interrupted:
            return
        checkpoint = self.save_checkpoint()
        received = gather_object([(self.interruption.number, self.loader.death)])
        numbers, deaths = ([one for one in each if one] for each in zip(*received, strict=True))
        if numbers:  # which have ended the workers too
            self.interruption.end(numbers[0])
        raise ChildProcessError(
            f"{deaths[0]} The steps before it are in {checkpoint}; --resume goes on from it. "
            "Fewer --num_workers need less memory."
        )

    def batches(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Gives the micro-batches of each step, until the run is over. The run's clock starts here, once the images are ready.

        Raises:
            Exception: what the reading of images raised, such as a `ValueError` for an unreadable image with --on_bad_image
                error. The steps before it are in a checkpoint, of a run of one process.
        """
        train_args, accelerator = self.train_args, self.accelerator
        sampler = StepSampler(
            self.images, self.state["step"], self.length.max_steps, train_args.per_device_batch_size,
            train_args.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes,
            self.state["stream"],
        )  # fmt: skip
        self.loader = training_loader(sampler, self.data_args.num_workers, accelerator.device)
        self.clock.start(after=self.state["seconds"])
        batches = self._received(sampler)
        while self.progress < 1:
            yield islice(batches, train_args.gradient_accumulation_steps)

    def _received(self, sampler: StepSampler) -> Iterator[dict[str, Any]]:
        """Gives the loader's batches, once it is noted where a stream stands after each and which images are unreadable."""
        try:
            for batch in self.loader:
                if self.images.streaming:
                    self.place = sampler.passed.popleft()
                self.report_unreadable(batch["bad"])
                yield batch
        except Exception:  # whatever reading raises, such as a decoder's error, the steps so far are kept
            if self.state["step"] and self.accelerator.num_processes == 1:  # others would wait for each other
                self.save_checkpoint()
            if (last := self.checkpoints.last()) is not None:
                print(f"\nThe last checkpoint is {last}; --resume goes on from it.")
            raise

    def report_unreadable(self, names: Iterable[str]):
        """Notes unreadable images, "name: error" each, and prints those that are new.

        Raises:
            ValueError: for one, with --on_bad_image error.
        """
        for name in sorted(set(names).difference(self.state["bad_images"])):
            if self.data_args.on_bad_image == "error":
                raise ValueError(f"unreadable image (--on_bad_image error): {name}")
            print(f"Skipping {name}")
            self.state["bad_images"].append(name)

    def inputs(self, batch: dict[str, Any], micro_step: int) -> dict[str, torch.Tensor]:
        """The arguments of the model's forward for a micro-batch, on the device: images, noise, and labels if it uses them.

        Noise is a function of the seed and the step. Every process draws that of the whole batch and takes its part, so that the
        number of processes changes nothing.
        """
        accelerator, size = self.accelerator, self.train_args.per_device_batch_size
        pixel_values = to_pixel_values(batch["pixel_values"].to(accelerator.device, non_blocking=True))
        self.generator.manual_seed(mix_seed(self.train_args.seed, self.state["step"], micro_step))
        noise = self.sample_noise(self.images_per_batch, generator=self.generator)
        rank = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
        inputs = {"pixel_values": pixel_values, **{name: value[rank] for name, value in noise.items()}}
        if self.uses_labels:
            if (label := int(batch["label"].max())) >= self.num_classes:  # of a stream
                raise ValueError(f"--num_classes {self.num_classes}: an image has the label {label:,}")
            inputs["labels"] = batch["label"].to(accelerator.device, non_blocking=True)
        return inputs

    def snapshot(self) -> torch.nn.Module:
        """The averaged model as it is now, whole, in evaluation mode; later calls change the same module."""
        self.recorder.flush()
        self.averaged.load_state_dict(full_state(self.model, self.ema, FULL))
        return self.averaged.to(self.accelerator.device).eval()

    def save_checkpoint(self) -> Path:
        """Writes a checkpoint and returns its path, unless the loss or gradient of a step so far was not finite.

        Raises:
            FloatingPointError: if it was not.
        """
        self.recorder.flush()
        self.state["bad_images"] = sorted(set(gather_object(self.state["bad_images"])))  # each process has met its own
        lanes = {place["lane"]: place for place in gather_object(self.state["stream"])}  # and has read its own
        self.state["stream"] = [lanes[lane] for lane in sorted(lanes)]
        self.saved_at = self.state["seconds"]
        return self.checkpoints.save(self.accelerator, self.model, self.optimizer, self.ema, self.state)


def _accelerator(train_args, output_dir: Path) -> Accelerator:
    return launch.start(
        train_args.mixed_precision,
        gradient_accumulation_steps=train_args.gradient_accumulation_steps,
        log_with=[tracker for tracker in train_args.report_to if tracker != "none"] or None,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
    )
