"""Calls of the Hub, which are tried again after faults that may pass."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import HTTPError

T = TypeVar("T")

WAITS = (2, 8, 32)  # seconds between tries
PASSING = {408, 409, 429, 500, 502, 503, 504}  # statuses of faults that may be gone at the next try
LONGEST_WAIT = 300  # seconds that the Hub may ask for


def retried(call: Callable[[], T]) -> T:
    """Makes a call, again after faults of the Hub that may pass, and returns what it returns.

    The client itself tries uploads of large files again, and downloads whose connection was dropped. Answers such as 503 it gives
    to its caller. A call that is made twice must do nothing the second time.

    Raises:
        Exception: what the call raised at its last try, or at once for a fault that does not pass.
    """
    for wait in WAITS:
        try:
            return call()
        except (OSError, HTTPError) as error:
            if not _passes(error):
                raise
            asked = getattr(_response(error), "headers", {}).get("Retry-After", "")
            seconds = max(wait, min(int(asked), LONGEST_WAIT) if asked.isdecimal() else 0)
            print(f"The Hub: {reason(error)}; trying again in {seconds} seconds")
            time.sleep(seconds)
    return call()


def reason(error: BaseException) -> str:
    """Why the Hub has done nothing, and what to do, in one line."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return f"{error} {reason(error.__cause__)}"
    response = getattr(error, "response", None)
    remedies = {
        401: "it does not take the access token; log in with `hf auth login`, or set HF_TOKEN",
        403: "the access token may not write there; give it the right to, or choose another --hub_model_id",
        404: "it knows no such repository, or hides it from the access token; mind the name",
        409: "the repository is being changed by someone else",
    }
    if response is not None and response.status_code in remedies:
        return f"{response.status_code}, {remedies[response.status_code]}"
    return " ".join(str(error).split())


def _passes(error: BaseException) -> bool:
    """Whether the Hub has given a status that may pass, or its connection has failed in a call of the client."""
    response = _response(error)
    return isinstance(error, HTTPError) if response is None else response.status_code in PASSING


def _response(error: BaseException | None) -> Any:
    """The answer of the Hub that an error tells of, which libraries wrap in others; None where there was none."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__ or error.__context__
    return None
