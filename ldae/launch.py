"""What a command runs on: all cores that it may use, and bf16 where that is faster, unless its user has chosen otherwise."""

import os
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import joblib
import psutil
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, get_int_from_env, parse_flag_from_env

from ldae.hardware import bf16_is_faster, keep_freed_memory
from ldae.mistakes import program

PATIENCE = timedelta(days=2)  # that a process has for the others, which decode, fit heads or write meanwhile
VARIABLES = {"num_cpu_threads_per_process": "OMP_NUM_THREADS", "mixed_precision": "ACCELERATE_MIXED_PRECISION"}
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
WORLDS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]  # launchers' numbers of processes
PRECISIONS = {"no": "float32"}


def start(
    mixed_precision: str | None = None, cpu: bool = False, gradient_accumulation_steps: int | None = None, **kwargs: Any
) -> Accelerator:
    """Starts accelerate on the device that it finds, and says in one line what the command runs on.

    `accelerate launch` gives a process one thread and float32 where its user says nothing. Here such a process takes its
    share of the cores instead, as its affinity and its cgroup allow, and bf16 where the device multiplies faster in it. What a
    user has chosen is kept: by options of accelerate's launcher, in its configuration file, or in the environment. On a CPU the
    process keeps from now on what memory it frees.

    Args:
        mixed_precision: "no", "bf16" or "fp16", the command's own option; None: not chosen there.
        cpu: leaves GPUs alone.
        gradient_accumulation_steps: micro-batches of a step, of a command that accumulates gradients.
        kwargs: further arguments of `Accelerator`.

    Raises:
        ValueError: if a launcher has started, or was asked for, another number of processes than accelerate knows, or the
            environment contradicts the steps of gradient accumulation, of which accelerate would take the environment's.
    """
    if gradient_accumulation_steps is not None:
        _validate_accumulation(gradient_accumulation_steps)
        # A step ends after its micro-batches, not where a loader does: accelerate may know one that was left before its end.
        kwargs["gradient_accumulation_plugin"] = GradientAccumulationPlugin(
            gradient_accumulation_steps, sync_with_dataloader=False
        )
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")  # Accelerator reads it, PartialState does not
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    _validate_processes(state)
    if is_initialized():  # by an earlier call of this process, whose precision accelerate keeps
        mixed_precision = _earlier_precision(mixed_precision)
    chosen = chosen_by_user()
    if "num_cpu_threads_per_process" not in chosen:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        torch.set_num_threads(max(1, joblib.cpu_count(only_physical_cores=True) // processes))
    if mixed_precision is None and "mixed_precision" not in chosen:
        # one process decides for all
        mixed_precision = broadcast_object_list(["bf16" if bf16_is_faster(state.device) else "no"])[0]
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu, **kwargs)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    accelerator.print(description(accelerator))
    return accelerator


def description(accelerator: Accelerator) -> str:
    """A line that says what a command runs on, such as "Runs on the CPU with 2 threads, in float32."."""
    device, threads, precision = accelerator.device, torch.get_num_threads(), accelerator.mixed_precision
    processes = f"{accelerator.num_processes} processes, each " if accelerator.num_processes > 1 else ""
    name = "the CPU" if device.type == "cpu" else str(device.type).upper()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    line = f"Runs on {processes}{name} with {threads} thread{'s' * (threads != 1)}, in {PRECISIONS.get(precision, precision)}."
    if device.type == "cuda" and (idle := torch.cuda.device_count() - accelerator.num_processes) > 0:
        line += f" {idle} more here: accelerate launch uses all."
    if precision == "bf16" and not bf16_is_faster(device):
        line += " It multiplies faster in float32: --mixed_precision no."
    return line


def attention(accelerator: Accelerator) -> str | None:
    """The implementation of attention that trains fastest, by transformers' name; None: its own choice, which is sdpa."""
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"  # the backward pass of sdpa there
    return "eager" if slow else None


def chosen_by_user() -> set[str]:
    """Which of "num_cpu_threads_per_process" and "mixed_precision" the user has chosen for this process."""
    launcher, arguments = _launcher()
    environment = os.environ if launcher is None else launcher
    chosen = {option for option, variable in VARIABLES.items() if variable in environment}
    if arguments is not None:
        configuration = _configuration(arguments)
        chosen |= {option for option in VARIABLES if getattr(arguments, option) or configuration.get(option)}
    return chosen


def _earlier_precision(asked: str | None) -> str:
    earlier = AcceleratorState().mixed_precision
    if asked not in (None, earlier):
        raise ValueError(
            f"--mixed_precision {asked} needs a new Python process: accelerate has begun this one with {earlier!r}"
        )
    return earlier


def _validate_accumulation(steps: int):
    given = os.environ.get(ACCUMULATION)
    if given is not None and given != str(steps):
        raise ValueError(
            f"--gradient_accumulation_steps {steps} contradicts {ACCUMULATION}={given} of the environment; give both the same, "
            "or unset the variable"
        )


def _validate_processes(state: PartialState):
    """Validates that the processes of a launcher know each other: they would all make the same run, in one folder."""
    number = get_int_from_env(WORLDS, 0)
    if not number and (arguments := _launcher()[1]) is not None:
        number = arguments.num_processes or _configuration(arguments).get("num_processes") or 0
    if number and number != state.num_processes:
        works = f"accelerate launch --multi_gpu --num_processes {number}"
        if state.device.type == "cpu":
            works = f"ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {number}"
        raise ValueError(
            f"the launcher was asked for {number} processes and accelerate knows {state.num_processes}; launch them by "
            f"`{works} {program()} ...`, or ask for one"
        )


def _configuration(arguments: Namespace) -> dict[str, Any]:
    """The configuration file of accelerate's launcher; empty where there is none."""
    file = Path(arguments.config_file or default_config_file)
    return yaml.safe_load(file.read_text()) or {} if file.is_file() else {}


def _launcher() -> tuple[dict[str, str] | None, Namespace | None]:
    """The environment and the options of the `accelerate launch` that started this process; None, None where none did.

    It sets `VARIABLES` in any case, so its own environment tells what its user has set.
    """
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent is not None else []
        start = next((i for i, word in enumerate(command[:3]) if _is_launcher(word)), None)
        if parent is None or start is None:
            return None, None
        words = command[start + 1 :]
        return parent.environ(), launch_command_parser().parse_args(words[1:] if words[:1] == ["launch"] else words)
    except psutil.Error:  # not allowed to look, or ended: what is in the environment counts
        return None, None


def _is_launcher(word: str) -> bool:
    """Whether a word of a command line is accelerate's launcher, by its program or by `python -m`."""
    program_name = Path(word).name.removesuffix(".exe")
    return program_name in ("accelerate", "accelerate-launch") or word.startswith("accelerate.commands.")
