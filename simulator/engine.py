"""One rollout engine: rows are admitted, prefilled and decoded; time jumps from event to event.

An iteration does, in this order (INTERFACE, "What happens, exactly"):
  1. reserve blocks for every running row's next token, in admission order; when short, preempt the latest admitted
     to the head of the queue, its tokens kept;
  2. if nothing was preempted, admit from the queue, first come, first served, while the head's blocks fit;
  3. prefill all admitted together, decodes stalled;
  4. decode all running rows one token.
With chunked prefill, 3 and 4 share a budget of `chunk_tokens`: the rows that decode take one token each, what is left
goes to prefills in the order of admission, first the prefill part, then the decode part; a row that is prefilled
decodes from the next iteration on.
With prefix reuse, the rows of one prompt share the full blocks of the prompt while any of them runs: one that is
admitted meanwhile (or after it in the same iteration) reserves and prefills only what comes after them. In chunks too:
prefills go in the order of admission, so the prompt is there when the later row's turn comes.
Between two events the decode steps of a constant batch are one span, summed in closed form.
"""

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from profiling.errors import ConfigError, ConservationError
from simulator.costs import RolloutCosts, decoded_pairs, prefilled_pairs
from simulator.kv import BLOCK_TOKENS, KvBlocks, blocks_for

PREFILL, DECODE = 0, 1
KINDS = ("prefill", "decode")
"""Names of the kinds of spans, in profiling.schema.ENGINE."""

ONE_INSTANT_S = 1e-12
"""Times that agree to this are one instant; its events go by (engine, row), so rounding never flips a dispatch."""


@dataclass(slots=True)
class Job:
    """A row in this step. `context`: prompt and response tokens as of its last admission or preemption."""

    row: int
    context: int
    left: int
    """Tokens to generate in this step from there on."""
    resumed: bool
    """It has response tokens from an earlier step."""
    preempted: int = 0
    admitted_at: int = 0
    """Decode steps that the engine had done when the row was admitted."""
    order: int = 0
    """Place in the order of admission."""
    t_start: float | None = None
    group: int = -1
    """The prompt that it answers, where rows share it."""
    shared_blocks: int = 0
    """Full blocks of the prompt; 0 without prefix reuse."""
    cached_tokens: int = 0
    """Of its context, found in the cache at its last admission."""
    prefilled: int = 0
    """Tokens of the context that are prefilled, while the row is being prefilled in chunks."""


class Span(NamedTuple):
    """What the engine does next, without interruption, and how long it takes."""

    kind: int
    """PREFILL or DECODE."""
    seconds: float
    steps: int
    batch: int
    context_tokens: int
    attended_pairs: int
    fresh_tokens: int
    resumed_tokens: int
    recomputed_tokens: int
    waiting: int


class Engine:
    """State of one engine within a step. The caller alternates `next_span` and `finish_span`, and keeps the time."""

    def __init__(
        self,
        costs: RolloutCosts,
        max_rows: int | None,
        kv_tokens: int | None,
        shared_queue: deque[Job] | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        self.costs = costs
        self.max_rows = max_rows
        self.kv = KvBlocks(None if kv_tokens is None else kv_tokens // BLOCK_TOKENS)
        self.queue: deque[Job] = deque()
        self._shared = deque() if shared_queue is None else shared_queue
        self.steps_done = 0
        self._running: dict[int, Job] = {}  # by order of admission
        self._ends: list[tuple[int, int, int]] = []  # heap of (steps_done at the end, row, order)
        self._context = 0  # of all rows that decode
        self._admissions = 0
        self._chunk_tokens = chunk_tokens
        self._holders: dict[int, int] = {}  # running rows of each prompt whose blocks are shared
        self._prefilling: dict[int, Job] = {}  # by order of admission; empty unless prefills are chunked
        self._complete: list[Job] = []  # of those, what the iteration at hand completes
        self._decode_part: Span | None = None  # of the iteration whose prefill part is under way

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def has_a_free_slot(self) -> bool:
        return self.max_rows is None or len(self._running) < self.max_rows

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def next_span(self, now_s: float) -> Span | None:
        """The next prefill, or decode steps up to the next event; None when there is nothing to run."""
        if self._decode_part is not None:
            part, self._decode_part = self._decode_part, None
            return part
        preempted = self._preempt_while_short()
        admitted = [] if preempted and self._running else self._admit(now_s)
        if self._chunk_tokens is not None and self._prefilling:
            return self._mixed_iteration(self._chunk_tokens)
        if admitted:
            return self._prefill_span(admitted)
        # The next iteration may admit what this one, having preempted, may not.
        return self._decode_span(at_most=1 if preempted and self._head_fits() else None)

    def finish_span(self, span: Span) -> list[Job]:
        """Take the span's work as done; the rows that end with it, by row id."""
        if span.kind == PREFILL:
            if self._decode_part is None:
                self._begin_to_decode()
            return []
        self.kv.advance(self.steps_done, span.steps)
        self.steps_done += span.steps
        self._context += span.batch * span.steps
        ended = []
        while self._ends and self._ends[0][0] == self.steps_done:
            _, _, order = heapq.heappop(self._ends)
            job = self._running.get(order)
            if job is None:
                continue  # it was preempted; its later admission has an entry of its own
            self._leave(job)
            ended.append(job)
        self._begin_to_decode()
        return ended

    def fits_at_once(self) -> bool:
        """Its memory holds all of its queue from the start, and to the end of every row."""
        if self.kv.capacity is None or not self.queue:
            return True
        rows = np.array([(job.left, job.context) for job in self.queue])
        rows = rows[np.argsort(rows[:, 0])]
        left, running = rows[:, 0], np.arange(len(rows), 0, -1)
        # When a row ends after n steps, each of those that still run has its context and n tokens: at most one block
        # a row more than their sum.
        tokens = np.cumsum(rows[::-1, 1])[::-1] + running * left
        return bool((tokens // BLOCK_TOKENS + 2 * running).max() <= self.kv.capacity)

    @property
    def in_an_iteration(self) -> bool:
        """Its prefill part is done and its decode part is not."""
        return self._decode_part is not None

    def cut(self, span: Span, elapsed_s: float) -> Span:
        """The part of a span under way that is done when the iteration at hand ends, `elapsed_s` after its start: a
        prefill whole, a decode up to the first step that ends then or later."""
        if span.kind == PREFILL:
            return span

        def seconds(steps: int) -> float:
            return self.costs.decode_s(batch=span.batch, context_tokens=span.context_tokens, steps=steps)

        low, high = 1, span.steps
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if seconds(middle) >= elapsed_s - ONE_INSTANT_S else (middle + 1, high)
        pairs = decoded_pairs(span.batch, span.context_tokens, low)
        return span._replace(steps=low, seconds=seconds(low), attended_pairs=pairs)

    def abort(self) -> list[Job]:
        """Take out every row, running or waiting, with what it has."""
        stopped = list(self._running.values())
        for job in stopped:
            self._leave(job)
        stopped += self.queue
        self.queue.clear()
        return stopped

    def check_empty(self) -> None:
        """At the end of a step nothing may be left behind. Raises ConservationError."""
        waiting = len(self.queue) + len(self._shared)
        if self.running or waiting or self.kv.used or self._context:
            raise ConservationError(
                f"engine: at the end of a step {self.running} rows run, {waiting} wait, "
                f"{self.kv.used} KV blocks and {self._context} context tokens are in use; all must be 0"
            )

    def _preempt_while_short(self) -> bool:
        preempted = False
        while self.kv.free < 0:
            order = next(reversed(self._running))
            job = self._running[order]
            self._leave(job)
            job.preempted += 1
            self.queue.appendleft(job)
            preempted = True
        return preempted

    def _admit(self, now_s: float) -> list[Job]:
        admitted: list[Job] = []
        most = math.inf if self.max_rows is None else self.max_rows
        while (queue := self.queue or self._shared) and len(self._running) < most:
            job = queue[0]
            if self._needed(job) > self.kv.free:
                if not self._running and self.kv.used:
                    raise ConservationError(
                        f"engine: no row runs, but {self.kv.used} KV blocks are in use: row {job.row} waits for "
                        f"{self._needed(job)} and finds {self.kv.free:.0f}"
                    )
                if not self._running:
                    raise ConfigError(
                        f"cluster.kv_tokens_per_engine: {self.kv.capacity} blocks of {BLOCK_TOKENS} tokens cannot "
                        f"hold row {job.row} of {job.context} tokens; raise it, or lower workload.max_response_tokens"
                    )
                break
            queue.popleft()
            job.order = self._admissions
            job.t_start = now_s if job.t_start is None else job.t_start
            self._admissions += 1
            self._running[job.order] = job
            job.cached_tokens = self._cached_blocks(job) * BLOCK_TOKENS
            self._share_prompt(job)
            if self._chunk_tokens is None:
                self._decode_from_now(job)
            else:
                job.prefilled = job.cached_tokens
                self._prefilling[job.order] = job
                self.kv.hold(job.context)
            admitted.append(job)
        return admitted

    def _decode_from_now(self, job: Job) -> None:
        job.admitted_at = self.steps_done
        self.kv.add(job.context, self.steps_done)
        self._context += job.context
        heapq.heappush(self._ends, (self.steps_done + job.left, job.row, job.order))

    def _cached_blocks(self, job: Job) -> int:
        """Blocks of its prompt that another running row holds."""
        return job.shared_blocks if job.shared_blocks and self._holders.get(job.group) else 0

    def _share_prompt(self, job: Job) -> None:
        if job.shared_blocks:
            self.kv.used -= self._cached_blocks(job)
            self._holders[job.group] = self._holders.get(job.group, 0) + 1

    def _begin_to_decode(self) -> None:
        """At the end of an iteration: rows whose prefill is complete."""
        complete, self._complete = self._complete, []
        for job in complete:
            del self._prefilling[job.order]
            self.kv.release(job.context)
            self._decode_from_now(job)

    def _mixed_iteration(self, chunk_tokens: int) -> Span | None:
        """The prefill part of an iteration; its decode part comes next. Only decodes when these fill the chunk."""
        decoding = self.running - len(self._prefilling)
        budget = chunk_tokens - decoding
        parts: list[tuple[Job, int]] = []
        for job in self._prefilling.values():
            tokens = min(job.context - job.prefilled, max(budget, 0))
            if tokens == 0 and job.prefilled < job.context:
                break
            parts.append((job, tokens))
            budget -= tokens
        decode = self._decode_span(at_most=1) if decoding else None
        if not parts:
            return decode
        self._decode_part = decode
        pairs = sum(prefilled_pairs(job.prefilled + n) - prefilled_pairs(job.prefilled) for job, n in parts)
        for job, n in parts:
            job.prefilled += n
        self._complete = [job for job, _ in parts if job.prefilled == job.context]
        tokens = sum(n for _, n in parts)
        recomputed = sum(n for job, n in parts if job.preempted)
        resumed = sum(n for job, n in parts if job.resumed and not job.preempted)
        return Span(
            PREFILL, self.costs.prefill_s(tokens=tokens, pairs=pairs), 1, len(parts),
            tokens, pairs, tokens - recomputed - resumed, resumed, recomputed,
            self._waiting(),
        )  # fmt: skip

    def _head_fits(self) -> bool:
        queue = self.queue or self._shared
        return bool(queue) and self.has_a_free_slot and self._needed(queue[0]) <= self.kv.free

    def _needed(self, job: Job) -> int:
        return blocks_for(job.context) - self._cached_blocks(job)

    def _leave(self, job: Job) -> None:
        """Take a running row out; its context and what is left are brought up to date."""
        del self._running[job.order]
        if job.shared_blocks:
            self._holders[job.group] -= 1
            self.kv.used += self._cached_blocks(job)
        if self._prefilling.pop(job.order, None) is not None:
            self.kv.release(job.context)
            return
        done = self.steps_done - job.admitted_at
        job.context += done
        job.left -= done
        self.kv.remove(job.context, self.steps_done)
        self._context -= job.context

    def _prefill_span(self, admitted: list[Job]) -> Span:
        new = [job.context - job.cached_tokens for job in admitted]
        tokens = sum(new)
        pairs = sum(prefilled_pairs(job.context) - prefilled_pairs(job.cached_tokens) for job in admitted)
        recomputed = sum(n for job, n in zip(admitted, new, strict=True) if job.preempted)
        resumed = sum(n for job, n in zip(admitted, new, strict=True) if job.resumed and not job.preempted)
        return Span(
            PREFILL, self.costs.prefill_s(tokens=tokens, pairs=pairs), 1, len(admitted), tokens, pairs,
            tokens - recomputed - resumed, resumed, recomputed, self._waiting(),
        )  # fmt: skip

    def _decode_span(self, at_most: int | None) -> Span | None:
        batch = self.running - len(self._prefilling)
        if not batch:
            return None
        while self._ends[0][2] not in self._running:
            heapq.heappop(self._ends)
        until_a_row_ends = self._ends[0][0] - self.steps_done
        steps = at_most or self.kv.steps_that_fit(self.steps_done, until_a_row_ends)
        seconds = self.costs.decode_s(batch=batch, context_tokens=self._context, steps=steps)
        pairs = decoded_pairs(batch, self._context, steps)
        return Span(DECODE, seconds, steps, batch, self._context, pairs, 0, 0, 0, self._waiting())

    def _waiting(self) -> int:
        """Rows that wait for KV blocks, not for a slot."""
        return len(self.queue) + len(self._shared) if self.has_a_free_slot else 0
