"""A fixed small workload, timed now and then: what changes between two timings is the machine, not the run."""

import time

import torch
from transformers import Qwen2ForCausalLM

from tppo.models.policy import new_qwen2

PROBE_STEPS = 12


class DriftProbe:
    """Forward passes of a small model of its own, about 10 ms on one CPU core."""

    def __init__(self) -> None:
        self.model: Qwen2ForCausalLM = new_qwen2(
            vocab_size=64, eos_token_id=0, pad_token_id=0, layers=2, hidden_size=64, heads=2, kv_heads=1,
            intermediate_size=128, max_tokens=64, seed=0,
        )  # fmt: skip
        self.input_ids = torch.arange(64).reshape(8, 8)
        self.run()  # the first pass allocates

    @torch.inference_mode()
    def run(self) -> float:
        """Seconds of one probe."""
        start = time.perf_counter()
        for _ in range(PROBE_STEPS):
            self.model(input_ids=self.input_ids, use_cache=False)
        return time.perf_counter() - start
