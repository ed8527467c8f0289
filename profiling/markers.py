"""Phases of a program that `tppo profile -- COMMAND` runs: `with phase("rollout", step=3): ...`.

Costs nothing where the program is not profiled. Each process writes a file of its own in the run directory, a line a
phase, whose times are the host's monotonic clock; the profiler reads them when the command has ended. A process that
is killed loses the phases that it was in, no others. The first line says which host's clock it is: one of another host
(on a shared disk) is placed by the wall clocks of both.
"""

import contextlib
import contextvars
import json
import operator
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "TPPO_PROFILE"
"""Names the run directory to a profiled program; unset: phases are not recorded."""

_depth: contextvars.ContextVar[int] = contextvars.ContextVar("profiling_marker_depth", default=1)
_lock = threading.Lock()
_files: dict[tuple[int, str], Any] = {}
_left: deque[tuple[str, bytes]] = deque()
"""Directory and line of phases that are to be written."""


@contextmanager
def phase(name: str, step: int) -> Iterator[None]:
    """Names of profiling.schema.PHASES take part in the idle ledger; any other is attributed all the same."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        yield
        return
    token = _depth.set(_depth.get() + 1)
    start = time.perf_counter()
    try:
        yield
    finally:
        end = time.perf_counter()
        _depth.reset(token)
        mark(directory, name, step, start, end, _depth.get())


def mark(directory: str, name: str, step: int, start: float, end: float, depth: int = 1) -> None:
    """A phase that is over; times of `time.perf_counter()`. What cannot be written is lost: the program goes on.

    Safe in threads, forks and signal handlers: nobody waits; whoever holds the lock writes what others left.
    """
    try:
        one = {"name": str(name), "step": operator.index(step), "start": start, "end": end, "depth": depth}
        line = json.dumps(one).encode() + b"\n"
    except (TypeError, ValueError):
        return
    _left.append((directory, line))
    while _left and _lock.acquire(blocking=False):
        try:
            while _left:
                _write(*_left.popleft())
        finally:
            _lock.release()


def _write(directory: str, line: bytes) -> None:
    key = (os.getpid(), directory)  # a forked process has a file of its own
    try:
        if key not in _files:
            folder = Path(directory) / "markers"
            folder.mkdir(exist_ok=True)
            own = {"host": platform.node(), "boot": boot_id(), "clock": time.perf_counter(), "unix": time.time()}
            _files[key] = (folder / f"{platform.node()}-{key[0]}.jsonl").open("ab", buffering=0)
            _files[key].write(json.dumps(own).encode() + b"\n")
        _files[key].write(line)
    except OSError:
        return


def _forget() -> None:
    """In a forked child: the lock may be held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()
    _files.clear()
    _left.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def boot_id() -> str:
    """Processes of one boot of one kernel share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _lines(path: Path) -> Iterator[bytes]:
    """What of a file can be read: a program's own file must not end the profiler."""
    from profiling.files import whole_lines

    with contextlib.suppress(OSError):
        yield from whole_lines(path)


def read_markers(
    directory: Path, zero_s: float, end_s: float, unix_zero_s: float, boot: str | None = None
) -> list[dict[str, Any]]:
    """Trace records of all processes' phases, by their ends, and a note for each other host. zero_s, unix_zero_s: the
    run's monotonic and wall clock at its start; end_s: of the run, where a phase that outlives it is cut; boot: whose
    monotonic clock that is, if not ours. Lines that are none are left out."""
    from profiling.files import parse_json  # here: a marked program does not wait for pyarrow
    from profiling.schema import fault_in

    records: list[dict[str, Any]] = []
    notes: dict[str, dict[str, Any]] = {}
    ours_s, here = zero_s, boot or boot_id()
    for path in sorted((directory / "markers").glob("*.jsonl")):
        zero_s = ours_s
        for line in _lines(path):
            try:
                one = parse_json(line)
                if "boot" in one:
                    if one["boot"] != here:
                        zero_s = float(one["clock"]) - (float(one["unix"]) - unix_zero_s)
                        text = (
                            f"host {one['host']}: its monotonic clock is {zero_s - ours_s:+.3f} s against ours, by "
                            "the wall clocks of both hosts; phases of it are as exact as these agree"
                        )
                        notes[str(one["boot"])] = {"type": "note", "text": text}
                    continue
                start, end = float(one["start"]) - zero_s, min(float(one["end"]) - zero_s, end_s)
                names = {
                    "type": "phase",
                    "name": str(one["name"]),
                    "step": operator.index(one["step"]),
                    "depth": operator.index(one["depth"]),
                    "process": path.stem,
                }
            except (ValueError, KeyError, TypeError, OverflowError):
                continue
            start = max(start, 0.0)
            record = {**names, "t_start": start, "t_end": end}
            if end > start and fault_in(record) is None:
                records.append(record)
    return [*notes.values(), *sorted(records, key=lambda record: record["t_end"])]
