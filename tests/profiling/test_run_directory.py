import json
import os
import resource
import subprocess
import sys

import pytest

from profiling.errors import ConfigError, DataError, RunError
from profiling.ledger import Cluster
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.schema import DEVICES, LEDGER, SUMMARY_NUMBERS
from profiling.settings import check_settings, parse_overrides, to_toml, with_overrides
from profiling.writer import RunWriter, write_atomically
from simulator.experiment import Experiment
from tppo.config import RunConfig


@pytest.fixture
def writer(tmp_path):
    return RunWriter(tmp_path / "run", header=plain_header(), config_toml="")


def device_rows(n):
    return {name: [0.5] * n if name != "device" else ["host"] * n for name in DEVICES.names} | {
        "event_reasons": [None] * n
    }


def test_what_is_written_is_read_back(writer):
    writer.table("devices", 0, device_rows(2))
    writer.metrics({"step": 1, "loss": float("nan")})
    writer.ledger({"step": [1], "gpu": [0], "cause": ["prefill"], "seconds": [2.0]})
    summary = {**dict.fromkeys(SUMMARY_NUMBERS), "wall_seconds": 2.0}
    writer.summary(summary)
    writer.close(t=2.0, status="finished")
    run = Run(writer.path)
    assert run.devices.t.to_list() == [0.5, 0.5]
    assert run.devices.event_reasons.isna().all()
    assert run.metrics.loss.isna().all()
    assert run.ledger.columns.to_list() == LEDGER.names
    assert run.summary == summary
    assert run.trailer["status"] == "finished"


@pytest.mark.parametrize(
    ("seconds", "fault"),
    [([2.0, 6.0], "GPU 1 sums to 6, not to the run's 2 s"), ([2.0], "sums to 2 GPU-seconds, not to the run's 4")],
)
def test_a_ledger_whose_seconds_are_not_the_runs_is_refused(writer, seconds, fault):
    many = len(seconds)
    writer.ledger({"step": [1] * many, "gpu": range(many), "cause": ["prefill"] * many, "seconds": seconds})
    assert len(Run(writer.path).ledger) == many  # nothing to compare it with
    writer.summary({**dict.fromkeys(SUMMARY_NUMBERS), "wall_seconds": 2.0, "gpu_seconds": 4.0})
    writer.close(t=2.0, status="finished")
    with pytest.raises(DataError, match=rf"ledger\.parquet: column 'seconds'.*{fault}"):
        _ = Run(writer.path).ledger


def test_a_killed_run_names_the_gpus_that_were_sampled(writer):
    gpu = {"uuid": "GPU-a", "name": "H200", "index": 0, "part_of": None}
    instance = {"uuid": "MIG-a", "name": "H200 MIG", "index": 0, "part_of": "GPU-a"}
    report = {"devices": [gpu, instance, {"uuid": "host"}, "?"], "capabilities": {"GPU-a": {"energy_joules": "ok"}}}
    (writer.path / "sampler.json").write_text(json.dumps(report))
    header = Run(writer.path).header
    assert header["devices"] == [gpu, instance]
    assert header["capabilities"] == report["capabilities"]
    assert (header["gpus"], header["gpus_per_engine"]) == (1, 1)
    (writer.path / "sampler.json").write_text('{"devices": 3, "capabilities": []}')
    assert Run(writer.path).header["devices"] == []


def test_a_profiled_program_has_the_gpus_that_were_sampled(tmp_path):
    writer = RunWriter(tmp_path / "run", header={**plain_header(), "zero_s": 0.0}, config_toml="")
    assert Run(writer.path).cluster == Cluster(1, 1)
    gpus = [{"uuid": f"GPU-{n}", "part_of": None} for n in range(3)]
    instances = [{"uuid": f"MIG-{n}", "part_of": "GPU-0"} for n in range(2)]
    writer.close(t=1.0, status="finished", sampler={"devices": [*gpus, *instances, {"uuid": "host"}]})
    assert Run(writer.path).cluster == Cluster(1, 3)
    path, many = writer.path / "trace.jsonl", "".join(f'{{"uuid":"GPU-{n}"}},' for n in range(9, 16_409))
    path.write_text(path.read_text().replace('"devices":[{"uuid":"GPU-0"', f'"devices":[{many}{{"uuid":"GPU-0"'))
    with pytest.raises(DataError, match=r"the sampler's devices: header: .* are more than 16384"):
        _ = Run(writer.path).header


def test_a_live_or_killed_run_reads_cleanly(writer):
    writer.trace({"type": "note", "text": "one"})
    with (writer.path / "trace.jsonl").open("ab") as file:
        file.write(b'{"type": "note", "te')
    run = Run(writer.path)
    assert [record["type"] for record in run.trace] == ["header", "note"]
    assert run.trailer is None
    assert run.summary is None
    assert run.ledger is None
    assert run.rollouts.empty


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[1]", "not a JSON object"),
        ('{"type": "dance"}', "type = 'dance' is not one of header, phase"),
        ('{"type": "note"}', "note.text is missing"),
        ('{"type": "note", "text": 3}', "note.text = 3 is not str"),
        (
            '{"type": "phase", "name": "x", "step": true, "t_start": 0, "t_end": 1, "depth": 0}',
            "phase.step = True is not int",
        ),
        ("{", "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_line_and_field(writer, line, fault):
    with (writer.path / "trace.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"trace\.jsonl: line 2: ") as error:
        _ = Run(writer.path).trace
    assert fault in str(error.value)


def test_a_trace_of_another_schema_version_is_refused(writer):
    path = writer.path / "trace.jsonl"
    path.write_text(path.read_text().replace('"schema":3', '"schema":99'))
    with pytest.raises(DataError, match="schema version 99 is not 3"):
        _ = Run(writer.path).trace


def test_a_header_without_an_engine_is_refused(writer):
    path = writer.path / "trace.jsonl"
    path.write_text(path.read_text().replace('"engines":1', '"engines":0'))
    with pytest.raises(DataError, match=r"header\.engines = 0 is not at least 1"):
        _ = Run(writer.path).trace


def test_corrupt_and_foreign_parquet_files_are_named(writer):
    writer.table("devices", 0, device_rows(1))
    part = writer.path / "devices" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-000000\.parquet: not a readable Parquet file"):
        _ = Run(writer.path).devices
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"t": [1.0]}), part)
    with pytest.raises(DataError, match="column 'device' is missing"):
        _ = Run(writer.path).devices
    pq.write_table(pa.table({name: pa.array(["x"]) for name in DEVICES.names}), part)
    with pytest.raises(DataError, match="column 't' is string, not double"):
        _ = Run(writer.path).devices


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, withstood):
    """A file-size limit stands for the full disk: the second write fails, the first file stays whole."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {os.getcwd()!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from profiling.writer import RunWriter, write_atomically
from profiling.errors import RunError
from profiling.ledger import Cluster
from profiling.phases import plain_header
path = Path({str(tmp_path)!r})
write_atomically(path / "kept", b"old")
writer = RunWriter(path / "run", header=plain_header(), config_toml="")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for attempt in (lambda: write_atomically(path / "kept", b"x" * 5000),
                lambda: [writer.trace({{"type": "note", "text": "y" * 300}}) for _ in range(20)]):
    try:
        attempt()
    except RunError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert "kept: cannot be written: File too large" in first
    assert "trace.jsonl: cannot be written" in second
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert not list(tmp_path.glob(".*.tmp"))
    content = (tmp_path / "run" / "trace.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert [json.loads(line)["type"] for line in content.splitlines()][1:] == ["note"] * (
        len(content.splitlines()) - 1
    )
    withstood("full disk under the run's own files", lost="nothing that was written")


def test_records_written_together_are_what_they_are_alone(writer):
    phase = {"type": "phase", "name": 'a "b" \u00e9', "step": 1, "t_start": 0.1, "t_end": 1e-7 + 1 / 3, "depth": 0}
    records = [phase, {**phase, "t_start": 0}, {**phase, "process": "host-1"}, {"type": "note", "text": "x"}]
    writer.trace(*records)
    lines = (writer.path / "trace.jsonl").read_text().splitlines()[1:]
    assert lines == [json.dumps(record, separators=(",", ":")) for record in records]
    for fault in ({"step": True}, {"step": 2.0}, {"depth": 2**60}, {"t_end": float("nan")}, {"name": None}):
        with pytest.raises(ValueError, match=rf"phase\.{next(iter(fault))}"):
            writer.trace(phase, {**phase, **fault})
    assert len((writer.path / "trace.jsonl").read_text().splitlines()) == 5


def test_of_records_written_together_a_full_disk_keeps_the_whole_lines(tmp_path):
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from profiling.writer import RunWriter
from profiling.errors import RunError
from profiling.ledger import Cluster
from profiling.phases import plain_header
writer = RunWriter({str(tmp_path / "run")!r}, header=plain_header(), config_toml="")
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    writer.trace(*[{{"type": "note", "text": "y" * 300}}] * 20)
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trace.jsonl: cannot be written" in done.stdout
    content = (tmp_path / "run" / "trace.jsonl").read_bytes()
    assert content.endswith(b"\n")
    assert len(content) + 350 > 2000
    assert [record["type"] for record in Run(tmp_path / "run").trace[1:]] == ["note"] * content.count(b"note")


def test_an_unwritable_place_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "inside", b"")
    with pytest.raises(ConfigError, match="cannot be created"):
        RunWriter(tmp_path / "file" / "run", header=plain_header(), config_toml="")


def test_a_run_is_not_overwritten(writer):
    with pytest.raises(ConfigError, match="already holds a run"):
        RunWriter(writer.path, header=plain_header(), config_toml="")


def test_unknown_keys_name_the_nearest_also_inside_a_union():
    with pytest.raises(ConfigError, match=r"f: unknown key 'rollout\.widow'; did you mean 'rollout\.window'\?"):
        check_settings({"rollout": {"widow": 3}}, RunConfig, where="f")
    values = {
        "workload": {"steps": 1, "prompts_per_step": 1, "max_response_tokens": 3,
                     "response_tokens": {"kind": "lognormal", "men": 3, "sigma": 1}},
        "schedule": {"kind": "synchronous"},
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"'workload\.response_tokens\.men'; did you mean 'workload\.response_tokens\.mean'"
    ):
        check_settings(values, Experiment, where="f")


def test_overrides_are_toml_or_plain_text():
    words = ["--a.b", "3", "--a.c=[1, 2]", "--d", "text", "--e.f-g", "true"]
    overrides = parse_overrides(words)
    assert overrides == {"a.b": 3, "a.c": [1, 2], "d": "text", "e.f_g": True}
    assert with_overrides({"a": {"b": 1, "z": 0}}, overrides)["a"] == {"b": 3, "z": 0, "c": [1, 2]}


def test_a_resolved_configuration_reads_back_as_itself():
    import tomllib

    config = RunConfig(model={"path": 'odd "name" \\ here'})
    assert RunConfig.model_validate(tomllib.loads(to_toml(config.model_dump(mode="json")))) == config


def test_the_limit_of_this_process_is_untouched():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_outline_leaves_the_schedules_records_out_and_names_lines_as_they_are(tmp_path):
    writer = RunWriter(tmp_path / "run", header=plain_header(), config_toml="")
    writer.trace({"type": "plan_step", "step": 1, "t": 0.0, "carried": [], "demand": {}, "admissions": [],
                  "rows_wanted": 1})  # fmt: skip
    writer.trace({"type": "note", "text": "x"})
    run = Run(writer.path)
    assert [record["type"] for record in run.outline] == ["header", "note"]
    assert [record["type"] for record in run.trace] == ["header", "plan_step", "note"]
    with (writer.path / "trace.jsonl").open("a") as file:
        file.write('{"type":"note"}\n')
    with pytest.raises(DataError, match=r"trace.jsonl: line 4: note.text is missing"):
        _ = Run(writer.path).header
