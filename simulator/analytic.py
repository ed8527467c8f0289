"""Costs from a model's sizes, a GPU's data sheet and efficiency factors. Seconds, bytes, FLOPs; pure functions.

Decode step of B rows with C tokens of context in all, on t GPUs (tensor parallel):
    products    (bytes of the weights that B tokens read / bandwidth) and (2 x active parameters x B / peak), joined by
                a norm, because the two overlap only in part
    attention   bytes of C tokens' keys and values / bandwidth (or its FLOPs / peak, where latent attention has more)
    all-reduce  two a layer, of B x hidden numbers, over the link
    the rest    per layer and per row
For one B this is affine in C, which is all that the closed form of a span needs.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from profiling.errors import ConfigError
from profiling.model_memory import (
    ACTIVATIONS,
    BF16,
    FP32,
    GATHERED,
    LOGITS,
    STATES,
    TRAINED,
    USABLE,
    Pass,
    Sizes,
    training_needs,
)
from simulator.cost_settings import AffineCostSettings, AnalyticCostSettings, Occasions
from simulator.hardware import Gpu, load_gpu
from simulator.hardware.efficiency import Efficiency, load_efficiency, peaks_only
from simulator.memory import Memory, sizes_of
from simulator.models import Model, load_model

OPTIMIZER_TRAFFIC = 30
"""Bytes that an Adam step reads and writes per parameter: fp32 weight, gradient and moments; then all but the
gradient, and the bf16 weight."""


@dataclass(frozen=True)
class Parts:
    """Seconds of a decode step by what takes them."""

    products: np.ndarray | float
    all_reduce: np.ndarray | float
    layers: float
    rows: np.ndarray | float


class AnalyticEngineCosts:
    """Costs of a rollout engine. `tensor_parallel` GPUs share its weights."""

    def __init__(
        self,
        model: Model,
        gpu: Gpu,
        efficiency: Efficiency,
        *,
        tensor_parallel: int = 1,
        weight_bytes: float = BF16,
        kv_bytes: float = BF16,
        expert_parallel: bool = False,
    ) -> None:
        self.model, self.gpu, self.efficiency, self.gpus = model, gpu, efficiency, tensor_parallel
        self.weight_bytes, self.kv_bytes = weight_bytes, kv_bytes
        self.expert_parallel = expert_parallel
        self.peak = gpu.bf16_flops
        if weight_bytes <= 1:
            self.peak = gpu.need("fp8_flops", "weight_bytes = 1 (fp8)")
        self._step_s: dict[int, float] = {}

    @cached_property
    def link_bytes_per_s(self) -> float:
        return self.gpu.need("link_bytes_per_s", "tensor_parallel > 1") / 2 * self.efficiency.link

    def parts(self, batch: np.ndarray | int) -> Parts:
        """Of a decode step, its attention apart."""
        model, has = self.model, self.efficiency
        read = (
            np.vectorize(model.parameters_read, otypes=[float])(batch) if model.experts else model.parameters_read(1)
        )
        multiplied: np.ndarray | float = model.active_parameters * batch
        if self.expert_parallel and model.experts:
            own = np.vectorize(model.expert_parameters_read, otypes=[float])(batch)
            uneven = self._busiest_share(batch) - 1
            # The busiest GPU holds up the others: more experts of its own are hit, more tokens multiplied with them.
            all_experts = model.moe_layers * model.experts * model.expert_parameters
            read = read + np.minimum(own * uneven, all_experts - own)
            active = model.moe_layers * model.experts_per_token * model.expert_parameters
            multiplied = multiplied + active * batch * uneven
        size = self.weight_bytes * (read + model.embedding_parameters) / self.gpus
        memory_s = size / (self.gpu.memory_bytes_per_s * has.weight_bandwidth)
        arithmetic_s = 2 * multiplied / self.gpus / (self.peak * has.decode_gemm)
        p = has.roofline_norm
        products = (memory_s**p + arithmetic_s**p) ** (1 / p)
        all_reduce: np.ndarray | float = 0.0
        if self.gpus > 1:
            wait_s = has.collective_s + has.collective_per_doubling_s * (math.log2(self.gpus) - 1)
            all_reduce = 2 * model.layers * (wait_s + self._all_reduced_s(batch))
        return Parts(products, all_reduce, model.layers * has.layer_s, has.row_s * batch + self._windows_s(batch))

    def _busiest_share(self, batch: np.ndarray | int) -> np.ndarray | float:
        """Tokens that the experts of the busiest of t GPUs get / the mean: with m each on average, about
        m + sqrt(2 m ln t) of independently drawn ones, and never more than all."""
        mean = batch * self.model.experts_per_token / self.gpus
        return np.minimum(1 + np.sqrt(2 * math.log(self.gpus) / mean), self.gpus)

    def _all_reduced_s(self, tokens: np.ndarray | float) -> np.ndarray | float:
        """Of sending: a ring moves 2 (t - 1) / t of the data through each GPU's link."""
        return 2 * (self.gpus - 1) / self.gpus * tokens * self.model.hidden * BF16 / self.link_bytes_per_s

    def _windows_s(self, batch: np.ndarray | int) -> np.ndarray | float:
        """Layers with a sliding window, as if each row had filled it: at most a few hundred tokens too much."""
        size = batch * self.model.kv_bytes_per_row(self.kv_bytes) / self._kv_shards
        return size / (self.gpu.memory_bytes_per_s * self.efficiency.kv_bandwidth)

    @property
    def _kv_shards(self) -> int:
        """GPUs that the cache is split over: each holds at least one head."""
        return min(self.gpus, self.model.kv_heads)

    def step_s(self, batch: np.ndarray | int) -> np.ndarray | float:
        """Of a decode step of `batch` rows, apart from what grows with their context."""
        parts = self.parts(batch)
        return parts.products + parts.all_reduce + parts.layers + parts.rows + self.efficiency.step_s

    @cached_property
    def context_token_s(self) -> float:
        """Of a decode step, per token of context."""
        size = self.model.kv_bytes_per_token(self.kv_bytes) / self._kv_shards
        memory_s = size / (self.gpu.memory_bytes_per_s * self.efficiency.kv_bandwidth)
        flops = self.model.decode_attention_flops_per_context_token() / self.gpus
        return max(memory_s, flops / (self.gpu.bf16_flops * self.efficiency.decode_gemm))

    def decode_s(self, *, batch: int, context_tokens: int, steps: int) -> float:
        """Seconds of `steps` decode steps of `batch` rows whose contexts sum to `context_tokens` before the first."""
        one = self._step_s.get(batch)
        if one is None:
            one = self._step_s[batch] = float(self.step_s(batch))
        pairs = steps * context_tokens + batch * (steps * (steps - 1) // 2)
        return steps * one + self.context_token_s * pairs

    def prefill_s(self, *, tokens: int, pairs: int) -> float:
        """Seconds to prefill `tokens` uncached tokens that attend to `pairs` pairs, whatever the rows."""
        if tokens == 0:
            return 0.0
        model, has = self.model, self.efficiency
        products = 2 * model.linear_parameters_per_token * tokens / self.gpus / (self.peak * has.prefill_gemm)
        attention = model.attention_flops(pairs, tokens) / self.gpus / (self.gpu.bf16_flops * has.prefill_attention)
        read = self.weight_bytes * model.parameters_read(tokens) / self.gpus
        products = max(products, read / (self.gpu.memory_bytes_per_s * has.weight_bandwidth))
        seconds = products + attention + model.layers * has.prefill_layer_s + has.prefill_step_s
        if self.gpus > 1:
            seconds += 2 * model.layers * (has.prefill_collective_s + float(self._all_reduced_s(tokens)))
        return seconds


class AnalyticCosts:
    """Everything that one experiment costs. engine_gpus: of one engine; trainer_gpus: all that train."""

    def __init__(self, settings: AnalyticCostSettings, *, engine_gpus: int, trainer_gpus: int, engines: int) -> None:
        self.settings = settings
        self.model, self.gpu = load_model(settings.model), load_gpu(settings.gpu)
        factors, self.borrowed = load_efficiency(self.gpu.family, settings.engine, settings.efficiency)
        self.efficiency = peaks_only(factors) if settings.peaks_only else factors
        self.tensor_parallel = settings.tensor_parallel or engine_gpus
        self.trainer_gpus, self.engines = trainer_gpus, engines
        self._check_parallelism(engine_gpus)
        self.engine = AnalyticEngineCosts(
            self.model, self.gpu, self.efficiency, tensor_parallel=self.tensor_parallel,
            weight_bytes=settings.weight_bytes, kv_bytes=settings.kv_bytes,
            expert_parallel=settings.expert_parallel,
        )  # fmt: skip

    def _check_parallelism(self, engine_gpus: int) -> None:
        own, settings = self.tensor_parallel, self.settings
        if own != engine_gpus:
            raise ConfigError(
                f"cost.tensor_parallel = {own}: an engine has cluster.gpus_per_engine = {engine_gpus} GPUs; set them "
                "equal (more engines are data parallelism)"
            )
        if own > self.gpu.gpus_per_node:
            raise ConfigError(
                f"cost.tensor_parallel = {own}: beyond the {self.gpu.gpus_per_node} GPUs of a node of {self.gpu.name}"
            )
        if self.model.heads % own:
            raise ConfigError(f"cost.tensor_parallel = {own}: does not divide {self.model.heads} attention heads")
        kv_heads = self.model.kv_heads
        if not self.model.latent_dim and own % kv_heads and kv_heads % own:
            raise ConfigError(
                f"cost.tensor_parallel = {own}: engines split {kv_heads} heads of keys and values over a divisor or a "
                "multiple of them"
            )
        groups = settings.trainer_tensor_parallel * settings.trainer_pipeline_parallel
        if settings.trainer == "fsdp" and groups > 1:
            raise ConfigError(
                "cost.trainer_tensor_parallel and trainer_pipeline_parallel: need cost.trainer = 'megatron'"
            )
        if self.trainer_gpus and self.trainer_gpus % groups:
            raise ConfigError(f"cost: {self.trainer_gpus} training GPUs do not divide into groups of {groups}")

    def rollout_memory(self, row_tokens: int) -> Memory:
        """With the cache of one row of `row_tokens` tokens."""
        has = self.settings
        return Memory(
            "rollout",
            {
                "weights": self.model.parameters * has.weight_bytes / self.tensor_parallel,
                "engine overhead": self.efficiency.engine_overhead_bytes,
                "cache of the longest row": row_tokens * self.cache_bytes_per_token + self._cache_bytes_per_row,
            },
            self.gpu.memory_bytes * has.memory_utilization,
        )

    @property
    def cache_bytes_per_token(self) -> float:
        """On each GPU of an engine."""
        shards = min(self.tensor_parallel, self.model.kv_heads)
        return self.model.kv_bytes_per_token(self.settings.kv_bytes) / shards

    @property
    def _cache_bytes_per_row(self) -> float:
        return self.model.kv_bytes_per_row(self.settings.kv_bytes) / min(self.tensor_parallel, self.model.kv_heads)

    def kv_tokens(self, row_tokens: int) -> int:
        """Tokens that an engine's cache holds. Raises ConfigError when not even one row fits."""
        memory = self.rollout_memory(row_tokens)
        fits = self.gpu.memory_bytes * self.settings.memory_utilization
        least = next((n for n in (2, 4, 8) if n > self.tensor_parallel and self.model.heads % n == 0), None)
        split = (
            f"split the weights over more GPUs (cluster.gpus_per_engine = {least})" if least else "take larger GPUs"
        )
        memory.check(self.gpu, f"{split}, or lower workload.max_response_tokens")
        free = fits - memory.needs["weights"] - memory.needs["engine overhead"]
        return int(free / (self.cache_bytes_per_token + self._cache_bytes_per_row / row_tokens))

    @property
    def sizes(self) -> Sizes:
        own = self.settings
        return sizes_of(self.model, value_model=own.value_model, reference_model=own.reference_model)

    def training_memory(self, row_tokens: int) -> Memory:
        """Where the longest row has `row_tokens` tokens: it makes a pass of its own. Engines have left the memory."""
        settings, sizes = self.settings, self.sizes
        tokens = max(settings.micro_batch_tokens, row_tokens)
        own = Pass(
            shards=self.trainer_gpus, tokens=tokens, logit_tokens=min(settings.logit_tokens, tokens),
            checkpointed=settings.recompute == "full", cpu_offload=settings.cpu_offload,
        )  # fmt: skip
        needs = training_needs(sizes, own)
        if settings.trainer == "megatron":  # nothing is gathered: bf16 weights and gradients stay, split
            split = settings.trainer_tensor_parallel * settings.trainer_pipeline_parallel
            kept = sizes.trained * (TRAINED - 2 * BF16) + sizes.frozen * FP32
            if not settings.cpu_offload:
                needs[STATES] = sizes.trained * 2 * BF16 / split + kept / self.trainer_gpus
            needs[ACTIVATIONS] /= split
            needs[LOGITS] /= settings.trainer_tensor_parallel
            del needs[GATHERED]
        return Memory("training", needs, self.gpu.memory_bytes * USABLE)

    def _pass_s(self, passes: float, gathers: float, *, logits: bool) -> tuple[float, float]:
        """(per token, per attended pair) of `passes` forward passes' worth of work, all training GPUs together."""
        model, has, gpus, settings = self.model, self.efficiency, self.trainer_gpus, self.settings
        flops = 2 * (model.linear_parameters_per_token + (model.embedding_parameters if logits else 0))
        token_s = passes * flops / (gpus * self.gpu.bf16_flops * has.train_gemm)
        pair_flops = model.attention_flops(1.0, math.inf)
        pair_s = passes * pair_flops / (gpus * self.gpu.bf16_flops * has.train_attention)
        if settings.trainer == "fsdp":  # gathering overlaps with arithmetic: the longer of the two counts
            size = gathers * BF16 * model.parameters
            return max(token_s, size / self._between_trainers() / settings.micro_batch_tokens / gpus), pair_s
        split = settings.trainer_tensor_parallel
        if split > 1:  # two all-reduces a layer and pass, which arithmetic waits for
            link = self.gpu.need("link_bytes_per_s", "trainer_tensor_parallel > 1") / 2 * has.link
            size = passes * 2 * model.layers * model.hidden * BF16 * 2 * (split - 1) / split
            token_s += size * split / gpus / link
        return token_s, pair_s

    def _between_trainers(self) -> float:
        """Bytes per second into one training GPU."""
        if self.trainer_gpus <= self.gpu.gpus_per_node:
            if self.trainer_gpus == 1:
                return math.inf
            return self.gpu.need("link_bytes_per_s", "training on several GPUs") / 2 * self.efficiency.link
        return self.gpu.need("network_bytes_per_s", "training on several nodes") * self.efficiency.network

    def _bubble(self, tokens: float) -> float:
        """A pipeline of p stages idles (p - 1) / m of its time with m micro-batches a mini-batch."""
        settings = self.settings
        stages = settings.trainer_pipeline_parallel
        replicas = settings.replicas(self.trainer_gpus)
        batches = max(1.0, tokens / settings.mini_batches / replicas / settings.micro_batch_tokens)
        return 1 + (stages - 1) / batches

    def _update(self, prefix: str, tokens: float, *, logits: bool) -> dict[str, float]:
        """An update: forward, twice that backward, and forward again where activations are recomputed."""
        passes, settings = (4.0 if self.settings.recompute == "full" else 3.0), self.settings
        token_s, pair_s = self._pass_s(passes, 3.0, logits=logits)
        parameters = self.model.parameters if logits else self.model.backbone_parameters
        bandwidth = self.gpu.memory_bytes_per_s * self.efficiency.optimizer_bandwidth
        step_s = parameters * OPTIMIZER_TRAFFIC / self.trainer_gpus / bandwidth
        if settings.trainer == "megatron" and self.trainer_gpus > 1:
            split = settings.trainer_tensor_parallel * settings.trainer_pipeline_parallel
            step_s += 2 * BF16 * parameters / split / self._between_trainers()  # gradients, weights
        bubble = self._bubble(tokens)
        return {
            f"{prefix}_base_s": settings.mini_batches * step_s,
            f"{prefix}_per_token_s": token_s * bubble,
            f"{prefix}_per_token_context_s": pair_s * bubble,
        }

    def _forward(self, prefix: str, *, logits: bool) -> dict[str, float]:
        token_s, pair_s = self._pass_s(1.0, 1.0, logits=logits)
        return {f"{prefix}_per_token_s": token_s, f"{prefix}_per_token_context_s": pair_s}

    def weight_sync_s(self) -> float:
        """Every GPU of every engine receives its share of the policy, over the slowest way there is."""
        if self.settings.weight_sync_s is not None:
            return self.settings.weight_sync_s
        size = self.model.parameters * self.settings.weight_bytes / self.tensor_parallel
        if max(self.trainer_gpus, self.engines * self.tensor_parallel) <= self.gpu.gpus_per_node:
            way = self.gpu.link_bytes_per_s
            return size / (way / 2 * self.efficiency.link) if way else 0.0
        way = self.gpu.need("network_bytes_per_s", "sending weights to other nodes")
        return size / (way * self.efficiency.network)

    def phases(self, tokens: float) -> AffineCostSettings:
        """Costs of the training phases. tokens: that a step processes, roughly (for a pipeline's bubble)."""
        settings = self.settings
        kept = {name: getattr(settings, name) for name in Occasions.model_fields}
        costs = {
            **kept, "reward_base_s": settings.reward_base_s, "reward_per_row_s": settings.reward_per_row_s,
            "reward_workers": settings.reward_workers, "switch_s": settings.switch_s,
        }  # fmt: skip
        if not self.trainer_gpus:
            return AffineCostSettings(**costs)
        costs |= {"weight_sync_s": self.weight_sync_s(), **self._update("policy_update", tokens, logits=True)}
        if settings.recompute_log_probs:
            costs |= self._forward("logprob_forward", logits=True)
        if settings.reference_model:
            costs |= self._forward("reference_forward", logits=True)
        if settings.value_model:
            costs |= self._forward("value_forward", logits=False)
            costs |= self._update("value_update", tokens, logits=False)
        return AffineCostSettings(**costs)
