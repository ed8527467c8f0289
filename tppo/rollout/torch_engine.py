"""Continuous batching on torch: rows leave their slots when they end, waiting rows take them.

Every iteration admits what fits, prefills it, then decodes until a row ends. Rows of a prefill are grouped by
length; all but a row's last token are prefilled, the last one is the first decode step's input.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from tppo.batching import micro_batches, pad_right
from tppo.models.cached import hidden_states
from tppo.models.policy import output_layer
from tppo.rollout.protocol import Clock, Completion, Request
from tppo.rollout.slot_cache import SlotCache

PREFILL_BUDGET_TOKENS = 8192
"""Padded tokens of one prefill pass; bounds its activation memory."""


@dataclass(slots=True)
class _Slot:
    request: Request
    t_start: float
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class TorchEngine:
    """Samples from `model` as it is now; the caller trains it in place and then calls `update_weights`.

    slots: rows that run at once. max_tokens: prompt and response. temperature 0 takes the likeliest token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_tokens: int,
        eos_token_id: int,
        pad_token_id: int,
        generator: torch.Generator,
        clock: Clock,
        temperature: float = 1.0,
    ) -> None:
        self.model = model
        self.slots = slots
        self.max_tokens = max_tokens
        self.generator = generator
        self.temperature = temperature
        self._eos, self._pad = eos_token_id, pad_token_id
        self._clock = clock
        self._cache = SlotCache(model, slots, max_tokens)
        self._columns = torch.arange(max_tokens)
        self._queue: deque[Request] = deque()
        self._running: list[_Slot] = []
        self._last = torch.empty(0, dtype=torch.long)  # (running,): token fed to the next decode step
        self._position = torch.empty(0, dtype=torch.long)  # (running,): its position
        self._left = torch.empty(0, dtype=torch.long)  # (running,): tokens of budget left
        self._records: list[dict[str, Any]] = []
        self._mark = 0.0

    def submit(self, requests: list[Request]) -> None:
        for request in requests:
            longest = len(request.token_ids) + request.budget_tokens
            if longest > self.max_tokens:
                raise ValueError(f"row {request.row}: {longest} tokens do not fit a slot of {self.max_tokens}")
        if not self._running and not self._queue:
            self._mark = self._clock()
        self._queue.extend(requests)

    @torch.inference_mode()
    def run_until_a_row_ends(self) -> list[Completion]:
        if self._queue and len(self._running) < self.slots:
            self._admit()
        if not self._running:
            return []
        return self._decode()

    def take_records(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records

    def update_weights(self) -> None:
        if self._running or self._queue:
            raise RuntimeError("weights may change only between rollouts")

    def _admit(self) -> None:
        first = len(self._running)
        admitted = [self._queue.popleft() for _ in range(min(self.slots - first, len(self._queue)))]
        known = [len(request.token_ids) - 1 for request in admitted]  # tokens to prefill
        for group in micro_batches(known, PREFILL_BUDGET_TOKENS):
            if known[group[-1]] == 0:
                continue
            input_ids = pad_right([admitted[i].token_ids[:-1] for i in group], self._pad)  # (group, width)
            self._cache.for_prefill(torch.tensor([first + i for i in group]), input_ids.shape[1])
            positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            hidden_states(self.model, input_ids, None, positions, self._cache)
        self._last = torch.cat([self._last, torch.tensor([request.token_ids[-1] for request in admitted])])
        self._position = torch.cat([self._position, torch.tensor(known)])
        self._left = torch.cat([self._left, torch.tensor([request.budget_tokens for request in admitted])])
        self._running += [_Slot(request, self._mark) for request in admitted]
        lengths = [len(request.token_ids) for request in admitted]
        resumed = sum(n for n, request in zip(lengths, admitted, strict=True) if request.response_tokens)
        self._record(
            kind="prefill", steps=1, batch=len(admitted), context_tokens=sum(lengths),
            attended_pairs=sum(n * (n + 1) // 2 for n in lengths),
            fresh_tokens=sum(lengths) - resumed, resumed_tokens=resumed,
        )  # fmt: skip

    def _decode(self) -> list[Completion]:
        """One decode span: iterations of constant batch until a row ends."""
        batch = len(self._running)
        context = int(self._position.sum()) + batch
        longest_left = int(self._left.min())
        width = int(self._position.max()) + 1
        sampled, sampled_log_probs, steps = [], [], 0
        while True:
            tokens, log_probs = self._decode_step(width)
            sampled.append(tokens)
            sampled_log_probs.append(log_probs)
            steps += 1
            self._last = tokens
            self._position = self._position + 1
            width += 1
            stopped = tokens == self._eos  # (running,)
            if steps == longest_left or bool(stopped.any()):
                break
        self._left = self._left - steps
        token_columns = torch.stack(sampled, dim=1).tolist()  # (running, steps)
        log_prob_columns = torch.stack(sampled_log_probs, dim=1).tolist()
        for slot, token_ids, values in zip(self._running, token_columns, log_prob_columns, strict=True):
            slot.token_ids += token_ids
            slot.log_probs += values
        ended = (stopped | (self._left == 0)).nonzero().flatten().tolist()
        self._record(
            kind="decode", steps=steps, batch=batch, context_tokens=context,
            attended_pairs=steps * context + batch * steps * (steps - 1) // 2,
        )  # fmt: skip
        completions = [self._complete(index, bool(stopped[index])) for index in ended]
        self._close_gaps(set(ended))
        return sorted(completions, key=lambda completion: completion.row)

    def _decode_step(self, width: int) -> tuple[Int[Tensor, " running"], Float[Tensor, " running"]]:
        """Feed the last tokens; sample the next ones, with their log-probabilities."""
        self._cache.for_decode(self._position, width)
        mask = (self._columns[:width] <= self._position[:, None])[:, None, None]  # (running, 1, 1, width)
        hidden = hidden_states(  # (running, 1, hidden)
            self.model, self._last[:, None], mask, self._position[:, None], self._cache
        )
        logits = output_layer(self.model)(hidden[:, 0]).float()  # (running, vocabulary)
        if self.temperature == 0:
            log_probs = logits.log_softmax(-1)
            tokens = log_probs.argmax(-1)
        else:
            log_probs = (logits / self.temperature).log_softmax(-1)
            # The largest of p / Exponential(1) is a draw from p.
            noise = torch.empty_like(log_probs).exponential_(generator=self.generator)
            tokens = (log_probs.exp() / noise).argmax(-1)
        return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)

    def _complete(self, index: int, stopped: bool) -> Completion:
        slot = self._running[index]
        return Completion(
            slot.request.row,
            slot.token_ids,
            slot.log_probs,
            "stop" if stopped else "budget",
            slot.t_start,
            self._mark,
        )

    def _close_gaps(self, ended: set[int]) -> None:
        """Move the last running rows into the slots of those that ended."""
        keep = [index for index in range(len(self._running)) if index not in ended]
        order = list(range(len(keep)))
        holes = [index for index in order if index in ended]
        movers = [index for index in keep if index >= len(keep)]
        for hole, mover in zip(holes, movers, strict=True):
            self._cache.move(mover, hole, int(self._position[mover]))
            order[hole] = mover
        index = torch.tensor(order, dtype=torch.long)
        self._running = [self._running[i] for i in order]
        self._last, self._position, self._left = self._last[index], self._position[index], self._left[index]

    def _record(self, **values: Any) -> None:
        """Close a span: it reaches back to the end of the last one, so the host's own work is inside."""
        now = self._clock()
        empty = {"fresh_tokens": 0, "resumed_tokens": 0, "recomputed_tokens": 0}
        span = {"engine": 0, "t_start": self._mark, "t_end": now, "slots": self.slots, "waiting": 0}
        self._records.append({**span, **empty, **values})
        self._mark = now
