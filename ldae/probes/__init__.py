"""How good an encoder is: a protocol in each module of this package, found by its name in `PROTOCOLS`."""

import importlib
import pkgutil

from ldae.probes.knn import Knn
from ldae.probes.linear_fast import LinearFast
from ldae.probes.measure import Result, best_baseline, format_figure, format_probe, probe
from ldae.probes.predictions import pack, unpack
from ldae.probes.protocol import PROTOCOLS, Protocol, register_protocol
from ldae.probes.subject import Subject

DEFAULT_PROTOCOLS = ("knn", "linear-fast")


def discover():
    """Imports every module of this package, so that the protocols in them are known."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)


discover()

__all__ = [
    "DEFAULT_PROTOCOLS", "PROTOCOLS", "Knn", "LinearFast", "Protocol", "Result", "Subject", "best_baseline", "discover",
    "format_figure", "format_probe", "pack", "probe", "register_protocol", "unpack",
]  # fmt: skip
