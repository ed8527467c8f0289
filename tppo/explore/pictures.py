"""What the page draws of an option, as plain numbers, from the simulation that its row of the answer comes from.

The figures of `tppo plot` and of the report take seconds and a run directory; these take the same tables in memory,
and the browser draws them.
"""

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis.lanes import with_slots
from analysis.model_costs import spans_work
from profiling.ledger import WHOLE_CLUSTER
from simulator.about import files_about
from simulator.run import Result

MOST_LANES = 6
PIECES = 200
"""Of a lane: what lies in one is added up."""


def pictures_of(result: Result, *, engines: int | None = None) -> dict[str, Any]:
    """engines: of the option, where the simulation has some of them."""
    return {"timeline": timeline(result, engines=engines), "roofline": roofline(result)}


def timeline(result: Result, *, engines: int | None = None) -> dict[str, Any]:
    """A step after start-up, from its rollout to the next one's; seconds from its start. engines: as in `pictures_of`.

    lanes: engines, some of them where there are many, from the one that is done first to the one that is done last.
    Of each of PIECES equal pieces the shares in which the engine prefills and decodes, and of the decoding the part
    in which its slots were filled. phases: what follows the rollout, or goes on beside it.
    """
    phases = result.phases[result.phases.step > result.experiment.startup_steps]
    begins = phases[phases.name == "rollout"].sort_values("step").t_start.to_numpy()
    steps = phases[phases.name == "rollout"].sort_values("step").step.to_numpy()
    place = (len(begins) - 1) // 2
    start = float(begins[place])
    end = float(begins[place + 1]) if place + 1 < len(begins) else result.run.wall_s
    spans = with_slots(result.engine)
    spans = spans[(spans.t_end > start) & (spans.t_start < end)].sort_values("t_start", kind="stable")
    done = spans[spans.step == steps[place]].groupby("engine").t_end.max().sort_values(kind="stable")
    shown = np.linspace(0, len(done) - 1, min(MOST_LANES, len(done))).round().astype(int)
    edges = np.linspace(start, end, PIECES + 1)
    near = phases[(phases.t_end > start) & (phases.t_start < end) & (phases.name != "rollout")]
    beside = result.cluster.trainer_gpus > 0
    return {
        "step": int(steps[place]),
        "seconds": end - start,
        "engines": engines or result.cluster.engines,
        "beside": beside,
        "lanes": [_lane(spans[spans.engine == done.index[at]], int(done.index[at]), edges) for at in shown],
        "phases": [
            {"name": phase.name, "start": max(phase.t_start - start, 0.0), "end": min(phase.t_end, end) - start,
             "everywhere": not beside or phase.name in WHOLE_CLUSTER}
            for phase in near.itertuples() if phase.t_end > phase.t_start
        ],
    }  # fmt: skip


def _lane(spans: pd.DataFrame, engine: int, edges: np.ndarray) -> dict[str, Any]:
    decodes = (spans.kind == "decode").to_numpy()
    fill = np.where(decodes, np.minimum(1.0, spans.batch / spans.slots), 0.0)
    begins, ends = spans.t_start.to_numpy(float), spans.t_end.to_numpy(float)
    shares = {"prefill": np.where(decodes, 0.0, 1.0), "decode": decodes.astype(float), "filled": fill}
    found = {name: shares_of_pieces(begins, ends, value, edges).round(4) for name, value in shares.items()}
    return {"engine": engine, **{name: value.tolist() for name, value in found.items()}}


def shares_of_pieces(begins: np.ndarray, ends: np.ndarray, value: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The mean of `value` over each piece between two edges; 0 outside of the spans, which do not overlap."""
    if not len(begins):
        return np.zeros(len(edges) - 1)
    times = np.column_stack([begins, ends]).ravel()
    sums = np.concatenate([[0.0], np.cumsum(np.column_stack([value * (ends - begins), np.zeros(len(ends))]).ravel())])
    # The integral is flat up to the first span, grows inside spans, and is flat between them.
    integral = np.interp(edges, times, sums[:-1])
    return np.diff(integral) / np.diff(edges)


def roofline(result: Result) -> dict[str, Any]:
    """Ceilings and points of one GPU. missing: why there are none."""
    files = files_about(result.run.all_costs.engine)
    model, hardware = (json.loads(files[name]) for name in ("model.json", "hardware.json"))
    if model["uncounted"]:
        return {
            "missing": f"{model['name']} has {model['uncounted']}; FLOPs and bytes are counted of dense models only"
        }
    work = spans_work(result.cluster.gpus_per_engine, model, result.engine)
    sums = work.groupby("kind")[["flops", "bytes", "seconds"]].sum()
    return {
        "hardware": hardware,
        "points": [
            {"work": str(kind), "intensity": float(own.flops / own.bytes),
             "flops_per_s": float(own.flops / own.seconds),
             "seconds": float(own.seconds / result.cluster.engines)}
            for kind, own in sums.iterrows() if own.seconds > 0 and own.flops > 0
        ],
    }  # fmt: skip
