"""A first estimate of an option, before the whole one: some of its engines, with their share of the rows, for a step.

Engines do not know of each other, so one with its rows does what it does among all. What is lost: steps and rows to
average over, and the tail of the slowest of many engines.
"""

from dataclasses import replace

from simulator.costs import PHASE_COSTS, Costs, resolve
from simulator.experiment import Experiment, load_experiment
from simulator.plan.estimate import Estimate, estimate_of, played
from simulator.plan.options import Option
from simulator.run import Result

ROWS = 1024
"""Of a step, roughly; of one engine, where its rows are more."""


def first_estimate(option: Option) -> tuple[Estimate, Result]:
    """(of the whole option, the simulation of its part). Raises as `estimate` does."""
    assert option.experiment is not None
    share = _share(option.experiment)
    small = replace(option, experiment=_part(option.experiment, share))
    result = played(small, _costs_of_a_part(option.experiment, share))
    own = estimate_of(small, result)
    whole = replace(
        own,
        finished_rows=own.finished_rows / share,
        trained_tokens=own.trained_tokens / share,
        gpu_seconds={cause: seconds / share for cause, seconds in own.gpu_seconds.items()},
        processed_tokens=own.processed_tokens / share,
        processed_pairs=own.processed_pairs / share,
        processed_squares=own.processed_squares / share,
    )
    return whole, result


def _share(experiment: Experiment) -> float:
    """Of the engines: whole ones."""
    engines = experiment.cluster.engines
    return min(engines, max(1, round(engines * ROWS / experiment.workload.rows_per_step))) / engines


def _part(experiment: Experiment, share: float) -> Experiment:
    cluster, workload = experiment.cluster, experiment.workload
    beside = cluster.trainer == "separate"  # whose last step says nothing about the pace
    changes = {
        "workload.steps": experiment.startup_steps + (2 if beside else 1),
        "workload.prompts_per_step": max(1, round(workload.prompts_per_step * share)),
        "cluster.engines": round(cluster.engines * share),
    }
    if beside:
        changes["cluster.trainer_gpus"] = max(1, round(cluster.trainer_gpus * share))
    return load_experiment(experiment.model_dump(mode="json", exclude_none=True), changes)


def _costs_of_a_part(experiment: Experiment, share: float) -> Costs:
    """With which a share of the rows trains and is graded as long as all of them with the whole cluster's costs."""
    costs = resolve(experiment)
    phases = costs.phases
    names = [f"{prefix}_{per}_s" for prefix in PHASE_COSTS.values() for per in ("per_token", "per_token_context")]
    dearer: dict[str, float] = {name: getattr(phases, name) / share for name in names}
    dearer["reward_workers"] = max(1, round(phases.reward_workers * share))
    return replace(costs, phases=phases.model_copy(update=dearer))
