"""python -m profiling [--interval S] [--output DIR] -- COMMAND ..."""

import argparse
from pathlib import Path

from profiling.command import profile_command
from profiling.shell import exit_code_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling", description="run any command under the sampler")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between samples")
    parser.add_argument("--output", type=Path, default=Path("runs/profile"), help="run directory")
    parser.add_argument("command", nargs="+", help="-- COMMAND ...")
    options = parser.parse_args()
    return exit_code_of(
        "profiling", lambda: profile_command(options.command, interval_s=options.interval, output=options.output)
    )


if __name__ == "__main__":
    raise SystemExit(main())
