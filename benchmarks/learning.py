"""Six algorithms, and T-PPO with the window at the maximum, on the demo's task: accuracy against tokens and time.

python -m benchmarks.learning [--seeds 20:23] [--arms ppo,dapo] [--output runs/learning] [--record]

One set of runs, read at equal generated tokens and at equal wall-clock (training time; evaluation left out). Data,
warm start, rows per step, model, value pre-training and optimiser settings are those of the regime `short`; what
differs is the recipe. dapo answers each prompt eight times, a quarter of the prompts a step. --record writes
docs/results/learning. Settings were chosen on seed 100, which is not reported.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.arms import budget_table, curves_figure, train_arms
from benchmarks.pages import ROOT, markdown
from benchmarks.record_results import machine

REGIME = "short"
TARGET = 0.85
ARMS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm.name": "ppo", "train.steps": 120},
    "ppo-ewma": {"algorithm.name": "ppo-ewma", "train.steps": 120},
    "geppo": {"algorithm.name": "geppo", "train.steps": 150},
    "vapo": {"algorithm.name": "vapo", "train.steps": 120},
    "dapo": {
        "algorithm.name": "dapo",
        "train.steps": 90,
        "rollout.prompts_per_step": 4,
        "rollout.samples_per_prompt": 8,
    },
    "tppo": {"algorithm.name": "tppo", "train.steps": 160},
    "tppo-full": {"algorithm.name": "tppo", "rollout.window": 256, "train.steps": 120},
}
"""Steps enough for every arm to pass the target. Under geppo half of a step's rows are new, the others reused."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="20:23", help="first:end")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    load = os.getloadavg()[0]
    chosen = {name: ARMS[name] for name in options.arms.split(",")}
    runs = train_arms(chosen, regime=REGIME, seeds=range(first, end), output=options.output)
    table = budget_table(runs, TARGET)
    print(f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after")
    print(markdown(table))
    if options.record:
        target = ROOT / "docs" / "results" / "learning"
        target.mkdir(parents=True, exist_ok=True)
        table.to_csv(target / "learning.csv", index=False)
        figure = curves_figure(runs, "Six algorithms on the demo's task (measured)", TARGET)
        figure.savefig(target / "learning.png")
        (target / "README.md").write_text(
            "# Six algorithms on one task\n\n"
            f"Written by `python -m benchmarks.learning --seeds {options.seeds} --record`. {machine(runs)}\n\n"
            "One set of runs, read at the generated tokens and at the training seconds that every run reached (dotted "
            "lines). Accuracy: mean of three consecutive evaluations of 192 held-out problems; medians over seeds.\n\n"
            f"{markdown(table)}\n\n![accuracy against tokens and time](learning.png)\n"
        )
        print(target)


if __name__ == "__main__":
    main()
