"""What one option costs a step, from a short simulation of it."""

import math
from dataclasses import dataclass

import numpy as np

from profiling.errors import ConfigError
from profiling.schema import CAUSES
from simulator.costs import Costs
from simulator.plan.options import Option
from simulator.run import Result, simulate

IDLE = ("wait_tail", "wait_rollout", "wait_train", "wait_other", "switch", "down")
"""Causes in which a GPU does no work. Empty slots of a decode step are not idle: the step costs almost the same."""
ROLLOUT = ("preempt_recompute", "re_prefill", "prefill", "decode_useful", "decode_underfilled", "kv_stall",
           "decode_discarded", "wait_tail")  # fmt: skip
TRAINING = ("logprob_forward", "reference_forward", "value_forward", "update_value", "update_policy")


@dataclass(frozen=True)
class Estimate:
    """Of a step once start-up is over; seconds of wall time unless named otherwise."""

    step_s: float
    rollout_s: float
    """Of the engines, hidden behind training or not."""
    training_s: float
    noise: float
    """Relative standard error of step_s, from step to step."""
    finished_rows: float
    trained_tokens: float
    tail_share: float
    """Of rollout_s, after nine tenths of its rows have ended."""
    visits: float
    """Steps that a row takes part in."""
    gpu_seconds: dict[str, float]
    """By cause, all GPUs."""
    update_s: float
    """Of training_s, update_policy."""
    processed_tokens: float
    """Of the rows that the policy update processes, with their context; and of those, for n tokens a row:"""
    processed_pairs: float
    """n (n + 1) / 2"""
    processed_squares: float
    """n ** 2"""
    beside: bool
    """Rollout and training run beside each other, on GPUs of their own."""

    @property
    def other_s(self) -> float:
        """What is neither: reward, weight sync, waiting for each other."""
        together = max(self.rollout_s, self.training_s) if self.beside else self.rollout_s + self.training_s
        return max(0.0, self.step_s - together)

    @property
    def idle_share(self) -> float:
        return sum(self.gpu_seconds[cause] for cause in IDLE) / sum(self.gpu_seconds.values())

    @property
    def first_idle_cause(self) -> str | None:
        worst = max(IDLE, key=lambda cause: self.gpu_seconds[cause])
        return worst if self.gpu_seconds[worst] > 0 else None


def _trained_in_flight(result: Result, startup: int) -> tuple[float, float]:
    """(rows, their response tokens) that the steps after start-up trained on."""
    rows = result.rollouts[result.rollouts.finished]
    length = (rows.context_before + rows.tokens - rows.prompt_tokens).to_numpy()
    late = rows.row.map(result.run.trained_at).to_numpy(float) > startup
    return float(late.sum()), float(length[late].sum())


def estimate(option: Option) -> Estimate:
    """Raises ConfigError or ConservationError as `simulate` does."""
    return estimate_of(option, played(option))


def played(option: Option, costs: Costs | None = None) -> Result:
    """The option's simulation; its start-up takes no time where its steps do not depend on time. costs: instead of
    its own."""
    assert option.experiment is not None
    timeless = option.schedule in ("synchronous", "truncated")
    skipped_steps = option.experiment.startup_steps if timeless else 0
    return simulate(option.experiment, skipped_steps=skipped_steps, costs=costs)


def estimate_of(option: Option, result: Result) -> Estimate:
    """What the option's simulation says of a step. Raises ConfigError when no row finished in it."""
    assert option.experiment is not None
    own_gpus = option.experiment.cluster.engines * option.experiment.cluster.gpus_per_engine
    startup = option.experiment.startup_steps
    rows, phases = result.rollouts, result.phases
    late, rows = phases[phases.step > startup], rows[rows.step > startup]
    ledger = result.ledger[result.ledger.step > startup].groupby("cause").seconds.sum()
    beside = option.experiment.cluster.trainer == "separate"
    rollouts = late[late.name == "rollout"].sort_values("step")
    # Where the next rollout begins before a step has trained, the last step says nothing about the pace.
    lasted = np.diff(rollouts.t_start if beside else [*rollouts.t_start, result.run.wall_s])
    by_cause = {cause: float(ledger.get(cause, 0.0)) / len(rollouts) for cause in CAUSES}
    length = late.t_end - late.t_start
    rollout_s = float(length[late.name == "rollout"].mean())
    if option.schedule == "in_flight":  # a step's rollout lasts as long as the step: what counts is the engines' work
        rollout_s = sum(by_cause[cause] for cause in ROLLOUT if cause != "wait_tail") / own_gpus
    finished, trained_tokens = float(rows.finished.sum()), float(rows.trained_tokens.sum())
    if option.schedule == "in_flight":  # what finished last waits for steps that are not simulated
        finished, trained_tokens = _trained_in_flight(result, startup)
    if not finished:
        raise ConfigError(
            f"{option.label}: no row finished in {len(rollouts)} steps after start-up; the window is too short for "
            "responses of this length"
        )
    trained = rows[rows.finished] if option.experiment.trains_whole_responses else rows
    n = (trained.context_before + trained.tokens).to_numpy(float)
    ends = [np.sort(of_step.to_numpy()) for _, of_step in rows.groupby("step").t_end]
    tail_s = float(np.mean([own[-1] - own[math.ceil(0.9 * len(own)) - 1] for own in ends]))
    return Estimate(
        step_s=float(lasted.mean()),
        rollout_s=rollout_s,
        training_s=float(length[late.name.isin(TRAINING)].sum()) / len(rollouts),
        noise=float(lasted.std(ddof=1) / lasted.mean() / np.sqrt(len(lasted))) if len(lasted) > 1 else 0.0,
        finished_rows=finished / len(rollouts),
        trained_tokens=trained_tokens / len(rollouts),
        tail_share=tail_s / max(rollout_s, 1e-12),
        visits=len(rows) / max(1, int(rows.finished.sum())),
        gpu_seconds=by_cause,
        update_s=float(length[late.name == "update_policy"].sum()) / len(rollouts),
        processed_tokens=float(n.sum()) / len(rollouts),
        processed_pairs=float((n * (n + 1) / 2).sum()) / len(rollouts),
        processed_squares=float((n * n).sum()) / len(rollouts),
        beside=beside,
    )
