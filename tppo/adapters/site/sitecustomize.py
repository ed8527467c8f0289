"""Loads the adapters that `tppo profile --adapter` names; then whatever sitecustomize this one hides."""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
try:
    from tppo.adapters.autoload import VARIABLE, start

    start([name for name in os.environ.get(VARIABLE, "").split(",") if name])
except Exception as error:  # the program goes on without phases
    print(f"tppo profile: no adapters in this Python: {error}", file=sys.stderr)

_path = sys.path
sys.path = [entry for entry in _path if os.path.abspath(entry) != _here]
del sys.modules["sitecustomize"]
try:
    import sitecustomize  # noqa: F401
except ImportError:
    sys.modules["sitecustomize"] = type(sys)("sitecustomize")
finally:
    sys.path = _path
