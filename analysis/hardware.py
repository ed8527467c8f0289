"""What a run's machine could do at best, and what an hour of it costs: hardware.json in the run or beside it."""

import math
from dataclasses import dataclass
from pathlib import Path

from profiling.errors import DataError
from profiling.files import read_json_table
from profiling.reader import Run


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s and bytes/s of one GPU, or of the host."""

    flops: float
    bytes_per_s: float
    source: str

    @property
    def ridge(self) -> float:
        """FLOP per byte where the two meet."""
        return self.flops / self.bytes_per_s


@dataclass(frozen=True)
class Hardware:
    """None: not known. Rates are of one GPU (or the host), one way where they go over a link."""

    path: Path
    name: str
    theoretical: Ceilings | None
    empirical: Ceilings | None
    link_bytes_per_s: float | None = None
    link: str = "the link"
    network_bytes_per_s: float | None = None
    gpus_per_node: int | None = None
    price_per_hour: float | None = None
    """US dollars for one GPU."""

    @property
    def highest(self) -> Ceilings:
        """What nothing can exceed: the data sheet's, or the best that was measured."""
        found = self.theoretical or self.empirical
        assert found is not None  # hardware_of reads one or both
        return found

    @property
    def ceilings(self) -> list[Ceilings]:
        return [found for found in (self.theoretical, self.empirical) if found is not None]

    def between_gpus(self, gpus: int) -> tuple[str, float] | None:
        """Way and bytes/s that `gpus` GPUs of one engine talk over; None where it is not known."""
        inside = self.gpus_per_node is None or gpus <= self.gpus_per_node
        rate = self.link_bytes_per_s if inside else self.network_bytes_per_s
        return None if rate is None else (self.link if inside else "the network", rate)


def hardware_path(run: Run) -> Path | None:
    """In the run directory (simulations write it there), else beside it (the demo measures once for all runs)."""
    return next((path for folder in (run.path, run.path.parent) if (path := folder / "hardware.json").exists()), None)


def hardware_of(run: Run) -> Hardware:
    """Raises DataError naming the file and the field."""
    path = hardware_path(run)
    if path is None:
        raise DataError(
            f"{run.path / 'hardware.json'}: does not exist, nor does one beside the run; write the machine's name, "
            "peak_flops, memory_bytes_per_s and measured (true or false) there"
        )
    values = read_json_table(path)
    for field, kind in (("name", str), ("measured", bool)):
        if not isinstance(values.get(field), kind):
            raise DataError(f"{path}: {field} = {values.get(field)!r} is not a {kind.__name__}")

    def rate(field: str, needed: bool = False) -> float | None:
        value = values.get(field)
        if value is None and not needed:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise DataError(f"{path}: {field} = {value!r} is not a positive number")
        return float(value)

    def ceilings(prefix: str, source: str) -> Ceilings | None:
        flops, size = rate(f"{prefix}_flops"), rate(f"{prefix}_memory_bytes_per_s")
        return None if flops is None or size is None else Ceilings(flops, size, source)

    theoretical: Ceilings | None
    empirical: Ceilings | None
    flops, size = rate("peak_flops", needed=True), rate("memory_bytes_per_s", needed=True)
    assert flops is not None
    assert size is not None
    if values["measured"]:
        theoretical, empirical = ceilings("data_sheet", "data sheet"), Ceilings(flops, size, "measured")
    else:
        source = str(values.get("empirical_from", "in practice"))
        theoretical, empirical = Ceilings(flops, size, "data sheet"), ceilings("empirical", source)
    per_node = rate("gpus_per_node")
    link = values.get("link") or Hardware.link
    if not isinstance(link, str):
        raise DataError(f"{path}: link = {link!r} is not a name")
    return Hardware(
        path, values["name"], theoretical, empirical, rate("link_bytes_per_s"), link, rate("network_bytes_per_s"),
        None if per_node is None else int(per_node), rate("price_per_hour"),
    )  # fmt: skip
