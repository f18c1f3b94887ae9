"""Pre-trains l-DAE: `accelerate launch train_ldae.py [recipe.yaml] [--options]`. `--help` lists the options."""

import json
import math
import shutil
import time
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ldae import LDAEForPreTraining
from ldae.data.images import (
    ImageDataset,
    StepSampler,
    load_examples,
    mix_seed,
    to_pixel_values,
    training_loader,
    why_not_probed,
)
from ldae.features.encoders import Encoder
from ldae.hardware import has_bf16
from ldae.hub.cards import write_card
from ldae.hub.folder import push_folder
from ldae.options import RUN_DEFINING, parse_arguments
from ldae.probes import Knn, Subject, format_probe, probe
from ldae.report.results import open_losses, save_result, short_name
from ldae.tokenizers import stage as tokenizer_stage
from ldae.tokenizers.fitting import explained_variance, fit_to_images
from ldae.training.checkpoints import FULL, Checkpoints, full_state, read_state, refuse_changes
from ldae.training.models import build_model
from ldae.training.optimization import learning_rate, parameter_groups
from ldae.training.run import draw_denoised, refuse, write_run

KNN_IMAGES = 5000  # of each split, that an online probe looks at


def train(model_args, data_args, train_args, model: torch.nn.Module | None = None) -> Path:
    """One pre-training run; returns its folder.

    `model` replaces the l-DAE of the options by another pre-training model with `forward(pixel_values, **noise).loss` and
    `sample_noise(batch_size, generator=)` (see experiments/baselines); with a true `uses_labels`, it is also given `labels` (B,).

    Args:
        model_args, data_args, train_args: as `ldae.options.parse_arguments` gives them.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: before any training, for what cannot work; a `ValueError` also for an
            unreadable image with --on_bad_image error, and for --resume with other options than the run's.
        FloatingPointError: for a loss that is not finite; the last checkpoint is whole.
    """
    began = time.monotonic()
    args = {**vars(data_args), **vars(train_args)}
    # ------------------------------------------------------------------------------- refuse what cannot work, then build
    output_dir = Path(train_args.output_dir).expanduser()
    checkpoints = Checkpoints(output_dir / "checkpoints", train_args.keep_checkpoints)
    last = checkpoints.last() if train_args.resume else None
    accelerator = Accelerator(
        mixed_precision=train_args.mixed_precision,
        gradient_accumulation_steps=train_args.gradient_accumulation_steps,
        log_with=[tracker for tracker in train_args.report_to if tracker != "none"] or None,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / "logs"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # probes are fitted while others wait
    )
    refuse(train_args)
    if accelerator.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        accelerator.print("This processor has no bf16 instructions: --mixed_precision no is many times faster here.")
    set_seed(train_args.seed)
    columns = {"image_column": data_args.image_column, "label_column": data_args.label_column}
    examples = load_examples(data_args.data, data_args.train_split, data_args.streaming, **columns)
    model = build_model(model_args, train_args, examples) if model is None else model
    config = model.config
    image_hw = getattr(config, "image_hw", (config.image_size, config.image_size))
    uses_labels = getattr(model, "uses_labels", False)
    if uses_labels and "label" not in (examples.features or {}):
        raise ValueError("--data has no labels, which this model needs: give --label_column or a folder for each class")
    images = ImageDataset(examples, image_hw, config.num_channels, data_args.crop, data_args.flip, train_args.seed)
    splits = None  # what probes look at
    if not images.streaming and (train_args.probe or train_args.knn_steps):
        splits = examples, load_examples(data_args.data, data_args.validation_split, **columns)
        if (reason := why_not_probed(*splits)) is not None:
            accelerator.print(f"Nothing is probed: {reason}.")
            splits = None

    per_batch = train_args.per_device_batch_size * accelerator.num_processes
    per_step = per_batch * train_args.gradient_accumulation_steps
    if train_args.max_steps is not None:
        max_steps = train_args.max_steps
    elif train_args.max_minutes is not None:
        max_steps = 1 << 40  # the clock decides
    elif images.streaming:
        raise ValueError("a stream has no length: give max_steps or max_minutes")
    else:
        max_steps = math.ceil(train_args.epochs * len(images) / per_step)
    peak = train_args.learning_rate or train_args.base_learning_rate * per_step / 256

    with accelerator.main_process_first():
        if train_args.overwrite and last is None and accelerator.is_main_process:
            for name in ("checkpoints", "results", "images", "logs", "losses.jsonl"):  # a run's own, nothing else
                path = output_dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        output_dir.mkdir(parents=True, exist_ok=True)
    if train_args.resume and last is None:
        accelerator.print(f"There is no checkpoint in {checkpoints.folder}: starting afresh.")
    options = {**vars(model_args), **{name: args[name] for name in RUN_DEFINING}}
    state = {"step": 0, "seconds": 0.0, "bad_images": [], "loss": None, "options": options}
    if last is not None:
        state = read_state(last)
        given = {**options, "images per step": per_step}
        if isinstance(model, LDAEForPreTraining):  # how its tokenizer is trained, autoencoders.stage compares
            given = {name: value for name, value in given.items() if not name.startswith("tokenizer_")}
        refuse_changes({**state["options"], "images per step": state["images_per_step"]}, given)
    elif isinstance(model, LDAEForPreTraining) and train_args.init_from is None:
        state["bad_images"] = fit_to_images(
            model.to(accelerator.device), images, data_args.pca_patches, data_args.num_workers
        )
        if config.tokenizer_type == "pca":
            held = explained_variance(model.ldae.tokenizer)
            accelerator.print(f"{config.latent_dim} principal components hold {held:.1%} of the patches' variance.")
    state["images_per_step"] = per_step
    if state["bad_images"] and data_args.on_bad_image == "error":
        raise ValueError(f"unreadable images (--on_bad_image error): {'; '.join(state['bad_images'][:5])}")

    plain = type(model)(config)  # an unwrapped copy for probes, images and saving
    if train_args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    groups = parameter_groups(model, train_args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(train_args.adam_beta1, train_args.adam_beta2))
    sample_noise = model.sample_noise
    if train_args.torch_compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(model.parameters(), train_args.ema_decay) if train_args.ema_decay else None
    if last is not None:
        checkpoints.load(last, model, optimizer, ema)
        accelerator.print(f"Going on from {last}.")
    accelerator.init_trackers("ldae", {k: str(v) for k, v in args.items()})

    def part_done() -> float:
        """Of the run: 1 at its end, by steps or by the clock."""
        by_clock = state["seconds"] / 60 / train_args.max_minutes if train_args.max_minutes is not None else 0
        return max(state["step"] / max_steps, by_clock)

    def snapshot() -> torch.nn.Module:
        """The averaged model as it is now, whole, in evaluation mode."""
        plain.load_state_dict(full_state(model, ema, FULL))
        return plain.to(accelerator.device).eval()

    @cache
    def crops(most: int | None) -> list[ImageDataset]:
        """Centre crops of both splits, or of at most so many random images of each."""
        orders = [torch.randperm(len(split), generator=torch.Generator().manual_seed(0)) for split in splits]
        parts = [split.select(sorted(order[:most].tolist())) for split, order in zip(splits, orders, strict=True)]
        return [ImageDataset(part, image_hw, config.num_channels) for part in parts]

    def subject(trained: torch.nn.Module, most: int | None = None) -> Subject:
        encoder = Encoder(trained, name=str(output_dir))
        return Subject(encoder, *crops(most), accelerator, train_args.seed, num_workers=data_args.num_workers)

    def save_checkpoint():
        state["bad_images"] = sorted(set(gather_object(state["bad_images"])))  # each process has met its own
        checkpoints.save(accelerator, model, optimizer, ema, state)

    # --------------------------------------------------------------------------------------------------------------- loop
    losses = open_losses(output_dir / "losses.jsonl", state["step"]) if accelerator.is_main_process else None
    generator = torch.Generator(accelerator.device)
    first = accelerator.process_index * train_args.per_device_batch_size
    rank = slice(first, first + train_args.per_device_batch_size)  # this process's part of a batch
    sampler = StepSampler(
        images, state["step"], max_steps, train_args.per_device_batch_size, train_args.gradient_accumulation_steps,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    batches = iter(training_loader(sampler, data_args.num_workers))
    bar = tqdm(initial=state["step"], total=max_steps, desc="training", disable=not accelerator.is_main_process)
    began -= state["seconds"]  # of the run before it was resumed
    started, first_step = time.monotonic(), state["step"]
    progress = part_done()
    model.train()
    while progress < 1:
        step = state["step"]
        rate = learning_rate(progress, peak, train_args.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=accelerator.device)
        for micro_step in range(train_args.gradient_accumulation_steps):
            batch = next(batches)
            for name in set(batch["bad"]).difference(state["bad_images"]):
                if data_args.on_bad_image == "error":
                    raise ValueError(f"unreadable image (--on_bad_image error): {name}")
                print(f"Skipping {name}")
                state["bad_images"].append(name)
            # every process draws the noise of the whole batch and takes its part, so their number changes nothing
            generator.manual_seed(mix_seed(train_args.seed, step, micro_step))
            noise = {name: value[rank] for name, value in sample_noise(per_batch, generator=generator).items()}
            if uses_labels:
                noise["labels"] = batch["label"].to(accelerator.device)
            with accelerator.accumulate(model):
                loss = model(to_pixel_values(batch["pixel_values"].to(accelerator.device)), **noise).loss
                total += accelerator.reduce(loss.detach(), "mean") / train_args.gradient_accumulation_steps
                if not torch.isfinite(total):
                    checkpoints.stop(step + 1, total.item(), gather_object(batch["name"]))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), train_args.max_grad_norm or math.inf)
                optimizer.step()
                optimizer.zero_grad()
        if ema is not None:
            ema.step(model.parameters())

        state["step"] = step = step + 1
        seconds = torch.tensor(time.monotonic() - began, device=accelerator.device)
        state["seconds"] = accelerator.reduce(seconds, "mean").item()
        progress = part_done()
        value = total.item()
        state["loss"] = value if state["loss"] is None else 0.98 * state["loss"] + 0.02 * value
        speed = (step - first_step) * per_step / (time.monotonic() - started)
        entry = {"loss": value, "learning_rate": rate, "images_per_second": speed, "grad_norm": float(norm)}
        if losses is not None:
            losses.write(json.dumps({"step": step, **entry}) + "\n")
        bar.total = max(step, round(step / progress))
        bar.set_postfix(loss=f"{state['loss']:.4f}", lr=f"{rate:.1e}", images_s=f"{speed:.0f}", refresh=False)
        bar.update()
        if step % train_args.logging_steps == 0:
            accelerator.log(entry, step)
        if splits and train_args.knn_steps and step % train_args.knn_steps == 0:
            if (knn := Knn()(subject(snapshot(), KNN_IMAGES))) is not None:
                accelerator.print(f"step {step}: k-NN {knn['accuracy']:.1f} %")
                accelerator.log({"knn_accuracy": knn["accuracy"]}, step)
            accelerator.wait_for_everyone()
        if train_args.image_steps and step % train_args.image_steps == 0:
            averaged = snapshot()
            if accelerator.is_main_process:
                draw_denoised(averaged, images, output_dir / "images" / f"step-{step:08d}.png")
        if train_args.checkpointing_steps and step % train_args.checkpointing_steps == 0 and progress < 1:
            save_checkpoint()
    bar.close()
    save_checkpoint()

    # ---------------------------------------------------------------------------------------- the end: folder, probes, Hub
    trained, probed, name = snapshot(), None, short_name(data_args.data)
    replaces = train_args.overwrite or train_args.resume
    if accelerator.is_main_process:
        losses.close()
        arguments = {"model_size": model_args.model_size, **args}
        write_run(trained, images, output_dir, state, per_step, arguments, uses_labels)
    if splits and train_args.probe:
        probed = probe(subject(trained), floor=train_args.floor, data_name=name)
    if accelerator.is_main_process:
        if probed is not None:
            save_result(output_dir / "results" / f"probe-{name}.json", probed, replaces)
            print(format_probe(probed))
        write_card(output_dir, train_args.hub_model_id)
        if state["bad_images"]:
            print(f"Unreadable images, skipped: {len(state['bad_images'])}; results/train.json names them.")
        print(f"Checkpoint: {output_dir}")
        if isinstance(trained, LDAEForPreTraining):
            print(f"clean | noisy | denoised: {output_dir / 'denoised.png'}")
        if train_args.push_to_hub:
            print(push_folder(output_dir, train_args.hub_model_id or output_dir.name, private=train_args.hub_private))
    for tracker in accelerator.trackers:  # end_training() would end the processes' group, which a next training needs
        tracker.finish()
    return output_dir


def main(argv: list[str] | None = None) -> Path:
    model_args, data_args, train_args = parse_arguments(argv)
    refuse(train_args)
    if (stage := tokenizer_stage.stage(model_args, data_args, train_args)) is not None:
        folder = train(*stage)
        train_args.tokenizer = str(folder)
    if not train_args.tokenizer_only:
        folder = train(model_args, data_args, train_args)
    PartialState().destroy_process_group()
    return folder


if __name__ == "__main__":
    main()
