"""python -m analysis RUN ... [--output report.html]: writes the report."""

import argparse
import sys
from pathlib import Path

from analysis.report import write_report
from profiling.errors import ToolkitError
from profiling.reader import Run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m analysis", description="write a report about runs")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    options = parser.parse_args()
    try:
        print(write_report([Run(path) for path in options.runs], options.output))
    except ToolkitError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
