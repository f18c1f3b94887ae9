"""The machine: what a result was made on, and what it can do."""

import ctypes
import os
import platform
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import is_initialized

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def hardware() -> dict[str, Any]:
    """Processor, cores, threads of PyTorch, and the names of the GPUs, unless accelerate has chosen the CPU."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        )
        processor = next(lines, processor)
    on_cpu = is_initialized() and PartialState().device.type == "cpu"
    gpus = [] if on_cpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def keep_freed_memory():
    """Lets this process keep the memory that it frees, on Linux with glibc.

    glibc returns large blocks to the system, which clears each of their pages when they are asked for again. A step of training
    frees its activations, and the next step asks for as many.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # the highest that older versions take
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@cache
def bf16_is_faster(device: torch.device) -> bool:
    """Whether the device multiplies matrices at least twice as fast in bf16 as in float32.

    A CPU is measured, on one thread for some milliseconds. With AMX it is many times faster; with other bf16 instructions it may
    be slower, and without any it is tens of times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds_of_product(torch.float32) > 2 * _seconds_of_product(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def _seconds_of_product(dtype: torch.dtype) -> float:
    """The shortest of several, in processor time, so that other work on the machine changes little."""
    a, seconds = torch.ones(512, 512, dtype=dtype), []
    for _ in range(6):
        start = time.process_time()
        a @ a
        seconds.append(time.process_time() - start)
    return min(seconds)
