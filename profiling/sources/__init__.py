"""Where device samples come from. A source names its devices and its metrics' states, and reads them all at once."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one device; None for what could not be read. Units as in profiling.schema.DEVICES."""

    device: str
    utilisation: float | None = None
    memory_bytes: float | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    event_reasons: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Utilisation that a driver measured itself, over a time of its own. Seconds from the start of the run."""

    device: str
    t_begin: float
    t_end: float
    utilisation: float


METRICS = tuple(name for name in Sample.__slots__ if name != "device")


@dataclass(frozen=True)
class Device:
    uuid: str
    name: str
    index: int


@dataclass
class Capabilities:
    """Metric -> ok, not supported, no permission, missing symbol, lost, or another NVML error's name; per device."""

    states: dict[str, dict[str, str]] = field(default_factory=dict)

    def note(self, device: str, metric: str, state: str) -> None:
        self.states.setdefault(device, {})[metric] = state


class Source(Protocol):
    capabilities: Capabilities

    def devices(self) -> list[Device]: ...

    def read(self) -> list[Sample]: ...

    def windows(self, now_s: float) -> list[Window]:
        """What the driver has sampled since the last call. now_s: the run's clock."""
        ...

    def close(self) -> None: ...
