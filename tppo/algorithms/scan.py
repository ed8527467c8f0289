"""First-order linear recurrences over time, without a loop over time. Shapes: rows, time; rows are independent.

A blocked scan: within blocks, over blocks, and back into them (Blelloch, Prefix sums and their applications, 1990)."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_TOKENS = 8
"""Tokens summarised into one. On a CPU 4, 8 and 16 are about as fast as each other."""

CHUNK_ELEMENTS = 2**19
"""Elements a chunk of rows may have: its dozen temporaries stay small beside a batch and near the processor."""


def row_chunks(rows: int, time: int) -> Iterator[slice]:
    """Slices that cover all rows, each of at most CHUNK_ELEMENTS elements, but of at least one row."""
    step = max(1, CHUNK_ELEMENTS // max(1, time))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@torch.no_grad()
def reverse_linear_recurrence(
    decay: Float[Tensor, "#rows #time"],
    inputs: Float[Tensor, "rows time"],
    after: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows time"]:
    """y_t = inputs_t + decay_t y_{t+1}, with y_T = `after` (0 if None). Unit: that of `inputs`.

    Blocks of BLOCK_TOKENS tokens are summarised, for all rows and blocks at once; the summaries obey the same
    recurrence, which gives each block what follows it; then every block is played from there (Blelloch, "Prefix sums
    and their applications", 1990, section 1.4). That is about three multiply-adds a token, whatever the length.
    Nothing is divided, so a decay of 0 and a decay of 1 are as good as any other.

    Blocks start at the first token, so tokens appended with decay 1 and input 0 change no bit of the others; and a
    row's result never depends on the other rows. No gradient flows through it.

    Memory beyond the result: at most three times the inputs, so cut long batches by `row_chunks`. The result runs
    along rows in memory; arguments that do too are not copied.
    """
    if after is None:
        after = inputs.new_zeros(inputs.shape[0])
    # (time, rows): one token of all rows, or of all blocks of all rows, is then a run of memory.
    by_time = inputs.mT.contiguous()
    result = torch.empty_like(by_time)
    _play(decay.expand_as(inputs).mT.contiguous(), by_time, result, after)
    return result.mT


def _play(decay: Tensor, inputs: Tensor, result: Tensor, after: Tensor) -> None:
    """Write the recurrence of (time, rows) tensors into `result`."""
    time = inputs.shape[0]
    blocks = time // BLOCK_TOKENS if time > BLOCK_TOKENS else 0
    whole = blocks * BLOCK_TOKENS
    after = _play_in_turn(decay[whole:], inputs[whole:], result[whole:], after)
    if not blocks:
        return
    # (BLOCK_TOKENS, blocks, rows)
    decay, inputs, result = (
        each[:whole].unflatten(0, (blocks, BLOCK_TOKENS)).transpose(0, 1) for each in (decay, inputs, result)
    )
    # A block turns what follows it, y, into block_inputs + block_decay y. (blocks, rows)
    block_decay, block_inputs = decay[-1], inputs[-1]
    for place in reversed(range(BLOCK_TOKENS - 1)):
        block_inputs = (decay[place] * block_inputs).add_(inputs[place])
        block_decay = decay[place] * block_decay
    first = torch.empty_like(block_inputs)  # y at each block's first token
    _play(block_decay, block_inputs, first, after)
    _play_in_turn(decay, inputs, result, torch.cat([first[1:], after[None]]))


def _play_in_turn(decay: Tensor, inputs: Tensor, result: Tensor, after: Tensor) -> Tensor:
    """The recurrence over the few tokens of the first axis; returns the first token's y."""
    for place in reversed(range(len(inputs))):
        # Product and sum are rounded one by one: a fused form may round differently by memory layout, and then
        # rows would depend on how they were cut into chunks.
        after = torch.mul(decay[place], after, out=result[place]).add_(inputs[place])
    return after
