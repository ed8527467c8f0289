"""The ways to run: GPUs x schedule x tensor parallelism, each as an experiment, or with the reason why not."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from profiling.errors import ConfigError
from profiling.model_memory import USABLE, Engine, needs_by_phase
from simulator.analytic import AnalyticCosts
from simulator.cost_settings import AnalyticCostSettings
from simulator.experiment import Experiment, load_experiment
from simulator.hardware import Gpu, load_gpu
from simulator.hardware.efficiency import load_efficiency
from simulator.memory import Memory
from simulator.models import Model, load_model
from simulator.plan.question import Question

MEASURED_STEPS = 2
"""Simulated beyond start-up; twice as many for schedules that train beside the rollout."""
ROWS_TO_MEASURE = 1000
"""More steps are simulated until so many rows have been started in them, up to:"""
MOST_STEPS = 40
LONG_ROWS_THAT_FIT = 8
MOST_OF_A_GPU, LEAST_OF_A_GPU = 0.9, 0.01
"""Of its memory, that an engine takes where nothing is said."""
REMEDIES = (
    "train on more GPUs, or lower --logit-tokens or --max-response-tokens",
    "take more GPUs, or lower --memory-utilization, and under torch --max-rows-per-engine",
    "split an engine over more GPUs",
)
"""Of training, of rollout, and within an engine's share."""
FAR = 2.0
"""Beyond this many times of what the factors were fitted on is far outside."""


@dataclass(frozen=True)
class Option:
    """One row of the answer. `fault`: why it cannot be run; then there is no experiment."""

    gpus: int
    schedule: str
    label: str
    tensor_parallel: int
    window: int | None = None
    experiment: Experiment | None = None
    fault: str | None = None
    headroom_bytes: float | None = None
    """Of a GPU, in the phase that leaves least."""
    tightest: str = ""
    needs: dict[str, dict[str, float]] | None = None
    """Bytes of each GPU: rollout, training -> part."""


def options_of(question: Question) -> list[Option]:
    """Every combination. Raises ConfigError when none can be run, or when it is far outside of what is known."""
    model, gpu = load_model(question.model), load_gpu(question.gpu)
    refuse_what_is_far_outside(question, gpu)
    found = [
        option
        for gpus in dict.fromkeys(question.gpus)
        for size in dict.fromkeys(question.tensor_parallel or (fewest_gpus_of_an_engine(question, model, gpu, gpus),))
        for option in _with(question, gpu, gpus, size)
    ]
    if all(option.fault for option in found):
        raise ConfigError(
            f"no option can be run; the first: {found[0].label} on {found[0].gpus} GPUs: {found[0].fault}"
        )
    return found


def fewest_gpus_of_an_engine(question: Question, model: Model, gpu: Gpu, gpus: int) -> int:
    """Of engines on the `gpus` GPUs that train. Raises ConfigError when not even a whole node holds the model."""
    if question.engine == "torch":
        return 1
    fault, fits = "no number of GPUs divides its heads", 0
    for share in (share_of(question, gpu, gpus), MOST_OF_A_GPU):  # where training leaves too little, training says so
        for size in range(1, gpu.gpus_per_node + 1):
            try:
                costs = AnalyticCosts(_cost(question, size, share), engine_gpus=size, trainer_gpus=0, engines=1)
                if costs.kv_tokens(question.row_tokens) >= LONG_ROWS_THAT_FIT * question.row_tokens:
                    return size
                fits = size  # a few rows at a time
            except ConfigError as error:
                if "divide" not in str(error) and "divisor" not in str(error):
                    fault = str(error)
        if fits:
            return fits
    raise ConfigError(fault)


def share_of(question: Question, gpu: Gpu, trainers: int) -> float:
    """Of a GPU's memory, for an engine: what was said, or what the training on the same GPUs leaves (trainers; 0: they
    are elsewhere)."""
    if question.memory_utilization is not None:
        return question.memory_utilization
    if not trainers or question.engine == "torch":
        return MOST_OF_A_GPU
    costs = AnalyticCosts(_cost(question, 1, MOST_OF_A_GPU), engine_gpus=1, trainer_gpus=trainers, engines=1)
    phases = needs_by_phase(
        costs.training_memory(question.row_tokens).needs, costs.sizes,
        Engine(share_bytes=0.0, released=question.release_memory, sent=trainers > 1),
    )  # fmt: skip
    taken = [sum(phases[phase].values()) for phase in ("rollout", "training")[: 1 if question.release_memory else 2]]
    return max(LEAST_OF_A_GPU, min(MOST_OF_A_GPU, USABLE - max(taken) / gpu.memory_bytes))


def memories_of(question: Question, costs: AnalyticCosts, engines: int, *, apart: bool) -> list[Memory]:
    """Of training, of rollout, and within the share of an engine that takes one."""
    own, gpu = question.engine == "torch", costs.gpu
    rows = question.max_rows_per_engine or -(-question.rows_per_step // engines)
    caches = 2 if question.evaluation_every and not question.release_memory else 1  # evaluations have their own
    engine = Engine(
        share_bytes=None if own else costs.settings.memory_utilization * gpu.memory_bytes,
        cache_tokens=caches * rows * question.row_tokens, released=question.release_memory,
        sent=not own and costs.trainer_gpus > 1, apart=apart,
    )  # fmt: skip
    phases = needs_by_phase(costs.training_memory(question.row_tokens).needs, costs.sizes, engine)
    found = [Memory(phase, phases[phase], gpu.memory_bytes * USABLE) for phase in ("training", "rollout")]
    return found if own else [*found, costs.rollout_memory(question.row_tokens)]


def refuse_what_is_far_outside(question: Question, gpu: Gpu) -> None:
    factors, borrowed = load_efficiency(gpu.family, question.factors_of, question.efficiency)
    row = question.prompt_tokens + question.max_response_tokens
    reasons = []
    if borrowed:
        reasons.append(f"no efficiency factors of family '{gpu.family}' (those of '{borrowed}' would be borrowed)")
    if row > FAR * factors.fitted_context:
        reasons.append(f"rows of {row} tokens, fitted up to {factors.fitted_context}")
    if reasons and not question.extrapolate:
        raise ConfigError(f"far outside of what the costs were fitted on: {'; '.join(reasons)}; --extrapolate answers "
                          "all the same, with wider intervals")  # fmt: skip


def _cost(question: Question, size: int, share: float) -> AnalyticCostSettings:
    mean_s, last_s = question.reward_s()
    return AnalyticCostSettings(
        kind="analytic", model=question.model, gpu=question.gpu, tensor_parallel=size, engine=question.factors_of,
        expert_parallel=question.expert_parallel, memory_utilization=share, cpu_offload=question.cpu_offload,
        micro_batch_tokens=question.micro_batch_tokens, logit_tokens=question.logit_tokens,
        reference_model=question.reference_model,
        value_model=question.value_model, mini_batches=question.mini_batches, recompute=question.recompute,
        trainer=question.trainer, efficiency=question.efficiency, reward_base_s=last_s, reward_per_row_s=mean_s,
        reward_workers=question.reward_workers, weight_sync_s=question.weight_sync_s, switch_s=question.switch_s,
    )  # fmt: skip


def _schedules(question: Question) -> Iterator[tuple[str, str, dict[str, Any], int | None]]:
    """(name, label, settings, window), the synchronous one first."""
    yield "synchronous", "synchronous", {"kind": "synchronous"}, None
    if "truncated" in question.schedules:
        for window in question.window_list:
            yield "truncated", f"truncated {window}", {"kind": "truncated", "window": window}, window
    if "oversample" in question.schedules:
        for factor in question.factors:
            yield "oversample", f"oversample {factor:g}", {"kind": "oversample", "factor": factor}, None
    if "asynchronous" in question.schedules:
        yield "asynchronous", "one step off", {"kind": "asynchronous"}, None
    if "in_flight" in question.schedules:
        yield "in_flight", "in flight", {"kind": "asynchronous", "in_flight_update": True}, None


def _with(question: Question, gpu: Gpu, gpus: int, size: int) -> Iterator[Option]:
    for name, label, schedule, window in _schedules(question):
        beside = name in ("asynchronous", "in_flight")
        trainers = 0
        if beside:
            trainers = min(max(round(gpus * question.trainer_share / size) * size, size), gpus - size)
        engines = (gpus - trainers) // size
        own = Option(gpus, name, label, size, window)
        if engines < 1 or (beside and trainers < 1) or (gpus - trainers) % size:
            fault = f"{gpus} GPUs do not divide into engines of {size}"
            if beside and gpus <= size:
                fault = f"rollout and training need GPUs of their own: at least {2 * size}"
            yield Option(**{**vars(own), "fault": fault})
            continue
        cluster: dict[str, Any] = {"engines": engines, "gpus_per_engine": size, "prefix_reuse": False}
        if beside:
            cluster |= {"trainer": "separate", "trainer_gpus": trainers}
        if question.max_rows_per_engine is not None:
            cluster["max_rows_per_engine"] = question.max_rows_per_engine
        try:
            cost = _cost(question, size, share_of(question, gpu, 0 if beside else gpus))
            costs = AnalyticCosts(cost, engine_gpus=size, trainer_gpus=trainers or gpus, engines=engines)
            memories = memories_of(question, costs, engines, apart=beside)
            given = question.engine == "torch" or question.memory_utilization is not None
            counted = memories if given else [memories[0], *memories[2:]]  # a share that is not given takes the rest
            tightest = min(counted, key=lambda memory: memory.headroom)
            own = Option(**{**vars(own), "headroom_bytes": tightest.headroom, "tightest": tightest.phase,
                            "needs": {memory.phase: memory.needs for memory in memories[1::-1]}})  # fmt: skip
            values = {
                "workload": {
                    "steps": 1, "prompts_per_step": question.prompts_per_step,
                    "samples_per_prompt": question.samples_per_prompt, "prompt_tokens": question.prompt_tokens,
                    "max_response_tokens": question.max_response_tokens, "seed": question.seed,
                    "response_tokens": question.response_tokens(),
                },
                "schedule": schedule, "cluster": cluster, "cost": cost.model_dump(mode="json"),
            }  # fmt: skip
            first = load_experiment(values)
            for memory, remedy in zip(memories, REMEDIES, strict=False):
                memory.check(gpu, remedy)
            measured = max(MEASURED_STEPS, min(MOST_STEPS, -(-ROWS_TO_MEASURE // question.rows_per_step)))
            steps = first.startup_steps + measured * (2 if beside else 1)
            yield Option(**{**vars(own), "experiment": load_experiment(values, {"workload.steps": steps})})
        except ConfigError as error:
            yield Option(**{**vars(own), "fault": str(error).removeprefix("experiment: ")})
