"""The host's CPU and memory through psutil: what is left to measure where there is no GPU."""

import psutil

from profiling.sources import Capabilities, Device, Sample, Window


class HostSource:
    def __init__(self) -> None:
        self.capabilities = Capabilities()
        for metric in ("utilisation", "memory_bytes"):
            self.capabilities.note("host", metric, "ok")
        psutil.cpu_percent()  # starts the interval that the first reading ends

    def devices(self) -> list[Device]:
        return [Device("host", f"{psutil.cpu_count()} CPU cores", 0)]

    def read(self) -> list[Sample]:
        """CPU time of all cores since the last reading, as a fraction of all cores; memory in use."""
        return [
            Sample(
                "host",
                utilisation=psutil.cpu_percent() / 100,
                memory_bytes=float(psutil.virtual_memory().used),
            )
        ]

    def windows(self, now_s: float) -> list[Window]:
        return []

    def close(self) -> None:
        pass
