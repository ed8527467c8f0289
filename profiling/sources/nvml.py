"""NVIDIA GPUs through nvidia-ml-py. A metric that a GPU does not have is None with a reason, never 0."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pynvml as nvml

from profiling.sources import Capabilities, Device, NoDriver, OnceASecond, Sample, Ticking, Window
from profiling.sources.gpm import Counters, links_without_gpm

STATES = {
    nvml.NVML_ERROR_NOT_SUPPORTED: "not supported",
    nvml.NVML_ERROR_NO_PERMISSION: "no permission",
    nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "missing symbol",
    nvml.NVML_ERROR_GPU_IS_LOST: "lost",
    nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: "version mismatch",
}
FOR_GOOD = ("not supported", "missing symbol", "version mismatch")
"""A metric in one of these states is not asked for again."""

FIELDS = {
    "energy_joules": nvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION,
    "power_watts": nvml.NVML_FI_DEV_POWER_AVERAGE,
    "power_instant_watts": nvml.NVML_FI_DEV_POWER_INSTANT,
}
"""Read by one call, every time; in thousandths."""
UNIONS = {
    nvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
    nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
    nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
    nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
    nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    nvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    nvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: "usVal",
}
"""Type of a field's value, the driver's choice -> where it stands."""
SINGLE: dict[str, Callable[[Any], float]] = {
    "energy_joules": lambda h: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3,
    "power_watts": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1e3,
}
"""The same of GPUs and drivers that do not have the field."""


def _utilisation(handle: Any) -> float:
    """Read every time where the driver keeps no samples of its own, else with SLOW."""
    return nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100


SLOW: dict[str, Callable[[Any], float]] = {
    "memory_bytes": lambda h: float(nvml.nvmlDeviceGetMemoryInfo(h).used),
    "sm_clock_mhz": lambda h: float(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
    "temperature_c": lambda h: float(nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
    "event_reasons": lambda h: nvml.nvmlDeviceGetCurrentClocksEventReasons(h),
}
LONGEST_WINDOW_S = 1.5
"""Between two of the driver's samples that follow each other."""
CLOCK_STEP_S = 0.05
"""That the wall clock, by which drivers stamp their samples, has moved against ours: it was set."""


@dataclass
class Gpu:
    """A GPU or a MIG instance, as NVML knows it now."""

    device: Device
    handle: Any
    counters: Counters
    lost: bool = False
    fields: list[str] = field(default_factory=lambda: list(FIELDS))
    """That it has."""
    absent: set[str] = field(default_factory=set)
    """Metrics that it does not have."""
    has_ring: bool = False
    """Its driver keeps utilisation samples."""
    ring_us: int = 0
    """Time of the last of the driver's samples that was read."""
    energy: Ticking = field(default_factory=Ticking)


class NvmlSource:
    """All GPUs that this process may use (CUDA_VISIBLE_DEVICES, by index, UUID or MIG UUID). Raises NoDriver.

    links: also read PCIe and NVLink traffic.
    """

    def __init__(self, *, links: bool = False) -> None:
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise NoDriver(str(error)) from None
        self.capabilities = Capabilities()
        self._links = links
        self._unopened = set(range(count))
        self._found: list[tuple[Device, Any]] = []
        self._gpus: list[Gpu] = []
        self._open()
        if not self._gpus and not self._unopened:
            raise NoDriver(f"CUDA_VISIBLE_DEVICES leaves none of {count} GPUs" if count else "no GPU")
        self.note = order_note([device for device, _ in self._found], os.environ)
        self._slow, self._retry = OnceASecond(), OnceASecond()
        self._averages: list[Window] = []
        """Of the GPUs' own counters, since windows() was called."""
        self._wall_s: float | None = None
        """The wall clock against ours, when windows() was called last."""
        self._seen: dict[str, dict[int, dict[str, Any]]] = {}

    def _open(self) -> None:
        """Try the GPUs that could not be opened so far; keep, of all that could, those that are visible."""
        for index in sorted(self._unopened):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                device = Device(_text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), index)
            except nvml.NVMLError as error:  # one broken GPU does not hide the others
                self.capabilities.note(f"GPU {index}", "all", STATES.get(error.value, str(error)))
                continue
            self._unopened.remove(index)
            self.capabilities.states.pop(f"GPU {index}", None)
            self._found += [(device, handle), *_instances(device, handle)]
        self._found.sort(key=lambda entry: entry[0].index)  # instances stay behind their GPU
        handles = {device.uuid: handle for device, handle in self._found}
        known = {gpu.device.uuid: gpu for gpu in self._gpus}
        self._gpus = [
            known.get(device.uuid)
            or Gpu(device, handle, Counters(handle, handles.get(device.part_of or ""), self._links))
            for device, handle in visible(self._found, os.environ.get("CUDA_VISIBLE_DEVICES"), self._unopened)
        ]

    def devices(self) -> list[Device]:
        return [gpu.device for gpu in self._gpus]

    def read(self, now_s: float, *, last: bool = False) -> Iterator[Sample]:
        """A GPU that was lost is looked for again at every reading; one that could not be opened, once a second."""
        if self._unopened and self._retry.is_due(now_s):
            self._open()
        slow = self._slow.is_due(now_s) or last
        for gpu in self._gpus:
            yield self._sample(gpu, now_s, slow)

    def _sample(self, gpu: Gpu, now_s: float, slow: bool) -> Sample:
        _look_for(gpu)
        values = self._fields(gpu)
        readers = dict(SLOW) if slow else {}
        if slow or not gpu.has_ring:
            readers["utilisation"] = _utilisation
        for metric, single in SINGLE.items():
            if metric not in values:
                readers[metric] = single
        for metric, reader in readers.items():
            if metric in gpu.absent:
                continue
            try:
                values[metric], state = reader(gpu.handle), "ok"
            except nvml.NVMLError as error:
                state = self._fault(gpu, metric, error)
            self.capabilities.note(gpu.device.uuid, metric, state)
        joules = values.get("energy_joules")
        if joules is not None and gpu.energy.has_stopped(joules, now_s):
            values["energy_joules"] = None
            self.capabilities.note(gpu.device.uuid, "energy_joules", "stale")
        if "gpm" not in gpu.absent and gpu.counters.due(now_s):
            with self._noting(gpu, "gpm"):
                self._averages += gpu.counters.read(gpu.device.uuid, now_s)
        if self._links and slow and "gpm" in gpu.absent and "links" not in gpu.absent:
            with self._noting(gpu, "links"):
                self._averages += links_without_gpm(gpu.device.uuid, gpu.handle, now_s)
        return Sample(gpu.device.uuid, **values)

    def _fields(self, gpu: Gpu) -> dict[str, Any]:
        """Metrics of FIELDS that this GPU has."""
        if not gpu.fields:
            return {}
        try:
            answers = nvml.nvmlDeviceGetFieldValues(gpu.handle, [FIELDS[metric] for metric in gpu.fields])
        except nvml.NVMLError as error:
            for metric in gpu.fields:
                self.capabilities.note(gpu.device.uuid, metric, self._fault(gpu, "fields", error))
            if "fields" in gpu.absent:
                gpu.fields = []
            return {}
        values: dict[str, Any] = {}
        for metric, answer in zip(list(gpu.fields), answers, strict=True):
            if answer.nvmlReturn == nvml.NVML_SUCCESS:
                values[metric], state = getattr(answer.value, UNIONS[answer.valueType]) / 1e3, "ok"
            else:
                state = STATES.get(answer.nvmlReturn, str(nvml.NVMLError(answer.nvmlReturn)))
                if state in FOR_GOOD or answer.nvmlReturn == nvml.NVML_ERROR_INVALID_ARGUMENT:
                    gpu.fields.remove(metric)
            self.capabilities.note(gpu.device.uuid, metric, state)
        return values

    def _fault(self, gpu: Gpu, metric: str, error: Any) -> str:
        """The state that an error means; what is not there is not asked for again."""
        state = STATES.get(error.value, str(error))
        gpu.lost = gpu.lost or state == "lost"
        if state in FOR_GOOD:
            gpu.absent.add(metric)
        return state

    @contextmanager
    def _noting(self, gpu: Gpu, metric: str) -> Iterator[None]:
        """Keep the state that reading the metric ends in."""
        try:
            yield
            state = "ok"
        except nvml.NVMLError as error:
            state = self._fault(gpu, metric, error)
        self.capabilities.note(gpu.device.uuid, metric, state)

    def windows(self, now_s: float) -> list[Window]:
        """The driver's ring of utilisation samples, a sixth of a second each, kept for some twenty seconds; and what
        the GPUs' own counters say."""
        unix_zero_s, wall_s = time.time() - now_s, _wall_clock_s()
        if self._wall_s is not None and abs(wall_s - self._wall_s) > CLOCK_STEP_S:
            for gpu in self._gpus:  # what was stamped by the clock before it was set cannot be placed
                gpu.ring_us = int(1e6 * time.time())
        self._wall_s = wall_s
        averages, self._averages = self._averages, []
        return [
            window
            for window in [*averages, *(w for gpu in self._gpus for w in self._ring(gpu, now_s, unix_zero_s))]
            if window.t_begin >= 0
        ]

    def _ring(self, gpu: Gpu, now_s: float, unix_zero_s: float) -> list[Window]:
        if "utilisation_windows" in gpu.absent:
            return []
        samples: Any = []
        with self._noting(gpu, "utilisation_windows"):
            try:
                _, samples = nvml.nvmlDeviceGetSamples(gpu.handle, nvml.NVML_GPU_UTILIZATION_SAMPLES, gpu.ring_us)
            except nvml.NVMLError as error:
                if error.value != nvml.NVML_ERROR_NOT_FOUND:  # none since the last time
                    raise
            gpu.has_ring = True
        found = []
        for sample in samples:
            stamp = int(sample.timeStamp)
            if stamp / 1e6 - unix_zero_s > now_s + CLOCK_STEP_S:  # from before the clock was set back
                continue
            if 0 < stamp - gpu.ring_us <= 1e6 * LONGEST_WINDOW_S:  # after a gap nobody knows when the window began
                begin, end = (us / 1e6 - unix_zero_s for us in (gpu.ring_us, stamp))
                found.append(Window(gpu.device.uuid, "utilisation", begin, end, sample.sampleValue.uiVal / 100))
            gpu.ring_us = max(gpu.ring_us, stamp)
        return found

    def processes(self) -> dict[str, list[dict[str, Any]]]:
        for gpu in self._gpus:
            with self._noting(gpu, "processes"):
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(gpu.handle):
                    seen = self._seen.setdefault(gpu.device.uuid, {}).setdefault(
                        process.pid, {"pid": process.pid, "name": _name_of(process.pid), "memory_bytes": None}
                    )
                    if process.usedGpuMemory is not None:
                        seen["memory_bytes"] = max(seen["memory_bytes"] or 0, process.usedGpuMemory)
        return {device: list(seen.values()) for device, seen in self._seen.items()}

    def close(self) -> None:
        nvml.nvmlShutdown()


def _wall_clock_s() -> float:
    """The wall clock against ours: the quickest of three looks, for a busy machine may hold us up between the two."""

    def look() -> tuple[float, float]:
        before = time.perf_counter()
        wall_s = time.time()
        return time.perf_counter() - before, wall_s - before

    return min(look() for _ in range(3))[1]


def _look_for(gpu: Gpu) -> None:
    if not gpu.lost:
        return
    try:
        gpu.handle = nvml.nvmlDeviceGetHandleByUUID(gpu.device.uuid)
        parent = nvml.nvmlDeviceGetHandleByUUID(gpu.device.part_of) if gpu.device.part_of else None
    except nvml.NVMLError:
        return
    gpu.lost = False
    gpu.counters.restart(gpu.handle, parent)
    gpu.energy = Ticking()


def _instances(device: Device, handle: Any) -> list[tuple[Device, Any]]:
    """The MIG instances of a GPU that is partitioned."""
    found = []
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
        many = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if mode == nvml.NVML_DEVICE_MIG_ENABLE else 0
    except nvml.NVMLError:
        return []
    for place in range(many):
        try:
            own = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
            uuid, name = _text(nvml.nvmlDeviceGetUUID(own)), _text(nvml.nvmlDeviceGetName(own))
        except nvml.NVMLError:  # places need not be taken
            continue
        found.append((Device(uuid, name, device.index, part_of=device.uuid), own))
    return found


def visible(
    handles: list[tuple[Device, Any]], setting: str | None, unopened: Collection[int] = ()
) -> list[tuple[Device, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: indices or UUID prefixes, up to the first unknown one; one
    that may be among the unopened is only left out. A MIG instance comes with its GPU, which alone counts energy; a
    GPU comes with its instances."""
    if setting is None:
        return handles
    chosen: list[tuple[Device, Any]] = []
    for word in (part.strip() for part in setting.split(",")):
        named = [
            device
            for device, _ in handles
            if (word.isdigit() and device.index == int(word) and device.part_of is None)
            or (word and device.uuid.startswith(word))
        ]
        if not named:
            if unopened and (word.startswith(("GPU-", "MIG-")) or (word.isdigit() and int(word) in unopened)):
                continue
            break
        own = named[0]
        chosen += [
            entry
            for entry in handles
            if entry not in chosen
            and (entry[0] == own or own.uuid == entry[0].part_of or entry[0].uuid == own.part_of)
        ]
    return chosen


def order_note(devices: list[Device], environment: Mapping[str, str]) -> str | None:
    """A warning where CUDA may count GPUs in another order than NVML, which goes by PCI bus."""
    words = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    by_index = any(word.strip().isdigit() for word in words)
    models = {device.name for device in devices if device.part_of is None}
    if not by_index or len(models) < 2 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return None
    return (
        "CUDA_VISIBLE_DEVICES names GPUs by index, and models differ: CUDA counts the fastest first, NVML by PCI bus, "
        "so samples may be another GPU's; use UUIDs, or CUDA_DEVICE_ORDER=PCI_BUS_ID"
    )


def _name_of(pid: int) -> str | None:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # another container's
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
