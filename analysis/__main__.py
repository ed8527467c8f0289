"""python -m analysis RUN ... [--output report.html]: writes the report."""

import argparse
from pathlib import Path

from analysis.report import write_report
from profiling.reader import Run
from profiling.shell import exit_code_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="write a report about runs")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    options = parser.parse_args()

    def run() -> int:
        print(write_report([Run(path) for path in options.runs], options.output))
        return 0

    return exit_code_of("analysis", run)


if __name__ == "__main__":
    raise SystemExit(main())
