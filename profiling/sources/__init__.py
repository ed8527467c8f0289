"""Where device samples come from. A source names its devices and its metrics' states, and reads them all at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one device; None for what could not be read, or is read less often. Units as in
    profiling.schema.DEVICES."""

    device: str
    utilisation: float | None = None
    memory_bytes: float | None = None
    power_watts: float | None = None
    power_instant_watts: float | None = None
    energy_joules: float | None = None
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    event_reasons: int | None = None


class NoDriver(Exception):
    """No driver of this kind of GPU answers on this host; str() says why."""


@dataclass(frozen=True, slots=True)
class Window:
    """The mean of a metric over a time that its counter defines, not our clock. Seconds from the start of the run."""

    device: str
    metric: str
    """One of profiling.schema.WINDOW_METRICS, in its unit."""
    t_begin: float
    t_end: float
    value: float


@dataclass(frozen=True)
class Device:
    uuid: str
    name: str
    index: int
    part_of: str | None = None
    """UUID of the GPU that this is a MIG instance of."""


@dataclass
class Capabilities:
    """Metric -> ok, not supported, no permission, missing symbol, lost, stale, or another error's name; per device."""

    states: dict[str, dict[str, str]] = field(default_factory=dict)

    def note(self, device: str, metric: str, state: str) -> None:
        self.states.setdefault(device, {})[metric] = state


class OnceASecond:
    """What changes slowly is read no more often."""

    def __init__(self) -> None:
        self._due_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """True at most once a second. now_s: any clock that goes on."""
        due = now_s >= self._due_s
        if due:
            self._due_s = now_s + 1.0
        return due


STALE_S = 3.0
"""Without a new value an energy counter, which ticks ten times a second, has stopped."""


class Ticking:
    """Whether a counter still counts."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None
        """Its value, and when that was first seen."""

    def has_stopped(self, value: float, now_s: float) -> bool:
        """True from STALE_S after its last change on. now_s: any clock that goes on."""
        if self._last is None or value != self._last[0]:
            self._last = value, now_s
        return now_s - self._last[1] > STALE_S


class Source(Protocol):
    capabilities: Capabilities
    note: str | None
    """What a reader of its samples should know."""

    def devices(self) -> list[Device]: ...

    def read(self, now_s: float, *, last: bool = False) -> Iterator[Sample]:
        """A sample per device, read when it is asked for: what changes fast every time, what changes slowly once a
        second, and at the last reading. now_s: the run's clock."""
        ...

    def windows(self, now_s: float) -> list[Window]:
        """What drivers and counters have averaged themselves since the last call."""
        ...

    def processes(self) -> dict[str, list[dict[str, Any]]]:
        """Device -> the programs seen on it so far: pid, name, most memory in bytes."""
        ...

    def close(self) -> None: ...
