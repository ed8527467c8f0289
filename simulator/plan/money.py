"""Hours, money and energy of a run. Each formula stands in the docstring of its function."""

import math

import numpy as np

from profiling.schema import CAUSES
from simulator.hardware import Gpu
from simulator.plan.estimate import IDLE, TRAINING

POWER_SHARE = {
    **dict.fromkeys(CAUSES, 0.5), **dict.fromkeys(IDLE, 0.0), **dict.fromkeys(TRAINING, 0.85),
    "prefill": 0.85, "re_prefill": 0.85, "preempt_recompute": 0.85, "weight_sync": 0.2, "reward": 0.0,
}  # fmt: skip
"""Of the way from idle power to TDP, by what a GPU does: an assumption. Measured ranges: training and prefill 0.75 to
0.95, decoding 0.4 to 0.6 (Patel et al., POLCA, arXiv 2308.12908)."""


def hours(
    step_s: np.ndarray,
    steps: np.ndarray | float,
    *,
    evaluation_every: int = 0,
    evaluation_s: float = 0.0,
    checkpoint_every: int = 0,
    checkpoint_s: float = 0.0,
    mtbf_hours: float | None = None,
    restart_s: float = 0.0,
) -> np.ndarray:
    """Wall-clock hours of `steps` steps of `step_s` seconds.

    A step carries its share of evaluations and checkpoints. Between two checkpoints (or over the whole run) d seconds
    have to pass without a failure; with mean time m between failures and restart time r that takes
    (m + r) (exp(d / m) - 1) on average.
    """
    step_s = step_s + (evaluation_s / evaluation_every if evaluation_every else 0.0)
    step_s = step_s + (checkpoint_s / checkpoint_every if checkpoint_every else 0.0)
    needed = step_s * steps
    if mtbf_hours is None:
        return needed / 3600
    mean = 3600 * mtbf_hours
    stretch = step_s * checkpoint_every if checkpoint_every else needed
    with np.errstate(over="ignore"):
        return needed / stretch * (mean + restart_s) * np.expm1(stretch / mean) / 3600


def paid_gpus(gpus: int, gpu: Gpu, *, whole_nodes: bool) -> int:
    return math.ceil(gpus / gpu.gpus_per_node) * gpu.gpus_per_node if whole_nodes else gpus


def watts(gpu: Gpu, gpu_seconds: dict[str, float]) -> float | None:
    """Mean draw of one GPU: idle + share x (TDP - idle), over its causes by their seconds. None where a number that
    it needs is unknown."""
    if gpu.tdp_watts is None or gpu.idle_watts is None:
        return None
    total = sum(gpu_seconds.values())
    share = sum(POWER_SHARE[cause] * seconds for cause, seconds in gpu_seconds.items()) / total
    return gpu.idle_watts + share * (gpu.tdp_watts - gpu.idle_watts)
