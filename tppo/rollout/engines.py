"""Makes the rollout engine that a configuration asks for, after checking that its rows can run on this model."""

import copy
from collections.abc import Sequence

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from profiling.errors import ConfigError
from tppo.config import RunConfig
from tppo.models.lora import has_adapters
from tppo.models.policy import input_layer, load_policy, padding_of
from tppo.parallel.ranks import SINGLE, Ranks
from tppo.parallel.shard import is_sharded
from tppo.rollout.protocol import Clock, RolloutEngine, Sampling
from tppo.rollout.self_check import check_it_can_be_served, check_it_looks_back_far_enough
from tppo.rollout.slot_cache import SlotCache
from tppo.rollout.torch_engine import TorchEngine

GIB = 2**30


def make_engine(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_path: str,
    slots: int,
    max_tokens: int,
    generator: torch.Generator,
    clock: Clock,
    device: torch.device | None = None,
) -> RolloutEngine:
    """An engine that samples from `model`, which the caller trains.

    model_path: where vLLM finds its configuration. slots: rows at once. max_tokens: prompt and response. device:
    vLLM's where the model is elsewhere. Raises ConfigError naming the setting when the engine is not installed, lacks
    a feature or has too little memory.
    """
    rollout, vllm = config.rollout, config.vllm
    device = device or input_layer(model).weight.device
    dtype = engine_dtype(config, device, trained=model.dtype)
    if rollout.engine == "vllm":
        from tppo.rollout.vllm_engine import VllmEngine

        gib = vllm.kv_cache_gib or (1.0 if device.type == "cpu" else None)
        return VllmEngine(
            model, model_path, slots=slots, max_tokens=max_tokens, temperature=rollout.temperature,
            dtype=str(dtype).removeprefix("torch."), generator=generator, clock=clock, keep_kv=rollout.keep_kv,
            sleep=rollout.release_memory, tensor_parallel=vllm.tensor_parallel,
            gpu_memory_utilization=vllm.gpu_memory_utilization,
            kv_cache_bytes=None if gib is None else int(gib * GIB), block_size=vllm.block_size, eager=vllm.eager,
        )  # fmt: skip
    check_cache_fits(model, slots, max_tokens)
    cannot_decode = needs_a_plain_copy(model, config)
    own, needs_a_copy = model, cannot_decode or dtype != model.dtype or rollout.schedule == "asynchronous"
    if is_sharded(model):
        own = without_numbers(model, model_path, config, device, dtype)
    elif cannot_decode:
        own = load_policy(model_path, trust_remote_code=config.model.trust_remote_code)[0]
        own.to(device)  # type: ignore[arg-type]
    elif needs_a_copy:
        own = copy.deepcopy(model)
        own.set_attn_implementation("sdpa")
    if needs_a_copy:
        for weight in own.requires_grad_(False).parameters():
            weight.data = weight.data.to(dtype)
    return TorchEngine(
        own, slots=slots, max_tokens=max_tokens, pad_token_id=padding_of(tokenizer), generator=generator, clock=clock,
        trained=model if needs_a_copy else None, keep_kv=rollout.keep_kv, compiled=rollout.compile,
    )  # fmt: skip


def without_numbers(
    model: PreTrainedModel, model_path: str, config: RunConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A whole model for the shards of `model` to be gathered into (`update_weights`): what it holds until then is
    arbitrary, and nothing was read for it."""
    own, _ = load_policy(model_path, trust_remote_code=config.model.trust_remote_code, weights=False)
    for weight in own.parameters():
        weight.data = weight.data.to(dtype)
    own.to_empty(device=device)
    buffers = dict(own.named_buffers())
    for name, buffer in model.named_buffers():
        buffers[name].copy_(buffer)
    return own


def needs_a_plain_copy(model: PreTrainedModel, config: RunConfig) -> bool:
    """Neither shards nor a model that checkpoints its activations can decode with keys and values; adapters would be
    multiplied apart at every token."""
    return is_sharded(model) or config.model.activation_checkpointing or has_adapters(model)


def engine_dtype(config: RunConfig, device: torch.device, trained: torch.dtype = torch.float32) -> torch.dtype:
    """Of an engine's weights. trained: the policy's."""
    if config.rollout.dtype != "auto":
        return getattr(torch, config.rollout.dtype)
    return trained if device.type == "cpu" else torch.bfloat16


def evaluation_engine(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_engine: RolloutEngine,
    *,
    slots: int,
    max_tokens: int,
) -> RolloutEngine:
    """What evaluates: a torch engine of its own, of the training engine's weights where the policy's cannot decode;
    the training's where it is vLLM, or where such weights are on other hosts."""
    if config.rollout.engine == "vllm":
        return training_engine
    if needs_a_plain_copy(model, config):
        if not isinstance(training_engine, TorchEngine):
            return training_engine
        model = training_engine.model
    return TorchEngine(
        model, slots=slots, max_tokens=max_tokens, pad_token_id=padding_of(tokenizer), generator=torch.Generator(),
        clock=lambda: 0.0,
    )  # fmt: skip


def sampling_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks = SINGLE, *, own_stops: Sequence[int] = ()
) -> Sampling:
    """How training samples. With several ranks or on a cluster by row, unless set otherwise: where a row runs changes
    nothing. own_stops: the model's."""
    rollout = config.rollout
    stops = tuple(dict.fromkeys((tokenizer.eos_token_id, *own_stops, *rollout.stop_token_ids)))
    several = ranks.world > 1 or config.ray.address != ""
    by_row = rollout.draws == "row" or (rollout.draws == "auto" and several)
    seed = config.train.seed if by_row else None
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, stops, seed, by_row)


def check_rows_fit(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest_prompt: int
) -> None:
    """Raises ConfigError when the model has too few positions for a row, another vocabulary than its tokenizer, or
    layers that the trainer and its engine would compute wrongly."""
    rollout, path = config.rollout, config.model.path
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        if longest_prompt >= positions:
            data = config.data
            limit = f"data.max_steps = {data.max_steps}"
            if data.task == "dataset":
                limit = f"data.max_prompt_tokens = {data.max_prompt_tokens}"
            raise ConfigError(
                f"{limit}: prompts of up to {longest_prompt} tokens leave no room in "
                f"the {positions} positions of {config.model.path}; lower it, or take another model"
            )
        if longest_prompt + rollout.max_response_tokens > positions:
            raise ConfigError(
                f"rollout.max_response_tokens = {rollout.max_response_tokens}: with prompts of up to {longest_prompt} "
                f"tokens a row needs {longest_prompt + rollout.max_response_tokens} positions, and "
                f"{config.model.path} has {positions}; lower it to {positions - longest_prompt}"
            )
        if rollout.window > positions and config.algorithm.name in ("tppo", "partial-rollout"):
            raise ConfigError(
                f"rollout.window = {rollout.window}: {config.model.path} has only {positions} positions; lower it"
            )
    table = model.get_input_embeddings()
    tokens = 1 + max(tokenizer.get_vocab().values(), default=-1)
    rows = tokens if not isinstance(table, nn.Embedding) else table.weight.shape[0]
    if tokens > rows:
        raise ConfigError(
            f"model.path = {config.model.path!r}: its tokenizer has {tokens} tokens, its model only {rows}; "
            "the two do not belong together"
        )
    beyond = [token for token in rollout.stop_token_ids if token >= rows]
    if beyond:
        raise ConfigError(f"rollout.stop_token_ids: {beyond[0]} is not a token of the model, which has {rows}")
    own_cache = rollout.engine == "torch"
    if own_cache or config.algorithm.prefix == "detached":
        check_it_looks_back_far_enough(model, path, longest_prompt + rollout.max_response_tokens)
    flash = config.model.attention == "flash_attention_2"
    if flash:  # it has no float32
        model.set_attn_implementation("sdpa")
    check_it_can_be_served(model, path, cached=own_cache)
    if flash:
        model.set_attn_implementation("flash_attention_2")


def check_cache_fits(model: PreTrainedModel, slots: int, max_tokens: int) -> None:
    """Raises ConfigError when the torch engine's KV cache is larger than the free memory of its device."""
    device = input_layer(model).weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = SlotCache.bytes_for(model, slots, max_tokens)
    if needed > free:
        raise ConfigError(
            f"rollout.max_rows_per_engine = {slots}: the KV cache of {slots} rows of {max_tokens} tokens takes "
            f"{needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free; lower it, or rollout.max_response_tokens"
        )
