"""python -m simulator EXPERIMENT.toml [--output DIR] [--section.key value ...]: prints the summary as JSON."""

import argparse
import json
from pathlib import Path

from profiling.settings import parse_overrides
from profiling.shell import exit_code_of
from simulator import load_experiment, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulator", description="simulate an experiment; print JSON")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--output", type=Path, help="write a run directory")
    options, rest = parser.parse_known_args()

    def run() -> int:
        words = [word for word in rest if word != "--json"]
        result = simulate(load_experiment(options.experiment, parse_overrides(words)))
        if options.output:
            result.write(options.output)
        print(json.dumps(result.summary(), indent=1, allow_nan=False))
        return 0

    return exit_code_of("simulator", run)


if __name__ == "__main__":
    raise SystemExit(main())
