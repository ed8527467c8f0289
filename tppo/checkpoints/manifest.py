"""The manifest of a checkpoint: whose it is, and the size and checksum of every file.

CRC-32, because it must run over every byte of every save and resume: 3 GB/s on a core, where BLAKE2b takes four times
as long. It finds every single fault of up to 32 bits in a row and misses others once in four thousand million; it is
no protection against someone who means to deceive. The manifest carries a checksum of itself.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from profiling.errors import ConfigError, DataError

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
    try:
        values = json.loads(path.read_bytes())
        checksum = values.pop("checksum")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {_line(error)}") from None
    if checksum != _checksum(values):
        raise DataError(f"{path} is damaged: its checksum differs")
    if values.get("schema") != SCHEMA:
        raise ConfigError(
            f"{checkpoint}: a checkpoint of schema {values.get('schema')} (tppo {values.get('toolkit')}), and this "
            f"tppo reads schema {SCHEMA}; go on with the tppo that wrote it"
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise DataError(f"{path} is not a manifest: {_line(error)}") from None


def verified(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written. Raises DataError, ConfigError."""
    manifest = read_manifest(checkpoint)
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


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
