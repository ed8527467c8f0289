"""A process group of the trainer (rank 0) and the engines, beside torch's default group, for broadcasts of weights:
NCCL between GPUs, gloo on CPUs. The code is one."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group find each other."""

    host: str
    port: int
    members: int
    backend: str
    """nccl or gloo"""
    timeout_s: float


class WeightGroup:
    """A member of the group. Made on all members at the same time: it waits for the others. Raises RuntimeError when
    they do not come within the meeting's time limit, and later when a broadcast takes longer."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device, store: Any | None = None) -> None:
        limit = timedelta(seconds=meeting.timeout_s)
        self._store = store or dist.TCPStore(meeting.host, meeting.port, timeout=limit)
        self.device = device
        if meeting.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._group: Any = dist.ProcessGroupNCCL(self._store, rank, meeting.members, options)
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, meeting.members, limit)

    def broadcast(self, flat: Tensor) -> None:
        """The trainer's numbers into every member's `flat`, which is on the group's device."""
        self._group.broadcast(flat, 0).wait()


def open_meeting(host: str, members: int, backend: str, timeout_s: float) -> tuple[Meeting, Any]:
    """A meeting at a free port of this host, and its store, which the first member keeps open."""
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return Meeting(host, store.port, members, backend, timeout_s), store
