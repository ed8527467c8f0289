"""Writes docs/results from finished runs: tables as Markdown and CSV, figures as PNG; and what the README claims.

python -m benchmarks.record_results DEMO_DIRECTORY NAME

DEMO_DIRECTORY is what `tppo demo` or `benchmarks.time_to_score` wrote; NAME the folder below docs/results. No number
is typed by hand.
"""

import argparse
import os
import platform
import shutil
from pathlib import Path

import pandas as pd

from analysis.plot import plot_all
from analysis.tables import arm_of, comparison_tables, paired_speedup, score_table, speed_table
from benchmarks.claims import write_claims
from benchmarks.pages import RESULTS, commit, markdown
from profiling.reader import Run

TARGET = 0.85
ARMS = ("ppo", "tppo", "tppo-full")


def machine(runs: list[Run]) -> str:
    """Where and with what the runs were made."""
    header = runs[0].header
    seeds = sorted({run.name.rsplit("-s", 1)[1] for run in runs}, key=int)
    return (
        f"{len(runs)} runs on one thread of a {os.cpu_count()}-core {platform.machine()} CPU, seeds "
        f"{', '.join(seeds)}, {', '.join(f'{k} {v}' for k, v in header['versions'].items())}, "
        f"recorded at commit {commit()}."
    )


def runs_in(directory: Path) -> list[Run]:
    found = [Run(path.parent) for path in directory.glob("*-s*/summary.json")]
    return sorted(found, key=lambda run: (ARMS.index(arm_of(run)), int(run.name.rsplit("-s", 1)[1])))


def speedups(runs: list[Run]) -> pd.DataFrame:
    rows = []
    for arm in ("tppo", "tppo-full"):
        if any(arm_of(run) == arm for run in runs):
            rows.append({"ratio of times to 85 %": f"ppo / {arm}", **paired_speedup(runs, "ppo", arm, TARGET)})
    if any(arm_of(run) == "tppo-full" for run in runs):
        rows.append(
            {"ratio of times to 85 %": "tppo-full / tppo", **paired_speedup(runs, "tppo-full", "tppo", TARGET)}
        )
    return pd.DataFrame(rows)


def reasons(runs: list[Run]) -> pd.DataFrame:
    """Where a ratio of times comes from, PPO / arm, medians over the pairs that both reached the target: seconds per
    step, steps needed, and what those steps cost per finished response and per trained token."""
    by_name = {run.name: run for run in runs}
    rows = []
    for arm in ("tppo", "tppo-full"):
        ratios = []
        for run in (run for run in runs if arm_of(run) == arm):
            peer = by_name.get(run.name.replace(arm, "ppo", 1))
            if peer is None:
                continue
            scores = score_table([peer, run], TARGET)
            if scores["s to target"].isna().any():
                continue
            costs = scores.assign(
                per_step=scores["s to target"] / scores["steps"],
                per_response=scores["s to target"] / scores["finished responses"],
                per_token=scores["s to target"] / scores["trained tokens"],
            )
            ratios.append(
                {
                    "time to 85 %": costs["s to target"][0] / costs["s to target"][1],
                    "s per step": costs.per_step[0] / costs.per_step[1],
                    "steps": costs.steps[0] / costs.steps[1],
                    "s per finished response": costs.per_response[0] / costs.per_response[1],
                    "finished responses": costs["finished responses"][0] / costs["finished responses"][1],
                    "s per trained token": costs.per_token[0] / costs.per_token[1],
                    "trained tokens": costs["trained tokens"][0] / costs["trained tokens"][1],
                }
            )
        if ratios:
            rows.append({"ppo / arm": arm, "pairs": len(ratios), **pd.DataFrame(ratios).median().to_dict()})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    runs = runs_in(options.directory)
    target = RESULTS / options.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    drawn, left_out = plot_all(runs, ["png"], target)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    predictions = options.directory / "predictions.csv"
    compared = comparison_tables(pd.read_csv(predictions))
    ratios = speedups(runs)
    ratios.to_csv(target / "speedups.csv", index=False)
    parts = [
        f"# {options.name}",
        f"Written by `python -m benchmarks.record_results`. {machine(runs)} Times in seconds.",
        "## Time to 85 % (mean of three consecutive evaluations; evaluation and checkpoints left out)",
        markdown(ratios),
        markdown(score_table(runs, TARGET)),
        "## Why: what the time to 85 % is made of",
        "Ratios PPO / arm, medians over the pairs that both reached it (value pre-training included). A ratio of "
        "times is that of seconds per step times that of steps; or per response times responses; or per token.",
        markdown(reasons(runs)),
        "## Speed, medians over seeds",
        markdown(speed_table(runs)),
        "## Predicted against measured",
        "Medians over the target runs; error = (predicted - measured) / measured. Forecast: costs and lengths of the "
        "calibration runs only. Replay: the target's own lengths. The number of steps is given, so the time to the "
        "target is conditional on it. The drift probe is a fixed workload timed at every evaluation.",
        *[
            f"### {arm}, predicted from {source} alone\n\n{markdown(table)}"
            for (source, arm), table in compared.items()
        ],
        *[f"![{path.stem}]({path.name})" for path in drawn if path.suffix == ".png"],
    ]
    (target / "README.md").write_text("\n\n".join(parts) + "\n")
    write_claims()
    print(target)


if __name__ == "__main__":
    main()
