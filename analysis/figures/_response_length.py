"""How long responses are while training goes on, and how many rows a step leaves unfinished."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.tables import arm_of, by_arm, provenance
from profiling.errors import DataError
from profiling.reader import Run

CAPTION = (
    "Upper: mean (line) and longest (dots) length of the responses that finished in a step, in tokens of all their "
    "windows; mean over seeds. Lower: share of a step's rows that carry over. Under truncation the first steps finish "
    "short responses only, until the mix of fresh and carried rows is steady."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    parts = []
    for run in runs:
        metrics = run.metrics
        if "response_length/mean" not in metrics:
            raise DataError(f"{run.path}: metrics.jsonl has no response_length/mean")
        rows = metrics[metrics.step >= 1]
        parts.append(
            pd.DataFrame(
                {
                    "run": run.name,
                    "arm": arm_of(run),
                    "step": rows.step,
                    "mean_tokens": rows["response_length/mean"],
                    "max_tokens": rows["response_length/max"],
                    "truncated_share": rows["training/truncated_share"],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    figure, (upper, lower) = style.subplots(2, 1, height=5.4)
    arms = by_arm(runs)
    colours = style.arm_colours(list(arms))
    for arm in arms:
        steps = table[table.arm == arm].groupby("step")[["mean_tokens", "max_tokens", "truncated_share"]].mean()
        upper.plot(steps.index, steps.mean_tokens, color=colours[arm], linewidth=1.6, label=style.arm_name(arm))
        upper.plot(steps.index, steps.max_tokens, ".", color=colours[arm], markersize=3, alpha=0.6)
        lower.plot(steps.index, steps.truncated_share, color=colours[arm], linewidth=1.6)
    upper.set(ylabel="response length, tokens", yscale="log")
    upper.set_title(f"Response lengths ({provenance(runs)})")
    lower.set(xlabel="training step", ylabel="share of rows carried over", ylim=(-0.02, None))
    handles, labels = upper.get_legend_handles_labels()
    lower.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3, frameon=False, fontsize=9)
    return figure
