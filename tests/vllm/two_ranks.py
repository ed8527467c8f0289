"""A model on two tensor-parallel CPU workers, its weights changed: prints the largest log-probability difference to
transformers. Run by test_vllm_engine.py in a process of its own, since workers are started from it."""

import sys
import time

import torch

from tppo.models.policy import load_policy
from tppo.rollout.protocol import Request, Sampling
from tppo.rollout.vllm_engine import VllmEngine


def main(path: str) -> None:
    model, _ = load_policy(path)
    engine = VllmEngine(
        model, path, slots=4, max_tokens=160, temperature=1.0, dtype="float32", eager=True, kv_cache_bytes=2**24,
        block_size=32, generator=torch.Generator().manual_seed(0), clock=time.perf_counter, tensor_parallel=2,
    )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    engine.update_weights(1)
    engine.submit([Request(0, [5, 6, 7, 8], 0, 20)], Sampling(seed=3))
    done = engine.run_until_a_row_ends()[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, 8, *done.token_ids]])).logits[0, 3:-1]
    exact = logits.log_softmax(-1).gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
    print(float((exact - torch.tensor(done.log_probs)).abs().max()))


if __name__ == "__main__":
    main(sys.argv[1])
