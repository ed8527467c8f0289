"""A row of metrics as the numbers that a tracker draws. Live sinks and `tppo export` share this."""

import math
from collections.abc import Mapping
from typing import Any


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Name -> value. The step is the axis, not a value; what is null or not finite is unmeasured and left out."""
    numbers = {str(k): float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
