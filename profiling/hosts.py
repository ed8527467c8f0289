"""The hosts of a run, each with a sampler. What the first one's reads lies in the run directory itself, that of
another in its folder hosts/NAME, on the clock of the run."""

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profiling.markers import boot_id

DEVICE = "host"
"""In tables of devices: the CPU, memory and disks of the first host; of another one this and its name."""
FOLDER = "hosts"


@dataclass(frozen=True)
class Host:
    """boot: the same for all processes that share a monotonic clock. name: tells containers of one machine apart."""

    boot: str
    name: str


def this_host() -> Host:
    return Host(boot_id(), platform.node())


class HostNames:
    """A name for each host of a run, no two alike, by which it is told in traces and in FOLDER. hosts: those that are
    known, the run's first host first."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.first = hosts[0]
        self._names: dict[Host, str] = {}
        for host in hosts:
            self.of(host)

    @property
    def hosts(self) -> list[Host]:
        """Those that have a name so far."""
        return list(self._names)

    def of(self, host: Host) -> str:
        if host not in self._names:
            plain = re.sub(r"[^\w.-]|^\.", "_", host.name, flags=re.ASCII)[:100] or "host"
            name, number = plain, 1
            while name in self._names.values():
                number += 1
                name = f"{plain}-{number}"
            self._names[host] = name
        return self._names[host]


def folder_of_host(run: Path, name: str) -> Path:
    return run / FOLDER / name


def folders_of_hosts(run: Path) -> list[Path]:
    """Of hosts that were sampled beside the first one."""
    return sorted(path for path in (run / FOLDER).glob("*") if path.is_dir())


def device_of_host(name: str) -> str:
    return f"{DEVICE} {name}"


def is_host(device: str) -> bool:
    return device == DEVICE or device.startswith(f"{DEVICE} ")
