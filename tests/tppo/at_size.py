"""Runs at the size of a published model, with random weights: what they cost, not what they learn."""

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from simulator.models.shape import CONFIGS
from tppo.config import RunConfig
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import save_policy


def random_model(path, name, **changes):
    """Folder of a model with a bundled configuration, float32, and the arithmetic task's tokenizer: its tokens are the
    first of the vocabulary. changes: fields of the configuration."""
    values = {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}
    tokenizer = character_tokenizer()
    values |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_policy(model, tokenizer, path)
    return path


def config_for(model_path, output, *, rows, tokens, **sections):
    """T-PPO: windows of a third of `tokens`; random weights seldom end a row, so nearly all are cut."""
    base = {
        "output": str(output),
        "model": {"path": str(model_path), "activation_checkpointing": True},
        "data": {"max_steps": 6},
        "rollout": {"prompts_per_step": rows, "max_response_tokens": tokens, "window": tokens // 3},
        "value": {"pretrain_rows": 0},
        "train": {"steps": 4, "micro_batch_tokens": 16_384},
        "evaluation": {"every": 0},
        "profile": {"sampler": False},
    }
    return RunConfig.model_validate(
        {
            name: {**own, **sections.get(name, {})} if isinstance(own, dict) else own
            for name, own in {"algorithm": {}, "parallel": {}, **base}.items()
        }
    )
