"""Writes docs/results from finished runs: tables as Markdown and CSV, figures as PNG, and the README's first table.

python -m benchmarks.record_results DEMO_DIRECTORY NAME [--readme]

DEMO_DIRECTORY is what `tppo demo` or `benchmarks.time_to_score` wrote; NAME the folder below docs/results. With
--readme the README's result block is rewritten from it. No number is typed by hand.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd

from analysis.plot import plot_all
from analysis.tables import arm_of, comparison_tables, paired_speedup, score_table, speed_table
from profiling.reader import Run

ROOT = Path(__file__).parent.parent
TARGET = 0.85
ARMS = ("ppo", "tppo", "tppo-full")


def machine(runs: list[Run]) -> str:
    """Where and with what the runs were made."""
    header = runs[0].header
    seeds = sorted({run.name.rsplit("-s", 1)[1] for run in runs}, key=int)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{len(runs)} runs on one thread of a {os.cpu_count()}-core {platform.machine()} CPU, seeds "
        f"{', '.join(seeds)}, {', '.join(f'{k} {v}' for k, v in header['versions'].items())}, "
        f"recorded at commit {commit.stdout.strip() or 'unknown'}."
    )


def runs_in(directory: Path) -> list[Run]:
    found = [Run(path.parent) for path in directory.glob("*-s*/summary.json")]
    return sorted(found, key=lambda run: (ARMS.index(arm_of(run)), int(run.name.rsplit("-s", 1)[1])))


def markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(str(c), v) for c, v in zip(frame.columns, row, strict=True)) + " |")
    return "\n".join(lines)


def _cell(column: str, value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:+.1%}" if "error" in column else f"{value:.4g}"
    return str(value)


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
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    runs = runs_in(options.directory)
    target = ROOT / "docs" / "results" / options.name
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
    if options.readme:
        rewrite_readme(options.name, runs, predictions)
    rewrite_readme_block("regimes", regimes())
    print(target)


REGIMES = {
    "demo": "`short`, the demo's seeds",
    "short": "`short`, new seeds: longest response six times the median, rollout over half of a PPO step",
    "prototype": "`prototype`, new seeds: a wide and shallow model, rollout less than half of a PPO step",
}


def regimes() -> str:
    """What every recorded regime says of PPO against T-PPO, in one table."""
    rows = []
    for name, title in REGIMES.items():
        path = ROOT / "docs" / "results" / name / "speedups.csv"
        if path.exists():
            row = pd.read_csv(path).iloc[0]
            rows.append(
                {
                    "regime": f"[{title}](docs/results/{name}/README.md)",
                    "time to 85 %, PPO / T-PPO": f"{row['median']:.2f}",
                    "95 % interval": f"{row['low']:.2f} to {row['high']:.2f}",
                    "T-PPO faster in": f"{row['wins']:.0f} of {row['pairs']:.0f} seeds",
                    "not reached": f"{row['unreached']:.0f}",
                }
            )
    return markdown(pd.DataFrame(rows))


def rewrite_readme(name: str, runs: list[Run], predictions: Path) -> None:
    tables = comparison_tables(pd.read_csv(predictions))
    names = [("ppo", "tppo"), ("tppo", "ppo")]
    rows = [tables[pair].assign(**{"predicted, from": f"{pair[1]}, from {pair[0]}"}) for pair in names]
    table = pd.concat(rows).iloc[:, [-1, 0, 1, 2, 3, 4, 5]]
    chosen = ("training time", "rollout, s", "per finished", "time to target")
    table = table[table.quantity.str.startswith(chosen)]
    ratio = paired_speedup(runs, "ppo", "tppo", TARGET)
    seeds = len({run.name.rsplit("-s", 1)[1] for run in runs})
    block = "\n\n".join(
        [
            f"On two CPU cores, T-PPO reached 85 % accuracy **{ratio['median']:.2f} times as fast** as PPO on the "
            f"clock (median of {seeds} paired seeds, 95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}, faster "
            f"in {ratio['wins']}). The simulator, calibrated on one algorithm's runs alone, "
            "forecast the other's, which it had not seen (medians over seeds, seconds):",
            markdown(table),
            f"![accuracy against wall-clock](docs/results/{name}/accuracy_time.png)",
        ]
    )
    rewrite_readme_block("results", block)


def rewrite_readme_block(marker: str, block: str) -> None:
    readme = ROOT / "README.md"
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    text = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{block}\n{end}", readme.read_text(), flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
