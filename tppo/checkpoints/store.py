"""The checkpoints of a run: where they are, which one to go on from, which ones to keep."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from profiling.errors import ConfigError, DataError, InputError, RunError
from tppo.checkpoints.folders import OLD, hidden, prune, tidy
from tppo.checkpoints.manifest import MANIFEST, Manifest, read_manifest, verified


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    path: Path
    manifest: Manifest
    passed_over: dict[Path, str]
    """Newer ones that are of no use -> why, in a line that names the file."""

    @property
    def run(self) -> Path:
        return self.path.parent.parent


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int | None:
    """None for anything that is not named like a checkpoint."""
    found = re.fullmatch(r"step-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def checkpoints_of(run: Path) -> list[Path]:
    """Oldest first, usable or not. A checkpoint whose replacement was cut short by a kill stands under its hidden
    name. Raises DataError."""
    parent = run / "checkpoints"
    steps = {}
    try:
        for path in parent.iterdir() if parent.is_dir() else ():
            name = path.name.removeprefix(".").removesuffix(f".{OLD}") if path.name.startswith(".") else path.name
            visible = parent / name
            step = step_of(visible)
            if step is not None and path in (visible, hidden(visible, OLD)) and not path.is_symlink():
                steps[step] = visible if visible.exists() else path
    except OSError as error:
        raise DataError(f"{parent}: cannot be read: {error.strerror}") from None
    return [steps[step] for step in sorted(steps)]


def newest_usable(run: Path, *, to_resume: bool = False) -> Found:
    """The newest checkpoint whose every byte is as written. to_resume: and whose run still has every byte that was
    written before it. Changes nothing. Raises DataError naming all when none is usable, ConfigError when the newest
    is of another version."""
    passed_over: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints_of(run)):
        try:
            manifest = verified(checkpoint)
            if to_resume:
                check_the_run_is_as_long(run, manifest)
            return Found(checkpoint, manifest, passed_over)
        except DataError as error:
            passed_over[checkpoint] = str(error)
    if not passed_over:
        raise DataError(f"{run}: has no checkpoint to resume from; start the run again, in another directory")
    raise DataError(f"{run}: has no usable checkpoint: {'; '.join(passed_over.values())}")


def check_the_run_is_as_long(run: Path, manifest: Manifest) -> None:
    for name, offset in manifest.offsets.items():
        file = run / name
        if not file.exists() or file.stat().st_size < offset:
            raise DataError(f"{file} is shorter than at step {manifest.step} ({offset} bytes)")


def make_ready_to_resume(run: Path, found: Found) -> None:
    """Clear what a kill left. Checkpoints that were passed over are of steps that will be trained again: they get the
    ending `.unusable`, out of the way and not deleted. Raises RunError."""
    try:
        for path in found.passed_over:
            _set_aside(path)
        tidy(run / "checkpoints")
    except OSError as error:
        raise RunError(f"{run / 'checkpoints'}: cannot be written: {error.strerror}") from None


def _set_aside(checkpoint: Path) -> None:
    name, number = checkpoint.name.removeprefix(".").removesuffix(f".{OLD}"), 1
    while (target := checkpoint.with_name(f"{name}.unusable" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    checkpoint.rename(target)


def prune_checkpoints(run: Path, newest: Path, *, keep_last: int, keep_best: int) -> None:
    """Delete all but the last `keep_last` and the best `keep_best` by accuracy. 0 of the last: keep all.

    newest: the checkpoint that was just written; it stays, and later steps do not count. Raises RunError.
    """
    if keep_last == 0:
        return
    limit = step_of(newest)
    assert limit is not None
    known = [path for path in checkpoints_of(run) if (step_of(path) or 0) <= limit]
    best = by_accuracy(known)[:keep_best]
    for path in known[:-keep_last]:
        if path not in best:
            try:
                prune(path)
            except OSError as error:
                raise RunError(f"{path}: cannot be deleted to keep the last {keep_last}: {error.strerror}") from None


def by_accuracy(checkpoints: list[Path]) -> list[Path]:
    """Those with an accuracy, best first; of equal ones the newest first."""
    scored = []
    for path in checkpoints:
        try:
            manifest = read_manifest(path)
        except InputError:
            continue
        if manifest.accuracy is not None:
            scored.append((manifest.accuracy, manifest.step, path))
    return [path for _, _, path in sorted(scored, key=lambda item: item[:2], reverse=True)]


def chosen_checkpoint(source: Path, name: str | None) -> tuple[Path, Manifest]:
    """A checkpoint by the name that --checkpoint gives: step-000100, best, or last (None), of a run directory; or
    `source` itself. Every byte of it is as it was written. Damaged ones that `last` passes over are named on standard
    error. Raises DataError, ConfigError."""
    if (source / MANIFEST).exists():
        if name is not None:
            raise ConfigError(f"--checkpoint {name}: {source} is a checkpoint itself; leave it out")
        return source.resolve(), verified(source)
    if not source.is_dir():
        raise DataError(f"{source}: no such run directory")
    known = checkpoints_of(source)
    if not known:
        raise DataError(
            f"{source}: has no checkpoint; one is written at the end, and every train.checkpoint_every steps"
        )
    if name in (None, "last"):
        found = newest_usable(source)
        for reason in found.passed_over.values():
            print(f"tppo: {reason}; taking {found.path.name}", file=sys.stderr)
        return found.path.resolve(), found.manifest
    if name == "best":
        best = by_accuracy(known)
        if not best:
            raise DataError(f"{source}: none of its checkpoints has an accuracy; name one, or take last")
        return best[0].resolve(), verified(best[0])
    for path in known:
        if path.name == name:
            return path.resolve(), verified(path)
    raise ConfigError(
        f"--checkpoint {name}: {source} has {', '.join(path.name for path in known)}; or write best or last"
    )
