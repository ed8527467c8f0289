"""`tppo watch RUN`: a run as it goes on, read from its directory only: a terminal view, and metrics for Prometheus.

A trainer is not touched by it: another process, which reads what the run has written.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from profiling.alarms import alarms
from profiling.console import plain_table, table_console
from profiling.errors import ConfigError, ConservationError, DataError, ToolkitError
from profiling.ledger import build_ledger
from profiling.markers import read_markers
from profiling.metrics_server import MetricsServer
from profiling.reader import Run
from profiling.sampler_process import HANGS_AFTER_S

REFRESH_S = 2.0
REST = 10.0
"""Between two looks, in times of what a look takes: that of a long run takes seconds."""
RECENT_S = 5.0
"""Of samples, of which a device's bar shows the mean."""
LONG_AGO_S = 120.0
"""Two of the longest times between a sampler's writings."""
LARGEST_CAUSES = 8
PREFIX = "tppo"


@dataclass(frozen=True)
class Snapshot:
    """A run so far."""

    run: Run
    step: int
    """Of the last one that is complete."""
    wall_s: float
    """Up to its end."""
    ledger: pd.DataFrame
    """Of the complete steps."""
    elapsed_s: float
    """Up to the last phase's end, or to the last sample that the sampler told of."""
    silent_s: float
    """Since the run's files last changed."""


def snapshot(path: Path) -> Snapshot:
    """Raises DataError. The step that is going on is left out: its records, or its phases, are not all written yet."""
    run = Run(path)
    if run.trailer is None and "zero_s" in run.header:
        run.outline += markers_so_far(run)
    phases, engine = run.phases, run.engine
    known_s = run.trailer["t"] if run.trailer else float(phases.t_end.max()) if len(phases) else 0.0
    steps = phases.step
    if len(engine):
        ends = engine.groupby("step").t_end.max()
        steps = ends[ends <= known_s].index
    step = int(steps.max()) if len(steps) else 0
    phases, engine = phases[phases.step <= step], engine[engine.step <= step]
    wall_s = run.trailer["t"] if run.trailer else float(phases.t_end.max()) if len(phases) else 0.0
    rollouts = run.rollouts[run.rollouts.step <= step]
    try:
        ledger = build_ledger(cluster=run.cluster, phases=phases, engine=engine, rollouts=rollouts, wall_s=wall_s)
    except ConservationError as error:
        raise DataError(f"{path}: its records do not add up: {error}") from None
    sampled_s = run.sampler.get("last_sample_s")
    if run.trailer is not None or not isinstance(sampled_s, int | float):
        sampled_s = 0.0
    elapsed_s = max(known_s, float(sampled_s))
    return Snapshot(run, step, wall_s, ledger, elapsed_s, _silent_s(path))


def _silent_s(path: Path) -> float:
    """The sampler says every five seconds that it lives, and it dies with the run."""
    times = []
    for name in ("trace.jsonl", "metrics.jsonl", "sampler.json"):
        with contextlib.suppress(OSError):
            times.append((path / name).stat().st_mtime)
    return max(0.0, time.time() - max(times, default=0.0))


def markers_so_far(run: Run) -> list[dict[str, Any]]:
    """Of a profiled command that goes on: its processes' phases, which are in the trace when it has ended."""
    zero_s, unix_s = run.header["zero_s"], run.header["unix_time_s"]
    if not isinstance(zero_s, int | float) or not isinstance(unix_s, int | float):
        return []
    return read_markers(run.path, zero_s, math.inf, unix_s, str(run.header.get("boot")))


def watch(
    path: Path, *, once: bool = False, port: int | None = None, host: str = "127.0.0.1", names: Sequence[str] = ()
) -> None:
    """Show the run until it ends, or until Ctrl-C. port: also serve /metrics there. Raises DataError, ConfigError."""
    shown = view(snapshot(path))
    if port is not None:
        serve(path, port, host, names)
    console = table_console()
    if once:
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False) as live:
        while True:
            began = time.perf_counter()
            now = snapshot(path)
            live.update(view(now), refresh=True)
            if now.run.trailer is not None:
                return
            took_s = time.perf_counter() - began
            time.sleep(max(REFRESH_S, REST * took_s))


def view(now: Snapshot) -> Group:
    run = now.run
    if run.trailer is not None:
        status = str(run.trailer["status"])
    elif now.silent_s > HANGS_AFTER_S:
        status = f"no sign of life for {now.silent_s:.0f} s"
    else:
        status = "running"
    doing = "" if len(run.phases) else ", in its first phase"
    title = f"{run.path} ({run.kind}): {status}, step {now.step}, {now.elapsed_s:.1f} s{doing}"
    return Group(title, _phases(now), _devices(now), _causes(now), *alarms(now.ledger, run))


def _phases(now: Snapshot) -> Table:
    table = plain_table("phases", "phase", "times", "seconds", "last, s", "processes", "share")
    for name, own in now.run.phases.groupby("name", sort=False):
        seconds = own.t_end - own.t_start
        processes = own.process.nunique()
        share = float(seconds.sum()) / (now.wall_s * processes) if now.wall_s else 0.0
        table.add_row(
            str(name),
            str(len(own)),
            f"{seconds.sum():.1f}",
            f"{seconds.iloc[-1]:.2f}",
            str(processes),
            ProgressBar(1.0, share, width=20),
        )
    return table


def _devices(now: Snapshot) -> Table:
    table = plain_table(f"devices, last {RECENT_S:g} s", "device", "utilisation", "", "power, W", "memory, GiB", "C")
    for device, own in latest(now.run).iterrows():
        busy = own.utilisation
        table.add_row(
            str(device),
            _text(100 * busy, ".0f", " %"),
            ProgressBar(1.0, busy, width=20) if pd.notna(busy) else "",
            _text(own.power_watts, ".0f"),
            _text(own.memory_bytes / 2**30, ".1f"),
            _text(own.temperature_c, ".0f"),
        )
    return table


def _causes(now: Snapshot) -> Table:
    """Where the GPU-seconds of the complete steps went, the largest first."""
    table = plain_table("GPU-seconds so far", "cause", "seconds", "share")
    seconds = now.ledger.groupby("cause").seconds.sum().sort_values(ascending=False)
    for cause, own in seconds.head(LARGEST_CAUSES).items():
        table.add_row(str(cause), f"{own:.1f}", ProgressBar(1.0, own / seconds.sum(), width=20))
    return table


def latest(run: Run) -> pd.DataFrame:
    """By device: means over the last RECENT_S seconds of its samples; null where nothing was read in them. Without
    those that were last read LONG_AGO_S before others."""
    devices = run.devices
    if devices.empty:
        return devices.set_index("device")
    last = devices.groupby("device").t.transform("max")  # samplers of other hosts write at times of their own
    recent = devices[(devices.t >= last - RECENT_S) & (last >= devices.t.max() - LONG_AGO_S)]
    return recent.groupby("device", sort=False).mean(numeric_only=True)


def _text(value: float, form: str, unit: str = "") -> str:
    return format(value, form) + unit if pd.notna(value) else "-"


def serve(path: Path, port: int, host: str, names: Sequence[str] = ()) -> MetricsServer:
    """Serve the run at http://host:port/metrics from a thread. names: under which it may be asked besides addresses.
    Raises ConfigError when the port cannot be had."""
    if not host:
        raise ConfigError("--bind: names no address; 127.0.0.1 is this machine alone, 0.0.0.0 every network")
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(path))
    try:
        server = MetricsServer(host, port, lambda: (CONTENT_TYPE_LATEST, generate_latest(registry)), names=names)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--prometheus {host}:{port}: cannot listen: {error}") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Metrics:
    """What a scrape sees: read anew every time. A run that cannot be read is `up` 0, and no other metric."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        try:
            found = list(_metrics(snapshot(self._path)))
        except ToolkitError:
            found = [GaugeMetricFamily(f"{PREFIX}_up", "1: the run directory can be read", value=0)]
        return found


def _metrics(now: Snapshot) -> Iterable[Metric]:
    run = now.run
    yield GaugeMetricFamily(f"{PREFIX}_up", "1: the run directory can be read", value=1)
    yield GaugeMetricFamily(f"{PREFIX}_running", "0: the run has ended", value=float(run.trailer is None))
    yield CounterMetricFamily(f"{PREFIX}_steps", "complete training steps", value=now.step)
    yield _labelled(
        CounterMetricFamily(f"{PREFIX}_phase_seconds", "seconds in phases", labels=["phase"]),
        (run.phases.t_end - run.phases.t_start).groupby(run.phases.name).sum(),
    )
    seconds = CounterMetricFamily(f"{PREFIX}_gpu_seconds", "GPU-seconds by cause", labels=["gpu", "cause"])
    for (gpu, cause), value in now.ledger.groupby(["gpu", "cause"]).seconds.sum().items():
        seconds.add_metric([str(gpu), str(cause)], float(value))
    yield seconds
    recent = latest(run)
    for column, name, text in (
        ("utilisation", "device_utilisation_ratio", "share of the time with a kernel running; host: of all cores"),
        ("memory_bytes", "device_memory_bytes", "memory in use"),
        ("power_watts", "device_power_watts", "power"),
        ("temperature_c", "device_temperature_celsius", "temperature"),
    ):
        if column in recent:
            yield _labelled(GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=["device"]), recent[column].dropna())
    counters = run.devices[run.devices.energy_joules.notna()].groupby("device").energy_joules.last()
    yield _labelled(
        CounterMetricFamily(f"{PREFIX}_device_energy_joules", "energy counter of the device", labels=["device"]),
        counters,
    )
    if len(run.metrics):
        last = run.metrics.iloc[-1]
        numbers = {str(k): float(v) for k, v in last.items() if isinstance(v, int | float) and pd.notna(v)}
        yield _labelled(
            GaugeMetricFamily(f"{PREFIX}_training_metric", "last row of metrics.jsonl", labels=["name"]),
            pd.Series(numbers, dtype=float),
        )


def _labelled(family: Metric, values: pd.Series) -> Metric:
    for label, value in values.items():
        family.add_metric([str(label)], float(value))  # type: ignore[attr-defined]
    return family
