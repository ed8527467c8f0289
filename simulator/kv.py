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
        return whole * self._rows + sum(self._residues[(-(now + j)) % BLOCK_TOKENS] for j in range(1, rest + 1))

    def steps_that_fit(self, now: int, wanted: int) -> int:
        """How many of `wanted` decode steps can be done one after the other before blocks run out.

        The rows' blocks at `now` fit already, so the first step always does.
        """
        if self.capacity is None or self.used + self.growth(now, wanted - 1) <= self.capacity:
            return wanted
        low, high = 1, wanted - 1  # growth is monotone: bisect the most steps s with growth(s - 1) fitting
        while low < high:
            middle = (low + high + 1) // 2
            if self.used + self.growth(now, middle - 1) <= self.capacity:
                low = middle
            else:
                high = middle - 1
        return low

    def advance(self, now: int, steps: int) -> None:
        self.used += self.growth(now, steps)
