"""KV-cache blocks of the running rows, counted in closed form.

All running rows gain one token a decode step, so row i's context after s steps is a_i + s with a_i fixed at its
admission. Its blocks, for the context and the next token, are ceil((a_i + s + 1) / 16): they grow by one whenever
a_i + s is a multiple of 16. Sixteen counts of rows by a_i mod 16 tell how many do so at any step.
"""

BLOCK_TOKENS = 16


def blocks_for(context_tokens: int) -> int:
    """Blocks of a row with this context, with room for its next token."""
    return (context_tokens + BLOCK_TOKENS) // BLOCK_TOKENS


class KvBlocks:
    """Blocks in use by the running rows, as of the step `now` (decode steps done since the engine started)."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.used = 0
        self._residues = [0] * BLOCK_TOKENS  # rows by (context - now) mod 16
        self._rows = 0

    @property
    def free(self) -> float:
        return float("inf") if self.capacity is None else self.capacity - self.used

    def add(self, context_tokens: int, now: int) -> None:
        self.used += blocks_for(context_tokens)
        self._residues[(context_tokens - now) % BLOCK_TOKENS] += 1
        self._rows += 1

    def remove(self, context_tokens: int, now: int) -> None:
        """A row with this context at `now` leaves. Its blocks reserve room for a next token."""
        self.used -= blocks_for(context_tokens)
        self._residues[(context_tokens - now) % BLOCK_TOKENS] -= 1
        self._rows -= 1

    def hold(self, context_tokens: int) -> None:
        """A row that is still being prefilled: its blocks are reserved, and do not grow."""
        self.used += blocks_for(context_tokens)

    def release(self, context_tokens: int) -> None:
        self.used -= blocks_for(context_tokens)

    def growth(self, now: int, steps: int) -> int:
        """Blocks that the rows gain while `steps` decode steps are done after `now`."""
        whole, rest = divmod(steps, BLOCK_TOKENS)
        if not rest:
            return whole * self._rows
        # Rows whose context is a multiple of 16 after 1, 2, ... steps: residues -(now + 1), -(now + 2), ... mod 16.
        last = -(now + 1) % BLOCK_TOKENS
        first = last - rest + 1
        some = self._residues[max(first, 0) : last + 1]
        if first < 0:
            some += self._residues[first:]
        return whole * self._rows + sum(some)

    def steps_that_fit(self, now: int, wanted: int) -> int:
        """How many of `wanted` decode steps can be done one after the other before blocks run out.

        The rows' blocks at `now` fit already, so the first step always does.
        """
        if self.capacity is None:
            return wanted
        free = self.capacity - self.used
        whole = free // self._rows if self._rows else wanted  # sixteen steps add a block to every row
        if whole * BLOCK_TOKENS >= wanted:
            return wanted
        free -= whole * self._rows
        steps = whole * BLOCK_TOKENS
        place = -(now + 1) % BLOCK_TOKENS
        while steps < wanted - 1 and (free := free - self._residues[place]) >= 0:
            steps += 1
            place = (place - 1) % BLOCK_TOKENS
        return min(steps + 1, wanted)

    def advance(self, now: int, steps: int) -> None:
        self.used += self.growth(now, steps)
