"""The manifest of a checkpoint: whose it is, and the size and checksum of every file.

CRC-32, because it must run over every byte of every save and resume: 3 GB/s on a core, where BLAKE2b takes four times
as long. It finds every single fault of up to 32 bits in a row and misses others once in four thousand million; it is
no protection against someone who means to deceive. The manifest carries a checksum of itself.
"""

import json
import os
import stat
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from profiling.errors import ConfigError, DataError, first_line
from profiling.files import read_json_table
from profiling.writer import APPEND_ONLY

SCHEMA = 1
"""Number of the form that checkpoints have. It rises when an older toolkit would read a checkpoint wrongly."""
MANIFEST = "manifest.json"
PIECE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Manifest:
    schema: int = SCHEMA
    toolkit: str
    """Version of tppo that wrote the checkpoint."""
    algorithm: str
    model: dict[str, Any]
    """The policy's architecture and dimensions, as in the run's model.json."""
    step: int
    accuracy: float | None
    """val/accuracy of exactly these weights; None where this step has no evaluation."""
    offsets: dict[str, int]
    """Length in bytes of the run's append-only files at this step."""
    files: dict[str, list[int]]
    """Size in bytes and CRC-32 of every file, by its path in the checkpoint."""


def toolkit_version() -> str:
    try:
        return version("tppo")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def checksums(folder: Path) -> dict[str, list[int]]:
    """[size, CRC-32] of every file but the manifest. Threads, because zlib lets go of the interpreter lock."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(size_and_crc, paths))
    return {path.relative_to(folder).as_posix(): got for path, got in zip(paths, found, strict=True)}


def size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return [size, crc]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    values = asdict(manifest)
    (folder / MANIFEST).write_text(json.dumps({**values, "checksum": _checksum(values)}, indent=1) + "\n")


def read_manifest(checkpoint: Path) -> Manifest:
    """Raises DataError when it is missing or damaged, ConfigError when a newer toolkit wrote it.

    The checksum comes first: its rule holds for every schema, so that a flipped bit is never taken for a new version.
    """
    path = checkpoint / MANIFEST
    if not path.exists():
        raise DataError(f"{path} is missing")
    values = read_json_table(path)
    if values.pop("checksum", None) != _checksum(values):
        raise DataError(f"{path} is damaged: its checksum differs")
    if values.get("schema") != SCHEMA:
        raise ConfigError(
            f"{checkpoint}: a checkpoint of schema {values.get('schema')} (tppo {values.get('toolkit')}), and this "
            f"tppo reads schema {SCHEMA}; go on with the tppo that wrote it"
        )
    try:
        manifest = Manifest(**values)
    except TypeError as error:
        raise DataError(f"{path} is not a manifest: {first_line(error)}") from None
    fault = fault_in(manifest)
    if fault:
        raise DataError(f"{path} is not a manifest: {fault}")
    return manifest


def fault_in(manifest: Manifest) -> str | None:
    """What no toolkit of ours wrote, however well its checksum fits: resuming shortens the files that `offsets` names,
    and reads those that `files` names, so neither may lead elsewhere."""
    if not isinstance(manifest.files, dict) or not isinstance(manifest.offsets, dict):
        return "files and offsets are not tables"
    for name, entry in manifest.files.items():
        if not _stays_inside(name):
            return f"files names {name!r}, which is outside of the checkpoint"
        if not isinstance(entry, list) or len(entry) != 2 or not all(_is_count(number) for number in entry):
            return f"files: {name!r} has no size and checksum"
    for name, offset in manifest.offsets.items():
        if name not in APPEND_ONLY:
            return f"offsets names {name!r}, which is not one of {', '.join(APPEND_ONLY)}"
        if not _is_count(offset):
            return f"offsets: {name!r} has {offset!r:.40}, which is no length"
    if not _is_count(manifest.step):
        return f"step is {manifest.step!r:.40}, which is no step"
    if not isinstance(manifest.model, dict):
        return "model is not a table"
    if isinstance(manifest.accuracy, bool) or not isinstance(manifest.accuracy, int | float | None):
        return f"accuracy is {manifest.accuracy!r:.40}, which is no number"
    return None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def verified(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written. Raises DataError, ConfigError."""
    manifest = read_manifest(checkpoint)
    check_all_is_its_own(checkpoint)
    for name, (size, crc) in manifest.files.items():
        path = checkpoint / name
        try:
            found = path.stat().st_size
            if found != size:
                raise DataError(f"{path} is damaged: {found} bytes, not {size}")
            if size_and_crc(path)[1] != crc:
                raise DataError(f"{path} is damaged: its checksum differs")
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return manifest


def check_all_is_its_own(checkpoint: Path) -> None:
    """Raises DataError at a link, whose target an export would copy, and at a pipe, which would be read for ever."""
    check_plain(checkpoint.rglob("*"), "a checkpoint has")


def check_plain(paths: Iterable[Path], who_has: str) -> None:
    """Raises DataError at what is neither a file nor a folder."""
    path = None
    try:
        for path in sorted(paths):
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise DataError(f"{path} is a link or a device; {who_has} plain files only: copy it there")
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from None


def check_it_fits(checkpoint: Path, manifest: Manifest, *, algorithm: str, model: dict[str, Any] | None) -> None:
    """Raises ConfigError when the checkpoint is another algorithm's or another model's. model: the run's model.json,
    None where it is lost."""
    if manifest.algorithm != algorithm:
        raise ConfigError(
            f"{checkpoint}: a checkpoint of algorithm {manifest.algorithm}, and the run trains with {algorithm}; "
            "start another run instead"
        )
    for name, wanted in (model or {}).items():
        if manifest.model.get(name) != wanted:
            raise ConfigError(
                f"{checkpoint}: a checkpoint of another model: {name} is {manifest.model.get(name)}, and the run's "
                f"is {wanted}; resume the run that it belongs to"
            )


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
