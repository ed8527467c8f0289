"""A key-value cache of slots for any Hugging Face model whose layers attend to everything before a token."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from tppo.models.policy import describe_model, input_layer


@dataclass(frozen=True, slots=True)
class Parked:
    """Keys and values of a row that is not running."""

    tokens: int
    keys: list[Float[Tensor, "heads tokens dim"]]
    """A tensor a layer."""
    values: list[Float[Tensor, "heads tokens dim"]]


class SlotCache(Cache):
    """Keys and values of `slots` rows of at most `max_tokens` tokens, in place, one tensor a layer.

    Running rows occupy slots 0..n-1, so that a decode step reads a view and copies nothing. Either `for_prefill` or
    `for_decode` names what the next forward pass writes.
    """

    def __init__(self, model: PreTrainedModel, slots: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # An odd stride: with a power of two, all slots' tokens at one position would share a few cache lines.
        shape = (slots, heads, max_tokens | 1, head_dim)
        weight = input_layer(model).weight
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in layers]
        self._rows = torch.empty(0, dtype=torch.long)
        self._running = 0
        self._places = torch.empty(0, dtype=torch.long)
        """Of the tokens that a decode step writes, in the cache as a list of tokens."""
        self._width = 0
        self._prefill = False

    @staticmethod
    def bytes_for(model: PreTrainedModel, slots: int, max_tokens: int) -> int:
        return slots * (max_tokens | 1) * describe_model(model)["kv_bytes_per_token"]

    def for_prefill(self, slots: Int[Tensor, " rows"], width: int) -> None:
        """Next: tokens 0..width-1 of the rows in `slots`, which hold nothing yet."""
        self._rows, self._width, self._prefill = slots, width, True

    def for_decode(self, positions: Int[Tensor, " rows"], width: int) -> None:
        """Next: one token of each of the first len(positions) slots, at these positions; all below `width`."""
        _, heads, tokens, _ = self.keys[0].shape
        first = torch.arange(len(positions) * heads, device=positions.device) * tokens  # of each slot and head
        self._places = first + positions.repeat_interleave(heads)
        self._running, self._width, self._prefill = len(positions), width, False

    def update(
        self,
        key_states: Float[Tensor, "rows heads time dim"],
        value_states: Float[Tensor, "rows heads time dim"],
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "rows heads width dim"], Float[Tensor, "rows heads width dim"]]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._prefill:
            keys[self._rows, :, : self._width] = key_states
            values[self._rows, :, : self._width] = value_states
            return key_states, value_states
        for cached, new in ((keys, key_states), (values, value_states)):
            cached.view(-1, cached.shape[-1]).index_copy_(0, self._places, new.flatten(0, 2))
        return keys[: self._running, :, : self._width], values[: self._running, :, : self._width]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row's first `tokens` tokens to another slot."""
        for cached in (*self.keys, *self.values):
            cached[target, :, :tokens] = cached[source, :, :tokens]

    def take(self, slot: int, tokens: int) -> Parked:
        """A copy of a row's first `tokens` tokens."""
        return Parked(
            tokens,
            [keys[slot, :, :tokens].clone() for keys in self.keys],
            [values[slot, :, :tokens].clone() for values in self.values],
        )

    def put(self, slot: int, parked: Parked) -> None:
        for cached, kept in zip((*self.keys, *self.values), (*parked.keys, *parked.values), strict=True):
            cached[slot, :, : parked.tokens] = kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self._prefill else self._width - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._width, 0
