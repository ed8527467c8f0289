"""`tppo train CONFIG --check`: does the run fit its GPUs? Its modules, built without weights, beside `tppo plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from profiling.console import plain_table, table_console
from profiling.errors import ConfigError
from profiling.files import read_json_table
from profiling.model_memory import (
    ACTIVATIONS,
    BF16,
    CACHE,
    FP32,
    LOGITS,
    STATES,
    USABLE,
    WEIGHTS,
    Engine,
    Pass,
    Sizes,
    needs_by_phase,
    training_needs,
)
from simulator.analytic import AnalyticCosts
from simulator.cost_settings import AnalyticCostSettings
from simulator.hardware import Gpu, load_gpu
from simulator.memory import sizes_of
from simulator.models import load_model
from simulator.models.shape import bundled_config, bundled_names
from tppo.config import RunConfig

TOLERANCE = 0.02
"""By which the modules and `tppo plan` may differ in weights, gradients, moments and the KV cache."""
GB = 1e9
BOTH = "a lower train.micro_batch_tokens together with rollout.window"
"""Where one is as large as the other, neither helps alone."""
PHASES = ("rollout", "training")


@dataclass(frozen=True)
class Part:
    """Of one GPU's memory, in bytes. plan: what `tppo plan` says; None for models that it does not know."""

    name: str
    built: float
    plan: float | None
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
    sizes, plan = built_sizes(config), plan_sizes(config)
    check_an_engine_fits(config, card, gpu)
    phases, usable = phases_of(sizes, config, card, gpus), USABLE * card.memory_bytes
    parts = parts_of(sizes, plan, config, card, gpus)
    console = table_console()
    console.print(table_of(parts, f"{where}: each of {gpus} {card.name}, GB"))
    for part in parts:
        same = part.name.startswith((STATES, WEIGHTS, CACHE))
        if same and part.plan is not None and abs(part.built - part.plan) > TOLERANCE * part.plan:
            raise ConfigError(
                f"{where}: {part.name}: the modules have {part.built / GB:.2f} GB, tppo plan says "
                f"{part.plan / GB:.2f}: more than {TOLERANCE:.0%} apart; report it"
            )
    for phase in PHASES:
        needed = sum(phases[phase].values())
        if needed > usable:
            remedies = remedies_of(sizes, config, card, gpus, phase)
            raise ConfigError(
                f"{where}: {phase} needs {needed / GB:.1f} GB of each {card.name}, and {usable / GB:.1f} are usable; "
                + (f"what lowers it: {', '.join(remedies)}" if remedies else "take larger GPUs")
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


def built_sizes(config: RunConfig) -> Sizes:
    from tppo.models import memory

    return memory.sizes_of(memory.build(read_json_table(config_json_of(config.model.path)), config), config)


def plan_sizes(config: RunConfig) -> Sizes | None:
    """By `tppo plan`'s formulas; None for what they do not know: adapters, averages, value models of other sizes."""
    from tppo.algorithms.recipes import RECIPES

    recipe, model = RECIPES[config.algorithm.name], load_model(config_json_of(config.model.path))
    if config.value.path or config.model.lora_rank or recipe.proximal == "ewma":
        return None
    return sizes_of(model, value_model=recipe.has_value_model, reference_model=bool(config.algorithm.kl_coef))


def phases_of(sizes: Sizes, config: RunConfig, card: Gpu, gpus: int) -> dict[str, dict[str, float]]:
    """Bytes of each GPU: rollout, training -> part."""
    from tppo.models.memory import tokens_of_a_pass

    prompt, ray, rollout = prompt_tokens_of(config), config.ray, config.rollout
    tokens, logit_tokens = tokens_of_a_pass(config, prompt)
    own_pass = Pass(
        shards=gpus_that_train(config, gpus) // config.parallel.replicas, tokens=tokens, logit_tokens=logit_tokens,
        checkpointed=config.model.activation_checkpointing, cpu_offload=config.parallel.cpu_offload,
    )  # fmt: skip
    on_ray, rows = ray.address != "", rows_of_an_engine(config, gpus)
    # Beside training's cache, evaluations have one of their own.
    caches = 1 if rollout.release_memory or not config.evaluation.every or on_ray else 2
    engine = Engine(
        share_bytes=config.vllm.gpu_memory_utilization * card.memory_bytes if rollout.engine == "vllm" else None,
        weight_bytes=FP32 if rollout.dtype == "float32" else BF16,
        cache_tokens=caches * rows * (prompt + rollout.max_response_tokens), released=rollout.release_memory,
        sent=on_ray, apart=on_ray and ray.layout == "separate",
    )  # fmt: skip
    return needs_by_phase(training_needs(sizes, own_pass), sizes, engine)


def check_an_engine_fits(config: RunConfig, card: Gpu, gpu: str) -> None:
    """Raises ConfigError when vLLM's share does not hold its part of the weights and one row's cache."""
    if config.rollout.engine != "vllm":
        return
    size, share = config.gpus_per_engine, config.vllm.gpu_memory_utilization * card.memory_bytes
    model = str(config_json_of(config.model.path))
    settings = AnalyticCostSettings(kind="analytic", model=model, gpu=gpu, tensor_parallel=size)
    plan = AnalyticCosts(settings, engine_gpus=size, trainer_gpus=1, engines=1)
    needs = sum(plan.rollout_memory(prompt_tokens_of(config) + config.rollout.max_response_tokens).needs.values())
    if share < needs:
        raise ConfigError(
            f"vllm.gpu_memory_utilization = {config.vllm.gpu_memory_utilization:g}: {share / GB:.1f} GB of a "
            f"{card.name} do not hold an engine's part of the weights and the cache of one row, "
            f"{needs / GB:.1f} GB; raise it, or vllm.tensor_parallel"
        )


def remedies_of(sizes: Sizes, config: RunConfig, card: Gpu, gpus: int, phase: str) -> list[str]:
    """What makes the phase's memory smaller, found by trying."""
    needed = sum(phases_of(sizes, config, card, gpus)[phase].values())
    rollout, train, ray = config.rollout, config.train, config.ray
    cluster = {"engines": 2 * ray.engines} if ray.layout == "colocated" else {}
    smaller_pass = {"micro_batch_tokens": max(1, train.micro_batch_tokens // 2)}
    smaller_window = {"window": max(1, rollout.window // 2)}
    found: list[str] = []
    tried: list[tuple[str, int, dict[str, dict[str, Any]]]] = [
        ("rollout.release_memory = true", gpus, {"rollout": {"release_memory": True}}),
        ("model.activation_checkpointing = true", gpus, {"model": {"activation_checkpointing": True}}),
        ("a lower vllm.gpu_memory_utilization", gpus,
         {"vllm": {"gpu_memory_utilization": config.vllm.gpu_memory_utilization / 2}}),
        ("a lower rollout.max_rows_per_engine", gpus, {"rollout": {"max_rows_per_engine": 1}}),
        ("a lower train.micro_batch_tokens", gpus, {"train": smaller_pass}),
        ("a lower rollout.window", gpus, {"rollout": smaller_window}),
        (BOTH, gpus, {"train": smaller_pass, "rollout": smaller_window}),
        ("a lower rollout.max_response_tokens", gpus,
         {"rollout": {"max_response_tokens": max(1, rollout.max_response_tokens // 2)}}),
        ("more GPUs", 2 * gpus, {"ray": cluster} if ray.address else {}),
        ("parallel.cpu_offload = true", gpus, {"parallel": {"cpu_offload": gpus_that_train(config, gpus) > 1}}),
    ]  # fmt: skip
    for name, many, sections in tried:
        changes = {at: getattr(config, at).model_copy(update=values) for at, values in sections.items()}
        if many > gpus and rollout.engine == "vllm" and not ray.address:
            continue  # one engine, in a process that trains on one GPU
        if sum(phases_of(sizes, config.model_copy(update=changes), card, many)[phase].values()) < needed:
            found.append(name)
    alone = {"a lower train.micro_batch_tokens", "a lower rollout.window"} & set(found)
    return [name for name in found if not (name == BOTH and alone)]


def parts_of(sizes: Sizes, plan: Sizes | None, config: RunConfig, card: Gpu, gpus: int) -> list[Part]:
    from tppo.models.memory import tokens_of_a_pass

    built = phases_of(sizes, config, card, gpus)
    said = phases_of(plan, config, card, gpus) if plan else {phase: {} for phase in PHASES}
    prompt = prompt_tokens_of(config)
    tokens, logit_tokens = tokens_of_a_pass(config, prompt)
    about = {
        ACTIVATIONS: f" of {tokens} tokens", LOGITS: f" of {logit_tokens} tokens",
        CACHE: f", {rows_of_an_engine(config, gpus)} rows of {prompt + config.rollout.max_response_tokens}",
    }  # fmt: skip
    found = []
    for name in dict.fromkeys([*built["rollout"], *built["training"]]):
        phases = tuple(phase for phase in PHASES if name in built[phase])
        found.append(Part(name + about.get(name, ""), built[phases[0]][name], said[phases[0]].get(name), phases))
    return found


def rows_of_an_engine(config: RunConfig, gpus: int) -> int:
    """That run at once."""
    from tppo.start import schedule_of, slots_of

    engines = 1 if config.rollout.engine == "vllm" else gpus
    return slots_of(config, schedule_of(config), config.ray.engines if config.ray.address else engines)


def prompt_tokens_of(config: RunConfig) -> int:
    """The longest prompt that the settings let through."""
    from tppo.data.tasks import arithmetic_task

    data = config.data
    return data.max_prompt_tokens if data.task == "dataset" else arithmetic_task(config).max_prompt_tokens


def table_of(parts: list[Part], title: str) -> Table:
    table = plain_table(title, "", "modules", "tppo plan", "difference", "in", left=("", "in"))
    for part in parts:
        said = "-" if part.plan is None else f"{part.plan / GB:.2f}"
        difference = f"{part.built / part.plan - 1:+.2%}" if part.plan else "-"
        table.add_row(part.name, f"{part.built / GB:.2f}", said, difference, " and ".join(part.phases))
    return table
