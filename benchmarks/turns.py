"""Times several calls in turns, so that whatever else the machine does falls on each of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Timed = dict[str, list[float]]
"""Call -> seconds of each repeat."""


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 0) -> Timed:
    """Seconds of every call, one after the other within each repeat; `warm_up` rounds before are not counted."""
    seconds: Timed = {name: [] for name in calls}
    for repeat in range(-warm_up, repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and largest of the repeats' ratios."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return statistics.median(each), min(each), max(each)
