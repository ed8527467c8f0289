"""The page of `tppo explore` in a real browser, against a real server."""

import json
import os
import signal
import subprocess
import sys
from urllib.parse import parse_qs, urlsplit

import pytest

from simulator.models.shape import CONFIGS
from tests.browser.conftest import WAIT_MS, watch
from tppo.cli import main

pytestmark = pytest.mark.usefixtures("one_process")
SMALL = (
    "?model=Qwen2.5-0.5B&gpu=H100-SXM&gpus=8&steps=5000&windows=1000&prompts_per_step=32&samples_per_prompt=4"
    "&max_response_tokens=3000&mean_tokens=900&draws=300"
)


@pytest.fixture(scope="module")
def address():
    server = subprocess.Popen([sys.executable, "-m", "tppo", "explore"], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    yield server.stdout.readline().strip()
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 130


@pytest.fixture
def faulty_page(browser):
    """A page on which the server refuses requests, which a browser logs; nothing else may go wrong."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    opened = context.new_page()
    found = watch(opened)
    yield opened
    context.close()
    assert [fault for fault in found if "status of 400" not in fault] == []


def drawn(page):
    """Numbers and pictures of the question in the address are there."""
    page.wait_for_selector("body[data-pictures]", timeout=WAIT_MS)
    page.wait_for_selector("#answer[aria-busy='false']:not(.stale)", timeout=WAIT_MS)


def after(page, change):
    """Do what changes the question; wait for the next answer's pictures. A file is sent before the question changes:
    then no answer may be on its way."""
    page.evaluate_handle("() => { delete document.body.dataset.numbers; delete document.body.dataset.pictures; }")
    change()
    drawn(page)


def planned(capsys, *words):
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def words_of(page):
    query = parse_qs(urlsplit(page.url).query)
    return [w for name, (value,) in query.items() if name != "shown" for w in (f"--{name.replace('_', '-')}", value)]


def saved(page, button, folder):
    with page.expect_download(timeout=WAIT_MS) as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def short(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.3g}'):g}"


def cells(page, place):
    return [cell.inner_text().split("\n")[0] for cell in page.query_selector_all(f"tr[data-place='{place}'] td")]


def test_choose_see_the_commands_numbers_and_download_them(page, address, capsys, tmp_path):
    page.goto(address + SMALL)
    drawn(page)
    after(page, lambda: page.fill("[name=gpus]", "8, 16"))
    after(page, lambda: page.check("[value=asynchronous]"))
    expected = planned(capsys, *words_of(page))
    assert len(expected["rows"]) == 6
    for place, row in enumerate(expected["rows"]):
        assert ("front" in page.inner_text(f"tr[data-place='{place}'] td.left")) == row["on_the_front"]
        assert cells(page, place)[1:10] == [
            str(row["gpus"]), row["schedule"], short(row["hours"]["p50"]), short(row["dollars"]["p50"]),
            short(row["kwh"]["p50"] / 1000), f"{100 * row['idle_share']:.0f} %", short(row["speedup_per_step"]),
            short(row["speedup_per_finished_row"]), "1" if row["schedule"] == "synchronous" else "not known",
        ]  # fmt: skip
    text = page.inner_text("#words")
    assert expected["decides"] in text
    assert expected["tail"] in text
    answer = json.loads(saved(page, "#save-answer", tmp_path).read_text())
    assert answer["rows"] == expected["rows"]

    drawn_last = page.query_selector_all("tr[data-place]:has(input:checked)")[-1]
    place = int(drawn_last.get_attribute("data-place"))
    experiment = saved(page, "#save-experiment", tmp_path)
    assert main(["simulate", str(experiment), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["seconds_per_step"] == pytest.approx(expected["rows"][place]["seconds_per_step"], rel=1e-9)

    report = saved(page, "#save-report", tmp_path)
    assert report.suffix == ".html"
    assert "simulated" in report.read_text()


def test_a_shared_link_opens_the_same_form_and_answer(page, address):
    page.goto(
        address + SMALL + "&price_per_hour=2.5&whole_nodes=false&schedules=synchronous,truncated,oversample&shown=0,2"
    )
    drawn(page)
    shown, query = page.inner_text("#table"), parse_qs(urlsplit(page.url).query)
    assert (query["whole_nodes"], query["price_per_hour"], query["shown"]) == (["false"], ["2.5"], ["0,2"])
    again = page.context.new_page()
    again.goto(page.url)
    drawn(again)
    assert again.inner_text("#table") == shown
    assert again.input_value("[name=price_per_hour]") == "2.5"
    assert not again.is_checked("[name=whole_nodes]")
    assert again.is_checked("[value=oversample]")
    labels = [figure.get_attribute("aria-label") for figure in again.query_selector_all("#pictures [role=img]")]
    assert len(labels) == 3
    assert all("synchronous, 8 GPUs" in label and "oversample 1.5, 8 GPUs" in label for label in labels)


def test_uploaded_lengths_give_the_commands_numbers(faulty_page, address, capsys, tmp_path):
    """Until the column is chosen the server may refuse the file: it has no column of the usual name."""
    page = faulty_page
    pilot = tmp_path / "pilot.csv"
    pilot.write_text("id,length\n" + "\n".join(f"{i},{200 + 37 * i % 2500}" for i in range(300)))
    page.goto(address + SMALL)
    page.check("[name=source][value=file]")
    page.set_input_files("#lengths-file", pilot)
    page.wait_for_selector("#kept:has-text('pilot.csv')", timeout=WAIT_MS)
    after(page, lambda: page.select_option("[name=lengths_column]", "length"))
    words = words_of(page)
    words[words.index("--lengths") + 1] = str(pilot)
    expected = planned(capsys, *words)
    assert [cells(page, place)[3] for place in (0, 1)] == [short(row["hours"]["p50"]) for row in expected["rows"]]
    after(page, lambda: page.check("[name=source][value=law]"))
    assert "lengths" not in page.url


def test_pasted_lengths_and_another_model_are_taken(page, address):
    page.goto(address + SMALL)
    drawn(page)
    before = cells(page, 0)[3]
    page.check("[name=source][value=paste]")
    after(page, lambda: page.fill("#paste", "100 200 300"))
    assert float(cells(page, 0)[3]) < float(before)
    after(page, lambda: page.set_input_files("#model-file", CONFIGS / "Qwen2.5-1.5B.json"))
    assert "1.54 billion parameters" in page.inner_text("[name=model]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.csv: is empty"),
        (b"\x00\x01\xff", "bad.csv: is not text"),
        (b"length\n5\n", None),
        (b"tokens\n5\n-1\n", "bad.csv: column 'tokens', row 2: not a positive number"),
        (b"tokens\n5\nmany\n", "bad.csv: column 'tokens', row 2"),
    ],
)
def test_bad_uploads_are_told_beside_the_field(faulty_page, address, tmp_path, content, message):
    page, bad = faulty_page, tmp_path / "bad.csv"
    bad.write_bytes(content)
    page.goto(address + SMALL)
    drawn(page)
    page.check("[name=source][value=file]")
    if message is None:  # one column only: it is the one, whatever it is called
        after(page, lambda: page.set_input_files("#lengths-file", bad))
        assert page.input_value("[name=lengths_column]") == "length"
        return
    page.set_input_files("#lengths-file", bad)
    page.wait_for_selector(f'.error:has-text("{message.split(": ")[0]}")', timeout=WAIT_MS)
    assert message in page.inner_text("#error-lengths") + page.inner_text("#error-lengths_column")


def test_a_fault_stands_beside_its_field_and_goes_with_it(faulty_page, address):
    page = faulty_page
    page.goto(address + SMALL)
    drawn(page)
    page.fill("[name=gpus]", "8,many")
    page.wait_for_selector("#error-gpus:has-text('input should be a valid integer')", timeout=WAIT_MS)
    assert page.get_attribute("[name=gpus]", "aria-invalid") == "true"
    assert "error-gpus" in page.get_attribute("[name=gpus]", "aria-describedby")
    after(page, lambda: page.fill("[name=gpus]", "8"))
    assert page.inner_text("#error-gpus") == ""
    page.fill("[name=prompts_per_step]", "90000")
    page.wait_for_selector("#faults:has-text('360000 responses a step')", timeout=WAIT_MS)


def test_an_answer_is_given_up_as_soon_as_the_question_changes(page, address):
    """In the pause of typing, too, when the next one is not yet asked."""
    page.goto(address + SMALL)
    drawn(page)
    left = page.evaluate_handle(
        """() => {
          const field = document.querySelector("[name=windows]");
          field.value = "700";
          field.dispatchEvent(new Event("input", {bubbles: true}));
          return Object.keys(document.body.dataset);
        }"""
    )
    assert left.json_value() == []
    drawn(page)
    assert "windows=700" in page.url


def test_only_the_last_question_is_shown(page, address):
    page.goto(address + SMALL)
    drawn(page)
    after(page, lambda: [page.fill("[name=windows]", str(window)) for window in (500, 700, 900, 1100)])
    assert cells(page, 1)[2].startswith("truncated 1100")
    assert "windows=1100" in page.url


def test_pasted_lengths_are_taken_as_they_are_typed_and_dim_the_old_answer_until_then(faulty_page, address):
    page = faulty_page
    page.goto(address + SMALL)
    drawn(page)
    page.check("[name=source][value=paste]")
    page.wait_for_selector("#answer.stale #status:has-text('Paste lengths')", timeout=WAIT_MS)
    page.fill("#paste", "3000 100 x")
    page.wait_for_selector("#error-lengths:has-text(\"number 3, 'x', is not a positive number\")", timeout=WAIT_MS)
    page.wait_for_selector("#answer.stale #status:has-text('These lengths cannot be used')", timeout=WAIT_MS)
    assert page.query_selector("#actions[inert]")
    after(page, lambda: page.fill("#paste", "3000 100"))
    assert "lengths=upload-" in page.url
    assert page.inner_text("#error-lengths") == ""
    assert not page.query_selector("#actions[inert]")


def test_a_refused_file_takes_the_place_of_the_accepted_one(faulty_page, address, tmp_path):
    page, good, bad = faulty_page, tmp_path / "good.csv", tmp_path / "bad.csv"
    good.write_text("tokens\n500\n900\n")
    bad.write_bytes(b"\x00\xff")
    page.goto(address + SMALL)
    drawn(page)
    page.check("[name=source][value=file]")
    after(page, lambda: page.set_input_files("#lengths-file", good))
    page.set_input_files("#lengths-file", bad)
    page.wait_for_selector("#error-lengths:has-text('bad.csv: is not text')", timeout=WAIT_MS)
    page.wait_for_selector("#answer.stale #actions[inert]", timeout=WAIT_MS)
    assert page.inner_text("#kept") == ""
    after(page, lambda: page.fill("[name=gpus]", "8,16") or page.check("[name=source][value=law]"))
    assert "lengths" not in page.url


def test_a_first_estimate_is_shown_as_one_until_the_whole_answer_comes(page, address):
    page.goto(address + SMALL)
    drawn(page)
    seen = page.evaluate_handle(
        """() => new Promise((done) => {
          const seen = [], status = () => document.getElementById("status"), look = () => {
            const {first, firstPictures, pictures} = document.body.dataset, answer = document.getElementById("answer");
            const now = pictures ? "whole" : firstPictures ? "drawn" : first ? "first" : "none";
            if (now === seen.at(-1)?.[0]) return;
            const lanes = document.querySelectorAll("#pictures figure")[1].textContent.match(/engine [0-9]+/g);
            seen.push([now, answer.className, status().textContent.slice(0, 9), lanes.length]);
            if (now === "whole") { observer.disconnect(); done(seen.filter(([name]) => name !== "none")); }
          };
          const observer = new MutationObserver(look);
          observer.observe(document.body, {attributes: true});
          const field = document.querySelector("[name=prompts_per_step]");
          field.value = "640";
          field.dispatchEvent(new Event("input", {bubbles: true}));
        })"""
    )
    (*first, _), *drawn_and_whole = seen.json_value()  # the pictures of the question before are dimmed until then
    assert first == ["first", "first", "First est"]
    # Two options: the three of eight engines that have 1,024 of 2,560 rows, then six of all of them.
    assert drawn_and_whole == [["drawn", "first", "First est", 2 * 3], ["whole", "", "Simulated", 2 * 6]]


def test_the_table_fits_its_card_and_the_roofline_names_its_lines(page, address):
    page.goto(address + SMALL + "&schedules=synchronous,truncated,oversample")
    drawn(page)
    assert page.evaluate_handle("(({scrollWidth, clientWidth}) => scrollWidth - clientWidth)"
                                "(document.querySelector('.scroll'))").json_value() == 0  # fmt: skip
    roofline = page.query_selector_all("#pictures figure")[-1]
    assert "dashed: in practice (vllm on hopper)." in roofline.inner_text()
    assert "ridge: 295 FLOP per byte" in roofline.text_content()
    margin = roofline.query_selector("svg[role=img]").evaluate_handle(
        """svg => svg.viewBox.baseVal.height - Math.max(...[...svg.querySelectorAll("text")].map((own) => {
          const {y, height} = own.getBBox();
          return y + height;
        }))"""
    )
    assert margin.json_value() > 0


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_its_window_and_every_control_has_a_name(page, address, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(address + SMALL)
    drawn(page)
    assert page.evaluate_handle("document.documentElement.scrollWidth").json_value() <= width
    for control in page.query_selector_all("input:not([type=hidden]), select, textarea, button"):
        named = control.evaluate_handle(
            "own => own.labels?.length > 0 || own.getAttribute('aria-label') || own.innerText.trim()"
        )
        assert named.json_value(), control.get_attribute("id")


def test_the_keyboard_reaches_the_form_and_the_answer(page, address):
    page.goto(address + SMALL)
    drawn(page)
    page.keyboard.press("Tab")
    assert page.evaluate_handle("document.activeElement.className").json_value() == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate_handle("document.activeElement.id").json_value() == "answer"
    assert page.get_attribute("#status", "aria-live") == "polite"


def test_a_forged_host_is_refused(page, address):
    """As if a page elsewhere had given its own name our address."""
    forged = page.request.get(address, headers={"host": "evil.example"})
    assert forged.status == 421
    assert "this page is at" in forged.json()["faults"][0]["message"]
