"""The folder of a run: what may be in it before, what is removed from it, and who else may write to it."""

import os
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from ldae.files import LOCK, hold_folder, remove, validate_writable
from ldae.hub.push import validate_hub, written_files
from ldae.training.checkpoints import Checkpoints

LEFT = ("checkpoints", "results", "images", "logs", "losses.jsonl", "held_out.jsonl")  # by a run, beside its Hub folder


def validate(train_args):
    """Validates, before any work starts, that the run can write its folder and upload it.

    Raises:
        FileExistsError: if output_dir holds another run's results.
        ValueError: if output_dir cannot be written to; if the run is to be uploaded and there is no access token, or the
            repository's name can be none.
        ConnectionError: if the run is to be uploaded and the Hub cannot be reached, or does not take the token.
    """
    found = {path.name for path in Path(train_args.output_dir).expanduser().glob("*")} - {LOCK}
    if found and not (train_args.resume or train_args.overwrite):
        raise FileExistsError(
            f"output_dir {train_args.output_dir!r} is not empty; pass --resume to go on with its run, --overwrite to replace "
            "it, or another --output_dir"
        )
    validate_writable(train_args.output_dir)
    if train_args.push_to_hub and os.environ.get("RANK", "0") == "0":
        train_args.hub_model_id = validate_hub(
            train_args.hub_model_id or Path(train_args.output_dir).expanduser().resolve().name
        )


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
            for name in (*written_files(output_dir), *LEFT):
                remove(output_dir / name)
    if resume and last is None:
        accelerator.print(f"There is no checkpoint in {checkpoints.folder}: starting afresh.")
    return last
