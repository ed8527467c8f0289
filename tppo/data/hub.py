"""A data set on the Hugging Face hub, through `datasets`, which executes no code of a data set's author."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from profiling.errors import DataError, first_line
from tppo.data.tables import ROWS_AT_ONCE, Table

PROBE_TIMEOUT_S = 10.0
"""For the first answer of the hub. Without this question `datasets` itself tries for half a minute and prints it."""


def open_hub(name: str, *, split: str, subset: str, key: str) -> Table:
    """Raises DataError when it is not there, cannot be reached or lacks the subset or split.

    With HF_HUB_OFFLINE=1 only what an earlier run left in the cache is used.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    from huggingface_hub import constants

    datasets.disable_progress_bars()
    offline = constants.is_offline_mode() or datasets.config.HF_HUB_OFFLINE
    if not offline:
        _ask_the_hub(name, key)
    try:
        data = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # whatever a loader raises is about the data set that was asked for
        remedy = _remedy(error, offline, key)
        raise DataError(
            f"{key}.path = {name!r}, split {split!r}: cannot be loaded: {_line(error)}; {remedy}"
        ) from None

    def rows(names: Sequence[str]) -> Iterator[dict[str, Any]]:
        for batch in data.select_columns(list(names)).iter(ROWS_AT_ONCE):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    return Table(name, tuple(data.column_names), rows)


def _ask_the_hub(name: str, key: str) -> None:
    """One question with a time limit and no retries. Raises DataError when there is no such data set, or no answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=PROBE_TIMEOUT_S)
    except HfHubHTTPError as error:
        raise DataError(
            f"{key}.path = {name!r}: no local file or folder, and the hub refuses it: {_line(error)}; check the name, "
            "and HF_TOKEN where it is private"
        ) from None
    except HFValidationError as error:
        raise DataError(f"{key}.path = {name!r}: not a name on the hub: {_line(error)}") from None
    except Exception as error:  # of whichever HTTP library this version of the hub's client stands on
        raise DataError(
            f"{key}.path = {name!r}: no local file or folder, and the hub cannot be reached: {_line(error)}; check "
            "the network, set HF_HUB_OFFLINE=1 to use a copy in the cache, or name local files"
        ) from None


def _remedy(error: Exception, offline: bool, key: str) -> str:
    if offline:
        return "HF_HUB_OFFLINE is set and the cache lacks it: load it once with a network, or name local files"
    return f"see {key}.split and {key}.subset" if isinstance(error, ValueError) else "check the name and the network"


def _line(error: Exception) -> str:
    return first_line(error)[:300]
