"""NVIDIA GPUs through nvidia-ml-py. A metric that a GPU does not have is None with a reason, never 0."""

import os
import time
from collections.abc import Callable
from typing import Any

import pynvml as nvml

from profiling.sources import Capabilities, Device, Sample, Window

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


LONGEST_WINDOW_S = 1.5
"""Between two of the driver's samples that follow each other."""


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
        self._lost: set[str] = set()
        self._ring_read_us = {device.uuid: 0 for device, _ in self._handles}
        """Time of the last of the driver's samples that was read."""

    def devices(self) -> list[Device]:
        return [device for device, _ in self._handles]

    def read(self) -> list[Sample]:
        """A GPU that was lost is looked for again at every reading."""
        samples = []
        self._handles = [(device, self._found_again(device, handle)) for device, handle in self._handles]
        for device, handle in self._handles:
            values: dict[str, Any] = {}
            for metric, reader in READERS.items():
                try:
                    values[metric] = reader(handle)
                    state = "ok"
                except nvml.NVMLError as error:
                    state = STATES.get(error.value, str(error))
                    if state == "lost":
                        self._lost.add(device.uuid)
                self.capabilities.note(device.uuid, metric, state)
            samples.append(Sample(device.uuid, **values))
        return samples

    def windows(self, now_s: float) -> list[Window]:
        """The driver's ring of utilisation samples, a sixth of a second each; kept for some twenty seconds."""
        zero_us = 1e6 * (time.time() - now_s)
        found = []
        for device, handle in self._handles:
            last = self._ring_read_us[device.uuid]
            try:
                _, samples = nvml.nvmlDeviceGetSamples(handle, nvml.NVML_GPU_UTILIZATION_SAMPLES, last)
                state = "ok"
            except nvml.NVMLError as error:
                samples, state = [], STATES.get(error.value, str(error))
                if error.value == nvml.NVML_ERROR_NOT_FOUND:  # none since the last time
                    state = "ok"
            self.capabilities.note(device.uuid, "utilisation_windows", state)
            for sample in samples:
                stamp = int(sample.timeStamp)
                if 0 < stamp - last <= 1e6 * LONGEST_WINDOW_S:  # after a gap nobody knows when the window began
                    found.append(
                        Window(
                            device.uuid,
                            (last - zero_us) / 1e6,
                            (stamp - zero_us) / 1e6,
                            sample.sampleValue.uiVal / 100,
                        )
                    )
                last = max(last, stamp)
            self._ring_read_us[device.uuid] = last
        return [window for window in found if window.t_begin >= 0]

    def _found_again(self, device: Device, handle: Any) -> Any:
        if device.uuid not in self._lost:
            return handle
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(device.uuid)
        except nvml.NVMLError:
            return handle
        self._lost.discard(device.uuid)
        return handle

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
