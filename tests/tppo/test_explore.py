"""What the page answers: the command's numbers, pictures and downloads."""

import io
import json
import time
import zipfile

import numpy as np
import pytest
from fastapi.testclient import TestClient

from simulator import load_experiment, simulate
from simulator.models.shape import CONFIGS
from simulator.plan.options import options_of
from tests.tppo.explore_page import HERE, LAW, PORT, QUESTION, asked, faults, words
from tppo.cli import main
from tppo.explore import planner as planner_module
from tppo.explore.asked import question_from
from tppo.explore.pictures import pictures_of, shares_of_pieces, timeline
from tppo.explore.server import make_app
from tppo.explore.uploads import Uploads
from tppo.explore.work import simulated


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def page(folder):
    with TestClient(make_app(folder, port=PORT), base_url=HERE) as client:
        yield client


def jobs(page, monkeypatch):
    """Names of those that the page's processes do from now on."""
    workers, ran = page.app.state.planner._workers, []
    run = workers.run

    async def counted(function, *arguments):
        ran.append(function.__name__)
        return await run(function, *arguments)

    monkeypatch.setattr(workers, "run", counted)
    return ran


@pytest.mark.slow
def test_the_answer_is_what_the_command_prints(page, capsys):
    changes = {"gpus": "8,16", "schedules": "synchronous,truncated,oversample,asynchronous", "steps_ratio": "1,1.2",
               "price_per_hour": "2.5", "whole_nodes": "false", "deadline_hours": "3"}  # fmt: skip
    flags = words({k: v for k, v in {**QUESTION, **LAW, **changes}.items() if k != "whole_nodes"})
    assert main(["plan", *flags, "--no-whole-nodes", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    own = asked(page, **changes)
    assert own.status_code == 200
    assert own.json() == printed
    assert len(printed["rows"]) == 2 * 4


def test_a_first_answer_comes_before_and_is_the_whole_one_when_nothing_is_new(page):
    first = asked(page, "first", seed="11", mean_tokens="800").json()
    whole = asked(page, seed="11", mean_tokens="800").json()
    assert not first["whole"]
    assert first["answer"]["question"] == whole["question"]
    for early, late in zip(first["answer"]["rows"], whole["rows"], strict=True):
        assert early["hours"]["p50"] == pytest.approx(late["hours"]["p50"], rel=0.2)
    assert asked(page, "first", seed="11", mean_tokens="800").json() == {"whole": True, "answer": whole}


def test_first_pictures_come_from_the_first_estimates_own_simulation(page, monkeypatch):
    changes = {"seed": "12", "prompts_per_step": "1024"}  # of 8 engines the two that have 1,024 of 4,096 rows
    ran = jobs(page, monkeypatch)
    rows = asked(page, "first", **changes).json()["answer"]["rows"]
    early = asked(page, "first/pictures", shown="0,1", **changes).json()
    assert ran.count("first") == len(rows) == 2
    assert "simulated" not in ran
    for row, own in zip(rows, early, strict=True):
        assert sum(own["gpu_seconds"].values()) == pytest.approx(8 * row["seconds_per_step"])
        assert own["timeline"]["engines"] == 8
        assert [lane["engine"] for lane in own["timeline"]["lanes"]] in ([0, 1], [1, 0])
    whole = asked(page, "pictures", shown="0,1", **changes).json()
    assert len(whole[0]["timeline"]["lanes"]) == 6
    for one, all_engines in zip(early, whole, strict=True):
        assert one["timeline"]["seconds"] == pytest.approx(all_engines["timeline"]["seconds"], rel=0.1)
        for point, other in zip(one["roofline"]["points"], all_engines["roofline"]["points"], strict=True):
            assert point["work"] == other["work"]
            assert point["intensity"] == pytest.approx(other["intensity"], rel=0.1)
            assert point["flops_per_s"] == pytest.approx(other["flops_per_s"], rel=0.1)
    assert asked(page, "first/pictures", shown="0,1", **changes).json() == whole


def test_an_option_is_simulated_once(page, monkeypatch):
    first = asked(page, seed="5").json()
    ran = jobs(page, monkeypatch)
    dearer = asked(page, seed="5", price_per_hour="100").json()
    assert ran == ["options", "answered"]
    assert dearer["rows"][0]["hours"] == first["rows"][0]["hours"]
    asked(page, seed="6")
    assert ran.count("simulated") == 2


def test_uploaded_and_pasted_lengths_are_those_of_the_command(page, capsys, tmp_path):
    lengths = tmp_path / "pilot.csv"
    lengths.write_text("id,length\n" + "\n".join(f"{i},{200 + 37 * i % 2500}" for i in range(300)))
    assert main(["plan", *words(QUESTION), "--lengths", str(lengths), "--lengths-column", "length", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = page.post("/api/lengths", params={"name": "my pilot.csv"}, content=lengths.read_bytes()).json()
    assert kept["columns"] == ["id", "length"]
    own = page.get("/api/answer", params={**QUESTION, "lengths": kept["id"], "lengths_column": "length"}).json()
    assert own["question"].pop("lengths") == "my-pilot.csv"
    assert printed["question"].pop("lengths") == str(lengths)
    assert own == printed
    numbers = " ".join(str(200 + 37 * i % 2500) for i in range(300))
    kept = page.post("/api/lengths", params={"paste": "true"}, content=numbers).json()
    pasted = page.get("/api/answer", params={**QUESTION, "lengths": kept["id"]}).json()
    assert pasted["rows"] == printed["rows"]


def test_an_uploaded_model_is_the_bundled_one_it_is_a_copy_of(page):
    config = (CONFIGS / "Qwen2.5-0.5B.json").read_bytes()
    kept = page.post("/api/model", params={"name": "config.json"}, content=config).json()
    assert kept["parameters"] == 494_032_768
    own = asked(page, model=kept["id"]).json()
    assert own["question"]["model"] == "config.json"
    assert own["rows"] == asked(page).json()["rows"]


def test_a_downloaded_experiment_gives_the_pages_numbers(page, capsys, tmp_path):
    rows = asked(page).json()["rows"]
    for place, row in enumerate(rows):
        given = asked(page, "experiment", place=place)
        path = tmp_path / f"{place}.toml"
        path.write_bytes(given.content)
        assert main(["simulate", str(path), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["seconds_per_step"] == pytest.approx(row["seconds_per_step"], rel=1e-9)
        assert summary["gpu_seconds"] == pytest.approx(8 * summary["wall_seconds"])
    assert 'filename="truncated-1000-8-gpus-tp1.toml"' in given.headers["content-disposition"]
    assert asked(page, "experiment", place=7).status_code == 400


def test_an_experiment_brings_its_uploads(page, tmp_path):
    kept = page.post("/api/lengths", params={"paste": "1"}, content="400, 800, 1600").json()
    config = (CONFIGS / "Qwen2.5-0.5B.json").read_bytes()
    model = page.post("/api/model", params={"name": "mine.json"}, content=config).json()
    query = {**QUESTION, "lengths": kept["id"], "model": model["id"]}
    given = page.get("/api/experiment", params={**query, "place": 1})
    zipfile.ZipFile(io.BytesIO(given.content)).extractall(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiment.toml", "mine.json", "pasted.csv"]
    result = simulate(load_experiment(tmp_path / "experiment.toml"))
    assert set(result.rollouts[result.rollouts.finished].eval("context_before + tokens - prompt_tokens")) <= {
        400,
        800,
        1600,
    }


@pytest.mark.slow
def test_a_report_is_one_page_of_the_chosen_options(page, folder):
    given = asked(page, "report", shown="0,1")
    assert given.status_code == 200, given.text
    text = given.content.decode()
    assert "synchronous-8-gpus-tp1" in text
    assert "truncated-1000-8-gpus-tp1" in text
    assert "simulated" in text
    assert not [path for path in folder.iterdir() if (path / "report.html").exists()]
    assert "choose 1 to 4" in faults(asked(page, "report", shown="0,9"))[None]


def test_pictures_come_from_the_rows_own_simulation(page):
    rows = asked(page).json()["rows"]
    drawn = asked(page, "pictures", shown="0,1").json()
    for row, own in zip(rows, drawn, strict=True):
        assert (own["gpus"], own["schedule"]) == (row["gpus"], row["schedule"])
        assert sum(own["gpu_seconds"].values()) == pytest.approx(8 * row["seconds_per_step"])
        assert [lane["engine"] for lane in own["timeline"]["lanes"]] != []
        hardware = own["roofline"]["hardware"]
        for point in own["roofline"]["points"]:
            roof = min(hardware["peak_flops"], point["intensity"] * hardware["memory_bytes_per_s"])
            assert 0 < point["flops_per_s"] < roof


def test_shares_of_pieces_by_hand():
    # Spans 0-2 s worth 1 and 3-4 s worth 1/2; pieces of 2 s: (2 x 1) / 2, and (0 + 1 x 1/2) / 2.
    begins, ends, value = np.array([0.0, 3.0]), np.array([2.0, 4.0]), np.array([1.0, 0.5])
    assert shares_of_pieces(begins, ends, value, np.array([0.0, 2.0, 4.0])).tolist() == [1.0, 0.25]
    assert shares_of_pieces(np.empty(0), np.empty(0), np.empty(0), np.array([0.0, 1.0])).tolist() == [0.0]


def test_a_timeline_holds_the_seconds_of_the_tables():
    question = question_from({**QUESTION, **LAW, "schedules": "asynchronous"}, Uploads(None))
    for option in options_of(question):
        result = simulate(option.experiment)
        drawn = timeline(result)
        phases = result.phases[result.phases.step == drawn["step"]]
        start = phases[phases.name == "rollout"].t_start.iloc[0]
        for lane in drawn["lanes"]:
            spans = result.engine[(result.engine.engine == lane["engine"])]
            for kind in ("decode", "prefill"):
                own = spans[spans.kind == kind]
                inside = own.t_end.clip(start, start + drawn["seconds"]) - own.t_start.clip(
                    start, start + drawn["seconds"]
                )
                piece_s = drawn["seconds"] / len(lane[kind])
                assert sum(lane[kind]) * piece_s == pytest.approx(inside.sum(), rel=1e-3, abs=piece_s * 0.02)
        names = [phase["name"] for phase in drawn["phases"]]
        assert "update_policy" in names
        assert all(
            phase["everywhere"] != drawn["beside"] for phase in drawn["phases"] if phase["name"] == "update_policy"
        )


def test_a_mixture_of_experts_has_no_roofline():
    query = {**QUESTION, **LAW, "model": "Qwen3-30B-A3B", "gpus": "32"}
    (option, *_) = options_of(question_from(query, Uploads(None)))
    assert pictures_of(simulate(option.experiment))["roofline"] == {
        "missing": "Qwen3-30B-A3B has experts; FLOPs and bytes are counted of dense models only"
    }


def test_a_simulation_that_takes_too_long_is_stopped(folder):
    long = {**QUESTION, **LAW, "prompts_per_step": "40000", "windows": "10", "steps": "1000"}  # minutes of it
    with TestClient(make_app(folder, port=PORT), base_url=HERE) as own:
        assert asked(own).status_code == 200  # the processes have started: their imports are not part of a job
        own.app.state.planner._workers.limit_s = 0.5
        began = time.monotonic()
        response = own.get("/api/answer", params=long)
        assert time.monotonic() - began < 20
        assert "stopped after 0.5 s; ask for fewer options" in response.text


def test_questions_beyond_the_limit_are_told_to_wait(page, monkeypatch):
    monkeypatch.setattr(planner_module, "MOST_AT_ONCE", 0)
    response = asked(page)
    assert response.status_code == 503
    assert "ask again in a few seconds" in faults(response)[None]


def test_a_refused_upload_that_came_twice_is_forgotten_once(tmp_path):
    uploads = Uploads(tmp_path)
    own = uploads.keep("model", "config.json", b"{}")
    assert uploads.keep("model", "config.json", b"{}").id == own.id
    uploads.forget(own.id)
    uploads.forget(own.id)
    assert uploads.get(own.id, "model") is None


def test_uploads_are_kept_once_and_not_for_ever(tmp_path):
    uploads = Uploads(tmp_path)
    first = uploads.keep("lengths", "a.csv", b"tokens\n1\n")
    assert uploads.keep("lengths", "a.csv", b"tokens\n1\n") == first
    assert len(list(tmp_path.iterdir())) == 1
    for size in range(2, 25):
        uploads.keep("lengths", "a.csv", b"tokens\n%d\n" % size)
    assert uploads.get(first.id, "lengths") is None
    assert len(list(tmp_path.iterdir())) == 20
    assert uploads.get(uploads.keep("lengths", "x", b"a\nb\n").id, "model") is None


def test_a_fault_of_one_option_does_not_stop_the_others():
    query = {**QUESTION, **LAW, "prompts_per_step": "1", "samples_per_prompt": "1", "windows": "1"}
    plain, cut = (simulated(option) for option in options_of(question_from(query, Uploads(None))))
    assert plain.pictures
    assert "no row finished" in cut.estimate
    assert cut.pictures == {}
