"""The trainer's side of one worker: what it was given, the call that is under way, and whether it still lives."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

from profiling.hosts import Host
from tppo.cluster.worker import About, Advance
from tppo.parallel.clocks import SAME_CLOCK, Offset, exchange
from tppo.rollout.protocol import Request, Sampling

NOT_BUILT = About(Host("", ""), "", 0, [])
CONTROL = "control"
"""The worker's second thread."""


@dataclass(eq=False)
class Member:
    """One worker. Times are this process's monotonic clock. rows: given to it and not ended, as they were submitted.
    unsent: those of them that go with the next call."""

    engine: int
    actor: Any
    ready: Any
    """Of its building, which may still go on."""
    about: About = NOT_BUILT
    offset: Offset = SAME_CLOCK
    rows: dict[int, Request] = field(default_factory=dict)
    unsent: list[Request] = field(default_factory=list)
    call: Any = None
    calls: int = 0
    progress_at: float = 0.0
    """When it was last known to get on."""
    _ping: Any = None
    _pinged_at: float = 0.0

    def give(self, requests: list[Request]) -> None:
        self.rows |= {request.row: request for request in requests}
        self.unsent += requests

    def advance(self, sampling: Sampling) -> None:
        """Begin a call, with what was given since the last one."""
        self.calls += 1
        self.progress_at = time.perf_counter()
        requests, self.unsent = self.unsent, []
        self.call = self.actor.advance.remote(self.calls, requests, sampling)

    def interrupt(self) -> None:
        """Let the call under way return soon."""
        self.actor.interrupt.options(concurrency_group=CONTROL).remote(self.calls)

    def ping(self, every_s: float) -> None:
        """Ask how it is, unless it has been asked and has not answered yet."""
        if self._ping is None and time.perf_counter() - max(self._pinged_at, self.progress_at) >= every_s:
            self._pinged_at = time.perf_counter()
            self._ping = self.actor.ping.options(concurrency_group=CONTROL).remote()

    def references(self) -> list[Any]:
        return [reference for reference in (self.call, self._ping) if reference is not None]

    def take(self, ray: Any, ready: list[Any]) -> Advance | None:
        """What its call brought, if that is among `ready`. Raises what the worker raised."""
        if self._ping in ready:
            reference, self._ping = self._ping, None
            self.progress_at = max(self.progress_at, self._pinged_at - ray.get(reference))
        if self.call not in ready:
            return None
        reference, self.call = self.call, None
        self.progress_at = time.perf_counter()
        brought: Advance = ray.get(reference)
        for done in brought.completions:
            del self.rows[done.row]
        return brought

    def is_silent(self, timeout_s: float) -> bool:
        return self.call is not None and time.perf_counter() - self.progress_at > timeout_s


def measured_offset(ray: Any, actor: Any, same_boot: bool, timeout_s: float) -> Offset:
    """What to add to the worker's monotonic clock to have ours. Processes of one boot share the clock."""
    if same_boot:
        return SAME_CLOCK
    to_theirs = exchange(lambda: ray.get(actor.now.remote(), timeout=timeout_s))
    return replace(to_theirs, seconds=-to_theirs.seconds)
