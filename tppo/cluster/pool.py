"""Several rollout engines as one: the protocol of tppo.rollout, spoken for n workers.

Every worker that has rows is in a call until one of its rows ends; then that end is handed on, the schedule decides,
and the worker is called again. A worker that dies, raises or falls silent is replaced, and what it had not finished is
generated again elsewhere from what was known when it was submitted: with draws by row (rollout.draws = "row") the
tokens come out the same.
"""

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from profiling.errors import ToolkitError, first_line
from profiling.hosts import HostNames
from profiling.markers import boot_id
from tppo.cluster.member import Member, measured_offset
from tppo.cluster.places import Places
from tppo.cluster.samplers import HostSamplers
from tppo.cluster.sync import ThroughTheObjectStore, WeightSync
from tppo.cluster.worker import Advance, EngineSpec, EngineWorker
from tppo.parallel.clocks import note_of
from tppo.rollout.drive import Trace
from tppo.rollout.packing import unpacked
from tppo.rollout.protocol import Completion, EngineError, Request, Sampling

PING_S = 5.0
"""Between questions to a worker that has not answered; less where it must answer sooner."""


class EnginePool:
    """n engines on a cluster. policy_version, and all methods: as of a RolloutEngine.

    spec: every engine's. sync, store: bring the trained model's weights to all engines, and through the object store
    to one (they may be the same). generator: seeds the engines' draws at every submission where they are not by row.
    `attach` it to the run before rows are submitted. Raises ConfigError or EngineError when an engine cannot be built.
    """

    def __init__(
        self,
        places: Places,
        spec: EngineSpec,
        sync: WeightSync,
        store: ThroughTheObjectStore,
        *,
        generator: torch.Generator,
    ) -> None:
        self.policy_version = 0
        self._places, self._ray, self._spec = places, places.ray, spec
        self._settings = spec.config.ray
        self._sync, self._store = sync, store
        self._generator = generator
        self._zero_s = 0.0
        self._notes: list[Mapping[str, Any]] = []
        self._trace: Trace = self._notes.append
        self._names: HostNames | None = None
        self._samplers: HostSamplers | None = None
        self._sampling = Sampling()
        self._shared: deque[Request] = deque()
        """Rows that wait for the first engine with a free slot (shared_queue)."""
        self._records: list[dict[str, Any]] = []
        self._retries_left = self._settings.retries
        self._joining: list[Member] = []
        """Replacements that are being built."""
        self._members = [self._new_member(engine) for engine in range(places.engines)]
        for member in self._members:
            self._welcome(member)

    def attach(self, zero_s: float, trace: Trace, names: HostNames) -> None:
        """From now on times are the run's, what fails is noted in its trace, and hosts of engines are sampled. zero_s:
        our monotonic clock at the start of the run. names: of the hosts of the trainer's ranks, which are sampled
        already."""
        self._zero_s, self._trace, self._names = zero_s, trace, names
        known = names.hosts
        for note in self._notes:
            trace(note)
        for member in self._members:
            self._note_host(member)
        if self._spec.config.profile.sampler:
            self._samplers = HostSamplers(
                self._ray, self._members, self._spec.config, known=known, names=names, zero_s=zero_s, trace=trace
            )

    def detach(self) -> None:
        """The run ends: what hosts of engines have sampled is written."""
        if self._samplers is not None:
            self._samplers.stop()
            self._samplers = None

    # -- The protocol.

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        if not self._has_rows():
            self._let_replacements_in(resend=True)
            seed = sampling.seed
            if seed is None:
                seed = int(torch.randint(2**62, (), generator=self._generator))
            self._sampling = replace(sampling, seed=seed)
        if self._settings.dispatch == "shared_queue":
            self._shared.extend(requests)
        else:
            self._deal(requests)

    def run_until_a_row_ends(self) -> list[Completion]:
        completions: list[Completion] = []
        while not completions and self._has_rows():
            self._fill_free_slots()
            for member in self._members:
                if member.rows and member.call is None:
                    member.advance(self._sampling_of(member))
            completions = self._wait()
        return sorted(completions, key=lambda done: done.row)

    def abort(self) -> list[Completion]:
        """Rows that ended while the others were being stopped come as what they are."""
        now = time.perf_counter() - self._zero_s
        queued, self._shared = list(self._shared), deque()
        stopped: list[Completion] = []
        for member in self._members:
            if member.call is not None:
                member.interrupt()
        while any(member.call is not None for member in self._members):
            stopped += self._wait(again=False)
        for member in list(self._members):
            queued += member.unsent  # what a worker that died meanwhile left to this one
            for request in member.unsent:
                del member.rows[request.row]
            member.unsent = []
            if not member.rows:
                continue
            try:
                rest: Advance = self._ray.get(member.actor.abort.remote(), timeout=self._settings.engine_timeout_s)
            except Exception as error:
                queued += member.rows.values()
                self._bury(member, _reason(error), rows=0)
                continue
            member.rows.clear()
            stopped += self._taken(member, rest)
        stopped += [Completion(r.row, [], [], "aborted", self.policy_version, now, now) for r in queued]
        return sorted(stopped, key=lambda done: done.row)

    def take_records(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records

    def update_weights(self, version: int) -> None:
        self._check_idle("weights may change")
        self._let_replacements_in()
        while True:
            try:
                self._sync.send(self._members)
                self._ask_all("use_weights", version)
                break
            except Exception as error:
                self._find_the_dead(error)
                self._let_replacements_in()
        self.policy_version = version

    def release_memory(self) -> None:
        self._check_idle("memory may be released")
        try:
            self._ask_all("release_memory")
        except Exception as error:
            self._find_the_dead(error)

    # -- Rows.

    def _has_rows(self) -> bool:
        return bool(self._shared) or any(member.rows for member in self._members)

    def _deal(self, requests: list[Request]) -> None:
        """Row i to engine i mod n, as the simulator does."""
        for place, member in enumerate(self._members):
            member.give(requests[place :: len(self._members)])

    def _fill_free_slots(self) -> None:
        for member in self._members:
            free = max(0, self._spec.slots - len(member.rows))
            if member.call is None and self._shared:
                member.give([self._shared.popleft() for _ in range(min(free, len(self._shared)))])

    def _sampling_of(self, member: Member) -> Sampling:
        """Engines of one seed would draw the same numbers, unless these depend on the row."""
        sampling = self._sampling
        if sampling.by_row or sampling.seed is None:
            return sampling
        return replace(sampling, seed=(sampling.seed + member.engine) % 2**62)

    def _wait(self, *, again: bool = True) -> list[Completion]:
        """For any worker's answer, or for its silence. again: rows of a worker that failed go to others."""
        timeout_s = self._settings.engine_timeout_s
        every_s = min(PING_S, timeout_s / 4)
        references = [reference for member in self._members for reference in member.references()]
        ready, _ = self._ray.wait(references, timeout=every_s)
        if ready:
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        completions: list[Completion] = []
        for member in list(self._members):
            try:
                brought = member.take(self._ray, ready)
            except Exception as error:
                self._fail(member, _reason(error), again)
                continue
            if brought is not None:
                completions += self._taken(member, brought)
            elif member.is_silent(timeout_s):
                self._fail(member, f"no token and no answer for {timeout_s:g} s", again)
            elif member.call is not None:
                member.ping(every_s)
        return completions

    def _taken(self, member: Member, brought: Advance) -> list[Completion]:
        """Its completions and records on the run's clock, with its number."""
        shift = member.offset.seconds - self._zero_s
        self._records += [
            {**r, "engine": member.engine, "t_start": r["t_start"] + shift, "t_end": r["t_end"] + shift}
            for r in brought.records
        ]
        return [
            replace(unpacked(done), t_start=done.t_start + shift, t_end=done.t_end + shift, engine=member.engine)
            for done in brought.completions
        ]

    # -- Failures.

    def _fail(self, member: Member, reason: str, again: bool) -> None:
        """Bury a worker; its unfinished rows go to those that live, or to its replacement."""
        rows = list(member.rows.values())
        self._bury(member, reason, rows=len(rows))
        if not rows:
            return
        if not self._members:
            self._let_replacements_in(resend=True)
        self._deal(rows)
        for other in self._members:
            if again and other.unsent and other.call is not None:
                other.interrupt()  # it takes them up now, not when a row of its own ends

    def _bury(self, member: Member, reason: str, rows: int) -> None:
        """End what is left of a worker, start another one if any are left, and say so."""
        self._members = [other for other in self._members if other is not member]
        self._ray.kill(member.actor)
        used = self._settings.retries - self._retries_left
        text = f"engine {member.engine} failed: {reason}; "
        if self._retries_left:
            self._retries_left -= 1
            self._joining.append(self._new_member(member.engine))
            text += f"another one starts in its place ({used + 1} of {self._settings.retries})"
        else:
            text += f"none is left to start in its place (ray.retries = {self._settings.retries})"
        if rows:
            text += f"; its {rows} unfinished rows are generated again"
        print(f"tppo: {text}", file=sys.stderr)
        self._trace({"type": "note", "text": text, "engine": member.engine, "rows": rows})

    def _find_the_dead(self, error: Exception) -> None:
        """Bury all workers that do not answer. Raises `error` when all do: it is not theirs."""
        answers = {member: member.actor.now.remote() for member in self._members}
        self._ray.wait(list(answers.values()), num_returns=len(answers), timeout=self._settings.engine_timeout_s)
        dead = []
        for member, answer in answers.items():
            try:
                self._ray.get(answer, timeout=0)
            except Exception as fault:
                dead.append((member, _reason(fault)))
        if not dead:
            raise error
        for member, reason in dead:
            self._bury(member, reason, rows=0)

    def _let_replacements_in(self, *, resend: bool = False) -> None:
        """Those that are built; where no engine is left, wait for one. resend: with the weights that the others have,
        else the caller sends all of them new ones. Raises EngineError when none is left and none comes."""
        limit = self._settings.engine_timeout_s
        while self._joining and not (resend and not self._store.can_resend):
            wait_s = 0 if self._members else limit
            done, _ = self._ray.wait([member.ready for member in self._joining], timeout=wait_s)
            if not done and self._members:
                return
            if not done:  # its host may have gone: nobody would ever build it
                raise EngineError(f"no rollout engine is left, and none has started within {limit:g} s")
            member = next(member for member in self._joining if member.ready == done[0])
            self._joining.remove(member)
            try:
                self._welcome(member)
                if resend:
                    self._store.resend(member)
                    self._ray.get(member.actor.use_weights.remote(self.policy_version), timeout=limit)
            except Exception as error:
                self._bury(member, _reason(error), rows=0)
        if not self._members:
            raise EngineError("no rollout engine on the cluster is left that has the policy, and none can be started")

    # -- Workers.

    def _new_member(self, engine: int) -> Member:
        actor = self._places.actor(EngineWorker, engine)
        return Member(engine, actor, actor.build.remote(self._spec))

    def _welcome(self, member: Member) -> None:
        """Wait until it is built; it is a member from then on. Raises what it raised."""
        limit = self._settings.engine_timeout_s
        try:
            self._ray.get(member.ready, timeout=limit)
            member.about = self._ray.get(member.actor.about.remote(), timeout=limit)
            same = member.about.host.boot == boot_id()
            member.offset = measured_offset(self._ray, member.actor, same, limit)
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ToolkitError):
                raise cause from None
            raise EngineError(f"engine {member.engine} cannot start on the cluster: {_reason(error)}") from None
        if member not in self._members:
            self._members = sorted([*self._members, member], key=lambda m: m.engine)
            self._note_host(member)

    def _note_host(self, member: Member) -> None:
        """Where it is not the trainer's; before `attach`, which says where that is, nothing."""
        if self._names is not None and member.about.host != self._names.first:
            host = self._names.of(member.about.host)
            if self._samplers is not None and not self._samplers.see(member):
                host += f", GPUs {member.about.gpus}"  # a place without samples: joules of the run are not known
            self._trace(note_of("engine", member.engine, host, member.offset, "the trainer"))

    def _ask_all(self, method: str, *arguments: Any) -> None:
        answers = [getattr(member.actor, method).remote(*arguments) for member in self._members]
        self._ray.get(answers, timeout=self._settings.engine_timeout_s)

    def _check_idle(self, what: str) -> None:
        if self._has_rows():
            raise RuntimeError(f"{what} only between rollouts")


def _reason(error: Exception) -> str:
    """One line of what Ray reports: of an error in the worker, that error."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {first_line(cause)}"[:200]
