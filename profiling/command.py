"""`tppo profile -- COMMAND`, `--pid PID`: any program under the sampler."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from rich.table import Table

from profiling.alarms import alarms
from profiling.attribution import COUNTERS, device_estimates, interval_text, windows_of
from profiling.console import plain_table, table_console
from profiling.energy import is_counting
from profiling.errors import ConfigError
from profiling.gpu_users import GpuUsers, marked_for, of_tree, seeing_what
from profiling.markers import VARIABLE, read_markers
from profiling.overlaps import overlap_note
from profiling.phases import Profiler
from profiling.reader import Run
from profiling.summary import COMMAND, write_totals

SHORTEST_INTERVAL_S = 1e-3
LONGEST_INTERVAL_S = 3600.0


def profile_command(
    argv: Sequence[str],
    *,
    interval_s: float,
    output: Path,
    links: bool = False,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `argv`, sample meanwhile, write a run directory, print what was seen. Returns the command's exit code.
    Raises ConfigError."""
    check_interval(interval_s)
    if shutil.which(argv[0]) is None:
        raise ConfigError(f"{argv[0]}: no such command")
    with Profiler(output, sampler_interval_s=interval_s, links=links) as profiler:
        with (
            GpuUsers(output, marked_for(output)) as users,
            profiler.phase(COMMAND, step=1),
            passing_on_sigterm() as pass_on_to,
        ):
            try:
                # The user's own command, as words: no shell reads it.
                process = subprocess.Popen(  # nosec B603
                    argv, env={**(environment or os.environ), VARIABLE: str(output.resolve())}
                )
            except OSError as error:
                raise ConfigError(f"{argv[0]}: cannot be run: {error.strerror}") from None
            pass_on_to(process)
            code = _wait(process)
        records = read_markers(output, profiler.zero_s, profiler.now(), time.time() - profiler.now())
        for record in records:
            profiler.trace(record)
        _trace_note(profiler, overlap_note(records, profiler.now()))
        _trace_note(profiler, users.note())
        wall_s = profiler.finish("finished" if code == 0 else "failed")
    write_totals(profiler.writer, wall_s)
    try:
        _print(Run(output), wall_s, f"exit code {code}")
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # (rich's) the reader of our output has gone; the command's exit code stands
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def profile_process(pid: int, *, interval_s: float, output: Path, links: bool = False) -> int:
    """Sample the GPUs that the process with this id was started with, while it runs or until Ctrl-C; it is left alone.
    Its phases are not known. Raises ConfigError."""
    check_interval(interval_s)
    try:
        process = psutil.Process(pid)
        name = process.name()
    except (psutil.Error, ValueError, OverflowError):
        raise ConfigError(f"--pid {pid}: no such process") from None
    ended = "ended"
    with seeing_what(process), Profiler(output, sampler_interval_s=interval_s, links=links) as profiler:
        with GpuUsers(output, of_tree(process)) as users, profiler.phase(COMMAND, step=1):
            try:
                process.wait()
            except KeyboardInterrupt:
                ended = "still runs"
        _trace_note(profiler, users.note())
        wall_s = profiler.finish("finished")
    write_totals(profiler.writer, wall_s)
    _print(Run(output), wall_s, f"{name} ({pid}) {ended}")
    return 0


def _trace_note(profiler: Profiler, text: str | None) -> None:
    if text is not None:
        profiler.trace({"type": "note", "text": text})


def check_interval(interval_s: float) -> None:
    if not SHORTEST_INTERVAL_S <= interval_s <= LONGEST_INTERVAL_S:
        raise ConfigError(
            f"--interval {interval_s:g}: must be from {SHORTEST_INTERVAL_S:g} to {LONGEST_INTERVAL_S:g} seconds"
        )


@contextlib.contextmanager
def passing_on_sigterm() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """The command decides what SIGTERM means; we record how it ended. Yields what names the command once it has
    started: a signal from before then is passed on there."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda process: None
        return
    started: list[subprocess.Popen[bytes]] = []
    came = False

    def told(*_: object) -> None:
        nonlocal came
        came = True
        for process in started:
            process.terminate()

    def pass_on_to(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        if came:
            process.terminate()

    before = signal.signal(signal.SIGTERM, told)
    try:
        yield pass_on_to
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code  # as a shell reports a signal
        except KeyboardInterrupt:
            continue  # the command got Ctrl-C too; it decides


def _print(run: Run, wall_s: float, how: str) -> None:
    columns = ("device", "samples", "utilisation", "power, W", "energy, J", "peak memory, GiB")
    table = plain_table(f"{run.path}: {wall_s:.1f} s, {how}", *columns)
    names = {device["uuid"]: device["name"] for device in run.header["devices"]}
    for device, samples in run.devices.groupby("device", sort=False):
        energy = samples.energy_joules.dropna()
        known = is_counting(samples.t[energy.index].to_numpy(float), energy.to_numpy(float))
        table.add_row(
            f"{device} ({names.get(device, '?')})",
            str(len(samples)),
            _busy(run, str(device), samples.utilisation),
            _mean(samples.power_watts, ".0f"),
            f"{energy.iloc[-1] - energy.iloc[0]:.0f}" if known else "-",
            _mean(samples.memory_bytes.dropna().nlargest(1) / 2**30, ".1f"),
        )
    notes = [record["text"] for record in run.trace if record["type"] == "note"]
    sentences = alarms(run.ledger, run) if run.ledger is not None else []
    table_console().print(table, *by_phase(run), *notes, *sentences, sep="\n")


def by_phase(run: Run) -> list[Table]:
    """Device and phase: seconds, busy, joules, watts with intervals, `unresolved` where nothing can be said; and what
    the GPUs' own counters say, where they have them."""
    estimates = device_estimates(run)
    main = plain_table("by phase, 95 % intervals", "device", "phase", "seconds", "busy", "energy, J", "mean power, W")
    counted = [name for name in COUNTERS if (estimates.quantity == name).any()]
    titles = (name.replace("_", " ") for name in counted)
    counters = plain_table("by phase, the GPUs' own counters", "device", "phase", *titles)
    for (device, phase), own in estimates.groupby(["device", "phase"], sort=False):
        known = own.set_index("quantity")
        seconds = float(own.seconds.iloc[0])
        texts = [
            interval_text(known, "busy", 100.0, " %"), interval_text(known, "joules"),
            interval_text(known, "joules", 1 / max(seconds, 1e-9)),
        ]  # fmt: skip
        main.add_row(str(device), str(phase), f"{seconds:.1f}", *(text or "-" for text in texts))
        texts = [interval_text(known, name, 100.0, " %") for name in counted]
        if any(texts):
            counters.add_row(str(device), str(phase), *(text or "-" for text in texts))
    return [main, *([counters] if counted else [])]


def _busy(run: Run, device: str, polls: pd.Series) -> str:
    """Mean of the driver's own windows, which leave no time out; of the polls where it keeps none."""
    own = windows_of(run, device, "utilisation")
    if not len(own.busy):
        return _mean(polls, ".0%")
    return format(np.average(own.busy, weights=own.end - own.begin), ".0%")


def _mean(values: "object", form: str) -> str:
    known = values.dropna()  # type: ignore[attr-defined]
    return format(known.mean(), form) if len(known) else "-"
