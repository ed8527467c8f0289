"""`tppo plan --config`: a training configuration as a question."""

from pathlib import Path
from typing import Any

from profiling.errors import ConfigError
from tppo.algorithms.recipes import RECIPES
from tppo.commands.check import prompt_tokens_of
from tppo.commands.train import read_config
from tppo.config import RunConfig
from tppo.models.memory import tokens_of_a_pass

MEAN_SHARE = 1 / 3
"""Of the longest response: the mean where no lengths are given, as a question's own defaults have it."""


def asked_by(path: Path) -> dict[str, Any]:
    """Fields of the question; prompts as long as the longest. Raises ConfigError for what a plan cannot describe."""
    config = read_config(path, [], output=None, resume=None)
    refuse_what_is_not_planned(config, path)
    rollout, train, vllm = config.rollout, config.train, config.rollout.engine == "vllm"
    recipe, prompt = RECIPES[config.algorithm.name], prompt_tokens_of(config)
    windowed = recipe.truncated and rollout.window < rollout.max_response_tokens
    schedule = "oversample" if rollout.schedule == "oversample" else "truncated" if windowed else "synchronous"
    own: dict[str, Any] = {
        "model": config.model.path, "steps": train.steps, "schedules": (schedule,),
        "factors": (rollout.oversample_factor,), "prompts_per_step": rollout.prompts_per_step,
        "samples_per_prompt": rollout.samples_per_prompt, "prompt_tokens": prompt,
        "max_response_tokens": rollout.max_response_tokens,
        "mean_tokens": max(1.0, MEAN_SHARE * rollout.max_response_tokens), "engine": rollout.engine,
        "max_rows_per_engine": rollout.max_rows_per_engine, "release_memory": rollout.release_memory,
        "value_model": recipe.has_value_model, "reference_model": config.algorithm.kl_coef > 0,
        "mini_batches": train.mini_batches, "micro_batch_tokens": train.micro_batch_tokens,
        "logit_tokens": tokens_of_a_pass(config, prompt)[1], "cpu_offload": config.parallel.cpu_offload,
        "recompute": "full" if config.model.activation_checkpointing else "none",
        "evaluation_every": config.evaluation.every, "checkpoint_every": train.checkpoint_every,
    }  # fmt: skip
    if windowed:
        own["windows"] = (rollout.window,)
    if vllm:
        own |= {"tensor_parallel": (config.gpus_per_engine,),
                "memory_utilization": config.vllm.gpu_memory_utilization}  # fmt: skip
    return own


def refuse_what_is_not_planned(config: RunConfig, path: Path) -> None:
    rollout, ray = config.rollout, config.ray
    unplanned = {
        "value.path": config.value.path,
        "model.lora_rank": config.model.lora_rank,
        "algorithm.name": "ppo-ewma" if config.algorithm.name == "ppo-ewma" else "",
        "parallel.replicas": config.parallel.replicas if config.parallel.replicas > 1 else 0,
        "rollout.dtype": rollout.dtype if rollout.dtype == "float32" else "",
        "rollout.schedule": rollout.schedule if rollout.schedule == "asynchronous" else "",
        "ray.layout": ray.layout if ray.address and ray.layout == "separate" else "",
        "ray.address": ray.address if rollout.engine == "torch" else "",
    }
    for name, value in unplanned.items():
        if value:
            raise ConfigError(
                f"{path}: {name} = {value}: tppo plan counts no memory for it; `tppo train {path} --check` does"
            )
