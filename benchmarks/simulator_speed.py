"""How fast the simulator plays 8,192 rows on 8 engines: median of repeated runs, beside the machine's load.

python -m benchmarks.simulator_speed [--lengths FILE --column NAME] [--repeat N]
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from simulator import load_experiment, simulate

EXPERIMENT = Path(__file__).parent.parent / "configs" / "benchmark_8192.toml"
CASES = {
    "no KV limit": {},
    "3,000,000 KV tokens an engine": {"cluster.kv_tokens_per_engine": 3_000_000},
}
GOAL_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, help="CSV of response lengths instead of the lognormal ones")
    parser.add_argument("--column", default="num_decode_tokens")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    own = {}
    if options.lengths:
        lengths = {"kind": "empirical", "file": str(options.lengths.resolve()), "column": options.column}
        own = {"workload.response_tokens": lengths}
    print(f"load average {os.getloadavg()[0]:.2f}; goal: under {GOAL_S} s")
    for name, overrides in CASES.items():
        experiment = load_experiment(EXPERIMENT, {**own, **overrides})
        seconds = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            summary = simulate(experiment).summary()
            seconds.append(time.perf_counter() - start)
        print(
            f"{name}: median {statistics.median(seconds):.3f} s (from {min(seconds):.3f} to {max(seconds):.3f}), "
            f"{summary['events']:,} events, {summary['rows_finished']:,} rows, "
            f"{summary['generated_tokens']:,} tokens, {summary['preemptions']:,} preemptions, "
            f"simulated {summary['wall_seconds']:,.1f} s"
        )


if __name__ == "__main__":
    main()
