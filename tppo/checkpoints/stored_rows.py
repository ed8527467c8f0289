"""Rows on the disk: one record a row, and its tokens, log-probabilities and values as flat arrays.

As JSON, a step of long responses would take hundreds of megabytes. A row that stands in two places (one that carries
over and whose batch trains again) is stored once and stands in both again: what one place appends, the other sees.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from tppo.rollout.rows import Row

LISTS = {"prompt_ids": torch.int64, "response_ids": torch.int64, "log_probs": torch.float64, "values": torch.float64}
"""Per-token fields of a row. float64 holds every Python float exactly."""

ROWS = TypeAdapter(list[Row])


class RowTable:
    """Collects rows by identity; `add` returns their places."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._place: dict[int, int] = {}

    def add(self, rows: Iterable[Row]) -> list[int]:
        places = []
        for row in rows:
            if id(row) not in self._place:
                self._place[id(row)] = len(self.rows)
                self.rows.append(row)
            places.append(self._place[id(row)])
        return places

    def records(self) -> list[dict[str, Any]]:
        """All fields but the per-token ones, for JSON."""
        names = [field.name for field in fields(Row) if field.name not in (*LISTS, "problem")]
        return [{"problem": asdict(row.problem), **{name: getattr(row, name) for name in names}} for row in self.rows]

    def tensors(self) -> dict[str, Tensor]:
        """NAME: every row's list, one after the other. NAME.lengths: how long each is."""
        tensors = {}
        for name, dtype in LISTS.items():
            lists = [getattr(row, name) for row in self.rows]
            tensors[name] = torch.tensor([item for own in lists for item in own], dtype=dtype)
            tensors[f"{name}.lengths"] = torch.tensor([len(own) for own in lists], dtype=torch.int64)
        return tensors


def rows_of(records: Sequence[dict[str, Any]], tensors: dict[str, Tensor], *, vocabulary: int) -> list[Row]:
    """The rows of a `RowTable`, in order. vocabulary: tokens that the policy knows. Raises KeyError, TypeError,
    ValueError or RuntimeError when they are not rows of its."""
    lists = {name: _lists(name, tensors, len(records)) for name in LISTS}
    for name in ("prompt_ids", "response_ids"):
        ids = tensors[name]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"{name} are not all tokens of the policy, which knows {vocabulary}")
    rows = ROWS.validate_json(json.dumps([{**record, "prompt_ids": []} for record in records]), strict=True)
    for place, row in enumerate(rows):
        for name, own in lists.items():
            setattr(row, name, own[place])
        if len(row.log_probs) != len(row.response_ids) or not 0 <= row.window_start <= len(row.response_ids):
            raise ValueError(f"row {row.row}: its tokens, log-probabilities and window do not belong together")
    return rows


def _lists(name: str, tensors: dict[str, Tensor], rows: int) -> list[list[Any]]:
    flat, lengths = tensors[name], tensors[f"{name}.lengths"].tolist()
    if flat.dtype != LISTS[name] or len(lengths) != rows:
        raise ValueError(f"{name}: {len(lengths)} lists of {flat.dtype} for {rows} rows, not of {LISTS[name]}")
    return [part.tolist() for part in flat.split(lengths)]
