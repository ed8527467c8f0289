"""T-PPO against PPO on the clock: seeds that no setting was chosen on, runs interleaved, paired by seed.

python -m benchmarks.time_to_score [--regime short] [--seeds 10:15] [--arms ppo,tppo] [--output runs/benchmark-short]

Writes the same directory as `tppo demo` (report.html included) and prints the paired ratios. The regimes' settings
were chosen on seeds 100 and 101; no reported seed was run before its regime was committed.
"""

import argparse
import os
from pathlib import Path

from analysis.tables import paired_speedup, score_table, speed_table
from tppo.commands.demo import run_demo
from tppo.regimes import ARMS, load_regime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regime", default="short")
    parser.add_argument("--seeds", default="10:15", help="first:end")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    first, end = map(int, options.seeds.split(":"))
    arms = options.arms.split(",")
    output = options.output or Path("runs") / f"benchmark-{options.regime}"
    print(f"load average {os.getloadavg()[0]:.2f}")
    runs = run_demo(output, regime=options.regime, seeds=range(first, end), arms=arms)
    target = load_regime(options.regime).target_accuracy
    print(speed_table(runs).to_string(index=False))
    print(score_table(runs, target).to_string(index=False))
    for arm in arms:
        if arm != "ppo":
            print(f"ppo / {arm}:", paired_speedup(runs, "ppo", arm, target))
    print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
