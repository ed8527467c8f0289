"""How Ctrl-C and SIGTERM reach a training run."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from profiling.errors import RunError

SAME_S = 1.0
"""Signals so close to the first are the same wish: a launcher passes Ctrl-C on to ranks that have it already, and
Linux tells of a parent's death once for each of its threads."""


class Stopped(RunError):
    """What was under way has been broken off, because someone asked the loop to stop."""


def nothing() -> None:
    """Between parts of what no signal breaks off."""


@dataclass
class Stop:
    """Whether someone asked the loop to stop."""

    signal: int | None = None

    @property
    def asked(self) -> bool:
        return self.signal is not None

    def leave(self) -> None:
        """For what a resumed run can begin again. Raises Stopped where someone asked."""
        if self.asked:
            raise Stopped


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM ask the loop to stop after the step under way, or in the midst of step 0; a later signal,
    either one, stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def as_before() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    asked_at: float | None = None

    def ask(number: int, frame: object) -> None:
        nonlocal asked_at
        if asked_at is not None:
            if time.monotonic() - asked_at > SAME_S:
                as_before()
                os.kill(os.getpid(), number)
            return
        stop.signal, asked_at = number, time.monotonic()
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        print(f"tppo: {name}: saving after the step under way; a second one stops at once", file=sys.stderr)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        as_before()
