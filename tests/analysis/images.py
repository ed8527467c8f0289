"""Compares a figure with the picture that someone looked at and committed, by structure and not by pixel."""

import io
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread
from skimage.metrics import structural_similarity

from analysis import style

BASELINE = Path(__file__).parent / "baseline"
DOTS_PER_INCH = 60
ALIKE = 0.97
"""Mean structural similarity: other text or one moved line gives less, another rasteriser's anti-aliasing more."""


def assert_looks_like(figure: Figure, name: str) -> None:
    """baseline/NAME.png shows this figure. `TPPO_WRITE_BASELINE=1 pytest ...` writes it anew: look at it."""
    got = picture(figure)
    path = BASELINE / f"{name}.png"
    if os.environ.get("TPPO_WRITE_BASELINE"):
        BASELINE.mkdir(exist_ok=True)
        path.write_bytes(got)
    seen, expected = (imread(io.BytesIO(data))[..., :3] for data in (got, path.read_bytes()))
    assert seen.shape == expected.shape, f"{path.name}: is {seen.shape}, was {expected.shape}"
    likeness = structural_similarity(seen, expected, channel_axis=2, data_range=1.0)
    assert np.isfinite(likeness)
    assert likeness >= ALIKE, f"{path.name}: similarity {likeness:.3f} is below {ALIKE}"


def picture(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with style.use("screen"):
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
