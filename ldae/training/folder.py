"""The folder of a run: what may be in it before, what is removed from it, and who else may write to it."""

import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from accelerate import Accelerator

from ldae.files import hold_folder, remove, validate_writable
from ldae.hub.push import WRITTEN, validate_hub
from ldae.training.checkpoints import Checkpoints

# What a run writes beside its Hub folder. Other files in these folders are the user's.
LEFT = (
    "checkpoints/checkpoint-????????",
    "checkpoints/.checkpoint-*",
    "images/step-*.png",
    "logs/ldae",
    "losses.jsonl",
    "held_out.jsonl",
    "results/train.json",
    "results/neighbours-*.png",
)
FOLDERS = ("checkpoints", "images", "logs", "results")


def validate(train_args):
    """Validates, before any work starts, that the run can write its folder and upload it.

    Raises:
        FileExistsError: if output_dir holds another run's results, or files and no run.
        ValueError: if output_dir cannot be written to; if the run is to be uploaded and there is no access token, or the
            repository's name can be none.
        ConnectionError: if the run is to be uploaded and the Hub cannot be reached, or does not take the token.
    """
    output_dir = Path(train_args.output_dir).expanduser()
    # Hidden files may be what a run left that was killed as it began.
    if any(path.name[0] != "." for path in output_dir.glob("*")) and not train_args.dry_run:
        if not _files(output_dir, LEFT):
            raise FileExistsError(
                f"output_dir {train_args.output_dir!r} holds files that are of no run; choose another --output_dir"
            )
        if not (train_args.resume or train_args.overwrite):
            raise FileExistsError(
                f"output_dir {train_args.output_dir!r} is not empty; pass --resume to go on with its run, --overwrite to replace "
                "it, or another --output_dir"
            )
    validate_writable(train_args.output_dir)
    if train_args.push_to_hub and os.environ.get("RANK", "0") == "0":
        train_args.hub_model_id = validate_hub(train_args.hub_model_id or output_dir.resolve().name)


def open_folder(
    output_dir: Path, checkpoints: Checkpoints, train_args, accelerator: Accelerator, held: ExitStack
) -> Path | None:
    """Makes a run's folder, and holds it until `held` is closed; returns the checkpoint to resume from.

    With --overwrite, a fresh run removes what another run wrote there, and nothing else.

    Raises:
        FileExistsError: if another run holds it.
        ValueError: for --resume where every checkpoint is damaged.
    """
    resume, overwrite = train_args.resume, train_args.overwrite
    with accelerator.main_process_first():
        output_dir.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            held.enter_context(hold_folder(output_dir))
        last = checkpoints.last(accelerator.print) if resume else None
        if resume and last is None and checkpoints.found() and not overwrite:
            raise ValueError(
                f"--resume: every checkpoint in {str(checkpoints.folder)!r} is damaged; pass --overwrite too to start afresh"
            )
        if overwrite and last is None and accelerator.is_main_process:
            for path in _files(output_dir, (*LEFT, *WRITTEN)):
                remove(path)
            for name in FOLDERS:
                with suppress(OSError):  # it is not there, or holds files of the user's
                    (output_dir / name).rmdir()
    if resume and last is None:
        accelerator.print(f"There is no checkpoint in {checkpoints.folder}: starting afresh.")
    return last


def _files(output_dir: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in output_dir.glob(pattern)]
