"""A model's weights as flat chunks, so that a sync never holds a second copy of the whole model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tppo.models.lora import is_adapter, plain_name, plain_weights
from tppo.parallel.ranks import Ranks

CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Piece:
    name: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """What lies in a chunk, one after the other, all of one type."""

    pieces: tuple[Piece, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        return sum(piece.numbers for piece in self.pieces)


def layouts_of(model: nn.Module, dtype: torch.dtype, chunk_bytes: int = CHUNK_BYTES) -> list[Layout]:
    """Chunks of at most `chunk_bytes`, or of one tensor. dtype: in which floating-point weights are sent. Tensors of
    several names (tied) are in once, under the first."""
    layouts: list[Layout] = []
    pieces: list[Piece] = []
    size, current = 0, dtype
    for name, tensor in _tensors_of(model, plain=True).items():
        own = dtype if tensor.is_floating_point() else tensor.dtype
        taken = tensor.numel() * own.itemsize
        if pieces and (own != current or size + taken > chunk_bytes):
            layouts.append(Layout(tuple(pieces), current))
            pieces, size = [], 0
        pieces.append(Piece(name, tuple(tensor.shape)))
        size, current = size + taken, own
    return [*layouts, Layout(tuple(pieces), current)]


def chunks_of(
    model: nn.Module, layouts: list[Layout], device: torch.device | str
) -> Iterator[tuple[Layout, Shaped[Tensor, " numbers"]]]:
    """Each layout's numbers, on `device`, made when they are asked for, adapters merged. A collective where the model
    is sharded."""
    weights = plain_weights(model)  # in the layouts' order
    for layout in layouts:
        flat = torch.empty(layout.numbers, dtype=layout.dtype, device=device)
        start = 0
        for piece in layout.pieces:
            tensor = next(tensor for name, tensor in weights if name == piece.name)
            flat[start : start + piece.numbers] = tensor.detach().flatten()
            start += piece.numbers
        yield layout, flat
    for _ in weights:  # tied ones at the end: to gather is everybody's work
        pass


@contextmanager
def gathered_chunks(
    model: nn.Module, layouts: list[Layout], device: torch.device | str, ranks: Ranks
) -> Iterator[Iterator[tuple[Layout, Shaped[Tensor, " numbers"]]]]:
    """`chunks_of` for the first rank, while the others are in `LedEngines.update_weights`. Whatever it does with
    them, all are gathered: the others do not know better."""
    chunks = chunks_of(model, layouts, device)
    if ranks.world == 1:
        yield chunks
        return
    ranks.from_main(True)
    try:
        yield chunks
    finally:
        for _ in chunks:
            pass


def unpack(model: nn.Module, layout: Layout, flat: Shaped[Tensor, " numbers"], *, keep: bool) -> None:
    """Bring a chunk's numbers into `model`. keep: they become its weights as they lie, without a copy."""
    tensors = _tensors_of(model)
    for piece, part in zip(layout.pieces, flat.split([piece.numbers for piece in layout.pieces]), strict=True):
        if keep:
            tensors[piece.name].data = part.view(piece.shape)
        else:
            tensors[piece.name].data.copy_(part.view(piece.shape))


def drop_weights(model: nn.Module) -> None:
    """Leave names only: the next chunks bring new weights (`keep`)."""
    for tensor in _tensors_of(model).values():
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def _tensors_of(model: nn.Module, *, plain: bool = False) -> dict[str, Tensor]:
    """What `state_dict` has, each tensor once. plain: under the names that it has without adapters."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and not (plain and is_adapter(name)):
            seen.add(id(tensor))
            found[plain_name(name) if plain else name] = tensor
    return found
