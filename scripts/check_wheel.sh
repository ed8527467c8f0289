#!/usr/bin/env bash
# `pip install .` on a clean machine gives a working tppo: builds the sdist and from it the wheel, looks at what is in
# them, installs the wheel without extras into an environment of its own, and tries it from another directory.
# The environment stays in .venv-wheel, so that the second time takes half a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
venv=${WHEEL_VENV:-$root/.venv-wheel}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip="$venv/bin/python -m pip --disable-pip-version-check"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
$pip install --quiet -c constraints.txt torch build

# From the files of the checkout alone: what an earlier build left behind does not get in.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [ -f "$file" ]; then cp --parents "$file" "$work/source"; fi
done
"$venv/bin/python" -m build --outdir "$work/dist" "$work/source" > "$work/build.log" 2>&1 || {
    tail -20 "$work/build.log"
    exit 1
}
"$venv/bin/python" scripts/wheel_content.py "$work/source" "$work"/dist/*.whl "$work"/dist/*.tar.gz

$pip uninstall --quiet --yes tppo > "$work/uninstall.log" 2>&1
$pip install --quiet -c constraints.txt "$work"/dist/*.whl
$pip check
mkdir "$work/elsewhere"
cp -r configs "$work/elsewhere"
cd "$work/elsewhere"
env -u PYTHONPATH "$venv/bin/python" "$root/scripts/try_install.py" "$work"/dist/*.whl
