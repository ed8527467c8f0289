"""Reads the file of an offline wandb run."""

import json

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32_768, 7
"""Of LevelDB's log format: blocks of records, each with checksum, length (2 bytes) and type before it."""
FULL, LAST = 1, 4


def records_of(path):
    """Every record of a .wandb file, in order."""
    content, at, parts, found = path.read_bytes(), HEADER, b"", []  # wandb's own header is as long as a record's
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block that is too short for a header is padding
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def history_of(path):
    """Rows that were logged, without wandb's own columns."""
    rows = []
    for record in records_of(path):
        items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        if items:
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows
