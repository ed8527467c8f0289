"""What a training run shows on the terminal, and how Ctrl-C reaches it."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tppo.config import RunConfig
from tppo.evaluation.graded import Graded


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C asks the loop to stop after the step under way; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        asked.set()
        print("tppo: stopping after the step under way; Ctrl-C again stops at once", file=sys.stderr)
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


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
