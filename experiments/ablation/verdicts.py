"""Whether a rung changes here what it changes in the paper."""

import math
from collections.abc import Collection

from experiments.ablation.rungs import RUNGS, Rung, options
from experiments.ablation.runs import TOKENIZER_TRAINING, Measured
from experiments.errors import paired_error

NO_CHANGE = 0.5  # points of accuracy: what changes less in the paper, which has one seed, is taken for no change
JUDGED = ("agrees", "absent", "contradicts")
NOT_RUN = "not run"
VERDICTS = (*JUDGED, "undecided", "not judgeable", "one seed", "not comparable", NOT_RUN)


def compare(rung: Rung, figures: dict[str, Measured]) -> tuple[float, float] | str | None:
    """Compares a rung with the one before it.

    Both are measured on the same images. Where the predictions of both were kept, the images' share of the error is that of the
    paired differences. Otherwise it is counted as if the images were others, and is too large rather than too small.

    Returns:
        The change in accuracy and its standard error, in points; None where one of the two is not run; or a sentence that says
        so, where the runs differ in more or in less than the rung's change.
    """
    if rung.before is None:
        return None
    after, before = figures.get(rung.name), figures.get(rung.before)
    if after is None or before is None:
        return None
    settings = after.setting, before.setting
    # A name that only one of the two has is an option of something that the other does not have.
    differ = {name for name in settings[0].keys() & settings[1].keys() if settings[0][name] != settings[1][name]}
    if stray := differ - _changes(rung, RUNGS[rung.before]):
        return f"`{rung.name}` and `{rung.before}` also differ in {', '.join(sorted(stray))}"
    if not differ:
        return f"`{rung.name}` and `{rung.before}` are the same run here"
    if after.right is not None and before.right is not None and after.images == before.images:
        image_error = paired_error(after.right, before.right)
    else:
        image_error = math.hypot(after.image_error, before.image_error)
    return after.accuracy - before.accuracy, math.hypot(image_error, after.seed_error or 0.0, before.seed_error or 0.0)


def _changes(rung: Rung, before: Rung) -> set[str]:
    """The settings that a rung may change; tokenizers of two kinds are each trained as they need."""
    new, old = options(rung), options(before)
    changed = {name for name in new.keys() | old.keys() if new.get(name) != old.get(name)}
    return changed | {TOKENIZER_TRAINING} if "tokenizer_type" in changed else changed


def verdict(rung: Rung, figures: dict[str, Measured]) -> str:
    """Whether a rung's change does here what it does in the paper: one of `VERDICTS`, at two standard errors of the difference.

    - "agrees": the change has the paper's sign; or none is seen, where the paper sees none, or one below `NO_CHANGE`.
    - "contradicts": it has the other sign; or one is seen, where the paper sees none.
    - "absent": none is seen, and one as large as the paper's would have been.
    - "undecided": neither.
    - "not judgeable": neither network is above its baseline, so that nothing was learned that could change.
    - "one seed": no rung has several, so that nothing is known of the deviation between seeds.
    """
    difference = compare(rung, figures)
    if difference is None:
        return NOT_RUN
    if isinstance(difference, str):
        return "not comparable"
    after, before = figures[rung.name], figures[rung.before or ""]
    if after.seed_error is None:
        return "one seed"
    if _at_baseline(after) and _at_baseline(before):
        return "not judgeable"
    change, error = difference
    claim = rung.claim or 0.0
    seen = abs(change) > 2 * error
    if (rung.sign is None and abs(claim) < NO_CHANGE) or not claim:
        return "contradicts" if seen else "agrees"
    if seen:
        return "agrees" if claim * change > 0 else "contradicts"
    return "absent" if rung.sign is None and abs(change - claim) > 2 * error else "undecided"


def _at_baseline(found: Measured) -> bool:
    return found.baseline is not None and found.accuracy - found.baseline <= 2 * found.error


def of_fact(verdicts: Collection[str]) -> str:
    """What several claims say of the fact that they tell together: their verdict, or "mixed" where those judged differ."""
    judged = {verdict for verdict in verdicts if verdict in JUDGED}
    if len(judged) > 1:
        return "mixed"
    return next(iter(judged), None) or min(verdicts, key=VERDICTS.index)
