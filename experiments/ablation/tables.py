"""The ablation's tables, ours beside the paper's tables 1 to 3 and those of its appendix A."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd

from experiments.ablation.rungs import END, RUNGS, TABLE2, TOKENIZERS, Rung, at_dimension, branches, main_path
from experiments.ablation.runs import PROTOCOL, Measured, Run, load_runs, measure
from experiments.ablation.verdicts import NOT_RUN, VERDICTS, compare, of_fact, verdict
from experiments.errors import pooled_variance
from ldae.probes import format_figure
from ldae.report.tables import MISSING, markdown

PAPER_TIMESTEPS = {  # appendix A: accuracy by the fixed t, on clean and on noisy images
    "clean": {0: 64.1, 10: 64.5, 20: 64.1, 40: 63.3, 80: 62.2},
    "noisy": {0: 64.2, 10: 65.0, 20: 65.0, 40: 65.0, 80: 64.5},
}
# of 24 blocks, encoder and decoder together
PAPER_BLOCKS = {9: 58.5, 10: 62.0, 11: 64.1, 12: 64.5, 13: 63.6, 14: 61.9, 15: 59.7}
SIGNS = {1: "+", 0: "0", -1: "−"}

Studies = dict[
    str, dict[str, Measured]
]  # what the rungs of each study gave; the first study is the one that is reported


def tables(study: str | Path, also: Sequence[str | Path] = ()) -> dict[str, str]:
    """Markdown by its marker: "setting", "facts", "claims", "table 1" to "table 3", "branches", "timesteps", "blocks".

    Left out are rungs that were not run, and markers of which nothing was run.

    Args:
        study: a .jsonl of results, or a folder of runs.
        also: other ablations, on other images or at another size: claims that this one has not run are judged there.

    Raises:
        FileNotFoundError: if no rung of a study is done.
    """
    paths = (study, *also)
    studies = {str(path): measure(path, [other for other in paths if other != path]) for path in paths}
    for path, found in studies.items():
        if not found:
            raise FileNotFoundError(f"no rung in {path!r} is trained and probed by {PROTOCOL}")
    runs, figures = load_runs(study), studies[str(study)]
    generating = main_path().index(RUNGS["patch-vae"])  # rungs before those of table 3
    claims = {
        name: verdict(rung, studies[_judged_in(rung, studies)])
        for name, rung in RUNGS.items()
        if rung.claim is not None
    }
    elsewhere = [sentence for rung in branches() if (sentence := _elsewhere(rung, studies))]
    texts = {
        "setting": _setting(runs),
        "facts": _facts(claims),
        "claims": _claims(claims, studies),
        "table 1": _generating(_done(main_path()[:generating], figures), figures),
        "table 2": _table2(figures),
        "table 3": _rungs(_done(main_path()[generating:], figures), figures),
        "branches": "\n".join([_rungs(_done(branches(), figures), figures), *elsewhere]),
        "timesteps": _timesteps(runs),
        "blocks": _blocks(runs),
    }
    return {name: text for name, text in texts.items() if text}


def _done(rungs: list[Rung], figures: dict[str, Measured]) -> list[Rung]:
    return [rung for rung in rungs if rung.name in figures]


def _setting(runs: dict[str, list[Run]]) -> str:
    """What the runs have seen and how long they took, as one sentence."""
    trainings = [run["train"] for done in runs.values() for run in done]

    def span(values: Iterable[float], form: str) -> str:
        low, high = (form.format(value) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    config = trainings[0]["config"]
    epochs = span([run["epochs"] for run in trainings], "{:.1f}")
    minutes = span([run["seconds"] / 60 for run in trainings], "{:.0f}")
    seeds = span([len(done) for done in runs.values()], "{}")
    return (
        f"{len(trainings)} runs of {len(runs)} rungs with {seeds} seeds each; {epochs} epochs of "
        f"{trainings[0]['data']['num_images']:,} images in {minutes} minutes, {config['num_hidden_layers']} encoder and "
        f"{config['decoder_num_hidden_layers']} decoder blocks of width {config['hidden_size']}; L-BFGS linear probe; errors are "
        "one standard error."
    )


def _facts(claims: dict[str, str]) -> str:
    """A row for each fact of the paper, with the verdicts on the claims that tell it; and how many facts there are of each."""
    facts: dict[str, list[str]] = {}
    for name, found in claims.items():
        facts.setdefault(RUNGS[name].fact or RUNGS[name].what, []).append(found)
    rows = [
        {"fact": fact, "claims": _counts(found, len(found) > 1), "verdict": of_fact(found)}
        for fact, found in facts.items()
    ]
    counts, rows = _counts([row["verdict"] for row in rows]), [row for row in rows if row["verdict"] != NOT_RUN]
    return f"{len(facts)} facts: {counts}.\n\n{markdown(rows, left=('fact', 'claims', 'verdict'))}"


def _counts(verdicts: Sequence[str], numbers: bool = True) -> str:
    counts = {name: verdicts.count(name) for name in (*VERDICTS, "mixed") if name in verdicts}
    return ", ".join(f"{count} {name}" if numbers else name for name, count in counts.items())


def _claims(claims: dict[str, str], studies: Studies) -> str:
    """A row for each claim of the paper: its sign, ours with its error, the verdict; and how many there are of each.

    A claim is judged in the first study that has run it.
    """
    rows, notes = [], []
    for name, found in claims.items():
        if found == NOT_RUN:
            continue
        rung = RUNGS[name]
        difference = compare(rung, studies[_judged_in(rung, studies)])
        rows.append(
            {
                "rung": f"`{name}`",
                "after": f"`{rung.before}`",
                "change": rung.what,
                "paper": f"{rung.claim:+.1f}" if rung.sign is None else SIGNS[rung.sign],
                "here": "{:+.1f} ± {:.1f}".format(*difference) if isinstance(difference, tuple) else MISSING,
                "verdict": found,
            }
        )
        if isinstance(difference, str):
            notes.append(f"\n{difference}.")
        if sentence := _elsewhere(rung, studies):
            notes.append(sentence)
    text = markdown(rows, left=("rung", "after", "change", "verdict"))
    return "\n".join([f"{len(claims)} claims: {_counts(list(claims.values()))}.\n", text, *notes])


def _judged_in(rung: Rung, studies: Studies) -> str:
    """The first study that has run a rung and the one before it; the first of all where none has."""
    return next((name for name, figures in studies.items() if compare(rung, figures) is not None), next(iter(studies)))


def _elsewhere(rung: Rung, studies: Studies) -> str:
    """A sentence on a rung that is not judged in the first study; empty for others."""
    study = _judged_in(rung, studies)
    if rung.before is None or study == next(iter(studies)):
        return ""
    names, figures = (rung.name, rung.before), studies[study]
    after, before = (f"`{name}` reaches {_accuracy(figures[name])}" for name in names)
    sentence = f"\n`{rung.name}` is judged in another ablation, {study}: {after}, {before}."
    return "\n".join([sentence, *(_differs(name, figures[name]) for name in names if figures[name].differs)])


def _differs(name: str, found: Measured) -> str:
    return f"\n`{name}` was run with {', '.join(f'`--{k} {v}`' for k, v in found.differs.items())}."


def _rungs(rungs: list[Rung], figures: dict[str, Measured], more: dict[str, list[Any]] | None = None) -> str:
    """A row for each rung; `more` are further columns, with a cell for each rung."""
    found = [figures[rung.name] for rung in rungs]
    columns = {
        "rung": [f"`{rung.name}`" for rung in rungs],
        "change": [rung.what for rung in rungs],
        "paper": [rung.paper for rung in rungs],
        "here": [_accuracy(each) for each in found],
        "baseline": [each.baseline for each in found],
        "seeds": [each.seeds for each in found],
    }
    notes = [_differs(rung.name, each) for rung, each in zip(rungs, found, strict=True) if each.differs]
    return "\n".join([markdown(pd.DataFrame(columns | (more or {})), left=("rung", "change")), *notes])


def _generating(rungs: list[Rung], figures: dict[str, Measured]) -> str:
    """`_rungs` with the paper's FID and our distances, a column for each that was measured."""
    found = [figures[rung.name] for rung in rungs]
    measures = dict.fromkeys(what for each in found for what in each.distances)
    columns: dict[str, list[Any]] = {"paper's FID": [rung.fid for rung in rungs]}
    for i, what in enumerate(measures, 1):
        between = pooled_variance(each.distances.get(what, []) for each in figures.values())
        columns[f"distance {i}"] = [_distance(each, what, between) for each in found]
    notes = [f"\nDistance {i}: {what}." for i, what in enumerate(measures, 1)]
    return "\n".join([_rungs(rungs, figures, columns), *notes])


def _distance(found: Measured, what: str, between: float | None) -> str:
    """The mean over the seeds, with its standard error where the variance between seeds is known."""
    values = found.distances.get(what)
    if not values:
        return MISSING
    return f"{mean(values):.1f}" + ("" if between is None else f" ± {math.sqrt(between / len(values)):.1f}")


def _table2(figures: dict[str, Measured]) -> str:
    """Tokenizers by latent dimension, "the paper's / ours" in each cell; and the part of the patches' variance they hold."""
    cells = pd.DataFrame(
        [
            (TOKENIZERS[name], d, paper, figures.get(at_dimension(name, d)))
            for name, row in TABLE2.items()
            if any(at_dimension(name, d) in figures for d in row)
            for d, paper in row.items()
        ],
        columns=["tokenizer", "d", "paper", "found"],
        dtype=object,
    )
    if cells.empty:
        return ""
    found = [each for each in cells["found"] if each]
    baselines = [each.baseline for each in found if each.baseline is not None]
    reach = " to ".join(dict.fromkeys(f"{edge(baselines):.1f}" for edge in (min, max) if baselines))
    note = [f"\nTheir best baselines reach {reach} %."] if baselines else []
    accuracies = [f"{row.paper:.1f} / {_accuracy(row.found)}" for row in cells.itertuples()]
    held = [100 * each.variance_held if each and each.variance_held is not None else None for each in cells["found"]]
    both = _by_dimension(cells, "tokenizer", accuracies), _by_dimension(cells, "variance held, in %", held)
    return "\n".join([both[0], *note, "", both[1]])


def _by_dimension(cells: pd.DataFrame, title: str, values: Sequence[Any]) -> str:
    """A table with a row for each tokenizer and a column for each latent dimension."""
    values = pd.Series(values, index=cells.index, dtype=object)
    table = cells.assign(values=values).pivot(index="tokenizer", columns="d", values="values")
    table = table.reindex(cells["tokenizer"].unique()).rename(columns="d = {}".format)
    return markdown(table.reset_index(names=title))


def _sweep(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The first sweep of the last rung by the protocol; without rows where there is none."""
    sweeps = (run["sweep"] for run in runs.get(END, []) if "sweep" in run)
    empty: dict[str, Any] = {"depth": [], "timesteps": []}
    return next((found for found in sweeps if PROTOCOL in found["depth"][0]["protocols"]), empty)


def _timesteps(runs: dict[str, list[Run]]) -> str:
    """Accuracy by the t that features are taken at, "the paper's / ours" in each cell."""
    ours = {(row["noisy"], row["t"]): row["protocols"][PROTOCOL] for row in _sweep(runs)["timesteps"]}
    if not ours:
        return ""
    cells = {
        images: {
            f"t = {t}": f"{paper:.1f} / {format_figure(PROTOCOL, ours.get((images == 'noisy', t)))}"
            for t, paper in row.items()
        }
        for images, row in PAPER_TIMESTEPS.items()
    }
    return markdown(pd.DataFrame.from_dict(cells, orient="index").reset_index(names="images"))


def _blocks(runs: dict[str, list[Run]]) -> str:
    """Accuracy by the block that features are taken from, counted through encoder and decoder: a table for each side."""
    depth = _sweep(runs)["depth"]
    if not depth:
        return ""
    figures = [format_figure(PROTOCOL, row["protocols"][PROTOCOL]) for row in depth]
    sides: list[dict[str, Any]] = [
        {"paper": "linear", **{f"block {block} of 24": paper for block, paper in PAPER_BLOCKS.items()}},
        {"here": PROTOCOL, **{f"block {i} of {len(depth)}": cell for i, cell in enumerate(figures, 1)}},
    ]
    return "\n\n".join(markdown([row]) for row in sides)


def _accuracy(found: Measured | None) -> str:
    return MISSING if found is None else f"{found.accuracy:.1f} ± {found.error:.1f}"
