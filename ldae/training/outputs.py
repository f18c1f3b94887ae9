"""What a run leaves in its folder beside its checkpoints: images while it trains; at its end weights, results and a card."""

import shlex
from typing import Any

import torch

from ldae.data.images import to_pixel_values
from ldae.data.order import StepSampler, training_loader
from ldae.data.sources import hub_id
from ldae.hub.cards import write_card
from ldae.hub.folder import save_hub_folder
from ldae.hub.push import push
from ldae.names import duration, short_name
from ldae.probes import format_probe
from ldae.report import figures
from ldae.report.results import save_result
from ldae.tokenizers.fitting import variance_held
from ldae.training.learning import what_is_learned
from ldae.training.run import Run


def look(run: Run):
    """Measures, probes and draws the model as it is now, where that is due, off the run's clock."""
    step, train_args = run.state["step"], run.train_args
    if run.curve is not None and run.curve.is_due(run.progress):
        with run.off_the_clock():
            run.curve.measure(run.snapshot(), step)
            run.report_unreadable(run.curve.unreadable)
    if step and run.probes.splits and run.is_due(train_args.knn_steps):
        with run.off_the_clock():
            run.probes.knn(run.snapshot(), step)
    if step and run.is_due(train_args.image_steps):
        with run.off_the_clock():
            draw_images(run)


def draw_images(run: Run):
    """Draws clean, noisy and denoised images of an l-DAE as it is now, into images/, and its learning curve."""
    model = run.snapshot()
    if run.curve is not None:
        run.curve.draw()
    if run.is_ldae and run.accelerator.is_main_process:
        path = run.output_dir / "images" / f"step-{run.state['step']:08d}.png"
        figures.save_denoising(model, _first_images(run), path, heading=f"step {run.state['step']:,}")


def finish(run: Run):
    """Ends a run: writes its Hub folder, drawings, results and card, probes it, and uploads it if it is to be."""
    model, probed = run.snapshot(), None
    data_args, train_args, output_dir = run.data_args, run.train_args, run.output_dir
    replaces, name = train_args.overwrite or train_args.resume, short_name(data_args.data)
    is_main_process = run.accelerator.is_main_process
    run.recorder.close()
    if run.curve is not None:
        run.curve.measure(model, run.state["step"])
        run.curve.draw()
    if is_main_process:
        save_hub_folder(model, output_dir)
        _draw(run, model)
        save_result(output_dir / "results" / "train.json", _result(run, model), replaces, data_args.data)
    if run.probes.splits and train_args.probe:
        beside = " beside what has learned nothing" if train_args.baseline else ""
        run.accelerator.print(f"Measuring the encoder{beside}, which may take minutes; --no_probe leaves it out.")
        probed = run.probes.measure(model, train_args.baseline, name)
    if is_main_process:
        if probed is not None:
            save_result(output_dir / "results" / f"probe-{name}.json", probed, replaces, data_args.data)
            print(format_probe(probed))
        write_card(output_dir, train_args.hub_model_id)
        if bad_images := run.state["bad_images"]:
            print(f"Unreadable images, skipped: {len(bad_images)}; results/train.json names them.")
        images_seen, seconds = run.state["step"] * run.images_per_step, run.state["seconds"]
        clock = " of the processor" if train_args.clock == "processor" else ""
        print(f"Trained on {images_seen:,} images in {duration(seconds)}{clock}: {images_seen / seconds:,.0f} images/s")
        files = ["README.md with all that was measured", *["denoised.png"] * run.is_ldae]
        if run.curve is not None and (learned := run.curve.result()) is not None:
            print(what_is_learned(learned))
            files.append("loss.png")
        print(f"Model: {output_dir}")
        print(f"In it: {', '.join(files)}")
        if run.is_ldae:
            given = f"--model {shlex.quote(str(output_dir))} --data {shlex.quote(str(data_args.data))}"
            print(f"Features: ldae-features {given} --output_dir features")
        if train_args.push_to_hub:
            print(push(output_dir, train_args))
    run.accelerator.wait_for_everyone()  # whoever reads the folder next finds it whole
    # end_training() would end the processes' group, which a next training needs
    for tracker in run.accelerator.trackers:
        tracker.finish()


def _draw(run: Run, model: torch.nn.Module):
    """Draws what an l-DAE denoises, and the filters and the spectrum of a linear tokenizer."""
    if not run.is_ldae:
        return
    pixel_values, heading = _first_images(run), f"step {run.state['step']:,}"
    figures.save_denoising(model, pixel_values, run.output_dir / "denoised.png", heading=heading)
    figures.noise_levels(model, pixel_values[0], run.output_dir / "noise_levels.png", heading=heading)
    tokenizer, config = model.ldae.tokenizer, model.config
    if tokenizer.linear:
        figures.filters(tokenizer, config.patch_hw, config.num_channels, run.output_dir / "filters.png")
        figures.spectrum(tokenizer, run.output_dir / "spectrum.png")


def _first_images(run: Run) -> torch.Tensor:
    """The first eight images of the run (8, C, H, W), in [-1, 1]."""
    batch = next(iter(training_loader(StepSampler(run.images, 0, 1, batch_size=8))))
    return to_pixel_values(batch["pixel_values"])


def _result(run: Run, model: torch.nn.Module) -> dict[str, Any]:
    """The content of results/train.json."""
    images, state, data = run.images, run.state, run.data_args.data
    images_seen = state["step"] * run.images_per_step
    num_images, held = None, None
    if not images.streaming:
        num_images = len(images)
        held = variance_held(model.ldae.tokenizer, images, model.config.patch_hw) if run.is_ldae else None
    return {
        "kind": "train",
        "data": {
            "name": run.data_args.data_name or short_name(data),
            "hub_id": hub_id(data),
            "fingerprint": state["fingerprint"],  # images may have gone since
            "num_images": num_images,
            "bad_images": state["bad_images"],
        },
        "arguments": {"model_size": run.model_args.model_size, **vars(run.data_args), **vars(run.train_args)},
        "config": model.config.to_dict(),
        "variance_held": held,
        "steps": state["step"],
        "images_seen": images_seen,
        "epochs": images_seen / num_images if num_images else None,
        "seconds": state["seconds"],
        "clock": run.train_args.clock,
        "images_per_second": images_seen / state["seconds"],
        "num_processes": run.accelerator.num_processes,
        "mixed_precision": run.accelerator.mixed_precision,
        "loss": state["loss"],
        "held_out": None if run.curve is None else run.curve.result(),
        "seed": run.train_args.seed,
        "uses_labels": run.uses_labels,
    }
