#!/usr/bin/env bash
# Whether the base can be installed on each Python that pyproject.toml allows: every pinned dependency has a wheel for
# it, and all fit together. Nothing is installed or run; where another interpreter is at hand, `PYTHON=python3.13
# make wheel` does both.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
for version in 3.11 3.12 3.13 3.14; do
    "$python" -m pip install --quiet --disable-pip-version-check --dry-run --report "$work/$version.json" \
        --python-version "$version" --only-binary=:all: --target "$work/none" -c constraints.txt "$work"/*.whl
    "$python" - "$version" "$work/$version.json" <<'END'
import json
import sys

version, report = sys.argv[1:]
print(f"Python {version}: {len(json.load(open(report))['install'])} packages fit together, all as wheels")
END
done
