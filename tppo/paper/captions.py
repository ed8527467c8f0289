"""CAPTIONS.md: what each figure of the set shows and does not, what it was made from, how to make it again."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.chosen import listed
from analysis.figures import FIGURES
from analysis.hardware import hardware_of, hardware_path
from analysis.tables import processor, provenance, seed_of
from profiling.reader import Run
from tppo.paper import DEMO, PaperSettings


@dataclass(frozen=True)
class Drawn:
    """A figure of the set: of which runs, and where; or why it is not there."""

    figure: str
    source: str
    """simulated or demo."""
    runs: Sequence[Run]
    files: Sequence[Path] = ()
    reason: str | None = None


def captions(drawn: Sequence[Drawn], settings: PaperSettings, command: str, output: Path) -> str:
    """The whole file. Paths of runs are relative to `output`."""
    parts = [
        "# Figures",
        "Every figure is there as PDF (column width, fonts embedded), PNG and, with the numbers that it draws, CSV. "
        "Simulated is what the simulator computed, measured what a run on this machine did, published what a paper "
        "reports; no figure mixes them without saying so.",
        f"Made by, and made again by:\n\n    {command}",
    ]
    parts += [_caption(one, settings, output) for one in drawn if one.reason is None]
    missing = [one for one in drawn if one.reason is not None]
    if missing:
        lines = "\n".join(f"- {one.figure} ({one.source}): {one.reason}" for one in missing)
        parts.append(f"## Left out\n\n{lines}")
    return "\n\n".join(parts) + "\n"


def _caption(one: Drawn, settings: PaperSettings, output: Path) -> str:
    module = FIGURES[one.figure]
    title = (module.__doc__ or one.figure).strip().splitlines()[0].rstrip(".")
    files = ", ".join(f"`{path.relative_to(output)}`" for path in one.files)
    lines = [
        f"## {title} ({provenance(one.runs)})",
        f"Files: {files}.",
        f"**Shows.** {module.CAPTION}",
    ]
    if not_shown := settings.not_shown.get(one.figure, {}).get(one.source):
        lines.append(f"**Does not show.** {' '.join(not_shown.split())}")
    lines.append(f"**From.** {_from(one.runs)}")
    if one.source != DEMO and settings.assumed:
        lines.append(f"**Assumed.** {' '.join(settings.assumed.split())}")
    for number in settings.published:
        if number.figure == one.figure and one.source != DEMO:
            lines.append(f"**Published, not ours.** {number.label}: {number.value:g} ({number.source}).")
    paths = " ".join(os.path.relpath(run.path, output) for run in one.runs)
    lines.append(f"**Again, from this folder.** `tppo plot {paths} --figure {one.figure} --style paper --format pdf`")
    return "\n\n".join(lines)


def _from(runs: Sequence[Run]) -> str:
    """Runs, model, hardware, GPUs, seeds."""
    kinds = provenance(runs)
    models = sorted({_model(run) for run in runs})
    machines = sorted({hardware_of(run).name if hardware_path(run) else "unnamed hardware" for run in runs})
    gpus = sorted({run.header["gpus"] for run in runs})
    seeds = sorted({_seed(run) for run in runs})
    count = f"{len(runs)} {kinds} run{'s' if len(runs) != 1 else ''}: {listed([run.name for run in runs], 6)}."
    unit = f"{processor(runs)}{'s' if gpus[-1] > 1 else ''}"
    return (
        f"{count} Model: {', '.join(models)}. Hardware: {', '.join(machines)}; {', '.join(map(str, gpus))} {unit}. "
        f"Seed{'s' if len(seeds) != 1 else ''}: {', '.join(seeds)}."
    )


def _model(run: Run) -> str:
    if run.simulated:
        return str(run.config.get("cost", {}).get("model") or "not named: costs are given")
    return Path(str(run.config.get("model", {}).get("path", "not named"))).name


def _seed(run: Run) -> str:
    if run.simulated:
        return str(run.config.get("workload", {}).get("seed", 0))
    own = seed_of(run)
    return "not named" if own is None else str(own)
