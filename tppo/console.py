"""What a training run shows on the terminal, and how Ctrl-C and SIGTERM reach it."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tppo.config import RunConfig
from tppo.evaluation.graded import Graded


@dataclass
class Stop:
    """Whether someone asked the loop to stop."""

    signal: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask the loop to stop after the step under way; a second signal, either one, stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def as_before() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        stop.signal = number
        as_before()
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        print(f"tppo: {name}: saving after the step under way; a second one stops at once", file=sys.stderr)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        as_before()


@contextmanager
def progress_bar(show: bool, config: RunConfig) -> Iterator[Any]:
    name = config.output.name if config.output else ""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not show, transient=False) as progress:
        bar = progress.add_task(name, total=config.train.steps, accuracy="-")

        def advance(step: int, accuracy: Graded | None) -> None:
            shown = f"{accuracy.mean:.2f}" if accuracy else "-"
            progress.update(bar, completed=step, accuracy=shown)

        yield advance
