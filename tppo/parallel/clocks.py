"""The run's clock on every rank. Processes of one boot share a monotonic clock; those of other hosts ask for it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from profiling.markers import boot_id
from tppo.parallel.ranks import Ranks

ROUNDS = 30
Clock = Callable[[], float]


@dataclass(frozen=True)
class Offset:
    """What to add to a rank's monotonic clock to have the first rank's."""

    seconds: float
    uncertainty_s: float
    """Half of the fastest round trip: the answer was read somewhere in it. 0 on one host."""


def offsets_to_main(ranks: Ranks, *, clock: Clock = time.perf_counter, host: str | None = None) -> list[Offset]:
    """Of every rank, on every rank. Each in turn asks the first rank for its time; the fastest round trip counts
    (Cristian, Probabilistic clock synchronization, 1989)."""
    hosts = ranks.gather(host or boot_id())
    own = Offset(0.0, 0.0)
    for rank in range(1, ranks.world):
        if hosts[rank] == hosts[0]:
            continue
        if ranks.main:
            _answer(rank, clock)
        elif ranks.rank == rank:
            own = _ask(clock)
    return ranks.gather(own)


def _ask(clock: Clock) -> Offset:
    trips = []
    for _ in range(ROUNDS):
        told = torch.zeros(1, dtype=torch.float64)
        sent = clock()
        dist.send(told, dst=0)
        dist.recv(told, src=0)
        back = clock()
        trips.append((back - sent, float(told) - (sent + back) / 2))
    fastest, offset = min(trips)
    return Offset(offset, fastest / 2)


def _answer(rank: int, clock: Clock) -> None:
    for _ in range(ROUNDS):
        asked = torch.zeros(1, dtype=torch.float64)
        dist.recv(asked, src=rank)
        dist.send(torch.tensor([clock()], dtype=torch.float64), dst=rank)


def notes_of(offsets: list[Offset]) -> list[dict[str, Any]]:
    """Trace records of the ranks on other hosts."""
    return [
        {
            "type": "note",
            "text": f"rank {rank} is on another host: {offset.seconds:+.6f} s bring its clock to rank 0's, to within "
            f"{1e6 * offset.uncertainty_s:.0f} us",
            "rank": rank,
            "offset_s": offset.seconds,
            "uncertainty_s": offset.uncertainty_s,
        }
        for rank, offset in enumerate(offsets)
        if offset.uncertainty_s > 0
    ]
