"""The progress bar of a training run."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

RECENT_STEPS = 20
"""Steps whose mean duration says what the others will take. rich's own estimate forgets after half a minute, which is
less than a step may last."""


class TimeLeft:
    """From the time of the last RECENT_STEPS steps, evaluations and checkpoints between them included."""

    def __init__(self, now_s: float) -> None:
        self._ends_s: deque[float] = deque([now_s], maxlen=RECENT_STEPS + 1)

    def step_ended(self, now_s: float) -> None:
        self._ends_s.append(now_s)

    def seconds(self, steps_left: int) -> float | None:
        """None before the first step has ended."""
        steps = len(self._ends_s) - 1
        return steps_left * (self._ends_s[-1] - self._ends_s[0]) / steps if steps else None


def as_duration(seconds: float | None) -> str:
    """3700 -> 1:01:40; a dash where it is not known. Days are hours."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def as_text(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


@contextmanager
def progress_bar(
    show: bool,
    name: str,
    *,
    total_steps: int,
    done_steps: int = 0,
    clock: Callable[[], float] = time.monotonic,
    console: Console | None = None,
) -> Iterator[Callable[[int, float | None, Mapping[str, Any]], None]]:
    """Yields what is called after every step: its number, the last accuracy, its row of metrics."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=12),  # the rest fits into 80 columns
        MofNCompleteColumn(),
        TextColumn("accuracy {task.fields[accuracy]}  reward {task.fields[reward]}  {task.fields[rate]} tokens/s"),
        TextColumn("left {task.fields[left]}"),
    )
    left = TimeLeft(clock())
    with Progress(*columns, disable=not show, transient=False, console=console) as progress:
        bar = progress.add_task(name, total=total_steps, completed=done_steps, accuracy="-", reward="-", rate="-",
                                left="-")  # fmt: skip

        def advance(step: int, accuracy: float | None, metrics: Mapping[str, Any]) -> None:
            left.step_ended(clock())
            progress.update(
                bar, completed=step, accuracy=as_text(accuracy, ".2f"),
                reward=as_text(metrics.get("critic/rewards/mean"), ".2f"),
                rate=as_text(metrics.get("perf/throughput"), ",.0f"),
                left=as_duration(left.seconds(total_steps - step)),
            )  # fmt: skip

        yield advance
