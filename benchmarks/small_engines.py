"""Small random models, and torch engines that sample from them, to time."""

import time

import torch
from transformers import PreTrainedModel

from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import new_qwen2
from tppo.rollout.protocol import Completion, Request, RolloutEngine, Sampling
from tppo.rollout.torch_engine import TorchEngine

MODELS = {  # layers, hidden size, heads, KV heads, intermediate size
    "demo, 4 x 48": (4, 48, 2, 1, 144),
    "2 x 128": (2, 128, 4, 2, 384),
    "4 x 256": (4, 256, 8, 4, 768),
}


def model_of(shape: tuple[int, ...]) -> PreTrainedModel:
    layers, hidden, heads, kv_heads, intermediate = shape
    tokenizer = character_tokenizer()
    return new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        layers=layers, hidden_size=hidden, heads=heads, kv_heads=kv_heads, intermediate_size=intermediate,
        max_tokens=512, seed=0,
    )  # fmt: skip


def engine_of(model: PreTrainedModel, slots: int, max_tokens: int = 512, **options: object) -> TorchEngine:
    return TorchEngine(
        model, slots=slots, max_tokens=max_tokens, pad_token_id=0, generator=torch.Generator().manual_seed(0),
        clock=time.perf_counter, **options,
    )  # type: ignore[arg-type]  # fmt: skip


def run_engine(engine: RolloutEngine, requests: list[Request], sampling: Sampling) -> dict[int, Completion]:
    engine.submit(requests, sampling)
    done = {}
    while ended := engine.run_until_a_row_ends():
        done |= {completion.row: completion for completion in ended}
    return done
