"""The host's CPU, memory and disk through psutil: what is left to measure where there is no GPU."""

import time
from collections.abc import Iterator
from typing import Any

import psutil

from profiling.hosts import DEVICE
from profiling.sources import Capabilities, Device, OnceASecond, Sample, Window

SHORTEST_S = 0.05
"""Of an interval that CPU time can be told for: the kernel counts it in hundredths of a second."""


class HostSource:
    """beside_gpus: read the host once a second, for the GPUs are what every reading is for. device: its name in
    tables."""

    def __init__(self, *, beside_gpus: bool = False, device: str = DEVICE) -> None:
        self._device = device
        self._beside_gpus = beside_gpus
        self.capabilities = Capabilities()
        for metric in ("utilisation", "memory_bytes"):
            self.capabilities.note(device, metric, "ok")
        self.note: str | None = None
        self._first = True
        psutil.cpu_percent()  # starts the interval that the first reading ends
        self._began_s = time.perf_counter()
        self._slow = OnceASecond()
        self._disk: tuple[float, int, int] | None = None

    def devices(self) -> list[Device]:
        return [Device(self._device, f"{psutil.cpu_count()} CPU cores", 0)]

    def read(self, now_s: float, *, last: bool = False) -> Iterator[Sample]:
        """CPU time of all cores since the last reading, as a fraction of all cores; memory in use. Nothing sooner than
        SHORTEST_S after the last reading; the first comes at once, and its CPU time is null where that is too soon."""
        interval_s = time.perf_counter() - self._began_s
        first, self._first = self._first, False
        if interval_s < SHORTEST_S and not first:
            return
        slow = self._slow.is_due(now_s) or last
        if self._beside_gpus and not slow:
            return
        utilisation = None
        if interval_s >= SHORTEST_S:
            utilisation = psutil.cpu_percent() / 100
            self._began_s += interval_s
        memory = float(psutil.virtual_memory().used) if slow else None
        yield Sample(self._device, utilisation=utilisation, memory_bytes=memory)

    def windows(self, now_s: float) -> list[Window]:
        """Bytes a second that all disks together read and wrote since the last call."""
        counters = psutil.disk_io_counters()
        state = "not supported" if counters is None else "ok"
        for metric in ("disk_read_bytes_per_s", "disk_write_bytes_per_s"):
            self.capabilities.note(self._device, metric, state)
        if counters is None:
            return []
        before, self._disk = self._disk, (now_s, counters.read_bytes, counters.write_bytes)
        if before is None or now_s <= before[0]:
            return []
        seconds = now_s - before[0]
        moved = {"read": counters.read_bytes - before[1], "write": counters.write_bytes - before[2]}
        return [
            Window(self._device, f"disk_{way}_bytes_per_s", before[0], now_s, own / seconds)
            for way, own in moved.items()
        ]

    def processes(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def close(self) -> None:
        pass
