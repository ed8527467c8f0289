"""AMD GPUs through amdsmi, the library that comes with ROCm. A metric that a GPU does not have is None with a reason.

What NVML has and this does not: samples that the driver keeps, event reasons, GPM's counters, links.
"""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from profiling.sources import Capabilities, Device, NoDriver, OnceASecond, Sample, Ticking, Window

STATES = {2: "not supported", 3: "not supported", 10: "no permission", 31: "lost"}
"""Of amdsmi_status_t: NOT_SUPPORTED, NOT_YET_IMPLEMENTED, NO_PERM, NOT_FOUND; others by their number."""
FOR_GOOD = ("not supported", "missing symbol")


def _utilisation(smi: ModuleType, handle: Any) -> Any:
    return _number(smi.amdsmi_get_gpu_activity(handle)["gfx_activity"], 1 / 100)


def _power(smi: ModuleType, handle: Any) -> Any:
    return _number(smi.amdsmi_get_power_info(handle)["average_socket_power"])


def _power_instant(smi: ModuleType, handle: Any) -> Any:
    return _number(smi.amdsmi_get_power_info(handle)["current_socket_power"])


def _energy(smi: ModuleType, handle: Any) -> Any:
    """The counter's name changed with ROCm 6.1; its unit is counter_resolution microjoules."""
    found = smi.amdsmi_get_energy_count(handle)
    count = found["energy_accumulator"] if "energy_accumulator" in found else found["power"]
    return _number(count, found["counter_resolution"] / 1e6)


def _memory(smi: ModuleType, handle: Any) -> Any:
    return _number(smi.amdsmi_get_gpu_memory_usage(handle, smi.AmdSmiMemoryType.VRAM))


def _clock(smi: ModuleType, handle: Any) -> Any:
    found = smi.amdsmi_get_clock_info(handle, smi.AmdSmiClkType.GFX)
    return _number(found["clk"] if "clk" in found else found["cur_clk"])


def _temperature(smi: ModuleType, handle: Any) -> Any:
    kind, now = smi.AmdSmiTemperatureType.HOTSPOT, smi.AmdSmiTemperatureMetric.CURRENT
    return _number(smi.amdsmi_get_temp_metric(handle, kind, now))


FAST: dict[str, Callable[[ModuleType, Any], Any]] = {
    "utilisation": _utilisation,
    "power_watts": _power,
    "power_instant_watts": _power_instant,
    "energy_joules": _energy,
}
SLOW: dict[str, Callable[[ModuleType, Any], Any]] = {
    "memory_bytes": _memory,
    "sm_clock_mhz": _clock,
    "temperature_c": _temperature,
}


def _number(value: Any, unit: float = 1.0) -> float | None:
    """amdsmi says "N/A" for what a GPU does not have."""
    return float(value) * unit if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclass
class Gpu:
    device: Device
    handle: Any
    absent: set[str] = field(default_factory=set)
    """Metrics that it does not have."""
    energy: Ticking = field(default_factory=Ticking)


class AmdSource:
    """All AMD GPUs of the host. Raises NoDriver."""

    def __init__(self) -> None:
        try:
            import amdsmi
        except (ImportError, OSError, KeyError, AttributeError) as error:  # it loads ROCm's library on import
            raise NoDriver(f"amdsmi: {error}") from None
        self._smi: ModuleType = amdsmi
        try:
            amdsmi.amdsmi_init()
            handles = list(amdsmi.amdsmi_get_processor_handles())
        except amdsmi.AmdSmiException as error:
            raise NoDriver(f"amdsmi: {error}") from None
        if not handles:
            raise NoDriver("amdsmi: no GPU")
        self.capabilities = Capabilities()
        self.note: str | None = None
        self._gpus = [Gpu(self._described(handle, index), handle) for index, handle in enumerate(handles)]
        self._slow = OnceASecond()

    def _described(self, handle: Any, index: int) -> Device:
        uuid, name = f"AMD-{platform.node()}-{index}", "AMD GPU"
        try:
            uuid = str(self._smi.amdsmi_get_gpu_device_uuid(handle))
            name = str(self._smi.amdsmi_get_gpu_asic_info(handle)["market_name"])
        except (self._smi.AmdSmiException, KeyError) as error:
            self.capabilities.note(uuid, "name", str(error))
        return Device(uuid, name, index)

    def devices(self) -> list[Device]:
        return [gpu.device for gpu in self._gpus]

    def read(self, now_s: float, *, last: bool = False) -> Iterator[Sample]:
        slow = self._slow.is_due(now_s) or last
        for gpu in self._gpus:
            wanted = {**FAST, **(SLOW if slow else {})}
            values = {name: self._read(gpu, name, of) for name, of in wanted.items() if name not in gpu.absent}
            joules = values.get("energy_joules")
            if joules is not None and gpu.energy.has_stopped(joules, now_s):
                values["energy_joules"] = None
                self.capabilities.note(gpu.device.uuid, "energy_joules", "stale")
            yield Sample(gpu.device.uuid, **values)  # type: ignore[arg-type]

    def _read(self, gpu: Gpu, name: str, of: Callable[[ModuleType, Any], Any]) -> float | None:
        value, state = None, "ok"
        try:
            value = of(self._smi, gpu.handle)
            state = "ok" if value is not None else "not supported"
        except (AttributeError, KeyError):
            state = "missing symbol"
        except self._smi.AmdSmiException as error:
            code = error.get_error_code() if hasattr(error, "get_error_code") else None
            state = STATES.get(code, str(error)) if isinstance(code, int) else str(error)
        if state in FOR_GOOD:
            gpu.absent.add(name)
        self.capabilities.note(gpu.device.uuid, name, state)
        return value

    def windows(self, now_s: float) -> list[Window]:
        return []

    def processes(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def close(self) -> None:
        try:
            self._smi.amdsmi_shut_down()
        except self._smi.AmdSmiException:
            return
