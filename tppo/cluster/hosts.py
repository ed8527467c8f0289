"""Which host of a Ray cluster each rank of the trainer is on. Ranks say where they are without Ray; the first one,
which has joined the cluster, finds the hosts."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from profiling.errors import ConfigError
from profiling.hosts import Host, this_host


@dataclass(frozen=True)
class Home:
    """Of a rank."""

    host: Host
    addresses: frozenset[str]
    """Of the host, those that others can reach."""


def home_of_this_process() -> Home:
    found = (address for own in psutil.net_if_addrs().values() for address in own)
    addresses = {a.address for a in found if a.family == socket.AF_INET and not a.address.startswith("127.")}
    return Home(this_host(), frozenset(addresses))


def hosts_of(homes: Sequence[Home], ray: Any, address: str) -> list[str]:
    """By rank: the resource that Ray has for its host alone, `node:ADDRESS`; empty where the first rank is outside the
    cluster (ray://). Raises ConfigError for a rank on a host that is not in it."""
    if ray.util.client.ray.is_connected():
        return []
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    own = ray.util.get_node_ip_address()
    return [f"node:{_host_of(rank, home, homes[0].host.boot, alive, own, address)}" for rank, home in enumerate(homes)]


def _host_of(rank: int, home: Home, first_boot: str, alive: list[str], own: str, address: str) -> str:
    for host in [own, *alive]:  # containers of one machine are hosts of their own
        if host in home.addresses:
            return host
    if home.host.boot == first_boot:
        return own
    raise ConfigError(
        f"--ray {address}: rank {rank} is on {home.host.name}, which is no host of this cluster; run `ray start "
        "--address HOST:PORT` there"
    )
