"""What a GPU's own performance counters say (GPM, Hopper and newer): how much of it works, not whether any of it does.

A counter is the difference of two snapshots, at least a tenth of a second apart as NVML has it; here half a second.
"""

import math
from contextlib import suppress
from typing import Any

import pynvml as nvml

from profiling.sources import Window

INTERVAL_S = 0.5
MEBI = float(2**20)
METRICS = {
    "sm_activity": (nvml.NVML_GPM_METRIC_SM_UTIL, 0.01),
    "sm_occupancy": (nvml.NVML_GPM_METRIC_SM_OCCUPANCY, 0.01),
    "tensor_activity": (nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, 0.01),
    "dram_activity": (nvml.NVML_GPM_METRIC_DRAM_BW_UTIL, 0.01),
}
"""Name -> NVML's number of it, and what its percentages and MiB a second are multiplied by."""
LINKS = {
    "pcie_sent_bytes_per_s": (nvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, MEBI),
    "pcie_received_bytes_per_s": (nvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, MEBI),
    "nvlink_sent_bytes_per_s": (nvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, MEBI),
    "nvlink_received_bytes_per_s": (nvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, MEBI),
}
PCIE_COUNTERS = {
    "pcie_sent_bytes_per_s": nvml.NVML_PCIE_UTIL_TX_BYTES,
    "pcie_received_bytes_per_s": nvml.NVML_PCIE_UTIL_RX_BYTES,
}
PCIE_WINDOW_S = 0.02
"""Over which NVML averages PCIe traffic where there is no GPM; the call takes as long."""


class Counters:
    """Two snapshots of one GPU, or of a MIG instance of `parent`."""

    def __init__(self, handle: Any, parent: Any, links: bool) -> None:
        self.handle = handle
        self._parent = parent
        self._metrics = METRICS | (LINKS if links else {})
        self._snapshots: list[Any] = []
        self._instance: int | None = None
        self._taken_s: float | None = None
        self._due_s = 0.0

    def restart(self, handle: Any, parent: Any) -> None:
        """The GPU was lost: it has new handles, and what it counted before says nothing of what it counts now."""
        for snapshot in self._snapshots:
            with suppress(nvml.NVMLError):
                nvml.nvmlGpmSampleFree(snapshot)
        self._snapshots, self._taken_s = [], None
        self.handle, self._parent = handle, parent

    def due(self, now_s: float) -> bool:
        return now_s >= self._due_s

    def read(self, device: str, now_s: float) -> list[Window]:
        """What happened since the last call; nothing at the first. Raises NVMLError."""
        self._due_s = now_s + INTERVAL_S
        try:
            if not self._snapshots:
                self._prepare()
            before, after = self._snapshots
            self._snapshot(after)
        except nvml.NVMLError:
            self._taken_s = None
            raise
        self._snapshots = [after, before]
        since, self._taken_s = self._taken_s, now_s
        if since is None:
            return []
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(self._metrics)
        asked.sample1, asked.sample2 = before, after
        for place, (number, _) in enumerate(self._metrics.values()):
            asked.metrics[place].metricId = number
        nvml.nvmlGpmMetricsGet(asked)
        return [
            Window(device, name, since, now_s, asked.metrics[place].value * unit)
            for place, (name, (_, unit)) in enumerate(self._metrics.items())
            if asked.metrics[place].nvmlReturn == nvml.NVML_SUCCESS and math.isfinite(asked.metrics[place].value)
        ]

    def _prepare(self) -> None:
        if not nvml.nvmlGpmQueryDeviceSupport(self._parent or self.handle).isSupportedDevice:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        if self._parent is not None:
            self._instance = nvml.nvmlDeviceGetGpuInstanceId(self.handle)
        self._snapshots = [nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()]

    def _snapshot(self, into: Any) -> None:
        if self._instance is None:
            nvml.nvmlGpmSampleGet(self.handle, into)
        else:
            nvml.nvmlGpmMigSampleGet(self._parent, self._instance, into)


def links_without_gpm(device: str, handle: Any, now_s: float) -> list[Window]:
    """PCIe traffic of GPUs before Hopper: two calls that take 20 ms each. Raises NVMLError."""
    return [
        Window(device, name, now_s, now_s + PCIE_WINDOW_S, 1024.0 * nvml.nvmlDeviceGetPcieThroughput(handle, counter))
        for name, counter in PCIE_COUNTERS.items()
    ]
