"""The sampler: `python -m profiling.sampler`, a process of its own, one per host.

A thread in the trainer would be held up by the interpreter's lock just when the trainer is busy. It writes
devices/part-N.parquet into the run directory and sampler.json beside it, and ends when its standard input closes or
its parent dies.
"""

import argparse
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from profiling import schema
from profiling.hosts import DEVICE
from profiling.shell import end_with_the_parent, exit_code_of
from profiling.sources import NoDriver, Sample, Source, Window
from profiling.sources.amd import AmdSource
from profiling.sources.host import HostSource
from profiling.sources.nvml import NvmlSource
from profiling.writer import write_atomically, write_parquet

PART_SECONDS = 5.0
"""Samples reach the disk at least this often, in the first minutes of a run; then:"""
LATER_PART_SECONDS, LATER_S = 60.0, 600.0
"""A day would else be seventeen thousand files."""
REPORT_SECONDS = 5.0
"""Between signs of life."""
ENDS_WITHIN_S = 5.0
"""Of SIGTERM, however a driver call goes on."""


def open_sources(links: bool, host: str = DEVICE) -> tuple[list[Source], str | None]:
    """NVML where a driver answers, else amdsmi, and the host always, by its name in tables; a note for the trace."""
    reasons = []
    openers: list[Callable[[], Source]] = [lambda: NvmlSource(links=links), AmdSource]
    for opened in openers:
        try:
            gpus = opened()
        except NoDriver as error:
            reasons.append(str(error))
        else:
            return [gpus, HostSource(beside_gpus=True, device=host)], gpus.note
    return [HostSource(device=host)], f"no GPU: host samples only (NVML: {'; '.join(reasons)})"


class Sampler:
    """Reads every source each `interval_s`, on deadlines that do not drift."""

    def __init__(
        self, directory: Path, interval_s: float, zero_s: float, *, links: bool = False, host: str = DEVICE
    ) -> None:
        self.directory = directory
        self.interval_s = interval_s
        self.zero_s = zero_s
        self.sources, self.note = open_sources(links, host)
        self.rows: list[tuple[float, Sample]] = []
        self.windows: list[Window] = []
        earlier = (p for name in ("devices", "windows") for p in (directory / name).glob("part-*.parquet"))
        self.part = 1 + max((int(p.stem[5:]) for p in earlier), default=-1)
        self.ticks = self.missed = 0
        self.start_cpu_s = 0.0
        """Spent on imports, on finding the devices and on getting ready to write."""
        self.first_s: float | None = None
        self.last_s: float | None = None

    def run(self, until: Sequence[Any]) -> None:
        """Sample until one of these files can be read; the first sample at once, the last one at the end."""
        self.tick()
        self.report()
        self.read_windows()  # says whether there are any: utilisation is polled where not
        _warm_up()
        self.start_cpu_s = time.process_time()
        deadline = time.perf_counter() + self.interval_s
        began = written = reported = time.perf_counter()
        while not _told_to_end(until, min(REPORT_SECONDS, max(0.0, deadline - time.perf_counter()))):
            now = time.perf_counter()
            if now >= deadline:  # else it is only time for a sign of life
                late = int((now - deadline) / self.interval_s)
                self.missed += late
                self.tick()
                deadline += (1 + late) * self.interval_s
            if now - written >= (PART_SECONDS if now - began < LATER_S else LATER_PART_SECONDS):
                self.write_part()
                written = reported = now
            elif now - reported >= REPORT_SECONDS:
                self.read_windows()
                self.report()
                reported = now
        self.tick(last=True)
        self.write_part()
        for source in self.sources:
            source.close()

    def tick(self, *, last: bool = False) -> None:
        t = time.perf_counter() - self.zero_s
        for source in self.sources:
            at = time.perf_counter() - self.zero_s  # a sweep of slow calls takes a while: each device has its time
            for sample in source.read(t, last=last):
                self.rows.append((at, sample))
                at = time.perf_counter() - self.zero_s
        self.ticks += 1
        self.first_s = t if self.first_s is None else self.first_s
        self.last_s = t

    def read_windows(self) -> None:
        """Before drivers, which keep some twenty seconds of them, forget them."""
        now = time.perf_counter() - self.zero_s
        self.windows += [window for source in self.sources for window in source.windows(now)]

    def write_part(self) -> None:
        self.read_windows()
        windows, self.windows = self.windows, []
        if windows:
            own = {name: [getattr(window, name) for window in windows] for name in schema.WINDOWS.names}
            write_parquet(self.directory / "windows" / f"part-{self.part:06d}.parquet", own, schema.WINDOWS)
        if self.rows:
            self.write_rows()
        self.part += 1
        self.report()  # its time says that the sampler lives

    def write_rows(self) -> None:
        columns: dict[str, list[Any]] = {"t": [t for t, _ in self.rows]}
        for field in fields(Sample):
            columns[field.name] = [getattr(sample, field.name) for _, sample in self.rows]
        path = self.directory / "devices" / f"part-{self.part:06d}.parquet"
        write_parquet(path, columns, schema.DEVICES)
        self.rows = []

    def report(self) -> None:
        """What was sampled and what it cost, in sampler.json."""
        states = {device: m for source in self.sources for device, m in source.capabilities.states.items()}
        content = {
            "devices": [asdict(device) for source in self.sources for device in source.devices()],
            "capabilities": states,
            "processes": {device: seen for source in self.sources for device, seen in source.processes().items()},
            "note": self.note,
            "interval_s": self.interval_s,
            "ticks": self.ticks,
            "missed_ticks": self.missed,
            "first_sample_s": self.first_s,
            "last_sample_s": self.last_s,
            "cpu_seconds": time.process_time(),
            "start_cpu_seconds": self.start_cpu_s,
        }
        write_atomically(self.directory / "sampler.json", (json.dumps(content, indent=1) + "\n").encode())


def _warm_up() -> None:
    """Libraries load what they need for a table when the first one is written: now, not in the middle of the run."""
    with tempfile.TemporaryDirectory() as folder:
        columns: dict[str, list[Any]] = {name: [] for name in schema.DEVICES.names}
        write_parquet(Path(folder) / "part.parquet", columns, schema.DEVICES)


def _told_to_end(until: Sequence[Any], timeout_s: float) -> bool:
    """Wait; True as soon as the parent has closed its end of the pipe, or said so: a child that it forked may hold
    the pipe open."""
    ready, _, _ = select.select(until, [], [], timeout_s)
    return bool(ready)


def sigterm() -> int:
    """A file descriptor that can be read from SIGTERM on, which the parent's death sends. A process that has not ended
    ENDS_WITHIN_S later, for a driver call does not return, ends there."""
    readable, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def end() -> None:
        select.select([readable], [], [])
        time.sleep(ENDS_WITHIN_S)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=end, name="end at SIGTERM", daemon=True).start()
    return readable


def main() -> None:
    parser = argparse.ArgumentParser(description="sample GPUs and the host until standard input closes")
    parser.add_argument("--output", type=Path, required=True, help="run directory, or another host's folder in it")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples")
    parser.add_argument("--zero", type=float, required=True, help="the monotonic clock at the start of the run")
    parser.add_argument("--links", action="store_true", help="also PCIe and NVLink traffic")
    parser.add_argument("--host", default=DEVICE, help="the host's name in tables")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; the pipe tells us
    until = [sys.stdin, sigterm()]
    end_with_the_parent()

    def sample() -> int:
        Sampler(options.output, options.interval, options.zero, links=options.links, host=options.host).run(until)
        return 0

    raise SystemExit(exit_code_of("sampler", sample))


if __name__ == "__main__":
    main()
