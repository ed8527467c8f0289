import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from fastapi.testclient import TestClient

from profiling.errors import ConfigError
from simulator import load_experiment, simulate
from simulator.models.shape import CONFIGS
from simulator.plan.options import options_of
from tppo.cli import main
from tppo.commands.explore import is_loopback, listen
from tppo.explore import planner as planner_module
from tppo.explore.asked import question_from
from tppo.explore.pictures import pictures_of, shares_of_pieces, timeline
from tppo.explore.server import make_app
from tppo.explore.uploads import MOST_BYTES, Uploads
from tppo.explore.work import simulated

QUESTION = {
    "model": "Qwen2.5-0.5B", "gpu": "H100-SXM", "gpus": "8", "steps": "50", "windows": "1000",
    "prompts_per_step": "32", "samples_per_prompt": "4", "max_response_tokens": "3000", "draws": "300",
}  # fmt: skip
LAW = {"mean_tokens": "900"}
PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def page(folder):
    with TestClient(make_app(folder, port=PORT), base_url=HERE) as client:
        yield client


def asked(page, what="answer", **changes):
    return page.get(f"/api/{what}", params={**QUESTION, **LAW, **changes})


def faults(response):
    found = response.json()["faults"]
    assert all(len(fault["message"].splitlines()) == 1 for fault in found)
    return {fault["field"]: fault["message"] for fault in found}


def words(query):
    return [word for name, value in query.items() for word in (f"--{name.replace('_', '-')}", value)]


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


def test_an_option_is_simulated_once(page, monkeypatch):
    first = asked(page, seed="5").json()
    workers = page.app.state.planner._workers
    ran = []
    run = workers.run

    async def counted(function, *arguments):
        ran.append(function.__name__)
        return await run(function, *arguments)

    monkeypatch.setattr(workers, "run", counted)
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
        drawn = timeline(option, result)
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
    assert pictures_of(option, simulate(option.experiment))["roofline"] == {
        "missing": "Qwen3-30B-A3B has experts; FLOPs and bytes are counted of dense models only"
    }


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"finished_rows": "5"}, "steps", "state the horizon: either steps or finished_rows"),
        ({"steps": "0"}, "steps", "steps = '0': input should be greater than or equal to 1"),
        ({"gpus": "8,,16"}, "gpus", "gpus: an empty value between commas"),
        ({"gpus": "8,many"}, "gpus", "gpus = 'many': input should be a valid integer"),
        ({"model": "Qwen2.5-7"}, "model", "model 'Qwen2.5-7': not a bundled one; did you mean 'Qwen2.5-"),
        ({"model": "simulator/models/configs/Qwen2.5-7B.json"}, "model", "not a bundled one"),
        ({"gpu": "/etc/passwd.toml"}, "gpu", "gpu '/etc/passwd.toml': not a bundled one"),
        ({"lengths": "/etc/passwd"}, "lengths", "paths are not opened from here; upload the file"),
        ({"lengths": "upload-" + "0" * 24}, "lengths", "this upload is no longer here; upload the file again"),
        ({"efficiency": "mine.toml"}, "efficiency", "files are not opened from here; use tppo plan --efficiency"),
        ({"windws": "8"}, "windws", "unknown field 'windws'; did you mean 'windows'?"),
        ({"mean_tokens": "5000"}, "mean_tokens", "mean_tokens = 5000 is not below max_response_tokens = 3000"),
        ({"steps_ratio": "1.5,1.2"}, "steps_ratio", "LOW,HIGH"),
        ({"gpu": "B200"}, "extrapolate", "no efficiency factors of family 'blackwell'"),
        ({"tensor_parallel": "4"}, "tensor_parallel", "does not divide 14 attention heads"),
        ({"seed": "9" * 3000}, "seed", "seed: has 3000 characters"),
        ({"gpus": ",".join(map(str, range(8, 64)))}, None, "112 options are more than the 48"),
        ({"prompts_per_step": "90000"}, None, "360000 responses a step"),
        ({"mtbf_hours": "0.000001"}, "checkpoint_every", "fail more than 10000 times on average"),
    ],
)  # fmt: skip
def test_faults_stand_beside_their_fields(page, changes, field, message):
    response = asked(page, **changes)
    assert response.status_code == 400
    assert message in faults(response)[field]


def test_every_fault_is_told_at_once(page):
    assert set(faults(asked(page, steps="x", draws="0", windows="y"))) == {"steps", "draws", "windows"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.csv: is empty; upload a CSV"),
        (b" \n\n", "a.csv: is empty"),
        (b"tokens\n", "a.csv: has column names but no rows"),
        (b"120\n340\n", "line 1 holds numbers, not column names; put a line such as 'tokens'"),
        (b"PAR1\x00\x00\xff", "a.csv: is not text; save it as CSV"),
        (b"tokens\n" + b"1," * 6000, "a.csv: line 2 has 12000 characters; write one response a line"),
        (b"tokens\n" + b"1\n" * (MOST_BYTES["lengths"] // 2), "a.csv: is larger than 20 MiB"),
    ],
)
def test_what_is_no_table_is_refused(page, content, message):
    response = page.post("/api/lengths", params={"name": "a.csv"}, content=content)
    assert response.status_code == 400
    assert message in faults(response)[None]


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (b"length\n5\n6\n", "lengths_column", "a.csv: no column 'tokens'; it has length"),
        (b"tokens\n5\n-6\n", "lengths_column", "a.csv: column 'tokens', row 2: not a positive number"),
        (b"tokens\nNaN\n6\n", "lengths_column", "row 1: not a positive number"),
        (b"tokens\n5\nmany\n", "lengths_column", "row 2: not a positive number"),
        (b"tokens\n5\n5,6,7\n", "lengths", "a.csv: cannot be read"),
    ],
)
def test_lengths_that_are_none_are_told_beside_the_upload(page, content, field, message):
    kept = page.post("/api/lengths", params={"name": "a.csv"}, content=content).json()
    response = page.get("/api/answer", params={**QUESTION, "lengths": kept["id"]})
    assert response.status_code == 400
    assert message in faults(response)[field]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "pasted lengths: none; paste numbers"),
        ("5 6 x7", "pasted lengths: number 3, 'x7', is not a positive number"),
        ("5, -6", "number 2, '-6'"),
        ("5; nan", "number 2, 'nan'"),
        ("inf", "number 1, 'inf'"),
    ],
)
def test_pasted_words_are_refused_by_number(page, text, message):
    response = page.post("/api/lengths", params={"paste": "1"}, content=text)
    assert response.status_code == 400
    assert message in faults(response)["lengths"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "theirs.json: is not a readable config.json"),
        (b"[1]", "theirs.json: is not a readable config.json: it holds no table"),
        (b"[" * 100_000, "theirs.json: is not a readable config.json"),
        (b'{"model_type": "gpt2"}', "theirs.json"),
        (b" " * (MOST_BYTES["model"] + 1), "theirs.json: is larger than 1 MiB"),
    ],
)
def test_a_config_that_is_none_is_refused(page, folder, content, message):
    response = page.post("/api/model", params={"name": "../../theirs.json"}, content=content)
    assert response.status_code == 400
    assert message in faults(response)[None]
    assert str(folder) not in response.text
    assert not list(folder.glob("**/theirs.json"))


def test_only_the_page_itself_is_answered(page):
    assert page.get("/").status_code == 200
    for host in ("evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1"):
        assert "this page is at" in faults(page.get("/", headers={"host": host}))[None]
    assert page.get("/", headers={"host": f"localhost:{PORT}"}).status_code == 200
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{PORT}"):
        response = page.post("/api/lengths", content=b"tokens\n5\n", headers={"origin": origin})
        assert response.status_code == 403
    assert page.post("/api/lengths", content=b"tokens\n5\n", headers={"origin": HERE}).status_code == 200
    assert asked(page).status_code == 200
    assert page.get("/api/choices", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert page.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link that was shared


def test_every_answer_forbids_what_is_not_ours(page):
    for response in (page.get("/"), page.get("/no"), asked(page, steps="x"), page.get("/", headers={"host": "x"})):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_only_the_pages_own_files_are_served(page):
    for name in ("../server.py", "..%2Fserver.py", "%2e%2e/guard.py", "server.py", "/etc/passwd"):
        assert page.get(f"/static/{name}").status_code == 404
    assert "import" in page.get("/static/page.js").text
    assert page.get("/docs").status_code == page.get("/openapi.json").status_code == 404
    for file in ("", "static/page.js", "static/form.js", "static/answer.js", "static/pictures.js", "static/style.css"):
        text = page.get(f"/{file}").text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text


def test_beyond_this_machine_a_token_is_demanded(folder):
    with TestClient(make_app(folder, port=PORT, token="secret"), base_url=f"http://host:{PORT}") as own:
        assert own.get("/").status_code == own.get("/api/choices").status_code == 401
        assert own.get("/api/choices?token=secret").status_code == 401
        assert own.get("/?token=wrong").status_code == 401
        led = own.get("/?token=secret&gpus=8", follow_redirects=False)
        assert (led.status_code, led.headers["location"]) == (303, "/?gpus=8")
        assert "httponly" in led.headers["set-cookie"].lower()
        assert own.get("/api/choices").status_code == 200


def test_a_simulation_that_takes_too_long_is_stopped(folder):
    long = {**QUESTION, **LAW, "prompts_per_step": "40000", "windows": "10"}
    with TestClient(make_app(folder, port=PORT, limit_s=0.5), base_url=HERE) as own:
        own.get("/api/choices")
        time.sleep(4)  # the processes start: their imports are not part of a job
        began = time.monotonic()
        response = own.get("/api/answer", params=long)
        assert time.monotonic() - began < 5
        assert "stopped after 0.5 s; ask for fewer options" in response.text


def test_questions_beyond_the_limit_are_told_to_wait(page, monkeypatch):
    monkeypatch.setattr(planner_module, "MOST_AT_ONCE", 0)
    response = asked(page)
    assert response.status_code == 503
    assert "ask again in a few seconds" in faults(response)[None]


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


def test_an_address_that_cannot_be_had_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen on 127.0.0.1: Address already in use; choose" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--port 70000: is not between 0 and 65535"):
        listen("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match="--bind 'no such host': is no address of this machine"):
        listen("no such host", 0)
    assert [is_loopback(address) for address in ("127.0.0.1", "::1", "0.0.0.0", "192.168.0.1")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["explore"]) == 2
    assert 'uvicorn is not installed; pip install "tppo[explore]"' in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_server_and_removes_what_is_temporary(tmp_path, number, code):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tppo", "explore"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )  # fmt: skip
    assert server.stdout.readline().startswith("http://127.0.0.1:")
    assert list(tmp_path.glob("tppo-explore-*"))
    time.sleep(0.5)
    server.send_signal(number)
    began = time.monotonic()
    _, error = server.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert server.returncode == code, error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("tppo-explore-*"))
