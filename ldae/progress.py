"""Progress bars, of which commands and functions show one at a time."""

from collections.abc import Iterable
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from huggingface_hub.utils import tqdm as hub_tqdm
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

GROUP = "ldae"  # of bars, which huggingface_hub lets a user switch off and on by itself


def progress_bar(iterable: Iterable[Any] | None = None, shown: bool = True, **kwargs: Any) -> tqdm:
    """Makes a bar that goes when it is done.

    There is none where stderr is no terminal, or where transformers' or huggingface_hub's bars were switched off.

    Args:
        iterable: what is counted; None: `update` counts.
        shown: false on other processes than the main one, and inside another bar.
        kwargs: of tqdm, such as `desc`, `total` and `unit`.
    """
    return hub_tqdm(iterable, name=GROUP, disable=None if shown else True, leave=False, **kwargs)


def hide_bars_of_libraries() -> None:
    """Switches off transformers' own bars, of weights that it reads or writes in a moment, and leaves ours as they were."""
    ours = not are_progress_bars_disabled(GROUP)
    disable_progress_bar()
    if ours:
        enable_progress_bars(GROUP)
