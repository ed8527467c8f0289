"""GPUs as data files: what a data sheet says, each number with its source; unknown is absent, never 0."""

import difflib
from pathlib import Path

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from profiling.errors import ConfigError
from profiling.settings import Settings, load_settings

LEAST = {"bf16_flops": 1e11, "memory_bytes": 1e8, "memory_bytes_per_s": 1e9, "link_bytes_per_s": 1e6,
         "network_bytes_per_s": 1e6}  # fmt: skip
"""Below these a number is in another unit."""
GPUS = Path(__file__).parent / "gpus"


class Gpu(Settings):
    """Rates are peaks: of dense arithmetic, of the data sheet. Bytes, seconds, watts, US dollars."""

    name: str
    family: str
    """Architecture; efficiency factors are looked up by it (simulator/hardware/factors)."""
    reported_as: tuple[str, ...] = ()
    """Names by which drivers and torch call it."""
    gpus_per_node: int = Field(8, ge=1, le=1024)
    """GPUs that reach each other over the fast link."""
    bf16_flops: PositiveFloat
    """Dense, FLOP per second."""
    fp8_flops: PositiveFloat | None = None
    """Dense."""
    memory_bytes: PositiveFloat
    memory_bytes_per_s: PositiveFloat
    link_bytes_per_s: PositiveFloat | None = None
    """To the other GPUs of the node, sum of both directions."""
    link: str | None = None
    """What that is called."""
    network_bytes_per_s: PositiveFloat | None = None
    """To other nodes, per GPU, one direction."""
    tdp_watts: PositiveFloat | None = None
    idle_watts: NonNegativeFloat | None = None
    price_per_hour: NonNegativeFloat | None = None
    """US dollars for one GPU, on demand: a default to overwrite."""
    price_date: str | None = None
    sources: dict[str, str] = Field(default_factory=dict)
    """Number -> where it comes from."""

    @model_validator(mode="after")
    def check_peaks(self) -> "Gpu":
        if self.fp8_flops is not None and self.fp8_flops < self.bf16_flops:
            raise ValueError(f"fp8_flops = {self.fp8_flops:g} is below bf16_flops = {self.bf16_flops:g}")
        if self.idle_watts is not None and self.tdp_watts is not None and self.idle_watts > self.tdp_watts:
            raise ValueError(f"idle_watts = {self.idle_watts:g} is above tdp_watts = {self.tdp_watts:g}")
        for name, least in LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(
                    f"{name} = {value:g} is below {least:g}; give bytes, FLOP/s and bytes/s, not GB or TFLOP/s"
                )
        return self

    def need(self, field: str, what_for: str) -> float:
        """A number that may be unknown. Raises ConfigError where it is."""
        value = getattr(self, field)
        if value is None:
            raise ConfigError(
                f"GPU '{self.name}': {field} is unknown, and {what_for} needs it; copy its file, add the number and "
                "name the copy instead"
            )
        return float(value)


def gpu_names() -> list[str]:
    return sorted(load_settings(path, Gpu).name for path in GPUS.glob("*.toml"))


def gpu_reported_as(name: str) -> Gpu | None:
    """By the name that a driver reports ("NVIDIA H100 80GB HBM3"); None where none of ours is called so."""
    known = (load_settings(path, Gpu) for path in sorted(GPUS.glob("*.toml")))
    return next((gpu for gpu in known if name in gpu.reported_as), None)


def load_gpu(source: str | Path) -> Gpu:
    """A GPU by name ("H100-SXM"), or the TOML file of one's own. Raises ConfigError naming the nearest."""
    path = Path(source)
    if path.suffix == ".toml":
        return load_settings(path, Gpu)
    if not str(source).strip() or len(str(source)) > 255:
        raise ConfigError(f"GPU {str(source)[:40]!r}: name one of {', '.join(gpu_names())}, or a .toml file")
    known = {own.stem: own for own in GPUS.glob("*.toml")}
    wanted = str(source).lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return load_settings(known[wanted], Gpu)
    near = [name for name in known if name.startswith(wanted)] or difflib.get_close_matches(wanted, known, 1, 0.5)
    hint = f"; did you mean '{load_settings(known[near[0]], Gpu).name}'?" if near else ""
    raise ConfigError(f"GPU {str(source)!r}: neither a .toml file nor one of {', '.join(gpu_names())}{hint}")
