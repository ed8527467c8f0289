"""Rows on the disk: one record a row, and its tokens, log-probabilities and values as flat arrays.

As JSON, a step of long responses would take hundreds of megabytes. A row that stands in two places (one that carries
over and whose batch trains again) is stored once and stands in both again: what one place appends, the other sees.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from tppo.data.problem import Problem
from tppo.rollout.rows import Row

LISTS = {"prompt_ids": torch.int64, "response_ids": torch.int64, "log_probs": torch.float64, "values": torch.float64}
"""Per-token fields of a row. float64 holds every Python float exactly."""


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


def rows_of(records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Row]:
    """The rows of a `RowTable`, in order. Raises KeyError, TypeError, ValueError or RuntimeError when they are not."""
    lists = {
        name: [part.tolist() for part in tensors[name].split(tensors[f"{name}.lengths"].tolist())] for name in LISTS
    }
    return [
        Row(
            **{**record, "problem": Problem(**record["problem"])},
            **{name: own[place] for name, own in lists.items()},
        )
        for place, record in enumerate(records)
    ]
