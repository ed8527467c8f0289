"""What a loss or gradient that was not finite leaves behind: RUN/evidence/step-N/.

    rank-R.json         step, model, which tensors or parameters were not finite, norms of gradients, the last row of
                        metrics, the rows without their tokens
    rank-R.safetensors  the micro-batch's tensors (batch.NAME), and the rows' tokens, log-probabilities and values
                        (rows.NAME, flat, with rows.NAME.lengths)

R: of a rank that saw it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save

from profiling.errors import RunError
from profiling.writer import write_atomically
from tppo.checkpoints.store import checkpoints_of
from tppo.checkpoints.stored_rows import RowTable
from tppo.learner.finite import NotFinite
from tppo.parallel.ranks import Ranks

NAMED = 3
"""Tensors that the one line names; the file names all."""


@contextmanager
def keeping_evidence(run: Path, step: int, ranks: Ranks, metrics: Mapping[str, Any] | None) -> Iterator[None]:
    """Turn NotFinite into a RunError on all ranks, with the evidence on the disk. metrics: the last row of them."""
    try:
        yield
    except NotFinite as fault:
        folder = ranks.from_main(folder_for(run, step))
        trouble = ""
        if fault.found is not None:
            try:
                write_evidence(folder, step, ranks.rank, fault, metrics)
            except (RunError, SafetensorError) as error:
                trouble = f" (incomplete: {error})"
        seen = sorted({name for names in ranks.gather(list(_faults(fault))) for name in names})
        more = f" and {len(seen) - NAMED} more" if len(seen) > NAMED else ""
        raise RunError(
            f"step {step}: the {fault.model}'s {fault.what} is not finite ({', '.join(seen[:NAMED])}{more}); the run "
            f"stopped before the optimiser moved, and nothing was saved after the last checkpoint. Evidence: "
            f"{folder}{trouble}. {remedy(run, fault)}"
        ) from fault


def folder_for(run: Path, step: int) -> Path:
    """A new one each time: a run that was resumed may stop at the same step again."""
    folder, number = run / "evidence" / f"step-{step:06d}", 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"step-{step:06d}-{number}")
    return folder


def remedy(run: Path, fault: NotFinite) -> str:
    rate = "optimizer.policy_lr" if fault.model == "policy" else "optimizer.value_lr"
    if checkpoints_of(run):
        return f"Go on with --resume {run} and a lower {rate}"
    return f"There is no checkpoint yet: start again, in another directory, with a lower {rate}"


def write_evidence(
    folder: Path, step: int, rank: int, fault: NotFinite, metrics: Mapping[str, Any] | None
) -> None:  # fmt: skip
    """Raises RunError or SafetensorError."""
    found = fault.found
    assert found is not None
    table = RowTable()
    table.add(found.rows)
    tensors = {f"rows.{name}": tensor for name, tensor in table.tensors().items()}
    tensors |= {f"batch.{name}": tensor.contiguous() for name, tensor in found.tensors.items()}
    about = {
        "step": step,
        "rank": rank,
        "what": fault.what,
        "model": fault.model,
        "not_finite": found.faults,
        "gradient_norms": found.norms,
        "metrics_of_the_step_before": metrics,
        "rows": table.records(),
    }
    write_atomically(folder / f"rank-{rank}.json", (json.dumps(plain(about), indent=1) + "\n").encode())
    write_atomically(folder / f"rank-{rank}.safetensors", save(tensors))


def plain(value: Any) -> Any:
    """With numbers that JSON has none for as text: nan, inf, -inf. Which of them it was is the evidence."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _faults(fault: NotFinite) -> dict[str, int]:
    return fault.found.faults if fault.found is not None else {}
