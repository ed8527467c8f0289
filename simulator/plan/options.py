"""The ways to run: GPUs x schedule x tensor parallelism, each as an experiment, or with the reason why not."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from profiling.errors import ConfigError
from simulator.analytic import AnalyticCosts
from simulator.cost_settings import AnalyticCostSettings
from simulator.experiment import Experiment, load_experiment
from simulator.hardware import Gpu, load_gpu
from simulator.hardware.efficiency import load_efficiency
from simulator.models import Model, load_model
from simulator.plan.question import Question

MEASURED_STEPS = 2
"""Simulated beyond start-up; twice as many for schedules that train beside the rollout."""
ROWS_TO_MEASURE = 1000
"""More steps are simulated until so many rows have been started in them, up to:"""
MOST_STEPS = 40
LONG_ROWS_THAT_FIT = 8
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


def options_of(question: Question) -> list[Option]:
    """Every combination. Raises ConfigError when none can be run, or when it is far outside of what is known."""
    model, gpu = load_model(question.model), load_gpu(question.gpu)
    refuse_what_is_far_outside(question, gpu)
    sizes = question.tensor_parallel or (fewest_gpus_of_an_engine(question, model, gpu),)
    found = [
        option
        for gpus, size in itertools.product(dict.fromkeys(question.gpus), dict.fromkeys(sizes))
        for option in _with(question, gpu, gpus, size)
    ]
    if all(option.fault for option in found):
        raise ConfigError(
            f"no option can be run; the first: {found[0].label} on {found[0].gpus} GPUs: {found[0].fault}"
        )
    return found


def fewest_gpus_of_an_engine(question: Question, model: Model, gpu: Gpu) -> int:
    """Raises ConfigError when not even a whole node holds the model."""
    fault, fits = "no number of GPUs divides its heads", 0
    row = question.prompt_tokens + question.max_response_tokens
    for size in range(1, gpu.gpus_per_node + 1):
        try:
            costs = AnalyticCosts(_cost(question, size), engine_gpus=size, trainer_gpus=0, engines=1)
            if costs.kv_tokens(row) >= LONG_ROWS_THAT_FIT * row:
                return size
            fits = size  # a few rows at a time
        except ConfigError as error:
            if "divide" not in str(error) and "divisor" not in str(error):
                fault = str(error)
    if fits:
        return fits
    raise ConfigError(fault)


def refuse_what_is_far_outside(question: Question, gpu: Gpu) -> None:
    factors, borrowed = load_efficiency(gpu.family, question.engine, question.efficiency)
    row = question.prompt_tokens + question.max_response_tokens
    reasons = []
    if borrowed:
        reasons.append(f"no efficiency factors of family '{gpu.family}' (those of '{borrowed}' would be borrowed)")
    if row > FAR * factors.fitted_context:
        reasons.append(f"rows of {row} tokens, fitted up to {factors.fitted_context}")
    if reasons and not question.extrapolate:
        raise ConfigError(f"far outside of what the costs were fitted on: {'; '.join(reasons)}; --extrapolate answers "
                          "all the same, with wider intervals")  # fmt: skip


def _cost(question: Question, size: int) -> AnalyticCostSettings:
    mean_s, last_s = question.reward_s()
    return AnalyticCostSettings(
        kind="analytic", model=question.model, gpu=question.gpu, tensor_parallel=size, engine=question.engine,
        expert_parallel=question.expert_parallel,
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
        try:
            costs = AnalyticCosts(
                _cost(question, size), engine_gpus=size, trainer_gpus=trainers or gpus, engines=engines
            )
            row = question.prompt_tokens + question.max_response_tokens
            memories = [costs.rollout_memory(row), costs.training_memory()]
            tightest = min(memories, key=lambda memory: memory.headroom)
            own = Option(**{**vars(own), "headroom_bytes": tightest.headroom, "tightest": tightest.phase})
            values = {
                "workload": {
                    "steps": 1, "prompts_per_step": question.prompts_per_step,
                    "samples_per_prompt": question.samples_per_prompt, "prompt_tokens": question.prompt_tokens,
                    "max_response_tokens": question.max_response_tokens, "seed": question.seed,
                    "response_tokens": question.response_tokens(),
                },
                "schedule": schedule, "cluster": cluster, "cost": _cost(question, size).model_dump(mode="json"),
            }  # fmt: skip
            first = load_experiment(values)
            for memory, remedy in zip(memories, ("split an engine over more GPUs", "train on more GPUs"), strict=True):
                memory.check(gpu, remedy)
            measured = max(MEASURED_STEPS, min(MOST_STEPS, -(-ROWS_TO_MEASURE // question.rows_per_step)))
            steps = first.startup_steps + measured * (2 if beside else 1)
            yield Option(**{**vars(own), "experiment": load_experiment(values, {"workload.steps": steps})})
        except ConfigError as error:
            yield Option(**{**vars(own), "fault": str(error).removeprefix("experiment: ")})
