"""Says what a run is doing when: `with profiler.phase("rollout", step=3): ...`.

Costs less than five microseconds, writing included: records are kept in memory and written together when `flush` is
called, every two seconds or hundred of them, and at the end. Safe across threads and asyncio tasks; phases nest, each
thread and task for itself.
"""

import contextvars
import platform
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from profiling.markers import boot_id
from profiling.sampler_process import SamplerProcess
from profiling.writer import RunWriter

FLUSH_AT_RECORDS, FLUSH_AFTER_S = 128, 2.0
"""Whichever comes first: a live view reads what was written, and nobody waits long for few."""

_depth: contextvars.ContextVar[int] = contextvars.ContextVar("profiling_phase_depth", default=0)


class Profiler:
    """Writes phases and other trace records of one run, and runs the sampler beside it.

    Give a directory (a run directory is created) or the `writer` of an existing one. start_s: the run clock's value
    now, for a run that is resumed. sampler_interval_s: seconds between device samples; None: no sampler.
    links: also sample PCIe and NVLink traffic. host: this host's name, where another one has the run directory's first
    sampler (profiling.hosts).
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        writer: RunWriter | None = None,
        start_s: float = 0.0,
        sampler_interval_s: float | None = 1.0,
        links: bool = False,
        host: str | None = None,
    ) -> None:
        self._zero = time.perf_counter() - start_s
        if writer is None:
            if directory is None:
                raise ValueError("a Profiler needs a directory or a writer")
            own = {"zero_s": self._zero, "boot": boot_id()}  # a program's markers have that clock
            writer = RunWriter(directory, header={**plain_header(), **own}, config_toml="")
        self.writer = writer
        self._interval_s, self._links, self._host = sampler_interval_s, links, host
        self._sampler: SamplerProcess | None = None
        self._records: list[Mapping[str, Any]] = []
        self._flushed = self._zero
        self._lock = threading.RLock()
        self._open = True
        self.sampler_note: str | None = None
        """What the sampler said when it started, if anything."""
        self._before_end: list[Callable[[], None]] = []

    @property
    def zero_s(self) -> float:
        """The monotonic clock at the start of the run."""
        return self._zero

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self._zero

    def phase(self, name: str, step: int) -> "_Phase":
        return _Phase(self, name, step)

    def trace(self, record: Mapping[str, Any]) -> None:
        """Keep a trace record; it is written later, in this order."""
        with self._lock:
            self._records.append(record)
            if len(self._records) >= FLUSH_AT_RECORDS or time.perf_counter() - self._flushed >= FLUSH_AFTER_S:
                self.flush()

    def flush(self) -> None:
        with self._lock:
            records, self._records = self._records, []
            self._flushed = time.perf_counter()
            self.writer.trace(*records)

    def before_end(self, stop: Callable[[], None]) -> None:
        """Also call this when the run ends, before its trailer is written."""
        self._before_end.append(stop)

    def __enter__(self) -> "Profiler":
        if self._interval_s is not None:
            self._sampler = SamplerProcess(
                self.writer.path, interval_s=self._interval_s, zero_s=self._zero, links=self._links, host=self._host,
                note=lambda text: self.trace({"type": "note", "text": text}),
            )  # fmt: skip
            self.sampler_note = self._sampler.start()
            if self.sampler_note:
                self.trace({"type": "note", "text": self.sampler_note})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open:
            interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
            self.finish("finished" if kind is None else "interrupted" if interrupted else "failed")

    def finish(self, status: str) -> float:
        """Stop the sampler and end the trace. status: finished, interrupted or failed. Returns the wall seconds."""
        self._open = False
        wall_s = self.now()
        for stop in self._before_end:
            stop()
        sampler = self._sampler.stop() if self._sampler else None
        self.flush()
        self.writer.close(t=wall_s, status=status, sampler=sampler)
        return wall_s


class _Phase:
    """A context manager of its own, several times cheaper than a generator's."""

    __slots__ = ("_name", "_profiler", "_start", "_step", "_token")

    def __init__(self, profiler: Profiler, name: str, step: int) -> None:
        self._profiler = profiler
        self._name = name
        self._step = step

    def __enter__(self) -> None:
        self._token = _depth.set(_depth.get() + 1)
        self._start = self._profiler.now()

    def __exit__(self, *error: object) -> None:
        end = self._profiler.now()
        _depth.reset(self._token)
        self._profiler.trace(
            {
                "type": "phase",
                "name": self._name,
                "step": self._step,
                "t_start": self._start,
                "t_end": end,
                "depth": _depth.get(),
            }
        )


def plain_header() -> dict[str, Any]:
    """The header of a program that we know nothing about: one host, one GPU-equivalent, no schedule."""
    return {
        "clock": "perf_counter",
        "unix_time_s": time.time(),
        "host": platform.node(),
        "simulated": False,
        "devices": [],
        "capabilities": {},
        "gpus": 1,
        "engines": 1,
        "gpus_per_engine": 1,
        "trainer_gpus": 0,
        "schedule": None,
    }
