"""A run for other programs: Chrome's trace format, which Perfetto and chrome://tracing draw."""

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from profiling.errors import DataError
from profiling.files import read_json
from profiling.reader import Run

TORCH_FOLDER = "torch"
"""Of a run directory: torch.profiler's traces, on the run's clock."""
LARGEST_TORCH_TRACE_BYTES = 2**31
PHASES_PID = 0
TORCH_PIDS = 1_000_000
"""Added to the process numbers of torch's own events."""
MARKED_PIDS = 2_000_000
"""Of the processes of a profiled command that marked phases."""
DEVICE_TID = 100
"""Of the process of phases: the same phases as the GPU saw them."""
DEVICE_PIDS = 3_000_000
"""Of the counters of each device."""
MOST_POINTS = 2_000
"""Of a counter's track; of a longer one, means of neighbours."""
ENGINE_PIDS = 1
"""Engine e is process ENGINE_PIDS + e: thread 0 shows what it does, thread 1 + s the rows in slot s."""


def chrome_trace(run: Run, first_step: int = 0, last_step: int | None = None) -> dict[str, Any]:
    """Phases, engine spans and rows of steps first_step..last_step as complete events, and what the devices' sensors
    said meanwhile as counters; times in microseconds.

    Format: "Trace Event Format" (Google, 2016), phases `X`, `C` and `M`. Raises DataError when no step is in the
    range.
    """

    def chosen(frame: pd.DataFrame) -> pd.DataFrame:
        end = frame.step.max() if last_step is None else last_step
        return frame[(frame.step >= first_step) & (frame.step <= end)]

    phases, spans, rows = chosen(run.phases), chosen(run.engine), chosen(run.rollouts)
    if phases.empty:
        last = "the last" if last_step is None else last_step
        raise DataError(f"{run.path}: has no phases in steps {first_step} to {last}")
    events = [_name("process_name", PHASES_PID, 0, f"{run.name}: phases ({run.kind})")]
    pids = {name: PHASES_PID if not name else MARKED_PIDS + n for n, name in enumerate(phases.process.unique())}
    events += [_name("process_name", pid, 0, f"{run.name}: {name}") for name, pid in pids.items() if name]
    for phase in phases.itertuples(index=False):
        events.append(_event(phase.name, phase, pids[phase.process], int(phase.depth), {"step": int(phase.step)}))
    for phase in chosen(run.device_phases).itertuples(index=False):
        events.append(_event(phase.name, phase, PHASES_PID, DEVICE_TID + int(phase.depth), {"step": int(phase.step)}))
    if len(run.device_phases):
        events.append(_name("thread_name", PHASES_PID, DEVICE_TID, "on the GPU"))
    events += _torch_events(run, 1e6 * float(phases.t_start.min()), 1e6 * float(phases.t_end.max()))
    events += _counters(run, float(phases.t_start.min()), float(phases.t_end.max()))
    engines = sorted({*spans.engine.unique().tolist(), *rows.engine.unique().tolist()})
    for engine in engines:
        events += _engine(engine, spans[spans.engine == engine], rows[rows.engine == engine])
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"run": run.name, "kind": run.kind}}


def _torch_events(run: Run, first_us: float, last_us: float) -> Iterator[dict[str, Any]]:
    """Of torch.profiler, where it ran in these steps."""
    for path in sorted((run.path / TORCH_FOLDER).glob("steps-*.json")):
        try:
            own = read_json(path, LARGEST_TORCH_TRACE_BYTES)["traceEvents"]
            events = [event for event in own if isinstance(event, dict)]
            inside = [event for event in events if "ts" not in event or first_us <= float(event["ts"]) <= last_us]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a trace: {error}") from None
        if any("ts" in event for event in inside):
            yield from ({**e, "pid": TORCH_PIDS + e["pid"]} if isinstance(e.get("pid"), int) else e for e in inside)


def _counters(run: Run, first_s: float, last_s: float) -> Iterator[dict[str, Any]]:
    """Of each device: utilisation by the driver's own windows, polled where it keeps none; power; and the counters of
    the GPU (GPM) and of the host's disks."""
    samples = run.devices[run.devices.t.between(first_s, last_s)]
    windows = run.windows[run.windows.t_begin.between(first_s, last_s)]
    for number, device in enumerate([*dict.fromkeys([*samples.device, *windows.device])]):
        pid, own = DEVICE_PIDS + number, samples[samples.device == device]
        tracks = {
            str(metric): (of.t_begin, of.value)
            for metric, of in windows[windows.device == device].groupby("metric", sort=False)
        }
        if "utilisation" not in tracks:
            tracks["utilisation"] = (own.t, own.utilisation)
        tracks["power_watts"] = (own.t, own.power_watts)
        yield _name("process_name", pid, 0, f"{device}: sensors")
        for metric, (t, value) in tracks.items():
            for at, mean in _thinned(t, value).itertuples(index=False):
                yield {"name": metric, "ph": "C", "ts": 1e6 * at, "pid": pid, "tid": 0, "args": {"value": mean}}


def _thinned(t: pd.Series, value: pd.Series) -> pd.DataFrame:
    """t, value: at most MOST_POINTS of those that were read."""
    known = pd.DataFrame({"t": t, "value": value}).dropna().astype(float).sort_values("t")
    if len(known) <= MOST_POINTS:
        return known
    return known.groupby(np.arange(len(known)) * MOST_POINTS // len(known)).agg({"t": "first", "value": "mean"})


def _engine(engine: int, spans: pd.DataFrame, rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    pid = ENGINE_PIDS + engine
    yield _name("process_name", pid, 0, f"engine {engine}")
    yield _name("thread_name", pid, 0, "engine")
    for span in spans.itertuples(index=False):
        names = ("steps", "batch", "context_tokens", "waiting")
        yield _event(span.kind, span, pid, 0, {name: int(getattr(span, name)) for name in names})
    ran = rows[rows.t_end > rows.t_start].sort_values(["t_start", "row"], kind="stable")
    slots = slots_of(ran.t_start.tolist(), ran.t_end.tolist())
    for slot in sorted(set(slots)):
        yield _name("thread_name", pid, 1 + slot, f"slot {slot}")
    for row, slot in zip(ran.itertuples(index=False), slots, strict=True):
        facts = {"tokens": int(row.tokens), "context before": int(row.context_before), "finished": bool(row.finished)}
        yield _event(f"row {row.row}", row, pid, 1 + slot, facts)


def slots_of(starts: list[float], ends: list[float]) -> list[int]:
    """The lowest slot that is free at each start; starts ascend. A slot that is left is free at that instant."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []  # heap of (end, slot)
    slots, opened = [], 0
    for start, end in zip(starts, ends, strict=True):
        while busy and busy[0][0] <= start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            heapq.heappush(free, opened)
            opened += 1
        slot = heapq.heappop(free)
        slots.append(slot)
        heapq.heappush(busy, (end, slot))
    return slots


def _event(name: str, timed: Any, pid: int, tid: int, facts: dict[str, Any]) -> dict[str, Any]:
    start, end = 1e6 * float(timed.t_start), 1e6 * float(timed.t_end)
    return {"name": name, "ph": "X", "ts": start, "dur": end - start, "pid": pid, "tid": tid, "args": facts}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
