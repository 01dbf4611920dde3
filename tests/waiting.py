"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(condition: Callable[[], T], within_s: float = 10.0, every_s: float = 0.1, what: str = "") -> T:
    """The first true value of `condition()`; AssertionError with the last value (or error) after `within_s`.

    An exception in the condition counts as "not yet": a process still starting refuses connections."""
    deadline = time.monotonic() + within_s
    last: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            last = value
        except Exception as exc:  # noqa: BLE001 - shown at the deadline
            last = exc
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or 'the condition'}; last: {last!r}"[:2000])
        time.sleep(every_s)


def holds_for(condition: Callable[[], object], for_s: float, every_s: float = 0.1, what: str = "") -> None:
    """Assert that `condition()` stays true for `for_s` seconds."""
    deadline = time.monotonic() + for_s
    while time.monotonic() < deadline:
        value = condition()
        assert value, f"did not hold for {for_s} s: {what or 'the condition'}; was {value!r}"
        time.sleep(every_s)
