"""How fast the simulator is: one rollout of 8,192 rows, a whole paper-scale training, and how time grows with rows.

python -m benchmarks.simulator [--lengths FILE --column NAME] [--repeats 5] [--record]

Seconds are `simulator_seconds`: playing the run and checking its ledger, without start-up and writing; medians.
--record writes docs/results/simulator, beside what other simulators did on such a workload (other_simulators.csv).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import style
from benchmarks.pages import ROOT, markdown
from simulator import load_experiment, simulate

EXPERIMENT = ROOT / "configs" / "benchmark_8192.toml"
RESULTS = ROOT / "docs" / "results" / "simulator"
ONE_ROLLOUT = {
    "8,192 rows, 8 engines, KV unlimited": ({}, 0.1),
    "the same, 3,000,000 KV tokens an engine": ({"cluster.kv_tokens_per_engine": 3_000_000}, 1.0),
}
"""Case -> (overrides, goal in seconds)."""
PAPER = {
    "workload.steps": 420,
    "schedule.kind": "truncated",
    "schedule.window": 8192,
    "cluster.engines": 64,
}
"""T-PPO's training: 420 steps of 8,192 rows, L = 24K, l = 8K."""
PAPER_GOALS = (180.0, 2.0)
"""Seconds, GiB."""
SCALES = (1, 10, 100)
"""Times 80 rows a step."""
GOAL_TOKENS_PER_S = 1e9


def played(overrides: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Medians over `repeats` runs of one experiment."""
    experiment = load_experiment(EXPERIMENT, overrides)
    seconds = []
    for _ in range(repeats):
        result = simulate(experiment)
        seconds.append(result.simulator_seconds)
    summary = result.summary()
    assert summary["rows_in"] == summary["rows_finished"] + summary["rows_carried"]
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "least": min(seconds),
        "largest": max(seconds),
        "rows finished": summary["rows_finished"],
        "rows carried": summary["rows_carried"],
        "tokens": summary["generated_tokens"],
        "tokens per second": summary["generated_tokens"] / middle,
        "events": summary["events"],
        "preemptions": summary["preemptions"],
        "simulated hours": summary["wall_seconds"] / 3600,
    }


def paper_scale() -> dict[str, Any]:
    """In a process of its own: the peak of its memory is this run's."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.simulator", "--paper"], cwd=ROOT, capture_output=True,
                          text=True, check=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def print_paper_scale() -> None:
    line = played(PAPER, repeats=1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**line, "peak GiB": peak / 2**30}))


def scaling(repeats: int) -> pd.DataFrame:
    """Ten steps of T-PPO on eight engines, with 80, 800 and 8,000 rows a step."""
    lines = []
    for scale in SCALES:
        overrides = {**PAPER, "workload.steps": 10, "cluster.engines": 8, "workload.prompts_per_step": 80 * scale,
                     "workload.samples_per_prompt": 1}  # fmt: skip
        line = played(overrides, repeats)
        per_row = 1e6 * line["seconds"] / (line["rows finished"] + line["rows carried"])
        lines.append({"rows a step": 80 * scale, "seconds": line["seconds"], "microseconds a row": per_row})
    return pd.DataFrame(lines)


def draw(growth: pd.DataFrame) -> style.Figure:
    """Seconds against rows a step, and what proportional growth from the largest would be."""
    figure, (axes,) = style.subplots(width=5.5, height=3.6)
    rows, seconds = growth["rows a step"].to_numpy(), growth.seconds.to_numpy()
    axes.plot(rows, seconds, "o-", color=style.BLUE, label="measured")
    axes.plot(rows, seconds[-1] * rows / rows[-1], "--", color=style.BLACK, linewidth=0.8, label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="rows a step", ylabel="seconds for ten steps")
    axes.set_title("Simulator time (measured)")
    style.legend(axes, columns=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="CSV of response lengths instead of the lognormal ones")
    parser.add_argument("--column", default="num_decode_tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="write docs/results/simulator")
    parser.add_argument("--paper", action="store_true", help="only the paper-scale run, as JSON")
    options = parser.parse_args()
    if options.paper:
        print_paper_scale()
        return
    own = {}
    if options.lengths:
        lengths = {"kind": "empirical", "file": str(options.lengths.resolve()), "column": options.column}
        own = {"workload.response_tokens": lengths}
    load = os.getloadavg()[0]
    lines = []
    for name, (overrides, goal) in ONE_ROLLOUT.items():
        lines.append({"case": name, "goal (s)": goal, **played({**own, **overrides}, options.repeats)})
    paper = paper_scale()
    lines.append({"case": "T-PPO, 420 steps of 8,192 rows, 64 engines (once)", "goal (s)": PAPER_GOALS[0], **paper})
    table = pd.DataFrame(lines)
    growth = scaling(options.repeats)
    machine = (
        f"{platform.system()} {platform.machine()}, one of {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, numpy {np.__version__}. Load average {load:.2f} before, "
        f"{os.getloadavg()[0]:.2f} after."
    )
    rate = table["tokens per second"].iloc[0]
    verdicts = [f"{row['case']}: {_verdict(row['seconds'] <= row['goal (s)'])}" for row in lines]
    verdicts += [
        f"{GOAL_TOKENS_PER_S:.0e} tokens per second, KV unlimited: {_verdict(rate >= GOAL_TOKENS_PER_S)} ({rate:.2g})",
        f"paper scale under {PAPER_GOALS[1]:.0f} GiB: {_verdict(paper['peak GiB'] <= PAPER_GOALS[1])}",
    ]
    parts = [
        "# Simulator: speed",
        f"Written by `python -m benchmarks.simulator --record`. {machine} Seconds play the run and check its ledger; "
        f"medians of {options.repeats}.",
        markdown(table),
        "Goals: " + "; ".join(verdicts) + ".",
        "Time grows with the rows:",
        markdown(growth),
        "![time against rows](simulator.png)",
    ]
    others = RESULTS / "other_simulators.csv"
    if others.exists():
        parts += [
            "## Beside other simulators",
            "Measured once, on two shared cores, with their own drivers and on requests drawn like the ones above "
            "(prompt 512, lognormal, cap 24,576). They simulate serving, one token at a time, with cost models of "
            "their own. This command does not measure them anew.",
            markdown(pd.read_csv(others)),
        ]
    page = "\n\n".join(parts) + "\n"
    print(page)
    if options.record:
        RESULTS.mkdir(parents=True, exist_ok=True)
        table.to_csv(RESULTS / "simulator.csv", index=False)
        growth.to_csv(RESULTS / "growth.csv", index=False)
        draw(growth).savefig(RESULTS / "simulator.png")
        (RESULTS / "README.md").write_text(page)


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


if __name__ == "__main__":
    main()
