"""What torch can tell of a run, on the run's clock: a profile of some steps, and phase boundaries on the GPU."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from profiling import Profiler
from profiling.errors import ConfigError
from profiling.exports import TORCH_FOLDER
from profiling.writer import write_atomically

ANCHOR = "tppo clock"
"""Name of the event whose time on our clock is known."""
ANCHOR_AGAIN_S = 60.0
"""The clocks of host and GPU drift apart by some milliseconds an hour."""


def steps_of(text: str) -> tuple[int, int] | None:
    """`3:5` as (3, 5), `3` as (3, 3), nothing as None. Raises ConfigError."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if first < 1 or last < first:
        raise ConfigError(f"profile.torch_steps = {text!r}: write FIRST:LAST, or one step, from 1 on")
    return first, last


class TorchProfile:
    """torch.profiler over steps first..last, written to torch/steps-FIRST-LAST.json in the run directory: Chrome's
    trace format, in microseconds from the start of the run. These steps are slower; the trace says so."""

    def __init__(self, profiler: Profiler, steps: tuple[int, int] | None) -> None:
        self._profiler = profiler
        self._steps = steps
        self._running: torch.profiler.profile | None = None
        self._first = self._anchor_s = 0.0

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if self._running is None:
            self._start(step)
        try:
            yield
        except BaseException:
            self._stop(step - 1)
            raise
        if step == self._steps[1]:
            self._stop(step)

    def finish(self, step: int) -> None:
        """At the end of a run that has fewer steps."""
        self._stop(step)

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._running, self._first = torch.profiler.profile(activities=activities), step
        self._running.start()
        with torch.profiler.record_function(ANCHOR):
            self._anchor_s = self._profiler.now()

    def _stop(self, last: int) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        path = self._profiler.writer.path / TORCH_FOLDER / f"steps-{self._first}-{last}.json"
        path.parent.mkdir(exist_ok=True)
        raw = path.with_suffix(".tmp")
        running.export_chrome_trace(str(raw))
        trace = on_our_clock(json.loads(raw.read_text()), self._anchor_s)
        raw.unlink()
        write_atomically(path, json.dumps(trace).encode())
        text = (
            f"torch.profiler ran in steps {self._first} to {last}, which are slower for it: {TORCH_FOLDER}/{path.name}"
        )
        self._profiler.trace({"type": "note", "text": text})


def on_our_clock(trace: dict[str, Any], anchor_s: float) -> dict[str, Any]:
    """torch's trace with its times moved so that the anchor's middle stands at anchor_s. Only its events are kept."""
    anchor = next(event for event in trace["traceEvents"] if event.get("name") == ANCHOR and event.get("ph") == "X")
    by_us = 1e6 * anchor_s - (float(anchor["ts"]) + float(anchor["dur"]) / 2)
    return {
        "traceEvents": [
            {**event, "ts": float(event["ts"]) + by_us} if "ts" in event else event for event in trace["traceEvents"]
        ],
        "displayTimeUnit": "ms",
    }


class DeviceTimes:
    """When the GPU reaches a phase's boundaries: CUDA events, read when they have passed, so the host never waits.

    A host that only enqueues work leaves a phase long before the GPU does. `event`, `synchronise`: torch.cuda's.
    """

    def __init__(
        self,
        profiler: Profiler,
        *,
        event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
        synchronise: Callable[[], None] = lambda: torch.cuda.synchronize(),
    ) -> None:
        self._profiler, self._event, self._synchronise = profiler, event, synchronise
        self._pending: list[tuple[str, int, int, Any, Any]] = []
        self._depth = 0
        self._set_anchor()

    def _set_anchor(self) -> None:
        self._synchronise()
        self._anchor = self._event()
        self._anchor.record()
        self._synchronise()
        self._anchor_s = self._profiler.now()

    @contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        start, end = self._event(), self._event()
        start.record()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            end.record()
            self._pending.append((name, step, self._depth, start, end))

    def collect(self, *, everything: bool = False) -> None:
        """Write the phases that the GPU has left. everything: wait for the rest."""
        again = self._profiler.now() - self._anchor_s > ANCHOR_AGAIN_S
        if everything or again:
            self._synchronise()
        left = []
        for name, step, depth, start, end in self._pending:
            if not end.query():
                left.append((name, step, depth, start, end))
                continue
            t_start, t_end = (self._anchor_s + self._anchor.elapsed_time(one) / 1e3 for one in (start, end))
            self._profiler.trace({
                "type": "device_phase", "name": name, "step": step, "t_start": t_start, "t_end": t_end, "depth": depth,
            })  # fmt: skip
        self._pending = left
        if again:
            self._set_anchor()


def device_phase(times: DeviceTimes | None, name: str, step: int) -> Any:
    """A phase on the GPU's time where these are kept."""
    return nullcontext() if times is None else times.phase(name, step)
