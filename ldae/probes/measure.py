"""Measures an encoder by several protocols, each beside its baselines."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from ldae.probes.baselines import TITLES, baselines
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
    on_protocol: Callable[[Result], Any] | None = None,
) -> Result | None:
    """Measures an encoder by each protocol and, beside it, its `baselines`.

    Args:
        baseline: whether the baselines are measured too.
        data_name: what the result calls the images.
        earlier: a result of the same subject; what it holds is not measured again.
        on_protocol: called on the main process after each protocol with the result so far, so that nothing is lost.

    Returns:
        What `ldae.report.results.save_result` writes, without the environment: "kind", "model", "identity", "data", "protocols",
        "seed", "mixed_precision", and the baselines by their keys ("floor" is the untrained one). "data" holds the packed
        "labels" of the readable validation images; with them, the "predictions" of each protocol that classifies allow paired
        tests. None on other processes than the main one.
    """
    result = earlier or {
        "kind": "probe",
        "model": subject.encoder.name,
        "identity": subject.identity,
        "data": subject.data(data_name),
        "protocols": {},
        "floor": {},
        "seed": subject.seed,
        "mixed_precision": subject.precision,
    }
    for protocol in protocols:
        protocol.prepare(subject)

    def measure(part: Result, measured: Subject, by: Sequence[Protocol]):
        for protocol in by:
            if protocol.name in part:
                continue
            figures = protocol(measured)
            if not subject.is_main_process:
                continue
            figures = cast(Result, figures)  # None on the other processes only
            part[protocol.name] = {**figures, "commit": commit()}  # several runs may share a file
            _describe_images(result["data"], subject)
            if on_protocol is not None:
                on_protocol(result)
        measured.drop_tokens()  # those of the encoder and a baseline together may not fit

    measure(result["protocols"], subject, protocols)
    for beside in baselines(subject, protocols) if baseline else ():
        part = result.setdefault(beside.key, {})
        part["description"] = beside.description
        measure(part, beside.subject, beside.protocols)
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
    """The figures of a probe as lines of text: the best baseline of each protocol where any was measured, and the encoder."""
    best = {name: best_baseline(result, name) for name in result["protocols"]}
    columns = ["best baseline", "encoder"] if any(best.values()) else ["encoder"]
    lines = [f"{'in %':<20}" + "".join(f"{column:>18}" for column in columns)]
    for name, figures in result["protocols"].items():
        key, baseline = best[name] or (None, None)
        shown = [baseline, figures][-len(columns) :]
        line = f"{name:<20}" + "".join(f"{format_figure(name, each):>18}" for each in shown)
        lines.append(f"{line}   ({TITLES[key]})" if key else line)
    return "\n".join(lines)


def best_baseline(result: Result, name: str) -> tuple[str, Result] | None:
    """The key and the figures of the baseline with the highest main figure by the protocol `name`; None: none was measured."""
    measured = {key: result[key][name] for key in TITLES if name in result.get(key, {})}
    return max(measured.items(), key=lambda item: item[1][PROTOCOLS[name].metric], default=None)
