"""The demo's starting point: a small Qwen2 trained on a careless pupil's solutions, cached by its settings."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profiling.settings import Settings
from tppo.batching import micro_batches, pad_right
from tppo.config import DataConfig
from tppo.data.arithmetic import ArithmeticTask, careless_solution
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import new_qwen2, save_policy, token_log_probs

FIRST_DEMONSTRATION = 10_000_000
"""Problems are numbered; demonstrations use numbers that training never reaches."""
TASK_FIELDS = {"task", "median_steps", "sigma", "max_steps", "seed"}
"""Of [data]: what the arithmetic task reads."""


class WarmStartConfig(Settings):
    layers: PositiveInt = 2
    hidden_size: PositiveInt = 96
    heads: PositiveInt = 3
    kv_heads: PositiveInt = 1
    intermediate_size: PositiveInt = 288
    steps: PositiveInt = 700
    rows_per_step: PositiveInt = 16
    lr: PositiveFloat = 2e-3
    slip_probability: float = 0.9
    """How often the pupil goes wrong where it can."""
    threads: PositiveInt = 1
    seed: NonNegativeInt = 0


def warm_start(
    config: WarmStartConfig,
    data: DataConfig,
    task: ArithmeticTask,
    cache: Path,
    report: Callable[[int, float], None],
) -> Path:
    """Directory of the model, trained now or found in `cache`. `report(step, loss)` is called now and then."""
    settings = {"warm_start": config.model_dump(), "data": data.model_dump(include=TASK_FIELDS)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    target = cache / f"warm-start-{key}"
    if target.is_dir():
        return target
    torch.set_num_threads(config.threads)
    start = time.perf_counter()
    tokenizer = character_tokenizer()
    model = new_qwen2(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        layers=config.layers, hidden_size=config.hidden_size, heads=config.heads, kv_heads=config.kv_heads,
        intermediate_size=config.intermediate_size,
        max_tokens=task.max_prompt_tokens + task.max_response_tokens + 8, seed=config.seed,
    )  # fmt: skip
    train_on_demonstrations(model, tokenizer, task, config, report)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    save_policy(model, tokenizer, temporary)
    provenance = {**settings, "seconds": time.perf_counter() - start}
    (temporary / "warm_start.json").write_text(json.dumps(provenance, indent=1) + "\n")
    temporary.rename(target)
    return target


def train_on_demonstrations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ArithmeticTask,
    config: WarmStartConfig,
    report: Callable[[int, float], None],
) -> None:
    """Next-token cross-entropy on the response, mean over tokens; the rate falls to zero over the last 40 %."""
    rng = np.random.default_rng(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(1, config.steps + 1):
        scale = min(1.0, step / 50, max(0.05, 2.5 * (1 - step / config.steps)))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * scale
        first = FIRST_DEMONSTRATION + step * config.rows_per_step
        prompts, responses = [], []
        for number in range(first, first + config.rows_per_step):
            solution = careless_solution(task.operands(number), config.slip_probability, rng)
            prompts.append(tokenizer(task.problem(number).prompt)["input_ids"])
            responses.append(tokenizer(solution)["input_ids"])
        optimizer.zero_grad()
        tokens = sum(map(len, responses))
        total = 0.0
        for members in micro_batches([len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)], 4096):
            rows = [[*prompts[i], *responses[i]][:-1] for i in members]
            input_ids = pad_right(rows, tokenizer.pad_token_id)
            row = [index for index, i in enumerate(members) for _ in responses[i]]
            column = [len(prompts[i]) - 1 + t for i in members for t in range(len(responses[i]))]
            targets = [token for i in members for token in responses[i]]
            scored = token_log_probs(model, input_ids, torch.tensor(row), torch.tensor(column), torch.tensor(targets))
            loss = -scored.log_probs.sum() / tokens
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            report(step, total)
