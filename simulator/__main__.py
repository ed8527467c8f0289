"""python -m simulator EXPERIMENT.toml [--output DIR] [--section.key value ...]: prints the summary as JSON."""

import argparse
import json
import sys
from pathlib import Path

from profiling.errors import ToolkitError
from profiling.settings import parse_overrides
from simulator import load_experiment, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulator", description="simulate an experiment; print JSON")
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--output", type=Path, help="write a run directory")
    options, rest = parser.parse_known_args()
    try:
        words = [word for word in rest if word != "--json"]
        result = simulate(load_experiment(options.experiment, parse_overrides(words)))
        if options.output:
            result.write(options.output)
    except ToolkitError as error:
        print(f"simulator: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result.summary(), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
