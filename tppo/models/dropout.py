"""Dropout whose masks are a function of what is trained, not of where: the same on any rank, in any micro-batch, when
a layer is computed again, and in a resumed run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Draws:
    """What a pass with gradient draws its masks from."""

    seed: int
    """Of the mini-batch."""
    rows: Sequence[int]
    """Numbers of its rows, in order."""
    tokens: Sequence[int]
    """Of each row, padding left out: a mask must not depend on how wide the row is padded."""


class RowDropout(nn.Module):
    """Drops only where gradients are wanted: the policy that samples and is scored is the whole one.

        y_i = x_i m_i / (1 - p)      m_i ~ Bernoulli(1 - p), drawn with hash(seed, row, layer) and in the row's order

    Torch's generators draw otherwise on a GPU than on a CPU, and on GPUs of different kinds.
    """

    def __init__(self, p: float, layer: int) -> None:
        """layer: its number in the model; no two of them have the same masks."""
        super().__init__()
        self.p, self.layer = p, layer
        self.draws: Draws | None = None

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """x: of the rows of `draw_masks`, (rows, time, hidden) or flattened to (rows x time, hidden)."""
        if not torch.is_grad_enabled():
            return x
        kept = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        if not x.is_meta:  # where only bytes are counted, nothing is drawn
            self._draw(kept)
        return x * kept / (1 - self.p)

    def _draw(self, kept: Tensor) -> None:
        """In place."""
        draws, generator = self.draws, torch.Generator(kept.device)
        assert draws is not None, "draw_masks comes before a pass with gradient"
        by_row = kept.view(len(draws.rows), -1, kept.shape[-1])
        for place, row, tokens in zip(by_row, draws.rows, draws.tokens, strict=True):
            key = hashlib.blake2b(f"{draws.seed} {row} {self.layer}".encode(), digest_size=8).digest()
            place[:tokens].bernoulli_(1 - self.p, generator=generator.manual_seed(int.from_bytes(key)))


def draw_masks(model: nn.Module, draws: Draws) -> None:
    """From now on, until the next call: in the forward pass, and where the backward pass computes a layer again."""
    for part in model.modules():
        if isinstance(part, RowDropout):
            part.draws = draws
