"""How good an encoder is: protocols, each beside its floor, the same network with fresh weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ldae.probes.attentive import Attentive, AttentiveEfficient
from ldae.probes.few_shot import FewShot
from ldae.probes.finetune import FineTune
from ldae.probes.knn import Knn
from ldae.probes.linear import Linear
from ldae.probes.linear_fast import LinearFast
from ldae.probes.protocol import Protocol, Subject
from ldae.probes.retrieval import Retrieval
from ldae.report.results import commit

PROTOCOLS: dict[str, type[Protocol]] = {
    protocol.name: protocol
    for protocol in (Knn, Linear, LinearFast, Attentive, AttentiveEfficient, FineTune, FewShot, Retrieval)
}
DEFAULT_PROTOCOLS = ("knn", "linear-fast")

Result = dict[str, Any]


def probe(
    subject: Subject,
    protocols: Sequence[Protocol] = (Knn(), LinearFast()),
    floor: bool = True,
    data_name: str = "data",
    earlier: Result | None = None,
    on_protocol: Callable[[Result], None] | None = None,
) -> Result | None:
    """Measures an encoder by each protocol and, beside it, the floor: the same network with fresh weights.

    Args:
        floor: without it, the result says nothing of the floor.
        earlier: a result of the same subject; what it holds is not measured again.
        on_protocol: called on the main process after each protocol with the result so far, so that nothing is lost.

    Returns:
        What `ldae.report.results.save_result` writes, without the environment: "kind", "model", "identity", "data", "protocols",
        "floor", "seed". None on other processes than the main one.
    """
    fresh = (
        replace(subject, encoder=subject.encoder.untrained(subject.seed), known={}, predictions={}) if floor else None
    )
    result = earlier or {
        "kind": "probe",
        "model": subject.encoder.name,
        "identity": subject.identity,
        "data": subject.data(data_name),
        "protocols": {},
        "floor": {},
        "seed": subject.seed,
    }
    if fresh is not None:
        same = " and the same tokenizer" if subject.encoder.config.model_type == "ldae" else ""
        result["floor"]["description"] = "the same network with fresh weights" + same
    for protocol in protocols:
        protocol.prepare(subject)
    for part, measured in (("protocols", subject), ("floor", fresh)):
        for protocol in protocols if measured is not None else ():
            if protocol.name in result[part]:
                continue
            figures = protocol(measured)
            if not subject.is_main_process:
                continue
            result[part][protocol.name] = {**figures, "commit": commit()}  # several runs may share a file
            for split in ("train", "validation"):
                if features := subject.known.get(split):
                    result["data"][f"num_{split}"] = len(features)
            result["data"]["unreadable"] = sorted({name for f in subject.known.values() if f for name in f.bad})
            if on_protocol is not None:
                on_protocol(result)
        if measured is not None:
            measured.drop_tokens()  # those of encoder and floor together may not fit
    return result if subject.is_main_process else None


def format_figure(name: str, figures: Result | None) -> str:
    """The main figure of a protocol's result with its standard error; a dash where it was not measured."""
    return f"{figures[PROTOCOLS[name].metric]:.1f} ± {figures['standard_error']:.1f}" if figures else "–"


def format_probe(result: Result) -> str:
    """The figures of a probe as lines of text, the floor beside the encoder."""
    lines = [f"{'in %':<20}{'untrained floor':>18}{'encoder':>18}"]
    for name, figures in result["protocols"].items():
        floor = format_figure(name, result["floor"].get(name))
        lines.append(f"{name:<20}{floor:>18}{format_figure(name, figures):>18}")
    return "\n".join(lines)


__all__ = [
    "DEFAULT_PROTOCOLS", "PROTOCOLS", "Attentive", "AttentiveEfficient", "FewShot", "FineTune", "Knn", "Linear", "LinearFast",
    "Protocol", "Retrieval", "Subject", "format_figure", "format_probe", "probe",
]  # fmt: skip
