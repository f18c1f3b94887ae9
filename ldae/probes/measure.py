"""Measures an encoder by several protocols, each beside its untrained baseline."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ldae.probes.knn import Knn
from ldae.probes.linear_fast import LinearFast
from ldae.probes.predictions import pack
from ldae.probes.protocol import PROTOCOLS, Protocol
from ldae.probes.subject import Subject
from ldae.report.results import commit

Result = dict[str, Any]


def probe(
    subject: Subject,
    protocols: Sequence[Protocol] = (Knn(), LinearFast()),
    baseline: bool = True,
    data_name: str = "data",
    earlier: Result | None = None,
    on_protocol: Callable[[Result], None] | None = None,
) -> Result | None:
    """Measures an encoder by each protocol and, beside it, the untrained baseline: the same network with fresh weights.

    Args:
        baseline: whether the untrained baseline is measured too.
        data_name: what the result calls the images.
        earlier: a result of the same subject; what it holds is not measured again.
        on_protocol: called on the main process after each protocol with the result so far, so that nothing is lost.

    Returns:
        What `ldae.report.results.save_result` writes, without the environment: "kind", "model", "identity", "data", "protocols",
        "floor" (the untrained baseline), "seed". "data" has the packed "labels" of the readable validation images, beside
        which the "predictions" of each protocol that classifies allow paired tests. None on other processes than the main one.
    """
    fresh = None
    if baseline:
        fresh = replace(subject, encoder=subject.encoder.untrained(subject.seed), known={}, predictions={})
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
            _describe_images(result["data"], subject)
            if on_protocol is not None:
                on_protocol(result)
        if measured is not None:
            measured.drop_tokens()  # those of encoder and baseline together may not fit
    return result if subject.is_main_process else None


def _describe_images(data: dict[str, Any], subject: Subject):
    """Writes into a result's "data" which images were read, and their classes."""
    for split in ("train", "validation"):
        if features := subject.known.get(split):
            data[f"num_{split}"] = len(features)
    data["unreadable"] = sorted({name for features in subject.known.values() if features for name in features.bad})
    if subject.labels is not None:
        data["labels"] = pack(subject.labels)


def format_figure(name: str, figures: Result | None) -> str:
    """The main figure of a protocol's result with its standard error; a dash where it was not measured."""
    return f"{figures[PROTOCOLS[name].metric]:.1f} ± {figures['standard_error']:.1f}" if figures else "–"


def format_probe(result: Result) -> str:
    """The figures of a probe as lines of text, the untrained baseline beside the encoder."""
    lines = [f"{'in %':<20}{'untrained':>18}{'encoder':>18}"]
    for name, figures in result["protocols"].items():
        floor = format_figure(name, result["floor"].get(name))
        lines.append(f"{name:<20}{floor:>18}{format_figure(name, figures):>18}")
    return "\n".join(lines)
