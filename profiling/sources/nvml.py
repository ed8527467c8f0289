"""NVIDIA GPUs through nvidia-ml-py. A metric that a GPU does not have is None with a reason, never 0."""

import os
from collections.abc import Callable
from typing import Any

import pynvml as nvml

from profiling.sources import Capabilities, Device, Sample

STATES = {
    nvml.NVML_ERROR_NOT_SUPPORTED: "not supported",
    nvml.NVML_ERROR_NO_PERMISSION: "no permission",
    nvml.NVML_ERROR_FUNCTION_NOT_FOUND: "missing symbol",
    nvml.NVML_ERROR_GPU_IS_LOST: "lost",
}

READERS: dict[str, Callable[[Any], float]] = {
    "utilisation": lambda h: nvml.nvmlDeviceGetUtilizationRates(h).gpu / 100,
    "memory_bytes": lambda h: float(nvml.nvmlDeviceGetMemoryInfo(h).used),
    "power_watts": lambda h: nvml.nvmlDeviceGetPowerUsage(h) / 1e3,
    "energy_joules": lambda h: nvml.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3,
    "sm_clock_mhz": lambda h: float(nvml.nvmlDeviceGetClockInfo(h, nvml.NVML_CLOCK_SM)),
    "temperature_c": lambda h: float(nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)),
    "event_reasons": lambda h: nvml.nvmlDeviceGetCurrentClocksEventReasons(h),
}


class NoDriver(Exception):
    """No NVIDIA driver answers on this host; str() says why."""


class NvmlSource:
    """All GPUs that this process may use (CUDA_VISIBLE_DEVICES, by index or UUID). Raises NoDriver."""

    def __init__(self) -> None:
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise NoDriver(str(error)) from None
        self.capabilities = Capabilities()
        self._handles: list[tuple[Device, Any]] = []
        for index in range(count):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            device = Device(_text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle)), index)
            self._handles.append((device, handle))
        self._handles = visible(self._handles, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def devices(self) -> list[Device]:
        return [device for device, _ in self._handles]

    def read(self) -> list[Sample]:
        samples = []
        for device, handle in self._handles:
            values: dict[str, Any] = {}
            for metric, reader in READERS.items():
                try:
                    values[metric] = reader(handle)
                    state = "ok"
                except nvml.NVMLError as error:
                    state = STATES.get(error.value, str(error))
                self.capabilities.note(device.uuid, metric, state)
            samples.append(Sample(device.uuid, **values))
        return samples

    def close(self) -> None:
        nvml.nvmlShutdown()


def visible(handles: list[tuple[Device, Any]], setting: str | None) -> list[tuple[Device, Any]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: indices or UUID prefixes, up to the first unknown one."""
    if setting is None:
        return handles
    chosen = []
    for word in (part.strip() for part in setting.split(",")):
        found = [
            entry
            for entry in handles
            if (word.isdigit() and entry[0].index == int(word)) or (word and entry[0].uuid.startswith(word))
        ]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
