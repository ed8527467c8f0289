"""Named warnings of a training that goes wrong, from its rows of metrics alone. Pure: same rows, same warnings.

Each guard says of a step whether it is bad, good or tells nothing. A warning is raised after `guards.patience` bad
steps in a row, once; it is over after as many good ones, and only then can it be raised again. Between bad and good
lies a margin, in which nothing changes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from profiling.settings import Settings

Name = Literal[
    "reward_collapse", "length_collapse", "length_explosion", "entropy_collapse", "value_divergence", "kl_blow_up",
    "ratio_explosion", "engine_mismatch",
]  # fmt: skip


class GuardsConfig(Settings):
    off: tuple[Name, ...] = ()
    """Guards that stay silent, by the names that their warnings have."""
    patience: PositiveInt = 3
    """Bad steps in a row before a warning, and good ones before it is over."""
    window: PositiveInt = 10
    """Steps of a running mean, and of the early mean that lengths are compared with."""
    reward_drop: float = Field(0.5, gt=0, le=1)
    """reward_collapse: the running mean of rewards has fallen from its best by this share of their range so far."""
    length_low: float = Field(0.3, gt=0, lt=1)
    """length_collapse: running mean of response lengths / their early mean."""
    length_high: float = Field(4.0, gt=1)
    """length_explosion: the same, above."""
    entropy_floor: NonNegativeFloat = 0.005
    """entropy_collapse: nats per token."""
    explained_variance_floor: float = -2.0
    """value_divergence: explained variance of the value model."""
    value_factor: PositiveFloat = 5.0
    """value_divergence: largest |value| / largest |reward| so far."""
    kl_ceiling: PositiveFloat = 0.5
    """kl_blow_up: nats per token between the updated policy and the one that sampled."""
    ratio_ceiling: PositiveFloat = 1000.0
    """ratio_explosion: largest probability ratio of a step."""
    mismatch_ceiling: PositiveFloat = 0.1
    """engine_mismatch: |KL| in nats per token between engine and trainer under the same weights."""


MARGIN = 0.8
"""A step is good again when it is within this share of the way to the threshold."""

REMEDIES: dict[str, str] = {
    "reward_collapse": "go on from an earlier checkpoint with a lower optimizer.policy_lr, and look at tppo samples",
    "length_collapse": "look at tppo samples: the reward may pay for short answers",
    "length_explosion": "look at tppo samples: repetition? lower optimizer.policy_lr or set an overlong penalty",
    "entropy_collapse": "raise algorithm.entropy_coef, or go on from an earlier checkpoint with a lower learning rate",
    "value_divergence": "lower optimizer.value_lr, or set algorithm.value_clip",
    "kl_blow_up": "lower optimizer.policy_lr or train.epochs",
    "ratio_explosion": "lower optimizer.policy_lr, or make the rows that train less stale",
    "engine_mismatch": "check the engine's dtype and sampling, or set algorithm.importance_cap",
}


@dataclass(frozen=True)
class Change:
    """A warning that was raised, or is over."""

    name: str
    raised: bool
    text: str
    """One line: the step, the name, what was seen and, if it was raised, what to do."""


@dataclass(frozen=True)
class Reading:
    """What one step says. Neither bad nor good: in the margin."""

    bad: bool
    good: bool
    text: str


Memory = dict[str, Any]
Guard = Callable[[Mapping[str, Any], Memory, GuardsConfig], Reading | None]
"""(row of metrics, what this guard remembers, thresholds) -> reading; None: the step tells nothing. Changes the
memory, which is plain JSON."""


def check(
    metrics: Mapping[str, Any], before: Mapping[str, Memory], config: GuardsConfig, *, startup_steps: int = 0
) -> tuple[dict[str, Memory], list[Change]]:
    """The guards' memory after a step, and what changed with it. Changes nothing that it was given.

    startup_steps: steps at the start whose lengths are no measure, since long responses cannot have finished yet.
    """
    step = int(metrics["step"])
    after: dict[str, Memory] = {}
    changes: list[Change] = []
    for name, guard in GUARDS.items():
        memory: Memory = {key: list(v) if isinstance(v, list) else v for key, v in before.get(name, {}).items()}
        after[name] = memory
        skipped = name.startswith("length") and step <= startup_steps
        reading = None if name in config.off or skipped else guard(metrics, memory, config)
        if reading is None:
            continue
        memory["bad"] = memory.get("bad", 0) + 1 if reading.bad else 0
        memory["good"] = memory.get("good", 0) + 1 if reading.good else 0
        was_raised = memory.get("raised", False)
        if not was_raised and memory["bad"] >= config.patience:
            memory["raised"] = True
            text = f"step {step}: {name}: {reading.text}, for {config.patience} steps; {REMEDIES[name]}"
            changes.append(Change(name, True, text))
        elif was_raised and memory["good"] >= config.patience:
            memory["raised"] = False
            changes.append(Change(name, False, f"step {step}: {name} is over: {reading.text}"))
        else:
            memory["raised"] = was_raised
    return after, changes


def guard_metrics(memory: Mapping[str, Memory]) -> dict[str, int | None]:
    """guards/NAME: 1 while its warning is raised, else 0; null where nothing has told it anything yet."""
    return {f"guards/{name}": _flag(memory.get(name, {}).get("raised")) for name in GUARDS}


def _flag(raised: bool | None) -> int | None:
    return None if raised is None else int(raised)


def reward_collapse(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> Reading | None:
    """b - m > reward_drop (max r - min r); r: a step's mean reward, m: its running mean, b: the best m so far.

    The range holds the noise of the steps too: of N noisy steps without a trend it is several standard deviations,
    and a mean of `window` steps moves by less than two.
    """
    reward = _number(metrics, "critic/rewards/mean")
    if reward is None:
        return None
    memory["low"] = min(reward, memory.get("low", reward))
    memory["high"] = max(reward, memory.get("high", reward))
    mean = _running_mean(memory, "recent", reward, config.window)
    if mean is None:
        return None
    memory["best"] = max(mean, memory.get("best", mean))
    fallen, span = memory["best"] - mean, memory["high"] - memory["low"]
    bad, good = fallen > config.reward_drop * span, fallen <= MARGIN * config.reward_drop * span
    return Reading(bad, good, f"mean reward {mean:.3g} over {config.window} steps, {memory['best']:.3g} at its best")


def length_collapse(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> Reading | None:
    ratio = _length_ratio(metrics, memory, config)
    if ratio is None:
        return None
    bad, good = ratio < config.length_low, ratio >= config.length_low / MARGIN
    return Reading(bad, good, f"responses have {ratio:.3g} times the length of the first steps")


def length_explosion(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> Reading | None:
    ratio = _length_ratio(metrics, memory, config)
    if ratio is None:
        return None
    bad, good = ratio > config.length_high, ratio <= MARGIN * config.length_high
    return Reading(bad, good, f"responses have {ratio:.3g} times the length of the first steps")


def _length_ratio(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> float | None:
    """Running mean / mean of the first `window` steps; None until there are twice as many."""
    length = _number(metrics, "response_length/mean")
    if length is None:
        return None
    early = memory.setdefault("early", [])
    if len(early) < config.window:
        early.append(length)
        return None
    mean = _running_mean(memory, "recent", length, config.window)
    return None if mean is None or not sum(early) else mean / (sum(early) / len(early))


def entropy_collapse(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> Reading | None:
    entropy = _number(metrics, "actor/entropy")
    if entropy is None:
        return None
    floor = config.entropy_floor
    return Reading(entropy < floor, entropy >= floor / MARGIN, f"entropy {entropy:.3g} nats, threshold {floor:g}")


def value_divergence(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> Reading | None:
    """Explained variance below its floor, or values far beyond any reward that was ever given. A step whose rewards
    are all alike says nothing of the first: there is no variance to explain."""
    rewards = [_number(metrics, f"critic/score/{end}") for end in ("min", "max")]
    known = [abs(reward) for reward in rewards if reward is not None]
    memory["reward"] = max([memory.get("reward", 0.0), *known])
    explained = _number(metrics, "critic/vf_explained_var") if len(set(rewards)) > 1 else None
    values = [_number(metrics, f"critic/values/{end}") for end in ("min", "max")]
    largest = max((abs(value) for value in values if value is not None), default=None)
    readings = []
    if explained is not None:
        floor = config.explained_variance_floor
        good = explained >= floor + (1 - MARGIN) * (1 - floor)  # of the way from the floor to 1
        readings.append(Reading(explained < floor, good, f"explained variance {explained:.3g}, threshold {floor:g}"))
    if largest is not None and memory["reward"] > 0:
        ratio, factor = largest / memory["reward"], config.value_factor
        text = f"|value| up to {largest:.3g} where no |reward| was above {memory['reward']:.3g}"
        readings.append(Reading(ratio > factor, ratio <= MARGIN * factor, text))
    if not readings:
        return None
    worst = next((reading for reading in readings if reading.bad), readings[0])
    return Reading(worst.bad, all(reading.good for reading in readings), worst.text)


def _ceiling(metric: str, field: str, what: str) -> Guard:
    """|metric| above a threshold."""

    def guard(metrics: Mapping[str, Any], memory: Memory, config: GuardsConfig) -> Reading | None:
        found, ceiling = _number(metrics, metric), getattr(config, field)
        if found is None:
            return None
        size = abs(found)
        return Reading(size > ceiling, size <= MARGIN * ceiling, f"{what} {size:.3g}, threshold {ceiling:g}")

    return guard


GUARDS: dict[Name, Guard] = {
    "reward_collapse": reward_collapse,
    "length_collapse": length_collapse,
    "length_explosion": length_explosion,
    "entropy_collapse": entropy_collapse,
    "value_divergence": value_divergence,
    "kl_blow_up": _ceiling("actor/approx_kl", "kl_ceiling", "KL per token"),
    "ratio_explosion": _ceiling("actor/ratio_max", "ratio_ceiling", "largest ratio"),
    "engine_mismatch": _ceiling("rollout_corr/kl", "mismatch_ceiling", "KL per token between engine and trainer"),
}


def _running_mean(memory: Memory, name: str, value: float, window: int) -> float | None:
    """Of the last `window` values; None until there are as many."""
    memory[name] = [*memory.get(name, []), value][-window:]
    return sum(memory[name]) / window if len(memory[name]) == window else None


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    """None where it is unmeasured or not finite: that is another guard's matter (tppo.learner.finite)."""
    value = metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None
