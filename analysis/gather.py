"""One table of many runs: what a run lacks leaves it out with its reason, and no run hides behind another."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis.chosen import asked, left_out
from profiling.errors import DataError
from profiling.reader import Run

LEFT_OUT = "left_out"
"""Key of DataFrame.attrs: the names of the runs that the table lacks, each with the reason."""


def gather(runs: Sequence[Run], table_of: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
    """The tables of all runs, one after the other. A run whose table_of raises DataError, or gives no row, is left out
    and named in attrs. Raises DataError, the first run's, when none is left."""

    def rows_of(run: Run) -> pd.DataFrame:
        table = table_of(run)
        if table.empty:
            raise DataError(f"{run.path}: has no finished training step yet")
        return table

    tables, reasons = asked(runs, rows_of)
    gathered = pd.concat([table for _, table in tables], ignore_index=True)
    gathered.attrs[LEFT_OUT] = reasons
    return gathered


def left_out_note(table: pd.DataFrame) -> str:
    """`Left out: NAMES (reason); ...`, or nothing."""
    return "".join(left_out(table.attrs.get(LEFT_OUT, [])))


def decimated(table: pd.DataFrame, x: str, spread: Sequence[str], most: int) -> pd.DataFrame:
    """At most `most` rows, in order of x: neighbours become one row with the means of all numbers, the least and the
    greatest of each column of `spread` as NAME_min and NAME_max, and `points`, the number of rows that it stands for.

    A row of one point has its own value as mean, least and greatest. Nulls do not count; all null stays null.
    """
    table = table.sort_values(x, kind="stable")
    place = np.arange(len(table))
    bins = place if len(table) <= most else place * most // len(table)
    numbers = table.select_dtypes("number")
    groups = numbers.groupby(bins)
    result = groups.mean()
    for column in spread:
        result[f"{column}_min"], result[f"{column}_max"] = groups[column].min(), groups[column].max()
    result["points"] = groups.size()
    return result.reset_index(drop=True)


def numbers(values: pd.Series) -> pd.Series:
    """As floats; what is no finite number is null."""
    return pd.to_numeric(values, errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)
