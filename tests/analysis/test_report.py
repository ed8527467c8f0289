import json
import re

import pandas as pd
import pytest

from analysis.figures import FIGURES
from analysis.report import MOST_NUMBERS, title_of, write_report
from analysis.svg import MOST_BYTES, MOST_POINTS, alt_text, to_svg
from profiling import schema
from profiling.advice import Advice, Option, Tail, trace_bytes_of, write_advice
from profiling.errors import DataError
from profiling.phases import plain_header
from profiling.reader import Run
from profiling.writer import RunWriter, write_parquet
from tests.analysis.made_runs import RISING, make_run
from tests.analysis.pages import Page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    """Every figure takes its second: only tests of `all_figures` have more than two."""
    if "all_figures" not in request.fixturenames:
        for name in [name for name in FIGURES if name not in ("accuracy_time", "idle_ledger")]:
            monkeypatch.delitem(FIGURES, name)


@pytest.fixture
def all_figures():
    return list(FIGURES)


def report(runs, path, **options):
    return write_report(runs, path / "report.html", **options).read_text()


def made_advice(run, **changes):
    """A window of 6K saves 22 % of 2 s."""
    values = {
        "schema": 1, "trace_bytes": trace_bytes_of(run.path), "basis": "costs fitted to the run itself", "rows": 128,
        "steps": 8, "resamples": 12, "replay_error": -0.02, "tail": Tail(time_share=0.41, row_share=0.03),
        "own": Option(kind="synchronous", seconds_per_finished_row=2.0, saving=0.0),
        "others": (Option(kind="truncated", window=6144, seconds_per_finished_row=1.56, saving=0.22, margin=0.04),
                   Option(kind="truncated", window=8192, seconds_per_finished_row=1.7, saving=0.15)),
    }  # fmt: skip
    return Advice(**values | changes)


@pytest.mark.slow
def test_a_report_with_every_figure_stands_alone(runs, tmp_path, all_figures):
    text = report(runs, tmp_path, command="tppo report ppo-s0 --output report.html")
    page = Page(text)
    linked = [
        a for _, a in page.tags for name in ("src", "href", "xlink:href", "action") if (a.get(name) or "#")[0] != "#"
    ]
    assert all((a.get("href") or a.get("src") or a.get("xlink:href")).startswith("data:image/png") for a in linked)
    assert page.unclosed == []
    assert "tppo report ppo-s0 --output report.html" in page.text
    assert "T-PPO reaches 85% 2.50 times as fast as PPO on the median of 3 seeds" in page.text
    assert "steps = 3" in page.text  # the configuration
    drawn = [a for a in page.all("div") if a.get("role") == "img"]
    assert len(drawn) == len(page.all("figure")) > 3
    titles = ["Cost against time", "Idle ledger", "Idle ledger by step", "Speed-up over the synchronous run"]
    assert set(titles) < {title_of(name) for name in all_figures}
    assert all(title_of(name) in page.text for name in all_figures)  # drawn, or left out with the reason
    assert "Rollout: by the clock" in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(len(a["aria-label"]) > 60 for a in drawn)
    assert len(text) < 3_000_000


def test_one_run_of_a_kind_is_told_without_a_range(runs, tmp_path):
    predictions = pd.read_csv(tmp_path / "predictions.csv").query("target == 'tppo-s1'")
    predictions.to_csv(tmp_path / "predictions.csv", index=False)
    text = Page(report(runs[:2], tmp_path)).text
    assert "T-PPO reaches 85% 2.00 times as fast as PPO in the one seed in which both did." in text
    assert "Calibrated on PPO alone, a forecast of T-PPO misses the training time by +10.0%." in text


def test_several_arms_of_a_prediction_are_joined_by_and(runs, tmp_path):
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    predictions.target = predictions.target.replace({"tppo-s2": "tppo-full-s2"})
    predictions.to_csv(tmp_path / "predictions.csv", index=False)
    text = Page(report(runs, tmp_path)).text
    assert (
        "a forecast of T-PPO and T-PPO, window = maximum misses the training time by 10.0% on the median of 3 runs "
        "(from +0.0% to +20.0%)." in text
    )


def test_what_is_not_known_of_a_runs_start_is_left_out(runs, simulated, tmp_path):
    text = Page(report([runs[0], simulated["synchronous"]], tmp_path)).text
    assert re.search(r"ppo-s0: PPO, measured, finished, started [\d-]+ [\d:]+ UTC on \S+", text)
    assert re.search(r"synchronous: .*, simulated, finished\n", text)


def test_its_policy_forbids_every_request_and_every_script_but_its_own(runs, tmp_path):
    import base64
    import hashlib

    text = report(runs[:1], tmp_path)
    (policy,) = [a["content"] for a in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.S)
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'; img-src data:" in policy
    assert not re.search(r"\son\w+=", re.sub(r"<script>.*?</script>", "", text, flags=re.S))


def test_what_a_run_says_is_text_and_never_markup(tmp_path):
    run = make_run(tmp_path / "<b onclick=x>-s0", accuracies=RISING)
    (run.path / "config.toml").write_text(f"name = '{HOSTILE}'\n")
    with (run.path / "trace.jsonl").open("a") as file:
        file.write(json.dumps({"type": "note", "text": HOSTILE}) + "\n")
    trace = run.path / "trace.jsonl"
    header, *others = trace.read_text().splitlines()
    values = json.loads(header) | {"host": HOSTILE, "versions": {HOSTILE: HOSTILE}, "devices": [{"name": HOSTILE}]}
    trace.write_text("\n".join([json.dumps(values, separators=(",", ":")), *others]) + "\n")
    text = report([Run(run.path)], tmp_path, command=HOSTILE)
    page = Page(text)
    assert text.count("<script>") == 1
    assert page.all("b") == page.all("img") == []
    assert page.text.count(HOSTILE) >= 5
    assert page.unclosed == []


def test_every_table_has_heads_that_sort_and_values_to_sort_by(runs, tmp_path):
    text = report(runs, tmp_path)
    page = Page(text)
    heads = [a for a in page.all("th") if a.get("scope") == "col"]
    assert len(heads) > 10
    cells = page.all("td") + [a for a in page.all("th") if a.get("scope") == "row"]
    assert all("data-sort" in a for a in cells)
    scrolling = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert len(scrolling) == len(page.all("table"))
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in scrolling)


def test_every_entry_of_the_contents_leads_somewhere(runs, tmp_path):
    page = Page(report(runs, tmp_path))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a")]
    assert len(targets) > 5
    assert set(targets) <= set(ids)
    assert [name for name, _ in page.tags if name in ("header", "nav", "main", "footer")] == [
        "header", "nav", "main", "footer"
    ]  # fmt: skip


def test_the_ledger_says_seconds_and_shares_of_each_cause(runs, tmp_path):
    # tppo: 2 s a step: 0.6 update, 0.2 prefill, 1.0 decode with 4 of 4 slots, 0.2 in no phase
    text = report(runs, tmp_path)
    rows = re.findall(r"<tr><th[^>]*>([^<]*)</th>((?:<td[^>]*>[^<]*</td>)*)", text)
    shown = {name: re.findall(r">([^<]*)</td>", cells) for name, cells in rows}
    assert shown["prefill"] == ["0.2", "4.0%", "0.2", "10.0%"]
    assert shown["decode, filled slots"] == ["0.5", "10.0%", "1", "50.0%"]
    assert shown["other waiting"] == ["3.2", "64.0%", "0.2", "10.0%"]


def test_alarms_stand_in_the_report(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    assert "Alarm:" not in report([run], tmp_path)
    waiting = run.ledger.assign(cause="wait_tail")
    write_parquet(run.path / "ledger.parquet", {name: waiting[name] for name in waiting}, schema.LEDGER)
    assert "GPU 0 waits 100% of each rollout for the tail" in report([Run(run.path)], tmp_path)


def test_advice_in_the_run_directory_stands_in_the_report(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    assert "Window:" not in report([run], tmp_path)
    write_advice(run.path, made_advice(run))
    text = Page(report([run], tmp_path)).text
    assert "41% of rollout waits for 3.0% of rows; a window of 6K would save 22% ± 4 per finished response." in text
    assert "Simulated, not measured. Per finished response only" in text
    assert "Replays of 8 steps with costs fitted to the run itself; the interval from 12 replays" in text
    assert "a replay of the run itself misses its measured seconds by -2.0%" in text


def test_a_tail_that_rounds_to_nothing_is_left_out(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    own = made_advice(run, tail=Tail(time_share=0.004, row_share=0.031))
    assert own.sentence() == "A window of 6K would save 22% ± 4 per finished response."


def test_damaged_advice_is_named_with_its_field_and_nothing_else_is_lost(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    write_advice(run.path, made_advice(run))
    values = json.loads((run.path / "advice.json").read_text())
    values["own"]["seconds_per_finished_row"] = -1
    (run.path / "advice.json").write_text(json.dumps(values))
    text = Page(report([run], tmp_path)).text
    assert "advice.json: own.seconds_per_finished_row = -1: input should be greater than 0; delete it" in text
    assert "Ledger by cause" in text


def test_a_report_of_a_live_run_says_what_it_leaves_out(tmp_path):
    live = make_run(tmp_path / "ppo-s0", accuracies=RISING, finish=False)
    text = report([live], tmp_path)
    assert "Left out: ppo-s0: has no ledger yet; the run has not ended" in text  # without the folder
    assert str(tmp_path) not in text
    assert "live or killed" in text
    assert len(Page(text).all("figure")) == 1


def test_no_runs_are_an_error_of_one_line(tmp_path):
    with pytest.raises(DataError, match="no runs to report on; name at least one run directory"):
        write_report([], tmp_path / "report.html")


def test_a_figure_whose_code_fails_says_so_and_the_others_stand(runs, tmp_path, monkeypatch):
    def broken(runs):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(FIGURES["accuracy_time"], "data", broken)
    page = Page(report(runs, tmp_path))
    assert "Accuracy against wall-clock: it cannot be drawn of these runs (ZeroDivisionError: by nothing)" in page.text
    assert len(page.all("figure")) == 1


def test_devices_by_phase_stand_in_the_report(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING)
    t = [0.05 * tick for tick in range(240)]
    writer = RunWriter(tmp_path / "other", header=plain_header(), config_toml="")
    writer.table("devices", 0, dict.fromkeys(schema.DEVICES.names, [None] * 240) | {
        "t": t, "device": ["GPU-1"] * 240, "energy_joules": [300 * now for now in t]})  # fmt: skip
    (tmp_path / "other" / "devices").rename(run.path / "devices")
    text = Page(report([Run(run.path)], tmp_path)).text
    assert "Devices by phase" in text
    assert "GPU-1" in text


def test_names_of_the_devices_that_were_sampled_stand_in_the_report(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING, finish=False)
    with (run.path / "trace.jsonl").open("a") as trace:
        sampler = {"ticks": 1, "missed_ticks": 0, "devices": [{"name": "simulated sensor"}] * 2 + ["damaged"]}
        trace.write(json.dumps({"type": "trailer", "t": 9.0, "status": "finished", "sampler": sampler}) + "\n")
    assert "devices: simulated sensor;" in Page(report([Run(run.path)], tmp_path)).text


def test_a_figure_of_many_points_becomes_pixels_inside_its_svg():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot(range(MOST_POINTS + 1), [i % 97 for i in range(MOST_POINTS + 1)])
    axes.plot([0, 1], [0, 1])
    text = to_svg(figure, "f1-")
    assert text.startswith("<svg")
    assert text.count("<image") == 1
    assert set(re.findall(r'\bid="(..)', text)) == {"f1"}
    assert set(re.findall(r"url\(#(..)", text)) == {"f1"}
    assert "<metadata>" not in text
    assert len(text) < MOST_BYTES


def test_a_figure_whose_svg_stays_too_large_becomes_one_picture():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    for place in range(300):
        axes.plot(range(60), [(place * i * 7919) % 101 for i in range(60)])
    text = to_svg(figure, "f1-")
    assert text.count("<image") == 1
    assert "<path" not in text


def test_alt_texts_have_the_key_numbers():
    table = pd.DataFrame({"run": ["a", "a", "b"], "cause": ["decode", "wait", "decode"], "seconds": [3.0, 1.0, 4.0],
                          "share": [0.75, 0.25, 1.0], "unknown": [None, None, None]})  # fmt: skip
    assert alt_text("Where the time went.", table, "measured") == (
        "Where the time went. Data: measured. seconds from 1 to 4. share from 0.25 to 1. "
        "Largest share: b decode 1; a decode 0.75; a wait 0.25."
    )


def test_long_tables_of_numbers_are_cut_and_say_so(tmp_path):
    run = make_run(tmp_path / "ppo-s0", accuracies=RISING * 10)
    assert re.search(rf"The first {MOST_NUMBERS} of \d+ rows\.", Page(report([run], tmp_path)).text)
