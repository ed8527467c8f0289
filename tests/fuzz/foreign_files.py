"""Files of other programs: logs of verl and TRL, data sets, tables of predictions, rows that a schedule logged."""

import functools
import io
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from analysis.figures._predicted_measured import read_predictions
from analysis.hardware import hardware_of
from analysis.model_costs import model_of
from profiling.reader import Run
from simulator.logs import calibrate_logs, read_log
from tests.analysis.made_runs import MODEL
from tests.fuzz.mutations import (
    BYTE_CHANGES,
    Bytes,
    bytes_changed,
    hostile_table,
    hostile_text,
    json_text,
    lines_text,
    one_or_two,
)  # fmt: skip
from tests.fuzz.reader import Reader
from tests.fuzz.run_files import RUN, whole_run
from tests.fuzz.settings_files import CSV_CELLS, csv_text, named, texts
from tppo.config import SourceConfig
from tppo.data.dataset import check_text
from tppo.data.layouts import layout_of
from tppo.data.prompts import problem_of
from tppo.data.tables import open_tables

STEPS = range(1, 9)
VERL = [
    {"timing_s/gen": 3.0 + 0.1 * step, "timing_s/old_log_prob": 0.5, "timing_s/update_actor": 1.0 + 0.01 * step,
     "timing_s/reward": 0.2, "timing_s/step": 6.0, "response_length/mean": 100.0 + step,
     "response_length/max": 300.0 + 7 * step, "prompt_length/mean": 20.0, "perf/total_num_tokens": 7680.0 + 64 * step}
    for step in STEPS
]  # fmt: skip
TRL = [{"step": step, "step_time": 2.0 + 0.1 * step, "completions/mean_length": 100.0, "num_tokens": 5000.0 * step,
        "completions/max_length": 200.0 + 9 * step} for step in STEPS]  # fmt: skip
PROBLEMS = [
    {"question": "1+1?", "answer": "#### 2", "problem": "1+1?", "solution": "\\boxed{2}", "prompt": "1+1?",
     "reward_model": {"ground_truth": "2"}},
    {"question": [{"role": "user", "content": "2+2?"}], "answer": 4, "problem": "2+2?", "solution": "4",
     "prompt": [{"role": "user", "content": "2+2?"}], "reward_model": {"ground_truth": 4}},
]  # fmt: skip


def console_text(records: Any) -> str:
    """verl's console: step:1 - timing_s/gen:3.1 - ..."""
    lines = []
    for step, record in enumerate(records if isinstance(records, list) else [records], start=1):
        items = record.items() if isinstance(record, dict) else [("x", record)]
        lines.append(f"(TaskRunner pid=1) step:{step} - " + " - ".join(f"{k}:{json_like(v)}" for k, v in items))
    return "\n".join(lines) + "\n"


def json_like(value: Any) -> str:
    return repr(value) if isinstance(value, float) else json_text(value)


def literal_text(records: Any) -> str:
    """TRL's printed dicts, among other words."""
    text = lines_text(records)
    return text.replace("null", "None").replace("true", "True").replace('"', "'")


def wandb_text(records: Any) -> str:
    """An export of wandb, its columns with the run's name before."""
    rows = [record for record in records if isinstance(record, dict)] if isinstance(records, list) else []
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["Step", *(f"run - {name}" for name in names)]]
    cells += [[step, *(row.get(name) for name in names)] for step, row in enumerate(rows, start=1)]
    return csv_text(cells).decode("utf-8", "replace")


def log(kind: str, name: str) -> Any:
    def read(folder: Path) -> None:
        read_log(kind, folder / name)
        calibrate_logs(kind, [folder / name], engines=2).as_dict()

    return read


def state_text(history: Any) -> str:
    return json_text({"log_history": history, "global_step": 8})


def problems_of(name: str) -> Any:
    def read(folder: Path) -> None:
        source = SourceConfig(path=str(folder / name))
        for table in open_tables(source.path, split="train", subset="", key="data"):
            layout = layout_of(table, "auto", prompt_column="", answer_column="", key="data")
            for number, row in enumerate(table.rows(layout.columns)):
                where = f"{table.where}: row {number}"
                problem, answer = problem_of(row[layout.problem], where), layout.answer_of(row)
                check_text(f"{problem}{answer}" if isinstance(problem, str) else str(answer), where)

    return read


def problems_csv(records: list[dict[str, Any]]) -> bytes:
    return csv_text([list(records[0]), *([str(value) for value in record.values()] for record in records)])


def problems_parquet() -> bytes:
    content = io.BytesIO()
    pd.DataFrame([{"question": f"{n}+1?", "answer": f"#### {n + 1}", "n": n} for n in range(5)]).to_parquet(content)
    return content.getvalue()


@functools.cache
def events(values: tuple[tuple[str, float, int], ...] = ()) -> bytes:
    """A TensorBoard file of verl's metrics with whole checksums. values: (tag, value, step) after those."""
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            whole = [(tag, value, step) for step, row in enumerate(VERL, start=1) for tag, value in row.items()]
            for tag, value, step in (*whole, *values):
                writer.add_scalar(tag, value, step)
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


EVENT_VALUES = st.lists(
    st.tuples(st.sampled_from((*VERL[0], "", "\x1b[31m", "x" * 3000)), st.floats(width=32),
              st.integers(-(2**63), 2**63 - 1) | st.integers(1, 9)), max_size=4).map(tuple)  # fmt: skip
PREDICTIONS = pd.DataFrame(
    [{"target": "tppo-s0", "calibrated_on": "ppo", "kind": kind, "drift_corrected": False,
      "quantity": "training_seconds", "unit": "s", "predicted": 10.0, "measured": 10.0, "error": 0.0}
     for kind in ("forecast", "replay")]
)  # fmt: skip
HOSTILE_PREDICTIONS: Bytes = st.one_of(
    st.builds(bytes_changed, st.just(PREDICTIONS.to_csv(index=False).encode()), BYTE_CHANGES),
    st.builds(lambda cells: csv_text([list(PREDICTIONS), *cells]), CSV_CELLS),
)
HARDWARE = {"name": "CPU", "peak_flops": 1e9, "memory_bytes_per_s": 1e9, "measured": True}


def beside_a_run(name: str, content: Bytes) -> Any:
    return st.deferred(lambda: one_or_two({f"{RUN}/trace.jsonl": whole_run()["trace.jsonl"]}, {name: content}))


READERS = (
    Reader("verl console log", texts("verl.log", (VERL,), console_text), log("verl", "verl.log")),
    Reader("verl JSON lines", texts("verl.jsonl", ([{"step": n, "data": row} for n, row in enumerate(VERL, 1)],),
           lines_text), log("verl", "verl.jsonl")),
    Reader("verl CSV of wandb", texts("verl.csv", (VERL,), wandb_text), log("verl", "verl.csv")),
    Reader("TRL printed log", texts("trl.log", (TRL,), literal_text), log("trl", "trl.log")),
    Reader("TRL trainer_state.json", texts("trainer_state.json", (TRL,), state_text),
           log("trl", "trainer_state.json")),
    Reader("TensorBoard events", named("events.out.tfevents.1", st.deferred(lambda: st.one_of(
               st.builds(bytes_changed, st.just(events()), BYTE_CHANGES), EVENT_VALUES.map(events),
               st.binary(max_size=400)))),
           log("verl", "events.out.tfevents.1"), share=0.5),
    Reader("data set JSON lines", texts("data.jsonl", (PROBLEMS,), lines_text), problems_of("data.jsonl")),
    Reader("data set JSON", texts("data.json", (PROBLEMS,), json_text), problems_of("data.json")),
    Reader("data set CSV", named("data.csv", st.one_of(
               st.builds(bytes_changed, st.just(problems_csv(PROBLEMS)), BYTE_CHANGES),
               st.builds(lambda cells: csv_text([["question", "answer"], *cells]), CSV_CELLS))),
           problems_of("data.csv")),
    Reader("data set Parquet", named("data.parquet", hostile_table(problems_parquet())), problems_of("data.parquet")),
    Reader("predictions.csv", named("predictions.csv", HOSTILE_PREDICTIONS),
           lambda folder: read_predictions(folder / "predictions.csv")),
    Reader("hardware.json", beside_a_run("hardware.json", hostile_text(HARDWARE, json_text)),
           lambda folder: hardware_of(Run(folder / RUN))),
    Reader("model.json", beside_a_run(f"{RUN}/model.json", hostile_text(MODEL, json_text)),
           lambda folder: model_of(Run(folder / RUN))),
)  # fmt: skip
