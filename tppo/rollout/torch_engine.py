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
from tppo.models.lora import plain_weights
from tppo.models.policy import input_layer, output_layer
from tppo.rollout.protocol import Clock, Completion, Request, Sampling, always
from tppo.rollout.sampling import draw
from tppo.rollout.slot_cache import Parked, SlotCache
from tppo.rollout.spans import Spans

PREFILL_BUDGET_TOKENS = 8192
"""Padded tokens of one prefill pass; bounds its activation memory."""


@dataclass(slots=True)
class _Slot:
    request: Request
    t_start: float
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class TorchEngine:
    """Samples from `model`.

    slots: rows that run at once. max_tokens: prompt and response. trained: the model that the trainer changes in
    place, of which `model` is then a copy that `update_weights` renews (of another data type, say, or because rollout
    and training overlap); None: `model` itself is trained. keep_kv: keys and values of a row that has not finished
    stay, also across weight updates, and it continues without a prefill; they are then stale: computed with the
    policy that sampled the tokens, not with the one that continues them. compiled: decode through torch.compile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_tokens: int,
        pad_token_id: int,
        generator: torch.Generator,
        clock: Clock,
        trained: PreTrainedModel | None = None,
        keep_kv: bool = False,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.slots = slots
        self.max_tokens = max_tokens
        self.policy_version = 0
        self.keep_kv = keep_kv
        self._trained = trained
        self._generator = generator
        self._pad = pad_token_id
        weight = input_layer(model).weight
        self._device, self._dtype = weight.device, weight.dtype
        self.keep_going = always
        """Asked at every token; False lets `run_until_a_row_ends` return early, with [] if no row has ended."""
        self._forward = torch.compile(hidden_states, dynamic=True) if compiled else hidden_states
        self._cache: SlotCache | None = None
        self._parked: dict[int, Parked] = {}
        """Of rows that did not finish, by row; forgotten when the next submission does not continue them."""
        self._columns = torch.arange(max_tokens, device=self._device)
        self._queue: deque[Request] = deque()
        self._running: list[_Slot] = []
        self._row = self._ints([])  # (running,): the request's row
        self._last = self._ints([])  # (running,): token fed to the next decode step
        self._position = self._ints([])  # (running,): its position
        self._left = self._ints([])  # (running,): tokens of budget left
        self._sampling = Sampling()
        self._stops = self._ints([])
        self._draws_from = generator
        self._spans = Spans(clock, slots)

    def submit(self, requests: list[Request], sampling: Sampling) -> None:
        for request in requests:
            longest = len(request.token_ids) + request.budget_tokens
            if longest > self.max_tokens:
                raise ValueError(f"row {request.row}: {longest} tokens do not fit a slot of {self.max_tokens}")
        if not self._running and not self._queue:
            self._sample_as(sampling)
            self._spans.start()
            wanted = {request.row for request in requests}
            self._parked = {row: parked for row, parked in self._parked.items() if row in wanted}
        elif sampling != self._sampling:
            raise ValueError("rows under way are sampled otherwise; wait for their end")
        self._queue.extend(requests)

    @torch.inference_mode()
    def run_until_a_row_ends(self) -> list[Completion]:
        if self._queue and len(self._running) < self.slots:
            self._admit()
        if not self._running:
            return []
        return self._decode()

    @torch.inference_mode()
    def abort(self) -> list[Completion]:
        stopped = [self._complete(index, "aborted") for index in range(len(self._running))]
        now = self._spans.end
        never_run = [Completion(r.row, [], [], "aborted", self.policy_version, now, now) for r in self._queue]
        self._queue.clear()
        self._close_gaps(set(range(len(self._running))))
        return sorted([*stopped, *never_run], key=lambda completion: completion.row)

    def take_records(self) -> list[dict[str, Any]]:
        return self._spans.take()

    @torch.no_grad()
    def update_weights(self, version: int) -> None:
        self._check_idle("weights may change")
        if self._trained is not None:
            own = dict(self.model.named_parameters())
            for name, new in plain_weights(self._trained):
                if name in own:  # else a buffer, or the other name of a tied weight
                    own.pop(name).copy_(new)
            assert not own, f"not renewed: {sorted(own)}"
        self.policy_version = version

    def release_memory(self) -> None:
        self._check_idle("memory may be released")
        self._cache = None

    def _check_idle(self, what: str) -> None:
        if self._running or self._queue:
            raise RuntimeError(f"{what} only between rollouts")

    def _sample_as(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._stops = self._ints(list(sampling.stop_token_ids))
        self._draws_from = self._generator
        seed = sampling.seed
        if seed is None and self._device != self._generator.device and not sampling.by_row:
            seed = int(torch.randint(2**62, (), generator=self._generator))
        if seed is not None and not sampling.by_row:
            self._draws_from = torch.Generator(self._device).manual_seed(seed)

    def _admit(self) -> None:
        if self._cache is None:
            self._cache = SlotCache(self.model, self.slots, self.max_tokens)
        first = len(self._running)
        admitted = [self._queue.popleft() for _ in range(min(self.slots - first, len(self._queue)))]
        known = [len(request.token_ids) - 1 for request in admitted]  # tokens whose keys and values are needed
        missing = list(known)
        for index, request in enumerate(admitted):
            parked = self._parked.pop(request.row, None)
            if parked is not None and parked.tokens == known[index]:
                self._cache.put(first + index, parked)
                missing[index] = 0
        to_prefill = [index for index, tokens in enumerate(missing) if tokens]
        for members in micro_batches([missing[index] for index in to_prefill], PREFILL_BUDGET_TOKENS):
            group = [to_prefill[member] for member in members]
            rows = [admitted[index].token_ids[:-1] for index in group]
            input_ids = pad_right(rows, self._pad).to(self._device)  # (group, width)
            self._cache.for_prefill(self._ints([first + index for index in group]), input_ids.shape[1])
            positions = torch.arange(input_ids.shape[1], device=self._device).expand_as(input_ids)
            hidden_states(self.model, input_ids, None, positions, self._cache)
        self._row = torch.cat([self._row, self._ints([request.row for request in admitted])])
        self._last = torch.cat([self._last, self._ints([request.token_ids[-1] for request in admitted])])
        self._position = torch.cat([self._position, self._ints(known)])
        self._left = torch.cat([self._left, self._ints([request.budget_tokens for request in admitted])])
        self._running += [_Slot(request, self._spans.end) for request in admitted]
        # A row's last token is computed by its first decode step, and counted here.
        lengths = [known[i] + 1 if missing[i] or not known[i] else 0 for i in range(len(admitted))]
        resumed = sum(n for n, request in zip(lengths, admitted, strict=True) if request.response_tokens)
        self._spans.close(
            "prefill", steps=1, batch=len(admitted), context_tokens=sum(lengths),
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
            stopped = (tokens[:, None] == self._stops).any(1)  # (running,)
            if steps == longest_left or bool(stopped.any()) or not self.keep_going():
                break
        self._left = self._left - steps
        token_columns = torch.stack(sampled, dim=1).tolist()  # (running, steps)
        log_prob_columns = torch.stack(sampled_log_probs, dim=1).tolist()
        for slot, token_ids, values in zip(self._running, token_columns, log_prob_columns, strict=True):
            slot.token_ids += token_ids
            slot.log_probs += values
        ended = (stopped | (self._left == 0)).nonzero().flatten().tolist()
        self._spans.close_decode(steps, batch, context)
        completions = [self._complete(index, "stop" if bool(stopped[index]) else "budget") for index in ended]
        self._close_gaps(set(ended))
        return sorted(completions, key=lambda completion: completion.row)

    def _decode_step(self, width: int) -> tuple[Int[Tensor, " running"], Float[Tensor, " running"]]:
        """Feed the last tokens; sample the next ones, with their log-probabilities."""
        assert self._cache is not None
        self._cache.for_decode(self._position, width)
        ahead = self._columns[:width] > self._position[:, None]  # (running, width)
        # Added to the scores: a boolean mask would be converted anew in every layer.
        mask = torch.zeros(ahead.shape, dtype=self._dtype, device=self._device).masked_fill_(ahead, -torch.inf)
        hidden = self._forward(  # (running, 1, hidden)
            self.model, self._last[:, None], mask[:, None, None], self._position[:, None], self._cache
        )
        logits = output_layer(self.model)(hidden[:, 0]).float()  # (running, vocabulary)
        return draw(logits, self._sampling, self._draws_from, self._row, self._position + 1)

    def _complete(self, index: int, reason: Any) -> Completion:
        slot = self._running[index]
        if self.keep_kv and reason != "stop":
            assert self._cache is not None
            self._parked[slot.request.row] = self._cache.take(index, int(self._position[index]))
        return Completion(
            slot.request.row,
            slot.token_ids,
            slot.log_probs,
            reason,
            self.policy_version,
            slot.t_start,
            self._spans.end,
        )

    def _close_gaps(self, ended: set[int]) -> None:
        """Move the last running rows into the slots of those that ended."""
        keep = [index for index in range(len(self._running)) if index not in ended]
        order = list(range(len(keep)))
        holes = [index for index in order if index in ended]
        movers = [index for index in keep if index >= len(keep)]
        for hole, mover in zip(holes, movers, strict=True):
            assert self._cache is not None
            self._cache.move(mover, hole, int(self._position[mover]))
            order[hole] = mover
        index = self._ints(order)
        self._running = [self._running[i] for i in order]
        self._row, self._last = self._row[index], self._last[index]
        self._position, self._left = self._position[index], self._left[index]

    def _ints(self, values: list[int]) -> Int[Tensor, " values"]:
        return torch.tensor(values, dtype=torch.long, device=self._device)
