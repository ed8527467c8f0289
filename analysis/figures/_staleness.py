"""How many policy versions old trained tokens are, and whether trained responses are as long as those drawn."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis import style
from analysis.chosen import simulated_only
from analysis.gather import gather, left_out_note
from analysis.tables import arm_of, by_arm, provenance
from profiling.errors import DataError
from profiling.reader import Run
from profiling.summary import staleness

OLDEST = 8
"""Ages from here on share a bar."""
CAPTION = (
    "Left: share of the trained tokens by how many policy updates lie between their generation and the step that "
    "trains on them, over an arm's runs; the legend has the means. A run whose rows wait, finished, for a later "
    "step than the one that generated them does not tell which in its records: only its mean is given. Right: mean "
    "length of the responses trained on / mean length of those drawn, a marker per run. 1: no bias; below 1, long "
    "responses are missing from the training. Unknown for a run that left responses unfinished and drew them from "
    "no known distribution."
)


def data(runs: Sequence[Run]) -> pd.DataFrame:
    """By `part`: `age` (arm, versions behind, share of its trained tokens), `mean` (arm, mean versions behind),
    `length_bias` (arm, run, ratio; null where the run cannot tell)."""
    tokens = gather(runs, _tokens_by_age)
    left_out = {name for name, _ in tokens.attrs["left_out"]}
    parts = []
    for arm, members in by_arm([run for run in runs if run.name not in left_out]).items():
        own = tokens[tokens.arm == arm]
        by_age = own[own.versions.notna()].groupby(own.versions.clip(upper=OLDEST)).tokens.sum()
        if len(by_age):
            parts.append(pd.DataFrame({"arm": arm, "part": "age", "versions": by_age.index,
                                       "value": by_age.to_numpy() / by_age.sum()}))  # fmt: skip
        mean = float(np.average(own["mean"], weights=own.tokens))
        parts.append(pd.DataFrame({"arm": [arm], "part": ["mean"], "value": [mean]}))
        parts += [pd.DataFrame({"arm": [arm], "run": [run.name], "part": ["length_bias"],
                                "value": [(run.summary or {}).get("length_bias")]}) for run in members]  # fmt: skip
    table = pd.concat(parts, ignore_index=True).reindex(columns=["arm", "run", "part", "versions", "value"])
    table["value"] = table.value.astype(float)
    table.attrs.update(tokens.attrs)
    return table


def _tokens_by_age(run: Run) -> pd.DataFrame:
    """arm, versions, tokens trained, and `mean`, the mean number of versions behind; versions is null where only the
    mean is known."""
    rows = run.rollouts[run.rollouts.step >= 1]
    if rows.empty:
        raise DataError(f"{run.path}: has no rollout records; staleness needs them")
    arm = arm_of(run)
    if (run.header["schedule"] or {}).get("in_flight_update"):
        mean = (run.summary or {}).get("staleness_mean")
        if mean is None:
            raise DataError(f"{run.path}: rows train in later steps than its records tell, and it has no summary yet")
        return pd.DataFrame({"arm": [arm], "versions": [np.nan], "tokens": [run.summary["trained_tokens"]],  # type: ignore[index]
                             "mean": [mean]})  # fmt: skip
    ages, tokens = staleness(rows.assign(trained_at=rows.step))
    if not tokens.sum():
        raise DataError(f"{run.path}: no token was trained on")
    mean = float(np.average(ages, weights=tokens))
    by_age = pd.Series(tokens).groupby(ages).sum()
    by_age = by_age[by_age > 0]
    return pd.DataFrame(
        {"arm": arm, "versions": by_age.index.astype(float), "tokens": by_age.to_numpy(), "mean": mean}
    )


def draw(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    figure, (left, right) = style.subplots(1, 2, width=8.4, height=3.8, width_ratios=(3, 2))
    arms = list(dict.fromkeys(table.arm))
    looks = style.arm_looks(arms)
    ages = table[table.part == "age"]
    oldest = int(ages.versions.max()) if len(ages) else 0
    width = 0.8 / max(1, ages.arm.nunique())
    for place, arm in enumerate(dict.fromkeys(ages.arm)):
        own, look = ages[ages.arm == arm], looks[arm]
        shift = (place - (ages.arm.nunique() - 1) / 2) * width
        left.bar(own.versions + shift, own.value, width, color=look.colour, edgecolor="white", linewidth=0.4,
                 hatch=look.hatch, gid=arm)  # fmt: skip
    left.set(xlabel="policy versions behind", ylabel="share of trained tokens", ylim=(0, 1.05))
    left.set_xticks(range(oldest + 1), [f"{OLDEST}+" if age == OLDEST else str(age) for age in range(oldest + 1)])
    left.grid(axis="x", visible=False)
    _bias(right, table[table.part == "length_bias"], looks)
    drawn = [run for run in runs if arm_of(run) in looks]
    style.title(left, f"Staleness ({provenance(drawn)})")
    style.title(right, "Length bias")
    means = table[table.part == "mean"].set_index("arm").value
    handles = [_patch(looks[arm]) for arm in arms]
    labels = [f"{style.arm_name(arm)}: mean {means[arm]:.2f}" for arm in arms]
    notes = [left_out_note(table), *simulated_only(drawn)]
    if only := [style.arm_name(arm) for arm in arms if arm not in set(ages.arm)]:
        notes.append(f"Mean only, from the summary: {', '.join(only)}.")
    style.below(figure, handles, labels, 3, " ".join(filter(None, notes)))
    return figure


def _patch(look: style.Look) -> Patch:
    return Patch(facecolor=look.colour, edgecolor="white", hatch=look.hatch, linewidth=0.4)


def _bias(axes: Axes, table: pd.DataFrame, looks: dict[str, style.Look]) -> None:
    for place, (arm, look) in enumerate(looks.items()):
        own = table[table.arm == arm].value
        if own.notna().any():
            axes.plot(own.dropna(), [place] * int(own.notna().sum()), look.marker, color=look.colour,
                      markersize=style.line_width(7), alpha=0.8, gid=arm)  # fmt: skip
        else:
            axes.text(1.0, place, "not known", ha="center", va="center", fontsize="x-small",
                      color=style.GREY, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    axes.axvline(1.0, color=style.GREY, linewidth=style.line_width(0.9))
    reach = max(0.05, float((table.value - 1).abs().max()) * 1.2) if table.value.notna().any() else 0.5
    axes.set(ylim=(len(looks) - 0.4, -0.6), xlim=(1 - reach, 1 + reach), xlabel="mean length, trained / drawn")
    axes.set_yticks(range(len(looks)), [style.arm_name(arm) for arm in looks], fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.grid(axis="y", visible=False)
