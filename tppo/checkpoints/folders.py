"""Folders that are whole or absent, after a kill and after a power cut.

A folder is written under a hidden name, every file and directory of it is synced, and one rename puts it in place.
Hidden names tell what a kill left behind:

    .step-000100.tmp      was being written: of no use
    .step-000100.old      was being replaced: still the newest where no step-000100 stands beside it
    .step-000100.pruned   was being deleted
"""

import os
import shutil
from pathlib import Path

TMP, OLD, PRUNED = "tmp", "old", "pruned"


def hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}")


def empty_folder_for(target: Path) -> Path:
    """The folder to write into before `put_in_place`. Raises OSError."""
    temporary = hidden(target, TMP)
    remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def put_in_place(target: Path) -> None:
    """Make what was written `target`. One that is there already goes once the new one stands. Raises OSError."""
    temporary, old = hidden(target, TMP), hidden(target, OLD)
    sync_tree(temporary)
    replaces = target.exists()
    if replaces:
        remove(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    sync(target.parent)
    remove(old)


def prune(folder: Path) -> None:
    """Delete a folder: from the first moment it is not there any more. What cannot be deleted goes when the run
    starts next. Raises OSError."""
    going = hidden(folder, PRUNED)
    remove(going)
    folder.rename(going)
    remove(going)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def tidy(parent: Path) -> None:
    """Clear what a kill left in `parent`; a folder that was being replaced comes back. Raises OSError."""
    for leftover in sorted(parent.glob(".*")):
        name, _, kind = leftover.name.removeprefix(".").rpartition(".")
        if kind == OLD and not (parent / name).exists():
            leftover.rename(parent / name)
        elif kind in (TMP, OLD, PRUNED):
            remove(leftover)


def sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
