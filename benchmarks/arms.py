"""Trains arms that differ in named settings, seed by seed, interleaved; reads their curves at equal budgets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from analysis import style
from analysis.tables import accuracy_curve, by_arm, time_to_score
from profiling.reader import Run
from profiling.settings import check_settings, with_overrides
from tppo.commands.demo import train_config, warm_model
from tppo.config import RunConfig
from tppo.quiet import quieten_libraries
from tppo.regimes import load_regime

SMOOTH = 3
"""Evaluations whose mean is an accuracy; one alone has about three points of sampling noise."""


def train_arms(arms: Mapping[str, Mapping[str, Any]], *, regime: str, seeds: Sequence[int], output: Path) -> list[Run]:
    """Every arm with every seed; an arm is a set of overrides, {"algorithm.name": "vapo"}. Finished runs are kept.

    Data, warm start, rows per step, model and optimiser are the regime's; the warm start is cached in `output`.
    """
    quieten_libraries()
    settings = load_regime(regime)
    output.mkdir(parents=True, exist_ok=True)
    model = warm_model(settings, output)
    runs: dict[str, list[Run]] = {arm: [] for arm in arms}
    for place, seed in enumerate(seeds):
        turn = place % len(arms)
        names = list(arms)
        for arm in (*names[turn:], *names[:turn]):
            base = settings.run_config("tppo", seed, model, output / f"{arm}-s{seed}").model_dump(mode="json")
            base = with_overrides(base, {"train.stop_at_accuracy": None, **arms[arm]})
            runs[arm].append(train_config(check_settings(base, RunConfig, where=arm)))
    return [run for arm in arms for run in runs[arm]]


def curve(run: Run) -> pd.DataFrame:
    """step, clock_s, tokens (generated so far, in thousands), accuracy (mean of SMOOTH evaluations)."""
    found = accuracy_curve(run)
    generated = run.metrics.set_index("step")["training/generated_tokens"].fillna(0).cumsum() / 1e3
    found["tokens"] = generated.reindex(found.step).to_numpy()
    found["accuracy"] = found.accuracy.rolling(SMOOTH, min_periods=1).mean()
    return found


def accuracy_at(run: Run, column: str, budget: float) -> float:
    """Accuracy when `column` (clock_s or tokens) reaches `budget`, between evaluations by interpolation."""
    found = curve(run)
    return float(np.interp(budget, found[column], found.accuracy))


def common_budget(runs: Sequence[Run], column: str) -> float:
    """What every run reached."""
    return min(float(curve(run)[column].iloc[-1]) for run in runs)


def budget_table(runs: Sequence[Run], target: float) -> pd.DataFrame:
    """Per arm, over seeds: accuracy at the tokens and the seconds that every run reached, and time to the target."""
    tokens, seconds = common_budget(runs, "tokens"), common_budget(runs, "clock_s")
    rows = []
    for arm, members in by_arm(runs).items():
        by_tokens = [accuracy_at(run, "tokens", tokens) for run in members]
        by_time = [accuracy_at(run, "clock_s", seconds) for run in members]
        times = [time_to_score(run, target) for run in members]
        reached = [t for t in times if t is not None]
        steps = run_steps(members)
        rows.append(
            {
                "arm": arm,
                "seeds": len(members),
                f"accuracy at {tokens:.0f}k tokens": float(np.median(by_tokens)),
                "range over seeds, tokens": f"{min(by_tokens):.3f} to {max(by_tokens):.3f}",
                f"accuracy at {seconds:.0f} s": float(np.median(by_time)),
                "range over seeds, time": f"{min(by_time):.3f} to {max(by_time):.3f}",
                "best accuracy": float(np.median([curve(run).accuracy.max() for run in members])),
                f"s to {target:.0%}": float(np.median(reached)) if len(reached) == len(times) else None,
                "seeds that reached it": f"{len(reached)} of {len(times)}",
                "s per step": float(np.median([curve(r).clock_s.iloc[-1] for r in members])) / float(np.median(steps)),
            }
        )
    return pd.DataFrame(rows)


def run_steps(runs: Sequence[Run]) -> list[int]:
    return [int(run.metrics.step.max()) for run in runs]


def curves_figure(runs: Sequence[Run], title: str, target: float) -> Figure:
    """Accuracy against generated tokens and against training time; thick: median over seeds, thin: seeds."""
    with rc_context(style.RC):
        return _curves(runs, title, target)


def _curves(runs: Sequence[Run], title: str, target: float) -> Figure:
    figure, panels = style.subplots(1, 2, width=10.0, height=4.6)
    arms = by_arm(runs)
    colours = style.arm_colours(list(arms))
    labels = {"tokens": "generated tokens, thousands", "clock_s": "training time, s"}
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for arm, members in arms.items():
            curves = [curve(run) for run in members]
            for each in curves:
                axes.plot(each[column], each.accuracy, color=colours[arm], linewidth=0.6, alpha=0.35)
            grid = np.linspace(0, min(each[column].iloc[-1] for each in curves), 120)
            middle = np.median([np.interp(grid, each[column], each.accuracy) for each in curves], axis=0)
            axes.plot(grid, middle, color=colours[arm], linewidth=2.2, label=style.arm_name(arm))
        axes.axhline(target, color="#555555", linewidth=0.9, linestyle="--")
        axes.axvline(common_budget(runs, column), color="#555555", linewidth=0.9, linestyle=":")
        axes.set(xlabel=label, ylabel="held-out accuracy", ylim=(0.3, 1.0))
        axes.set_xlim(left=0)
    panels[0].set_title(title)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
