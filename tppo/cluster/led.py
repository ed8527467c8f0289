"""A cluster's engines as torchrun's ranks see them: the first rank has the pool, the others follow it."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from profiling.hosts import HostNames
from tppo.cluster.pool import EnginePool
from tppo.models.lora import plain_weights
from tppo.parallel.ranks import Ranks
from tppo.rollout.drive import Trace, engine_faults
from tppo.rollout.packing import packed, unpacked
from tppo.rollout.protocol import Completion, Request, Sampling

T = TypeVar("T")


class LedEngines:
    """A RolloutEngine whose methods all ranks call together, from their main thread; an error on the first rank is
    raised on all of them. Each rank gets the rows that it has submitted, and gets them when all ranks' have ended.

    The first rank may also drive its `pool` by itself. model: the policy, sharded over the ranks.
    """

    def __init__(self, pool: EnginePool | None, model: nn.Module, ranks: Ranks) -> None:
        self.policy_version = 0
        self._pool, self._model, self._ranks = pool, model, ranks
        self._submitted: set[int] | None = None
        """Rows of this rank that are under way; None: no rank's are."""

    @property
    def pool(self) -> EnginePool:
        assert self._pool is not None, "only the first rank has the engines"
        return self._pool

    def attach(self, zero_s: float, trace: Trace, names: HostNames) -> None:
        if self._pool is not None:
            self._pool.attach(zero_s, trace, names)

    def detach(self) -> None:
        if self._pool is not None:
            self._pool.detach()

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        everyones = [request for part in self._ranks.gather(requests) for request in part]
        everyones.sort(key=lambda request: request.row)  # as one process submits them
        self._lead(lambda pool: pool.submit(everyones, sampling))
        self._submitted = {request.row for request in requests}

    def run_until_a_row_ends(self) -> list[Completion]:
        def all_of(pool: EnginePool) -> list[Completion]:
            done: list[Completion] = []
            while ended := pool.run_until_a_row_ends():
                done += map(packed, ended)
            return done

        return self._own(all_of)

    def abort(self) -> list[Completion]:
        return self._own(lambda pool: list(map(packed, pool.abort())))

    def take_records(self) -> list[dict[str, Any]]:
        return self._lead(lambda pool: pool.take_records())

    def release_memory(self) -> None:
        self._lead(lambda pool: pool.release_memory())

    def update_weights(self, version: int) -> None:
        """The pool asks for gathered weights once, or again after a failure, or not at all: it tells the others."""

        def send() -> None:
            try:
                with engine_faults():
                    self.pool.update_weights(version)
            finally:
                self._ranks.from_main(False)

        def follow() -> None:
            while self._ranks.from_main(True):
                for _ in plain_weights(self._model):
                    pass

        self._ranks.everyones(send if self._ranks.main else follow)
        self.policy_version = version

    def _own(self, work: Callable[[EnginePool], list[Completion]]) -> list[Completion]:
        if self._submitted is None:
            return []
        done, own = self._lead(work), self._submitted
        self._submitted = None
        return sorted((unpacked(each) for each in done if each.row in own), key=lambda each: each.row)

    def _lead(self, work: Callable[[EnginePool], T]) -> T:
        """What it gives on the first rank, on all of them."""

        def lead() -> T:
            with engine_faults():
                return work(self.pool)

        return self._ranks.from_first(lead)
