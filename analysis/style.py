"""How figures look: colours that the colour-blind tell apart and that keep their order in grey, and sizes."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RC: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "tppo",
}

# Okabe and Ito's palette (2008).
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"

ARMS = {"ppo": VERMILION, "tppo": BLUE, "tppo-full": GREEN}
OTHERS = (ORANGE, PURPLE, SKY, BLACK)
ARM_NAMES = {
    "ppo": "PPO",
    "tppo": "T-PPO",
    "tppo-full": "T-PPO, window = maximum",
    "ppo-ewma": "PPO-EWMA",
    "geppo": "GePPO",
    "vapo": "VAPO",
    "dapo": "DAPO",
}

CAUSES = {
    "decode_useful": (BLUE, "decode, filled slots"),
    "decode_underfilled": (SKY, "decode, empty slots"),
    "kv_stall": ("#7fa8c9", "decode, waiting for KV blocks"),
    "decode_discarded": ("#23445e", "decode, discarded"),
    "prefill": (GREEN, "prefill"),
    "re_prefill": ("#66c2a5", "prefill of resumed rows"),
    "preempt_recompute": ("#b2e2d0", "prefill after preemption"),
    "reward": (PURPLE, "reward"),
    "logprob_forward": ("#d9a9c4", "log-prob forward"),
    "reference_forward": ("#e6c8da", "reference forward"),
    "value_forward": (YELLOW, "value forward"),
    "update_value": (ORANGE, "value update"),
    "update_policy": (VERMILION, "policy update"),
    "weight_sync": ("#8c564b", "weight sync"),
    "switch": ("#c49c94", "switch"),
    "evaluation": ("#9a9a9a", "evaluation"),
    "checkpoint": ("#6e6e6e", "checkpoint"),
    "down": (BLACK, "down"),
    "wait_tail": ("#d0d0d0", "waiting for the longest rows"),
    "wait_rollout": ("#bdbdbd", "trainer waiting for rollout"),
    "wait_train": ("#a8a8a8", "engine waiting for training"),
    "wait_other": ("#ececec", "other waiting"),
    "unresolved": ("#ffffff", "not resolved"),
}
"""Ledger cause -> colour and name."""


def subplots(rows: int = 1, columns: int = 1, *, width: float = 7.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure of its own (no global state) and its axes, row by row."""
    with rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    spare = cycle(OTHERS)
    return {arm: ARMS.get(arm) or next(spare) for arm in arms}


def arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm)


def legend(axes: Axes, columns: int = 1) -> None:
    """Below the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9
        )
