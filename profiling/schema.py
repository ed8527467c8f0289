"""The run directory's records: the only contract between the packages. Times: seconds from the start of the run.

    config.toml             the resolved configuration
    metrics.jsonl           a row per training step
    trace.jsonl             header, phases, device phases, counted work, schedule decisions, probes, notes, trailer
                            (append only)
    rollouts/step-N.parquet ROLLOUTS: a row per (response, step)
    engine/step-N.parquet   ENGINE: decode spans of constant batch, and prefills
    evaluations/step-N.parquet EVALUATIONS: a row per graded response of an evaluation; absent where there is none
    samples/step-N.parquet  SAMPLES: some responses of the step, as text; absent where none were asked for
    devices/part-N.parquet  DEVICES: samples of GPUs and of the host
    windows/part-N.parquet  WINDOWS: what drivers and counters averaged themselves
    ledger.parquet          LEDGER: GPU-seconds by step, GPU and cause
    summary.json            totals
    model.json, hardware.json  the model's dimensions and the device's ceilings, where they are known
    data.json               fingerprint of a data set's problems
    advice.json             what another window would save (profiling.advice)

Unmeasured is null, never 0.
"""

from typing import Any

import pyarrow as pa

from profiling.errors import shown

SCHEMA_VERSION = 3
"""Raised when a reader of the version before would fail on a run or misread it. A table of its own is no such change:
whoever does not know it does not open it, and a run without it has an empty one."""

LARGEST = 2.0**53
"""Of a number in a record: seconds, steps, tokens. Beyond it sums are not exact."""
MOST_GPUS = 16_384

PHASES = (
    "down",
    "rollout",
    "reward",
    "logprob_forward",
    "reference_forward",
    "value_forward",
    "update_value",
    "update_policy",
    "weight_sync",
    "switch",
    "evaluation",
    "checkpoint",
)
"""Phases of a step that a host declares. `rollout` is resolved further by the engine's records; `down`: a failure, and
what is lost by it and done again."""

CAUSES = (
    "down",
    "switch",
    "weight_sync",
    "evaluation",
    "checkpoint",
    "reward",
    "logprob_forward",
    "reference_forward",
    "value_forward",
    "update_value",
    "update_policy",
    "preempt_recompute",
    "re_prefill",
    "prefill",
    "decode_useful",
    "decode_underfilled",
    "kv_stall",
    "decode_discarded",
    "wait_tail",
    "wait_rollout",
    "wait_train",
    "wait_other",
    "unresolved",  # rollout time of a program that writes no rollout records
)
"""Exclusive and exhaustive names of a GPU-second, in the order in which the first match wins."""


def _columns(*names_and_types: tuple[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in names_and_types])


_INT, _FLOAT, _TEXT, _BOOL = pa.int64(), pa.float64(), pa.string(), pa.bool_()

ROLLOUTS = _columns(
    ("step", _INT),
    ("row", _INT),  # the response, over its whole life
    ("group", _INT),  # the prompt it answers
    ("engine", _INT),
    ("policy_version", _INT),  # of the tokens of this record
    ("prompt_tokens", _INT),
    ("context_before", _INT),  # prompt + all earlier response tokens
    ("tokens", _INT),  # generated in this step
    ("trained_tokens", _INT),  # of this row, for the first time, in this step; all its windows' under some recipes
    ("finished", _BOOL),
    ("discarded", _BOOL),  # dropped for good, untrained
    ("preempted", _INT),  # times, in this step
    ("reward", _FLOAT),  # null while unfinished
    ("t_start", _FLOAT),
    ("t_end", _FLOAT),
    nullable=("reward",),
)

ENGINE = _columns(
    ("step", _INT),
    ("engine", _INT),
    ("kind", _TEXT),  # prefill | decode
    ("t_start", _FLOAT),
    ("t_end", _FLOAT),
    ("steps", _INT),  # decode: iterations; prefill: 1
    ("batch", _INT),  # rows running, or admitted together
    ("context_tokens", _INT),  # decode: sum over the rows, before the first iteration; prefill: tokens computed
    ("attended_pairs", _INT),  # decode: sum over iterations of the total context; prefill: query-key pairs
    ("fresh_tokens", _INT),  # prefill: of rows never run before
    ("resumed_tokens", _INT),  # prefill: of rows carried over from an earlier step
    ("recomputed_tokens", _INT),  # prefill: of rows preempted in this step
    ("slots", _INT),  # rows the engine could run; 0: unlimited
    ("waiting", _INT),  # rows that wait for KV blocks meanwhile
)

DEVICES = _columns(  # null: not known, or not read at this instant (what changes slowly is read once a second)
    ("t", _FLOAT),
    ("device", _TEXT),  # GPU UUID, "host", or "host NAME" of another host
    ("utilisation", _FLOAT),  # fraction of the sensor's last window with a kernel running; host: of all cores
    ("memory_bytes", _FLOAT),
    ("power_watts", _FLOAT),  # the driver's average over a second; on old GPUs at the instant
    ("power_instant_watts", _FLOAT),
    ("energy_joules", _FLOAT),  # counter since boot or driver load
    ("sm_clock_mhz", _FLOAT),
    ("temperature_c", _FLOAT),
    ("event_reasons", _INT),  # NVML clocks-event (throttle) bit mask
    nullable=(
        "utilisation",
        "memory_bytes",
        "power_watts",
        "power_instant_watts",
        "energy_joules",
        "sm_clock_mhz",
        "temperature_c",
        "event_reasons",
    ),
)

WINDOWS = _columns(
    ("t_begin", _FLOAT),
    ("t_end", _FLOAT),
    ("device", _TEXT),  # GPU UUID, "host", or "host NAME" of another host
    ("metric", _TEXT),  # of WINDOW_METRICS
    ("value", _FLOAT),  # its mean between t_begin and t_end
)

WINDOW_METRICS = {
    "utilisation": "fraction of the time with a kernel running",
    "sm_activity": "fraction of the multiprocessors with a warp",
    "sm_occupancy": "fraction of the warps that could run",
    "tensor_activity": "fraction of the time in tensor operations",
    "dram_activity": "fraction of the memory's bandwidth",
    "pcie_sent_bytes_per_s": "bytes/s",
    "pcie_received_bytes_per_s": "bytes/s",
    "nvlink_sent_bytes_per_s": "bytes/s",
    "nvlink_received_bytes_per_s": "bytes/s",
    "disk_read_bytes_per_s": "bytes/s",
    "disk_write_bytes_per_s": "bytes/s",
}

EVALUATIONS = _columns(
    ("step", _INT),  # after which the policy was evaluated; null: a model outside of any run
    ("problem", _INT),  # number of the held-out problem
    ("sample", _INT),
    ("tokens", _INT),  # of the response
    ("finished", _BOOL),  # it ended with a stop token
    ("correct", _BOOL),
    ("answer", _TEXT),  # as the reward read it, equal ones of a problem as the first of them; null: none
    nullable=("step", "answer"),
)

SAMPLES = _columns(
    ("step", _INT),
    ("row", _INT),
    ("prompt", _TEXT),  # as the model sees it, special tokens included; so is the response, over all windows
    ("response", _TEXT),
    ("answer", _TEXT),  # as the reward read it; null: none
    ("reward", _FLOAT),  # this and the next: null while unfinished
    ("correct", _BOOL),
    ("tokens", _INT),  # of the response, over all windows
    ("finished", _BOOL),
    ("policy_version", _INT),  # of the last window
    nullable=("answer", "reward", "correct"),
)

LEDGER = _columns(
    ("step", _INT),  # -1: outside every step
    ("gpu", _INT),
    ("cause", _TEXT),
    ("seconds", _FLOAT),
)

TABLES = {
    "rollouts": ROLLOUTS,
    "engine": ENGINE,
    "evaluations": EVALUATIONS,
    "samples": SAMPLES,
    "devices": DEVICES,
    "windows": WINDOWS,
}
PART_NAMES = {
    "rollouts": "step",
    "engine": "step",
    "evaluations": "step",
    "samples": "step",
    "devices": "part",
    "windows": "part",
}

TRACE_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "header": {
        "schema": int,
        "clock": str,  # "perf_counter" or "virtual"
        "unix_time_s": (int, float, type(None)),  # at t = 0; null in a simulation
        "host": (str, type(None)),
        "simulated": bool,
        "devices": list,  # GPUs: [{"uuid", "name", "index", "part_of"}]; [] where only the sampler knows them
        "capabilities": dict,  # device -> metric -> ok | not supported | no permission | ...; as devices
        "gpus": int,  # GPU-equivalents of the ledger; a CPU-only host counts as 1
        "engines": int,
        "gpus_per_engine": int,
        "trainer_gpus": int,  # 0 when colocated
        "schedule": (dict, type(None)),
    },
    "phase": {"name": str, "step": int, "t_start": (int, float), "t_end": (int, float), "depth": int},
    "device_phase": {"name": str, "step": int, "t_start": (int, float), "t_end": (int, float), "depth": int},
    "work": {  # of a step's training phase; tokens and pairs without padding
        "name": str,
        "step": int,
        "passes": int,  # forward, of a micro-batch each
        "tokens": int,
        "pairs": int,  # attended query-key pairs
        "outputs": int,  # positions that the output layer was applied to
        "backward_passes": int,
        "backward_tokens": int,
        "backward_pairs": int,
        "backward_outputs": int,
        "updates": int,  # optimiser steps
    },
    "plan_step": {
        "step": int,
        "t": (int, float),
        "carried": list,
        "demand": dict,
        "admissions": list,
        "rows_wanted": int,
    },
    "row_end": {
        "step": int,
        "t": (int, float),
        "running": int,  # this and the next three: before the row ended
        "rows_wanted": int,
        "finished": int,
        "ended": bool,
        "event": dict,
        "decisions": list,
    },
    "probe": {"step": int, "t": (int, float), "seconds": (int, float)},
    "note": {"text": str},
    "trailer": {"t": (int, float), "status": str},
}
"""Type of record -> its fields; more fields are allowed. `carried`, `demand`, `admissions`, `event` and `decisions`
are the dataclasses of tppo.schedule as plain data; `depth` counts the phases around a phase; a `device_phase` is when
the GPU, not the host, reached its ends."""

SUMMARY_NUMBERS = (
    "wall_seconds", "pretrain_seconds", "rollout_seconds", "steps", "generated_tokens", "seconds_per_step",
    "seconds_per_finished_row", "seconds_per_trained_token", "gpu_seconds",
)  # fmt: skip


def fault_in(record: Any) -> str | None:
    """What is wrong with a trace record, or None."""
    if not isinstance(record, dict):
        return "not a JSON object"
    kind = record.get("type", "")
    if not isinstance(kind, str) or kind not in TRACE_FIELDS:
        return f"type = {shown(record.get('type'))} is not one of {', '.join(TRACE_FIELDS)}"
    fields = TRACE_FIELDS[kind]
    for name, kinds in fields.items():
        if name not in record:
            return f"{record['type']}.{name} is missing"
        value = record[name]
        accepted = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            return f"{kind}.{name} = {shown(value)} is not {' or '.join(k.__name__ for k in accepted)}"
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
            return f"{kind}.{name} = {value} is beyond {LARGEST:g}"
    checks = {"header": fault_in_header, "trailer": fault_in_trailer}
    return checks[kind](record) if kind in checks else None


def fault_in_header(header: dict[str, Any]) -> str | None:
    for name, least in {"gpus": 1, "engines": 1, "gpus_per_engine": 1, "trainer_gpus": 0}.items():
        if header[name] < least:
            return f"header.{name} = {header[name]} is not at least {least}"
    if header["engines"] * header["gpus_per_engine"] + header["trainer_gpus"] > MOST_GPUS:
        return f"header: {header['engines']} engines of {header['gpus_per_engine']} GPUs are more than {MOST_GPUS}"
    if not all(isinstance(device, dict) for device in header["devices"]):
        return "header.devices is not a list of tables"
    if not isinstance(header.get("versions") or {}, dict):
        return f"header.versions = {shown(header['versions'])} is not a table"
    if header["schedule"] is not None and not isinstance(header["schedule"].get("kind"), str):
        return f"header.schedule.kind = {shown(header['schedule'].get('kind'))} is not str"
    if not is_count(header.get("startup_steps", 0)):
        return f"header.startup_steps = {shown(header['startup_steps'])} is not a whole number of at least 0"
    if header["schema"] != SCHEMA_VERSION:
        return f"schema version {header['schema']} is not {SCHEMA_VERSION}; use the toolkit that wrote the run"
    return None


def fault_in_trailer(trailer: dict[str, Any]) -> str | None:
    sampler = trailer.get("sampler")
    for name in ("ticks", "missed_ticks"):
        value = sampler.get(name) if isinstance(sampler, dict) else None
        if not is_count(value):
            return f"trailer.sampler.{name} = {shown(value)} is not a whole number of at least 0"
    return None


def is_count(value: Any) -> bool:
    """A whole number of at least 0, or null."""
    return value is None or (type(value) is int and 0 <= value <= LARGEST)


def fault_in_metrics(row: Any) -> str | None:
    """What is wrong with a row of metrics.jsonl, or None: every value is a number or null, `step` a whole number."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if type(row.get("step")) is not int or abs(row["step"]) > LARGEST:
        return f"step = {shown(row.get('step'))} is not a whole number"
    for name, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"{name} = {shown(value)} is neither a number nor null"
    return None


def fault_in_summary(summary: Any) -> str | None:
    """What is wrong with summary.json, or None: totals are numbers or null, and those that tables and predictions are
    made of are there."""
    if not isinstance(summary, dict):
        return "not a JSON object"
    for name in SUMMARY_NUMBERS:
        if name not in summary:
            return f"{name} is missing"
    for name, value in summary.items():
        if name == "ledger":
            if not isinstance(value, dict):
                return f"ledger = {shown(value)} is not a table"
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return f"{name} = {shown(value)} is neither a number nor null"
        elif value is not None and not abs(value) <= LARGEST:
            return f"{name} = {value} is beyond {LARGEST:g}"
    for name in ("steps", "startup_steps"):
        if not is_count(summary.get(name)):
            return f"{name} = {shown(summary[name])} is not a whole number of at least 0"
    return None
