"""How new weights reach the engines, chunk by chunk."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from tppo.cluster.group import WeightGroup, open_meeting
from tppo.cluster.member import Member
from tppo.cluster.packing import Layout, gathered_chunks, layouts_of
from tppo.parallel.ranks import SINGLE, Ranks


class WeightSync(Protocol):
    def send(self, members: Sequence[Member]) -> None:
        """The model's weights as they are now, into every member. Raises whatever Ray or torch do, also when a member
        dies meanwhile or answers too late; members may then have some of the weights."""
        ...


class ThroughTheObjectStore:
    """Every chunk is put into Ray's object store once; workers of this host read it there, in shared memory, those of
    others get one copy a host. Two chunks live at a time, so that one is made while the other is read.

    keep: chunks stay until the next `send`, for `resend` to an engine that joins later (a whole copy of the model in
    the store): wanted where the model itself has moved on by then, or cannot be gathered because the other ranks are
    not asked to.
    """

    def __init__(
        self, ray: Any, model: nn.Module, dtype: torch.dtype, *, timeout_s: float, keep: bool = False,
        ranks: Ranks = SINGLE,
    ) -> None:  # fmt: skip
        self._ray, self._model, self._timeout_s, self._keep, self._ranks = ray, model, timeout_s, keep, ranks
        self._layouts = layouts_of(model, dtype)
        self._kept: list[tuple[Layout, Any]] = []

    def send(self, members: Sequence[Member]) -> None:
        self._kept = []
        reading: list[Any] = []
        with gathered_chunks(self._model, self._layouts, "cpu", self._ranks) as chunks:
            for layout, flat in chunks:
                stored = self._ray.put(flat.view(torch.uint8).numpy())
                del flat
                self._ray.get(reading, timeout=self._timeout_s)
                reading = [member.actor.receive.remote(layout, stored) for member in members]
                if self._keep:
                    self._kept.append((layout, stored))
                del stored
        self._ray.get(reading, timeout=self._timeout_s)

    @property
    def can_resend(self) -> bool:
        """Whether the weights that were sent last can still be had."""
        return not self._keep or bool(self._kept)

    def resend(self, member: Member) -> None:
        """What was sent last, or the model as it is where nothing was kept."""
        if not self._keep:
            self.send([member])
            return
        answers = [member.actor.receive.remote(layout, stored) for layout, stored in self._kept]
        self._ray.get(answers, timeout=self._timeout_s)


class ByBroadcast:
    """A broadcast from the trainer's device over NCCL or gloo. The group is made anew when its members change."""

    def __init__(
        self, ray: Any, model: nn.Module, dtype: torch.dtype, *, backend: str, host: str, device: torch.device,
        timeout_s: float, ranks: Ranks = SINGLE,
    ) -> None:  # fmt: skip
        self._ray, self._model, self._ranks = ray, model, ranks
        self._backend, self._host, self._timeout_s = backend, host, timeout_s
        self._device = device if backend == "nccl" else torch.device("cpu")
        self._layouts = layouts_of(model, dtype)
        self._group: WeightGroup | None = None
        self._members: list[Any] = []

    def send(self, members: Sequence[Member]) -> None:
        actors = [member.actor for member in members]
        # A broadcast waits for a dead member until its time limit; this finds it at once.
        self._ray.get([actor.now.remote() for actor in actors], timeout=self._timeout_s)
        try:
            if self._group is None or actors != self._members:
                self._group = self._meet(actors)
                self._members = actors
            answers = [actor.receive_broadcast.remote(self._layouts) for actor in actors]
            with gathered_chunks(self._model, self._layouts, self._device, self._ranks) as chunks:
                for _, flat in chunks:
                    self._group.broadcast(flat)
            self._ray.get(answers, timeout=self._timeout_s)
        except Exception:
            self._group = None  # a broadcast that failed leaves a group useless
            raise

    def _meet(self, actors: list[Any]) -> WeightGroup:
        self._group = None
        meeting, store = open_meeting(self._host, len(actors) + 1, self._backend, self._timeout_s)
        answers = [actor.join.remote(meeting, rank + 1) for rank, actor in enumerate(actors)]
        group = WeightGroup(meeting, 0, self._device, store)
        self._ray.get(answers, timeout=self._timeout_s)
        return group
