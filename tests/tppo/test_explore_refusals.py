"""What the page refuses, whom it does not answer, and how the command ends."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from fastapi.testclient import TestClient

from profiling.errors import ConfigError
from tests.tppo.explore_page import HERE, PORT, QUESTION, asked, faults
from tppo.cli import main
from tppo.commands.explore import is_loopback, listen
from tppo.explore.server import make_app
from tppo.explore.uploads import MOST_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def page(folder):
    with TestClient(make_app(folder, port=PORT), base_url=HERE) as client:
        yield client


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"finished_rows": "5"}, "steps", "state the horizon: either steps or finished_rows"),
        ({"steps": "0"}, "steps", "steps = '0': input should be greater than or equal to 1"),
        ({"gpus": "8,,16"}, "gpus", "gpus: an empty value between commas"),
        ({"gpus": "8,many"}, "gpus", "gpus = 'many': input should be a valid integer"),
        ({"gpus": "abc"}, "gpus", "gpus = 'abc': input should be a valid integer"),
        ({"gpus": "0"}, "gpus", "gpus = '0': input should be greater than or equal to 1"),
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


@pytest.mark.parametrize(
    ("number", "code", "started"),
    [
        pytest.param(signal.SIGINT, 130, signal.SIG_DFL, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, signal.SIG_IGN, id="Ctrl-C in the background"),
        pytest.param(signal.SIGTERM, 143, signal.SIG_DFL, id="SIGTERM"),
        pytest.param(signal.SIGTERM, 143, signal.SIG_IGN, id="SIGTERM in the background", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_server_and_removes_what_is_temporary(tmp_path, number, code, started):
    """A shell without job control starts what is in the background with SIGINT ignored."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tppo", "explore"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, started),
    )  # fmt: skip
    address = server.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert list(tmp_path.glob("tppo-explore-*"))
    with urllib.request.urlopen(address, timeout=200) as page:  # until then it may still be starting
        assert page.status == 200
    server.send_signal(number)
    began = time.monotonic()
    _, error = server.communicate(timeout=200)
    assert time.monotonic() - began < 20
    assert server.returncode == code, error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("tppo-explore-*"))
