"""`tppo train CONFIG --check`: does the run fit its GPUs? Its modules, built without weights, beside `tppo plan`."""

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from profiling.console import table_console
from profiling.errors import ConfigError
from profiling.files import read_json_table
from simulator.analytic import TRAINING_USABLE, AnalyticCosts
from simulator.cost_settings import AnalyticCostSettings
from simulator.hardware import Gpu, load_gpu
from simulator.models.shape import bundled_config, bundled_names
from tppo.config import RunConfig

TOLERANCE = 0.02
"""By which the modules and `tppo plan` may differ in what both count: weights, gradients, moments and the KV cache."""
GB = 1e9


@dataclass(frozen=True)
class Part:
    """Of one GPU's memory, in bytes. plan: what `tppo plan` says; None where it counts nothing of the kind."""

    name: str
    built: float
    plan: float | None
    compared: bool
    """Both count the same. Else the plan estimates, and the modules decide."""
    phases: tuple[str, ...]
    """rollout, training"""


def run_check(config: RunConfig, *, gpu: str | None, gpus: int, where: str) -> None:
    """Print the table. Raises ConfigError when the run does not fit, or the modules and the plan disagree."""
    if gpu is None:
        raise ConfigError("--check: name the GPU, --gpu H100-SXM, and how many, --gpus 8")
    if not 1 <= gpus <= config.rows_per_step:
        raise ConfigError(f"--gpus {gpus}: must lie between 1 and the {config.rows_per_step} rows of a step")
    trainers = gpus_that_train(config, gpus)
    if trainers % config.parallel.replicas:
        raise ConfigError(f"--gpus {gpus}: does not divide into parallel.replicas = {config.parallel.replicas}")
    card = load_gpu(gpu)
    parts = parts_of(config, card, gpu, gpus)
    console = table_console()
    console.print(table_of(parts, f"{where}: each of {gpus} {card.name}, GB"))
    for part in parts:
        if part.compared and part.plan is not None and abs(part.built - part.plan) > TOLERANCE * part.plan:
            raise ConfigError(
                f"{where}: {part.name}: the modules have {part.built / GB:.2f} GB, tppo plan says "
                f"{part.plan / GB:.2f}: more than {TOLERANCE:.0%} apart; report it"
            )
    for phase in ("rollout", "training"):
        needed, usable = sum(p.built for p in parts if phase in p.phases), TRAINING_USABLE * card.memory_bytes
        if needed > usable:
            raise ConfigError(
                f"{where}: {phase} needs {needed / GB:.1f} GB of each {card.name}, and {usable / GB:.1f} are usable; "
                "take more GPUs, or lower rollout.max_rows_per_engine, train.micro_batch_tokens or "
                "rollout.max_response_tokens"
            )
        console.print(f"{phase}: {needed / GB:.1f} of {usable / GB:.1f} GB", highlight=False)


def gpus_that_train(config: RunConfig, gpus: int) -> int:
    """Of all GPUs: ranks of torchrun. Raises ConfigError when engines on a Ray cluster leave none, or others."""
    ray = config.ray
    if not ray.address and config.rollout.engine == "vllm" and gpus != config.gpus_per_engine:
        raise ConfigError(
            f"--gpus {gpus}: without --ray, vLLM is one engine of {config.gpus_per_engine} GPUs in a process that "
            f"trains on one of them; take --gpus {config.gpus_per_engine}, or engines on a cluster"
        )
    if not ray.address:
        return 1 if config.rollout.engine == "vllm" else gpus
    engines = ray.engines * config.gpus_per_engine
    if ray.layout == "colocated" and engines != gpus:
        raise ConfigError(
            f"--gpus {gpus}: colocated, {ray.engines} engines of {config.gpus_per_engine} must be on the GPUs that "
            f"train; set ray.engines = {max(1, gpus // config.gpus_per_engine)}, or --gpus {engines}"
        )
    if ray.layout == "separate" and engines >= gpus:
        raise ConfigError(
            f"--gpus {gpus}: {ray.engines} separate engines of {config.gpus_per_engine} leave none to train on; take "
            "more GPUs, or lower ray.engines"
        )
    return gpus if ray.layout == "colocated" else gpus - engines


def config_json_of(path: str) -> Path:
    """A local model's, or the bundled one of the hub model's name. Raises ConfigError."""
    local = Path(path) / "config.json"
    if local.exists():
        return local
    bundled = bundled_config(path)
    if bundled is not None:
        return bundled
    raise ConfigError(
        f"model.path = {path!r}: --check needs its config.json, here or among the bundled ones: "
        f"{', '.join(bundled_names())}"
    )


def parts_of(config: RunConfig, card: Gpu, gpu: str, gpus: int) -> list[Part]:
    from tppo.models import memory
    from tppo.start import schedule_of, slots_of

    source = config_json_of(config.model.path)
    values = read_json_table(source)
    built, prompt = memory.build(values, config), prompt_tokens_of(config)
    shards = gpus_that_train(config, gpus) // config.parallel.replicas
    on_ray, of_an_engine = config.ray.address != "", config.gpus_per_engine
    engines = config.ray.engines if on_ray else 1 if config.rollout.engine == "vllm" else gpus
    row_tokens, rows = prompt + config.rollout.max_response_tokens, slots_of(config, schedule_of(config), engines)
    tokens, picked = memory.tokens_of_a_pass(config, prompt)
    checkpointed = config.model.activation_checkpointing
    plan = AnalyticCosts(
        AnalyticCostSettings(
            kind="analytic", model=str(source), gpu=gpu, tensor_parallel=of_an_engine,
            value_model=built.value_model is not None, reference_model=bool(config.algorithm.kl_coef),
            micro_batch_tokens=tokens, recompute="full" if checkpointed else "none",
        ),
        engine_gpus=of_an_engine, trainer_gpus=shards, engines=engines,
    )  # fmt: skip
    activations = memory.activation_bytes(built.policy, tokens, checkpointed=checkpointed)
    training, rollout = plan.training_memory().needs, plan.rollout_memory(row_tokens).needs
    # The plan knows no adapters, averages, offloading, float32 references, and no value model of other sizes.
    states_alike = not (
        config.value.path or config.model.lora_rank or config.parallel.cpu_offload or config.algorithm.kl_coef
        or config.algorithm.name == "ppo-ewma"
    )  # fmt: skip
    apart = on_ray and config.ray.layout == "separate"
    trains: tuple[str, ...] = ("training",) if apart else ("rollout", "training")
    always: tuple[str, ...] = ("rollout",) if apart else ("rollout", "training")
    resting = ("rollout",) if config.rollout.release_memory else always
    if config.rollout.engine == "vllm":
        share = config.vllm.gpu_memory_utilization * card.memory_bytes
        if share < sum(rollout.values()):
            raise ConfigError(
                f"vllm.gpu_memory_utilization = {config.vllm.gpu_memory_utilization:g}: {share / GB:.1f} GB of a "
                f"{card.name} do not hold an engine's part of the weights and the cache of one row, "
                f"{sum(rollout.values()) / GB:.1f} GB; raise it, or vllm.tensor_parallel"
            )
        engine = [Part("vLLM: vllm.gpu_memory_utilization", share, None, False, resting)]
    else:
        cache = memory.cache_bytes(built.policy, config, rows, row_tokens)
        weights = memory.engine_weight_bytes(built.policy, config)
        both = 1 if config.rollout.release_memory or not config.evaluation.every or on_ray else 2
        engine = [
            Part("engine's weights", weights, rollout["weights"], config.rollout.dtype != "float32", always),
            Part(f"KV cache, {rows} rows of {row_tokens}", both * cache,
                 both * rows * rollout["cache of the longest row"], config.rollout.dtype != "float32",
                 resting),
        ]  # fmt: skip
    if on_ray:
        largest = max(p.numel() for p in built.policy.parameters()) * memory.FP32
        engine.append(Part("a weight on its way to engines", largest, None, False, trains[:1]))
    return [
        Part("weights, gradients, moments", memory.state_bytes(built, config, shards),
             training["weights, gradients and optimizer"], states_alike, trains),
        *engine,
        Part("gathered shards", memory.gathered_bytes(built.policy), training["two gathered layers"], False,
             ("training",)),
        Part(f"activations of {tokens} tokens", activations, training["activations"], False, ("training",)),
        Part(f"logits of {picked} tokens", picked * plan.model.vocabulary * memory.LOGIT, training["logits"], False,
             ("training",)),
    ]  # fmt: skip


def prompt_tokens_of(config: RunConfig) -> int:
    """The longest prompt that the settings let through."""
    from tppo.data.tasks import arithmetic_task

    data = config.data
    return data.max_prompt_tokens if data.task == "dataset" else arithmetic_task(config).max_prompt_tokens


def table_of(parts: list[Part], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("", "modules", "tppo plan", "difference", "in"):
        table.add_column(name, justify="left" if name in ("", "in") else "right")
    for part in parts:
        difference = "plan estimates"
        if part.plan is None:
            difference = "-"
        elif part.compared:
            difference = f"{part.built / part.plan - 1:+.2%}"
        table.add_row(
            part.name, f"{part.built / GB:.2f}", "-" if part.plan is None else f"{part.plan / GB:.2f}", difference,
            " and ".join(part.phases),
        )  # fmt: skip
    return table
