"""Measures an encoder on labelled images: `accelerate launch probe_ldae.py --model FOLDER --data DATA`.

Every protocol stands beside the untrained baseline, the same network with fresh weights. The encoder is an l-DAE or any
other vision model that transformers loads, timm's among them. `--help` lists the options, docs/probes.md says what each
protocol does.
"""

import dataclasses
import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from ldae import launch
from ldae.data.images import ImageDataset
from ldae.data.sources import load_train, load_validation, validate_output, why_not_probed
from ldae.features.encoders import load_encoder
from ldae.files import read_json, validate_writable
from ldae.hub.cards import write_card
from ldae.hub.push import push, validate_hub
from ldae.mistakes import run_command
from ldae.names import short_name
from ldae.options import EncodingArguments, HubArguments, OptionParser, option, option_parser
from ldae.options.shared import HUB
from ldae.probes import (
    DEFAULT_PROTOCOLS,
    PROTOCOLS,
    Knn,
    LinearFast,
    Protocol,
    Result,
    Subject,
    format_probe,
    probe,
)  # fmt: skip
from ldae.probes.baselines import TITLES
from ldae.probes.knn import nearest_images
from ldae.probes.sweep import format_sweep, load_with_decoder, sweep
from ldae.report import figures
from ldae.report.results import save_result


@dataclass(kw_only=True)
class ProbeArguments(HubArguments, EncodingArguments):
    model: str = option(
        MISSING,
        "An l-DAE folder or Hub id, or any other vision encoder that transformers' AutoModel loads, timm's too.",
    )
    data: str = option(
        "photos",
        "'photos' (embedded), a folder of images in classes, a folder of parquet files, or a Hub data set (NAME:CONFIGURATION "
        "where it has several).",
    )
    train_split: str = option("train", "Split whose images and labels the probes learn from.")
    validation_split: str = option("validation", "Split that is measured; val, valid and test are found too.")
    protocols: list[str] = option(list(DEFAULT_PROTOCOLS), f"What to measure, of {', '.join(PROTOCOLS)}.")
    baseline: bool = option(
        True, "Measure the untrained baseline beside the encoder, with a random ViT and a thumbnail of the image."
    )
    sweep: bool = option(
        False,
        "Also measure by depth and by t, clean and noisy (paper, appendix A), with a plot; by knn and linear-fast, or the one "
        "of them that --protocols names.",
    )
    figures: bool = option(
        False, "Also draw nearest neighbours and, of protocols that this run measures, confusion matrices."
    )
    seed: int = option(
        0, "Seed of the untrained baseline's weights, of the held-out images and of all that protocols draw."
    )
    output_dir: str | None = option(
        None,
        "Where probe-DATA.json goes; by default results/ in the model's folder, or runs/probes/MODEL for a Hub id.",
    )
    overwrite: bool = option(False, "Measure again what an earlier run has measured.")
    features_cache: str = option(
        "~/.cache/ldae/features",
        "Folder that keeps pooled features (4 bytes x images x hidden_size), so that they are computed once; 'none'.",
    )
    device: Literal["auto", "cpu"] = option("auto", "auto: what accelerate chooses.")
    push_to_hub: bool = option(
        False, "Make the card of the model's folder anew and upload the folder, with these results.", group=HUB
    )


def parse_arguments(argv: list[str] | None = None) -> tuple[ProbeArguments, list[Protocol]]:
    """Reads the options of a command line, and the protocols that they name.

    Raises:
        SystemExit: for an unknown option or value, named on stderr.
        ValueError: for an unknown protocol, or options of a chosen protocol that do not fit together.
    """
    return _validated(*_parser().parse_args_into_dataclasses(argv))


def parse_keywords(**given: Any) -> tuple[ProbeArguments, list[Protocol]]:
    """The same of keyword arguments.

    Raises:
        TypeError: for an unknown option.
        ValueError: for a value that an option may not have; otherwise as `parse_arguments` does.
    """
    parser = _parser()
    return _validated(*parser.build(parser.keywords(given)))


def _parser() -> OptionParser:
    return option_parser(ProbeArguments, *PROTOCOLS.values(), description=(__doc__ or "").split("\n")[0])


def _validated(options: ProbeArguments, *protocols: Protocol) -> tuple[ProbeArguments, list[Protocol]]:
    if unknown := [name for name in options.protocols if name not in PROTOCOLS]:
        raise ValueError(f"--protocols: {unknown[0]!r} is none of {', '.join(PROTOCOLS)}")
    by_name = {protocol.name: protocol for protocol in protocols}
    chosen = [by_name[name] for name in dict.fromkeys(options.protocols)]
    for protocol in chosen:
        protocol.check()
    return options, chosen


def validate_push(options: ProbeArguments):
    """Validates, before any work starts, that the model's folder can be uploaded with the results in it.

    Raises:
        ValueError: if there is no such folder, the results go elsewhere, or as `validate_hub`.
        ConnectionError: as `validate_hub`.
    """
    folder = Path(options.model).expanduser()
    if not folder.is_dir() or options.output_dir:
        raise ValueError(
            "--push_to_hub uploads the folder of a model with its results in it: give it as --model, and no --output_dir"
        )
    options.hub_model_id = validate_hub(options.hub_model_id or folder.resolve().name)


def labelled_splits(options: ProbeArguments) -> tuple[Any, Any]:
    """Loads training and validation examples with the same classes.

    Raises:
        ValueError: if a split or its labels are missing, or the classes of the splits differ.
    """
    train = load_train(options)
    validation = load_validation(options.data, options.validation_split, **options.columns)
    if (reason := why_not_probed(train, validation)) is not None:
        raise ValueError(f"--data {options.data!r} cannot be probed: {reason}")
    return train, validation


def result_path(options: ProbeArguments) -> Path:
    """Returns the path of the result's file."""
    folder = Path(options.model).expanduser()
    default = folder / "results" if folder.is_dir() else Path("runs/probes") / short_name(options.model)
    folder = Path(options.output_dir).expanduser() if options.output_dir else default
    return folder / f"probe-{short_name(options.data)}.json"


def earlier_result(path: Path, subject: Subject, protocols: list[Protocol], overwrite: bool) -> Result | None:
    """Reads the figures of the same encoder on the same images that an earlier run left and this run keeps.

    Raises:
        FileExistsError: if it holds another encoder's figures, or a protocol's in another way, and `overwrite` is false.
        ValueError: if it is damaged, and `overwrite` is false.
    """
    if not path.exists():
        return None
    try:
        earlier = read_json(path)
    except ValueError:
        if overwrite:
            return None
        raise
    if earlier.get("identity") != subject.identity:
        if overwrite:
            return None
        raise FileExistsError(
            f"{path} holds figures of another encoder, other images or another seed; choose another --output_dir or pass "
            "--overwrite"
        )
    for protocol in protocols:
        measured, asked = earlier["protocols"].get(protocol.name), dataclasses.asdict(protocol)
        if measured is None:
            continue
        if overwrite:
            for part in ("protocols", *TITLES):
                earlier.get(part, {}).pop(protocol.name, None)
        elif changed := [name for name, value in asked.items() if measured["settings"].get(name) != value]:
            raise FileExistsError(
                f"{path} holds {protocol.name} with another --{changed[0]}; choose another --output_dir or pass --overwrite"
            )
        elif measured["description"] != protocol.description:  # of an earlier version
            raise FileExistsError(
                f"{path} holds {protocol.name} as it was measured once: {measured['description']}; choose another --output_dir "
                "or pass --overwrite"
            )
    return earlier


def draw(subject: Subject, result: Result, path: Path):
    """Draws confusion matrices of the protocols that this run measured, and the nearest neighbours of some images."""
    data = result["data"]["name"]
    feature = subject.validation.examples.features["label"]
    names = getattr(feature, "names", None) or [str(i) for i in range(subject.num_classes)]
    for name, predictions in subject.predictions.items():
        file = path.with_name(f"confusion-{name}-{data}.png")
        print(figures.confusion_matrix(predictions, subject.labels, names, file))
    queries, nearest, same_class = nearest_images(subject)
    print(figures.neighbours(queries, nearest, same_class, path.with_name(f"neighbours-{data}.png")))


def main(argv: list[str] | None = None) -> Path:
    """Runs a command line, as `run` does its options."""
    return run(*parse_arguments(argv))


def run(options: ProbeArguments, protocols: list[Protocol]) -> Path:
    """Probes a model; returns the result's file."""
    path = result_path(options)
    validate_output(path.parent, options.data)
    validate_writable(path.parent)
    if options.push_to_hub and os.environ.get("RANK", "0") == "0":
        validate_push(options)
    accelerator = launch.start(options.mixed_precision, cpu=options.device == "cpu")
    with accelerator.main_process_first():  # one process downloads and prepares
        examples = labelled_splits(options)
        encoder = load_encoder(options.model, options.trust_remote_code).to(accelerator.device)
    train, validation = (ImageDataset(split, encoder.image_hw, encoder.num_channels) for split in examples)
    cache = None if options.features_cache == "none" else Path(options.features_cache).expanduser()
    subject = Subject(
        encoder, train, validation, accelerator, options.seed, options.batch_size, options.num_workers, cache,
        tokens=any(protocol.needs_tokens for protocol in protocols),
    )  # fmt: skip
    data, earlier = short_name(options.data), earlier_result(path, subject, protocols, options.overwrite)
    sweep_path = path.with_name(f"sweep-{data}.json")
    if options.sweep and sweep_path.exists() and not options.overwrite:
        raise FileExistsError(f"{sweep_path} holds an earlier sweep; choose another --output_dir or pass --overwrite")

    names = ", ".join(protocol.name for protocol in protocols)
    beside = " beside what has learned nothing" if options.baseline else ""
    accelerator.print(f"Measuring the encoder{beside} by {names}, which may take minutes.")
    result = probe(
        subject, protocols, options.baseline, data, earlier,
        on_protocol=lambda result: save_result(path, result, True, options.data),  # a run that is stopped loses nothing
    )  # fmt: skip
    if options.figures:  # their features, which all processes compute, where no protocol has needed them
        for split in ("train", "validation"):
            subject.features(split)
    if result is not None:
        print(format_probe(result))
        for name in result["data"]["unreadable"]:
            print(f"left out, unreadable: {name}")
        if options.figures:
            draw(subject, result, path)
        print(f"Result: {path}")
    if options.sweep:
        swept = [protocol for protocol in protocols if protocol.name in DEFAULT_PROTOCOLS] or (Knn(), LinearFast())
        measured = sweep(subject, load_with_decoder(encoder), protocols=swept, data_name=data)
        if measured is not None:
            save_result(sweep_path, measured, True, options.data)
            print(format_sweep(measured))
            print(f"Sweep: {figures.sweep(measured, sweep_path.with_suffix('.png'))}")
    if options.push_to_hub and accelerator.is_main_process:
        folder = path.parent.parent
        write_card(folder, options.hub_model_id)
        print(push(folder, options))
    accelerator.end_training()
    return path


def command() -> None:
    """The command `ldae-probe`."""
    run_command(main)


if __name__ == "__main__":
    command()
