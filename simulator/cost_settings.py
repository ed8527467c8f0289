"""How an experiment says what work costs. A field's docstring is its help; a cost that is left out is 0."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from profiling.settings import Settings


class Occasions(Settings):
    """What happens now and then, whatever the work costs. Seconds."""

    evaluation_s: NonNegativeFloat = 0.0
    evaluation_every: NonNegativeInt = 0
    """Steps between evaluations; 0: none."""
    checkpoint_s: NonNegativeFloat = 0.0
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: none."""
    mtbf_hours: PositiveFloat | None = None
    """Mean hours of running between two failures of the cluster; left out: none fails."""
    restart_s: NonNegativeFloat = 0.0
    """From a failure to running again, from the last checkpoint."""


class AffineCostSettings(Occasions):
    """Seconds. A decode step: base + per_row x rows + per_context_token x total context."""

    kind: Literal["affine"] = "affine"
    decode_base_s: NonNegativeFloat = 0.0
    """Of every decode step."""
    decode_per_row_s: NonNegativeFloat = 0.0
    """Per running row and decode step."""
    decode_per_context_token_s: NonNegativeFloat = 0.0
    """Per token of context (prompt + generated so far, summed over running rows) and decode step."""
    prefill_base_s: NonNegativeFloat = 0.0
    """Of every prefill, however many rows it admits."""
    prefill_per_token_s: NonNegativeFloat = 0.0
    """Per uncached token."""
    prefill_per_token_context_s: NonNegativeFloat = 0.0
    """Per attended pair of tokens."""
    reward_base_s: NonNegativeFloat = 0.0
    reward_per_row_s: NonNegativeFloat = 0.0
    """Per finished row, divided among reward_workers."""
    reward_workers: PositiveInt = 1
    """Rows graded at the same time."""
    logprob_forward_base_s: NonNegativeFloat = 0.0
    logprob_forward_per_token_s: NonNegativeFloat = 0.0
    """Per processed token (context before + tokens of the step)."""
    logprob_forward_per_token_context_s: NonNegativeFloat = 0.0
    """Per attended pair: n (n + 1) / 2 for a row of n processed tokens."""
    reference_forward_base_s: NonNegativeFloat = 0.0
    reference_forward_per_token_s: NonNegativeFloat = 0.0
    reference_forward_per_token_context_s: NonNegativeFloat = 0.0
    value_forward_base_s: NonNegativeFloat = 0.0
    value_forward_per_token_s: NonNegativeFloat = 0.0
    value_forward_per_token_context_s: NonNegativeFloat = 0.0
    value_update_base_s: NonNegativeFloat = 0.0
    """Of a step in which a row finished."""
    value_update_per_token_s: NonNegativeFloat = 0.0
    """Per token of the rows that finished in the step."""
    value_update_per_token_context_s: NonNegativeFloat = 0.0
    policy_update_base_s: NonNegativeFloat = 0.0
    policy_update_per_token_s: NonNegativeFloat = 0.0
    policy_update_per_token_context_s: NonNegativeFloat = 0.0
    weight_sync_s: NonNegativeFloat = 0.0
    switch_s: NonNegativeFloat = 0.0
    """Colocated: from engine to trainer and back, each."""
    rollout_other_s: NonNegativeFloat = 0.0
    """Of a rollout, outside prefills and decodes: the host's own work."""
    step_other_s: NonNegativeFloat = 0.0
    """Of a step, outside every phase."""


class CalibratedCostSettings(Occasions):
    kind: Literal["calibrated"]
    file: Path
    """calibration.json of `tppo calibrate`, relative to the experiment file."""


class AnalyticCostSettings(Occasions):
    """Costs from a model's config.json, a GPU's data sheet and efficiency factors (simulator/hardware)."""

    kind: Literal["analytic"]
    model: str
    """A bundled name, or a config.json (or its folder) relative to the experiment file."""
    gpu: str
    """A bundled name, or a TOML file relative to the experiment file."""
    tensor_parallel: PositiveInt | None = None
    """GPUs that an engine's weights are split over; left out: all of cluster.gpus_per_engine."""
    expert_parallel: bool = False
    """An engine's GPUs hold whole experts, so that the busiest holds up the others, instead of a slice of each."""
    engine: Literal["vllm", "sglang", "trtllm"] = "vllm"
    """Whose efficiency factors."""
    efficiency: Path | None = None
    """A file of one's own factors, relative to the experiment file."""
    peaks_only: bool = False
    """A pure roofline: every efficiency 1, every overhead 0; optimistic by 1.3 to 3.6 times."""
    weight_bytes: float = Field(2.0, ge=0.5, le=4)
    """Of a parameter in the rollout engines: 2 for bf16, 1 for fp8."""
    kv_bytes: float = Field(2.0, ge=0.5, le=4)
    """Of a cached number."""
    memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of a GPU's memory that an engine may use."""
    trainer: Literal["fsdp", "megatron"] = "fsdp"
    """fsdp: parameters are gathered for every micro-batch. megatron: they stay, split by trainer_tensor_parallel."""
    trainer_tensor_parallel: PositiveInt = 1
    trainer_pipeline_parallel: PositiveInt = 1
    recompute: Literal["full", "none"] = "full"
    """full: activations are computed again in the backward pass."""
    value_model: bool = True
    """A value model with the policy's backbone, as PPO and T-PPO have it."""
    reference_model: bool = False
    """Log-probs of a frozen reference, for a KL penalty."""
    recompute_log_probs: bool = True
    """The trainer computes the log-probs of the rollout's policy; else the engine's are used."""
    mini_batches: PositiveInt = 16
    """Optimizer steps per step and model."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens that one GPU passes forward and backward at once; a longer row makes a pass of its own."""
    logit_tokens: PositiveInt = 4096
    """Tokens whose logits a pass holds at once."""
    cpu_offload: bool = False
    """Weights, gradients and moments are on the CPU between passes."""
    reward_base_s: NonNegativeFloat = 0.0
    reward_per_row_s: NonNegativeFloat = 0.0
    reward_workers: PositiveInt = 1
    weight_sync_s: NonNegativeFloat | None = None
    """Left out: the policy's bytes over the network to every engine."""
    switch_s: NonNegativeFloat = 0.0
    """Colocated: from engine to trainer and back, each (offloading, waking up)."""

    def replicas(self, gpus: int) -> int:
        """Groups of the training GPUs that each pass their share of a batch, all of them in every mini-batch."""
        return gpus // (self.trainer_tensor_parallel * self.trainer_pipeline_parallel)


CostSettings = AffineCostSettings | CalibratedCostSettings | AnalyticCostSettings
