"""An estimate of the electrical energy of a run, from its time and the power that its hardware is made for."""

import re
from typing import Any

# Watts of a card, by the words of its name, as its maker publishes them. The first that fits counts.
WATTS = {"B200": 1000, "H200": 700, "H100 PCIe": 350, "H100": 700, "A100 PCIe": 300, "A100": 400, "V100": 300, "L40S": 350,
         "L4": 72, "T4": 70, "RTX 4090": 450, "RTX 3090": 350}  # fmt: skip
CORE = 10  # watts of a processor's core with its share of the memory


def published_watts(gpu: str) -> int | None:
    """The power of a card by the name that it gives itself, such as "NVIDIA A100-SXM4-80GB"; None if it is not known."""
    words = set(re.split(r"[\s-]+", gpu))
    return next((watts for name, watts in WATTS.items() if words.issuperset(name.split())), None)


def energy(result: dict[str, Any]) -> str | None:
    """The energy of a training result in words, with what was assumed; None for hardware whose power is not known."""
    hours, processes = result["seconds"] / 3600, result.get("num_processes", 1)
    hardware = result["hardware"]
    if hardware["gpus"]:
        watts = published_watts(hardware["gpus"][0])
        if watts is None:
            return None
        count, unit = processes, "a GPU's published power"
    else:  # the processor's clock counts the time of all threads together
        threads = 1 if result.get("clock") == "processor" else hardware["threads"]
        count, unit, watts = processes * threads, "an assumed power of a core", CORE
    kwh = hours * count * watts / 1000
    return f"about {kwh:.2g} kWh, an estimate: {hours:.2g} hours of {count} × {watts} W, {unit}"
