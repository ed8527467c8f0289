"""What of a data sheet's peaks is reached, and what is spent beside: named factors with their source, one set for each
family of GPUs and engine, never for a model."""

import os
from pathlib import Path

from pydantic import Field, NonNegativeFloat

from profiling.errors import ConfigError
from profiling.settings import Settings, load_settings

FILES = Path(__file__).parent / "factors"

Share = Field(ge=1e-4, le=1)
Seconds = Field(ge=0, le=10)


class Efficiency(Settings):
    """Shares of peaks, and seconds."""

    family: str
    engine: str
    weight_bandwidth: float = Share
    """Decode: of the memory bandwidth, reading weights."""
    kv_bandwidth: float = Share
    """Decode: of the memory bandwidth, reading keys and values."""
    decode_gemm: float = Share
    """Decode: of the dense peak, where matrix products are bound by arithmetic."""
    roofline_norm: float = Field(gt=1, le=20)
    """p of (memory ** p + arithmetic ** p) ** (1 / p), the time of matrix products: 1 adds the two, infinity takes the
    longer."""
    step_s: float = Seconds
    """Decode: of a step, whatever the batch: the host schedules while the GPU waits."""
    layer_s: float = Seconds
    """Decode: of a layer, whatever the batch: kernels that are bound by their launch."""
    row_s: float = Seconds
    """Decode: of a row and step: sampling and scheduling."""
    collective_s: float = Seconds
    """Decode: of an all-reduce among two GPUs, whatever its size."""
    collective_per_doubling_s: float = Seconds
    """Decode: added with every doubling of the GPUs."""
    link: float = Share
    """Of half the link's two-way bandwidth, in all-reduces."""
    prefill_gemm: float = Share
    prefill_attention: float = Share
    prefill_layer_s: float = Seconds
    prefill_step_s: float = Seconds
    prefill_collective_s: float = Seconds
    train_gemm: float = Share
    """Training: of the dense peak, in what is executed (recomputation included)."""
    train_attention: float = Share
    network: float = Share
    """Of the network's bandwidth."""
    optimizer_bandwidth: float = Share
    """Of the memory bandwidth, in the optimizer's step."""
    engine_overhead_bytes: NonNegativeFloat
    """Of a GPU under a rollout engine, beside weights and cache."""
    rollout_uncertainty: float = Field(ge=0, lt=1)
    """Relative, of rollout seconds: 90 % are believed to lie within."""
    train_uncertainty: float = Field(ge=0, lt=1)
    fitted_context: int = Field(gt=0)
    """Tokens of the longest row that the factors were fitted on."""
    sources: dict[str, str]
    """Factor -> where it comes from."""


ASSUMED_UNCERTAINTY = 0.3
"""Of a family that no set was fitted on and that borrows another's."""


def load_efficiency(family: str, engine: str, own: Path | None = None) -> tuple[Efficiency, str | None]:
    """(factors, the family that they are borrowed from, or None). own: a file to use instead. Raises ConfigError."""
    if own is not None:
        if not os.path.isfile(own):
            raise ConfigError(f"{own}: no such file of efficiency factors")
        return load_settings(own, Efficiency), None
    path = FILES / f"{family}-{engine}.toml"
    if path.name in {file.name for file in FILES.glob("*.toml")}:
        return load_settings(path, Efficiency), None
    borrowed = FILES / f"hopper-{engine}.toml"
    if not borrowed.is_file():
        known = ", ".join(sorted({file.stem.split("-", 1)[1] for file in FILES.glob("*.toml")}))
        raise ConfigError(f"engine '{engine}': no efficiency factors; choose one of {known}, or name a file")
    factors = load_settings(borrowed, Efficiency)
    wider = {
        "rollout_uncertainty": max(factors.rollout_uncertainty, ASSUMED_UNCERTAINTY),
        "train_uncertainty": max(factors.train_uncertainty, ASSUMED_UNCERTAINTY),
    }
    return factors.model_copy(update=wider), "hopper"


def peaks_only(factors: Efficiency) -> Efficiency:
    """Every share 1 and every overhead 0: what a pure roofline says."""
    changes: dict[str, float] = {}
    for name, field in Efficiency.model_fields.items():
        if name.endswith("_s"):
            changes[name] = 0.0
        elif field.annotation is float and name not in ("roofline_norm", "rollout_uncertainty", "train_uncertainty",
                                                        "engine_overhead_bytes"):  # fmt: skip
            changes[name] = 1.0
    return factors.model_copy(update={**changes, "roofline_norm": 20.0})
