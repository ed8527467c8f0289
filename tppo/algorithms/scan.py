"""First-order linear recurrences over time, without a loop over time. Shapes: rows, time; rows are independent."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_TOKENS = 4
"""Tokens summarised into one; measured fastest among 3, 4, 6, 8 and 16 (benchmarks/advantages.py)."""

CHUNK_ELEMENTS = 2**17
"""Elements a chunk of rows may have: its temporaries stay in the processor's cache and far below a batch's memory."""


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

    Blocks of four tokens are summarised, for all rows and blocks at once; the summaries obey the same recurrence,
    which gives each block what follows it; then every block is played from there (the parallel prefix of Blelloch,
    "Prefix sums and their applications", 1990, section 1.4, with blocks of four). That is three multiply-adds a token
    and a half, whatever the length, and memory for summaries of about 1.5 times the inputs: cut long batches by
    `row_chunks`. Nothing is divided, so a decay of 0 and a decay of 1 are as good as any other.

    Blocks start at the first token, so tokens appended with decay 1 and input 0 change no bit of the others; and a
    row's result never depends on the other rows. No gradient flows through it.
    """
    result = torch.empty_like(inputs)
    if after is None:
        after = inputs.new_zeros(inputs.shape[0])
    _play(decay.expand_as(inputs), inputs, result, after)
    return result


def _play(decay: Tensor, inputs: Tensor, result: Tensor, after: Tensor) -> None:
    """Write the recurrence of (rows, time) tensors into `result`."""
    time = inputs.shape[1]
    blocks = time // BLOCK_TOKENS if time > BLOCK_TOKENS else 0
    whole = blocks * BLOCK_TOKENS
    after = _play_in_turn(decay[:, whole:], inputs[:, whole:], result[:, whole:], after)
    if not blocks:
        return
    in_blocks = (blocks, BLOCK_TOKENS)
    decay, inputs, result = (each[:, :whole].unflatten(1, in_blocks) for each in (decay, inputs, result))
    # A block turns what follows it, y, into block_inputs + block_decay y. (rows, blocks)
    block_decay, block_inputs = decay[..., -1], inputs[..., -1]
    for place in reversed(range(BLOCK_TOKENS - 1)):
        block_inputs = (decay[..., place] * block_inputs).add_(inputs[..., place])
        block_decay = decay[..., place] * block_decay
    first = torch.empty_like(block_inputs)  # y at each block's first token
    _play(block_decay, block_inputs, first, after)
    _play_in_turn(decay, inputs, result, torch.cat([first[:, 1:], after[:, None]], dim=1))


def _play_in_turn(decay: Tensor, inputs: Tensor, result: Tensor, after: Tensor) -> Tensor:
    """The recurrence over the few tokens of the last axis; returns its first token's y."""
    for place in reversed(range(inputs.shape[-1])):
        # Product and sum are rounded one by one: a fused form may round differently by memory layout, and then
        # rows would depend on how they were cut into chunks.
        after = torch.mul(decay[..., place], after, out=result[..., place]).add_(inputs[..., place])
    return after
