"""What a device can do: its published and its measured rate of matrix products, and how long calls take on it."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

# Dense bf16 FLOP/s of the data sheets, by the beginning of the name that CUDA gives.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the maker publishes; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for start, flops in PEAK_FLOPS.items() if name.startswith(start)), None)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product of random numbers, the median of 20."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / statistics.median(durations(lambda: a @ b, device, 20, warmup=3))


def durations(call: Callable[[], object], device: torch.device, repeats: int, warmup: int = 0) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` calls that are not counted.

    On CUDA the calls are queued without a stop between them, as in training, and timed by events.
    """
    for _ in range(warmup):
        call()
    if device.type != "cuda":
        return [timed(call) for _ in range(repeats)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call on the CPU: processor time with one thread, which a busy machine disturbs less; else the clock's."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def in_rounds(
    calls: dict[Any, Any], rounds: int, warmup: int = 0, time_of: Callable[[Any], Any] = timed
) -> dict[Any, list[Any]]:
    """The times of each call by its key, in rounds of all in turn, after `warmup` rounds that are not counted.

    Args:
        time_of: what makes a call and gives the time that it took.
    """
    times: dict[Any, list[Any]] = {key: [] for key in calls}
    for i in tqdm(range(warmup + rounds), "rounds"):
        for key, call in calls.items():
            taken = time_of(call)
            if i >= warmup:
                times[key].append(taken)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over the rounds of ours / theirs: neighbours in time, so that slow minutes cancel."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


class MatrixProducts(TorchDispatchMode):
    """Counts the mm, addmm, bmm and baddbmm that run below it, by their operands' shapes, strides and types."""

    def __init__(self):
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            operands = args[1:3] if "add" in name else args[:2]
            self.seen[tuple((tuple(x.shape), x.stride(), x.dtype) for x in operands)] += 1
        return function(*args, **(kwargs or {}))

    def replay(self, device: torch.device) -> Callable[[], None]:
        """A call making the same products as often, on tensors of its own, with nothing between them."""
        work = []
        for operands, count in self.seen.items():
            a, b = (torch.empty_strided(*x[:2], dtype=x[2], device=device).normal_() for x in operands)
            work += [(a, b, a @ b)] * count

        def products():
            for a, b, out in work:
                torch.matmul(a, b, out=out)

        return products
