"""What generated files have found, each as small as it gets."""

import json
import os
import pickle
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.model_costs import model_of
from profiling.errors import LONGEST_MESSAGE, ConfigError, DataError, InputError, shown
from profiling.files import parse_json, read_whole
from profiling.markers import read_markers
from profiling.reader import Run
from profiling.schema import EVALUATIONS, fault_in
from profiling.settings import read_toml
from profiling.watch import snapshot
from simulator import load_experiment, simulate
from simulator.calibrate import Calibration, calibrate
from simulator.lengths import read_lengths
from simulator.logs import calibrate_logs, read_log
from tests.analysis.made_runs import RISING, make_run
from tests.fuzz.checkpoint_files import FOLDER, Canary, fitting_manifest, fresh_state, whole_checkpoint, with_pickle
from tests.fuzz.oracle import write_files
from tppo.checkpoints.content import restore
from tppo.checkpoints.manifest import read_manifest
from tppo.cli import main


def refused(read, *words, error=InputError):
    with pytest.raises(error) as caught:
        read()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.isprintable()


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run", accuracies=RISING[:2])
    return tmp_path / "run"


def rewrite(path, change):
    """A Parquet table with some of its columns changed."""
    pq.write_table(change(pq.read_table(path)), path)


def test_a_message_is_one_line_of_bounded_length_whatever_it_quotes():
    assert str(DataError("a\nb\x1b[31m")) == "a\\nb\\x1b[31m"
    long = str(DataError("file: " + "\0" * 5000 + "; do this"))
    assert long.startswith("file: \\x00") and long.endswith("; do this")
    assert len(long) <= LONGEST_MESSAGE + len(" [...] ")


def test_a_value_that_cannot_be_written_is_shown_by_its_type():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "a list"
    assert shown(10**5000) == "a int"
    assert shown("x" * 100) == "'" + "x" * 79
    while nested:  # freed from the outside in: freeing them at once would nest, too
        nested = nested[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("x = " + "9" * 5000, "Exceeds the limit"),
        ("a." * 200 + "b = 1", "a key of 100 dots or more"),
        ("#" * 2**18 + "x", "more than 256 KiB"),
        ("x = '\0'", "not valid TOML"),
    ],
)
def test_settings_that_no_parser_can_follow_are_refused(tmp_path, text, fault):
    path = tmp_path / "e.toml"
    path.write_text(text)
    refused(lambda: read_toml(path), str(path), fault, error=ConfigError)


def test_a_name_with_a_nul_is_refused(tmp_path):
    refused(lambda: read_toml(tmp_path / "a\0b.toml"), "null byte", error=ConfigError)


def test_many_sentences_are_no_key_of_many_dots(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(f'x = "{"Think. Step by step. " * 200}"')
    assert len(read_toml(path)["x"]) == 21 * 200


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"NaN", "NaN is not a number of JSON"),
        (b"[-Infinity]", "-Infinity is not a number of JSON"),
        (b"1e999", "too large"),
        (b"9223372036854775808", "more than 64 bits"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_no_table_can_hold_is_refused(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_json(text)


def test_json_at_the_edge_of_what_is_refused_is_read():
    values = [1e308, 2**63 - 1, -(2**63), "NaN", "\U0001f600", 1e-5]
    assert parse_json(json.dumps(values).encode()) == values


def test_a_pipe_and_a_device_are_no_files(tmp_path, run):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            read_whole(path)
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    refused(lambda: Run(run).metrics, "metrics.jsonl", "not a regular file")


def test_a_record_whose_type_is_a_list_is_refused():
    assert fault_in({"type": []}).startswith("type = [] is not one of header, ")


def test_a_number_in_a_record_is_one_that_sums_can_hold(run):
    phase = {"type": "phase", "name": "rollout", "step": 1, "t_start": 0.0, "t_end": 1e300, "depth": 0}
    assert fault_in(phase) == "phase.t_end = 1e+300 is beyond 9.0072e+15"
    header = Run(run).header
    assert fault_in({**header, "engines": 2**40}) == "header: 1099511627776 engines of 1 GPUs are more than 16384"


def test_a_row_of_metrics_holds_numbers(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "val/accuracy": "high"}\n')
    refused(lambda: Run(run).metrics, "line 3: val/accuracy = 'high' is neither a number nor null")


def test_a_summary_without_its_totals_is_refused(run):
    (run / "summary.json").write_text('{"wall_seconds": 1.0}')
    refused(lambda: Run(run).summary, "summary.json", "pretrain_seconds is missing")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.append_column("step", t.column("step")), "column 'step' stands there 2 times"),
        (lambda t: t.set_column(3, "t_start", pa.array([np.inf, 0.0])), "column 't_start' has a number that is not f"),
        (lambda t: t.set_column(0, "step", pa.array([2**60, 1])), "column 'step' has 1152921504606846976, beyond 2*"),
        (lambda t: t.drop_columns(["kind"]), "column 'kind' is missing"),
    ],
)  # fmt: skip
def test_a_table_holds_what_sums_can_hold(run, change, fault):
    rewrite(run / "engine" / "step-000001.parquet", change)
    refused(lambda: Run(run).engine, "step-000001.parquet", fault)


def test_a_text_that_is_no_utf_8_is_refused(run):
    def change(table):
        own = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"\xff", b"a"], pa.binary()).buffers()[1:]])
        return table.set_column(2, "kind", own)

    rewrite(run / "engine" / "step-000001.parquet", change)
    refused(lambda: Run(run).engine, "step-000001.parquet", "UTF8")


def test_columns_beside_those_of_the_schema_are_not_read(run, tmp_path):
    path = run / "evaluations" / "step-000001.parquet"
    path.parent.mkdir()
    cells = {field.name: pa.array([None if field.nullable else 0]).cast(field.type) for field in EVALUATIONS}
    pq.write_table(pa.table({**cells, "huge": [[0] * 1_000_000]}), path)
    assert list(Run(run).evaluations) == EVALUATIONS.names


def test_watch_names_the_run_whose_records_do_not_add_up(run):
    rewrite(run / "engine" / "step-000001.parquet", lambda t: pa.concat_tables([t, t]))
    refused(lambda: snapshot(run), str(run), "its records do not add up: ledger: ")


def test_markers_of_a_program_never_end_the_profiler(tmp_path):
    (tmp_path / "markers").mkdir()
    deep, huge = "[" * 5000, '{"name": "a", "step": 1, "start": 1.0, "end": 2.0, "depth": 1' + "0" * 30 + "}"
    good = '{"name": "a", "step": 1, "start": 1.0, "end": 2.0, "depth": 1}'
    (tmp_path / "markers" / "h-1.jsonl").write_text(f"{deep}\n{huge}\n{good}\n")
    (record,) = read_markers(tmp_path, 0.0, 9.0, 0.0, "c")
    assert (record["t_start"], record["t_end"], record["depth"]) == (1.0, 2.0, 1)


def test_a_deeply_nested_calibration_is_refused(tmp_path):
    (tmp_path / "c.json").write_text("[" * 5000)
    refused(lambda: Calibration.load(tmp_path / "c.json"), "c.json", "nested too deeply", error=ConfigError)


def test_lengths_are_never_decompressed(tmp_path):
    path = tmp_path / "l.csv.gz"
    pd.DataFrame({"n": [1, 2]}).to_csv(path, index=False)
    refused(lambda: read_lengths(path, "n"), "l.csv.gz", "cannot be read")


def test_lengths_that_are_texts_or_stand_there_twice_are_refused(tmp_path):
    path = tmp_path / "l.parquet"
    pq.write_table(pa.table({"n": ["1", "2"]}), path)
    refused(lambda: read_lengths(path, "n"), "l.parquet", "column 'n' is string, not numbers")


def test_a_log_that_does_not_tell_its_rows_is_named(tmp_path):
    path = tmp_path / "v.log"
    path.write_text("step:1 - timing_s/gen:3.0 - response_length/mean:5.0 - response_length/max:9.0\n")
    refused(lambda: calibrate_logs("verl", [path], engines=1), str(path), "give --rows-per-step")


def test_dimensions_of_a_model_are_whole_numbers(run):
    (run / "model.json").write_text('{"parameters": "many"}')
    refused(lambda: model_of(Run(run)), "model.json", "parameters = 'many' is not a number of at least 0")


def test_a_report_shows_a_run_whose_configuration_is_no_text(run, tmp_path, capsys):
    (run / "config.toml").write_bytes(b"\x80")
    assert main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    assert capsys.readouterr().err == ""


@pytest.fixture
def checkpoint(tmp_path):
    write_files(tmp_path, whole_checkpoint())
    return tmp_path / FOLDER


def test_an_undamaged_checkpoint_is_restored(checkpoint):
    state = fresh_state()
    assert restore(state, checkpoint).time_s == 1.0
    assert state.carried[0].response_ids == [3]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"files": {"../../x": [1, 2]}}, "'../../x', which is outside of the checkpoint"),
        ({"files": {"/etc/passwd": [1, 2]}}, "'/etc/passwd', which is outside of the checkpoint"),
        ({"offsets": {"..": 0}}, "offsets names '..'"),
        ({"files": {"a": []}}, "files: 'a' has no size and checksum"),
        ({"files": None}, "files and offsets are not tables"),
        ({"offsets": {"trace.jsonl": -1}}, "which is no length"),
    ],
)
def test_a_manifest_says_what_a_manifest_can_say(checkpoint, changes, fault):
    (checkpoint / "manifest.json").write_bytes(fitting_manifest(changes))
    refused(lambda: read_manifest(checkpoint), "manifest.json is not a manifest", fault)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("step", "4", "progress.json: step = '4'"),
        ("carried", [7], "list index out of range"),
        ("carried", [-1], "progress.json: carried.0 = -1"),
        ("accuracies", ["a"], "progress.json: accuracies.0 = 'a'"),
    ],
)
def test_the_progress_of_a_checkpoint_is_checked(checkpoint, key, value, fault):
    path = checkpoint / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), key: value}))
    refused(lambda: restore(fresh_state(), checkpoint), "not a usable checkpoint", fault)


def test_rows_with_tokens_that_the_policy_does_not_know_are_refused(checkpoint):
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "rows.safetensors")
    tensors["response_ids"][0] = 10**6
    save_file(tensors, checkpoint / "rows.safetensors")
    refused(lambda: restore(fresh_state(), checkpoint), "response_ids are not all tokens of the policy")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_checkpoint_is_executed(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("random.pt", "optimizers.pt"):
        whole = (checkpoint / name).read_bytes()
        for content in (pickle.dumps(Canary()), with_pickle(whole, pickle.dumps(Canary()))):
            (checkpoint / name).write_bytes(content)
            refused(lambda: restore(fresh_state(), checkpoint), "not a usable checkpoint")
        (checkpoint / name).write_bytes(whole)
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(Canary()))  # the trick works on a reader that executes
    assert (tmp_path / "canary").exists()


def test_a_compressed_archive_is_not_unpacked(checkpoint):
    with zipfile.ZipFile(checkpoint / "random.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("random/data.pkl", bytes(1000))
    refused(lambda: restore(fresh_state(), checkpoint), "random.pt is compressed")


BEYOND_FLOATS = "1" + "0" * 400


def test_a_length_beyond_floats_is_refused(tmp_path):
    (tmp_path / "l.csv").write_text(f"n,other\n3,a\n{BEYOND_FLOATS}\n")
    refused(lambda: read_lengths(tmp_path / "l.csv", "n"), "l.csv", "column 'n'", "too large")


def test_names_in_a_log_that_no_table_can_hold_are_left_out(tmp_path):
    entries = '"timing_s/gen": 3.0, "response_length/mean": 5.0, "response_length/max": 9.0, "\\ud800": 1'
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "data": {{{entries}}}}}\n')
    assert sorted(read_log("verl", tmp_path / "log.jsonl")) == [
        "response_length/max", "response_length/mean", "step", "timing_s/gen",
    ]  # fmt: skip


def test_numbers_of_a_log_beyond_floats_are_no_numbers(tmp_path):
    lines = [
        f'{{"step": {step}, "data": {{"timing_s/gen": {seconds}, "response_length/mean": 5.0, '
        f'"response_length/max": 9.0, "x": {x}}}}}'
        for step, seconds, x in ((1, BEYOND_FLOATS, 1), (BEYOND_FLOATS, 3.0, 1), (3, 3.0, BEYOND_FLOATS))
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    table = read_log("verl", tmp_path / "log.jsonl")
    assert table.step.tolist() == [1.0, 3.0]
    assert table["timing_s/gen"].isna().tolist() == [True, False]
    assert table["x"].isna().tolist() == [False, True]


@pytest.mark.parametrize("field", ["response_tokens", "model", "gpu", "efficiency"])
def test_a_name_longer_than_any_file_is_refused_where_an_experiment_names_one(tmp_path, capsys, field):
    long = "9" * 700
    lengths = f'{{ kind = "run", path = "{long}" }}' if field == "response_tokens" else '{ kind = "fixed", value = 5 }'
    named = {"model": "Qwen2.5-0.5B", "gpu": "H100-SXM"} | (
        {field: f"{long}.toml"} if field != "response_tokens" else {}
    )
    costs = "\n".join(f'{name} = "{value}"' for name, value in named.items())
    (tmp_path / "e.toml").write_text(
        f"[workload]\nsteps = 1\nprompts_per_step = 1\nmax_response_tokens = 9\nresponse_tokens = {lengths}\n"
        f'[schedule]\nkind = "synchronous"\n[cost]\nkind = "analytic"\n{costs}\n'
    )
    with pytest.raises((ConfigError, DataError)) as error:
        simulate(load_experiment(tmp_path / "e.toml"))
    assert "99999" in str(error.value)


def test_a_run_whose_numbers_no_fit_can_take_is_refused(run):
    def huge(table):
        return table.set_column(
            table.schema.get_field_index("t_end"), "t_end", pa.array([1e200] * len(table), pa.float64())
        )

    for path in (run / "engine").glob("*.parquet"):
        rewrite(path, huge)
    refused(lambda: calibrate([Run(run)]), "too large for a fit")
