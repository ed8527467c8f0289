"""Hands metrics and samples on to the trackers that are on, each in a thread of its own.

Nothing here may stop a run or make it wait: a tracker that raises, or falls behind, is switched off with one warning.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tppo.tracking.packages import EXTRAS, check_package
from tppo.tracking.protocol import About, Sink
from tppo.tracking.scalars import scalars_of
from tppo.tracking.settings import LoggingConfig
from tppo.tracking.to_mlflow import MlflowSink
from tppo.tracking.to_tensorboard import TensorBoardSink
from tppo.tracking.to_wandb import WandbSink, check_wandb_key

BEHIND = 256
"""Records that may wait for a tracker."""
CLOSE_S = 20.0
"""How long the end of a run waits for all trackers together."""

SINKS: dict[str, Callable[[About], Sink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
}
"""Field of `[logging]` -> what it switches on."""


def check_trackers(settings: LoggingConfig) -> None:
    """Raises ConfigError when a tracker that is on cannot start, before anything is written."""
    for name in EXTRAS:
        if getattr(settings, name):
            check_package(name, asked_by=f"logging.{name}")
    if settings.wandb and settings.wandb_mode == "online":
        check_wandb_key()


class Worker:
    """One sink and its thread. `fault`: why it is off."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self.fault: str | None = None
        self.told = False
        """The fault was reported."""
        self._open_sink = open_sink
        self._todo: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(BEHIND)
        self._status = "failed"
        # A daemon: a process that ends does not wait for a network.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, call: Callable[[Sink], None]) -> None:
        if self.fault is not None:
            return
        try:
            self._todo.put_nowait(call)
        except queue.Full:
            self.fault = f"{BEHIND} records behind"

    def close(self, status: str, deadline_s: float) -> None:
        """Let it write what waits. deadline_s: of time.monotonic."""
        self._status = status
        if self.fault is None:
            try:
                self._todo.put(None, timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Full:
                self.fault = f"{BEHIND} records behind"
            self._thread.join(max(0.0, deadline_s - time.monotonic()))
            if self._thread.is_alive() and self.fault is None:
                self.fault = "has not taken everything in time"

    def _work(self) -> None:
        try:
            sink = self._open_sink()
            while (call := self._todo.get()) is not None and self.fault is None:
                call(sink)
            sink.close(self._status)
        except BaseException as error:  # whatever a library does: it is a tracker's, and training goes on
            text = str(error).strip()
            self.fault = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"


class Tracker:
    """note: where a warning is recorded beside standard error."""

    def __init__(self, workers: Sequence[Worker] = (), note: Callable[[str], None] | None = None) -> None:
        self._workers = list(workers)
        self._note = note
        self._open = True

    @classmethod
    def of(cls, about: About, note: Callable[[str], None]) -> "Tracker":
        """Every tracker that the settings switch on."""

        def worker(name: str) -> Worker:
            return Worker(name, lambda: SINKS[name](about))

        return cls([worker(name) for name in SINKS if getattr(about.settings, name)], note)

    def metrics(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        step, unix_s, values = int(row["step"]), time.time(), scalars_of(row)
        for worker in self._workers:
            worker.put(lambda sink: sink.metrics(step, unix_s, values))
        self._report()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for worker in self._workers:
            worker.put(lambda sink: sink.samples(step, rows))

    def finish(self, status: str) -> None:
        """Close all; a second call does nothing. status: finished, interrupted or failed."""
        if not self._open:
            return
        self._open, self._note = False, None  # the trace has ended
        deadline_s = time.monotonic() + CLOSE_S
        for worker in self._workers:
            worker.close(status, deadline_s)
        self._report()

    def _report(self) -> None:
        for worker in self._workers:
            if worker.fault is not None and not worker.told:
                worker.told = True
                text = f"logging.{worker.name} is switched off: {worker.fault}; metrics.jsonl goes on"
                print(f"tppo: warning: {text}", file=sys.stderr)
                if self._note:
                    self._note(text)
