"""The run's clock on every rank. Processes of one boot share a monotonic clock; those of other hosts ask for it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from profiling.hosts import Host, HostNames
from tppo.parallel.ranks import Ranks

ROUNDS = 30
Clock = Callable[[], float]


@dataclass(frozen=True)
class Offset:
    """What to add to a rank's monotonic clock to have the first rank's."""

    seconds: float
    uncertainty_s: float
    """Half of the fastest round trip: the answer was read somewhere in it. 0 on one machine."""


SAME_CLOCK = Offset(0.0, 0.0)


def offsets_to_main(ranks: Ranks, hosts: Sequence[Host], *, clock: Clock = time.perf_counter) -> list[Offset]:
    """Of every rank, on every rank. Each in turn asks the first rank for its time. hosts: by rank."""
    own = SAME_CLOCK
    for rank in range(1, ranks.world):
        if hosts[rank].boot == hosts[0].boot:
            continue
        if ranks.main:
            _answer(rank, clock)
        elif ranks.rank == rank:
            own = _ask(clock)
    return ranks.gather(own)


def _ask(clock: Clock) -> Offset:
    def main_s() -> float:
        told = torch.zeros(1, dtype=torch.float64)
        dist.send(told, dst=0)
        dist.recv(told, src=0)
        return float(told)

    return exchange(main_s, clock)


def _answer(rank: int, clock: Clock) -> None:
    for _ in range(ROUNDS):
        asked = torch.zeros(1, dtype=torch.float64)
        dist.recv(asked, src=rank)
        dist.send(torch.tensor([clock()], dtype=torch.float64), dst=rank)


def exchange(theirs: Clock, ours: Clock = time.perf_counter) -> Offset:
    """What to add to our clock to have theirs, which every call asks them for; the fastest round trip counts
    (Cristian, Probabilistic clock synchronization, 1989)."""
    trips = []
    for _ in range(ROUNDS):
        sent = ours()
        told = theirs()
        back = ours()
        trips.append((back - sent, told - (sent + back) / 2))
    fastest, seconds = min(trips)
    return Offset(seconds, fastest / 2)


def notes_of(hosts: Sequence[Host], offsets: Sequence[Offset], names: HostNames) -> list[dict[str, Any]]:
    """Trace records of the ranks on other hosts than the first one's."""
    return [
        note_of("rank", rank, names.of(host), offset, "rank 0")
        for rank, (host, offset) in enumerate(zip(hosts, offsets, strict=True))
        if host != names.first
    ]


def note_of(kind: str, number: int, host: str, offset: Offset, reference: str) -> dict[str, Any]:
    """Trace record of a rank or an engine on another host, whose clock `offset` brings to the reference's."""
    return {
        "type": "note",
        "text": f"{kind} {number} is on another host, {host}: {offset.seconds:+.6f} s bring its clock to "
        f"{reference}'s, to within {1e6 * offset.uncertainty_s:.0f} us",
        kind: number,
        "host": host,
        "offset_s": offset.seconds,
        "uncertainty_s": offset.uncertainty_s,
    }
