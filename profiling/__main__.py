"""python -m profiling [--interval S] [--output DIR] -- COMMAND ..."""

import argparse
import sys
from pathlib import Path

from profiling.command import profile_command
from profiling.errors import ToolkitError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling", description="run any command under the sampler")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between samples")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"), help="run directory")
    parser.add_argument("command", nargs="+", help="-- COMMAND ...")
    options = parser.parse_args()
    try:
        return profile_command(options.command, interval_s=options.interval, output=options.output)
    except ToolkitError as error:
        print(f"profiling: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
