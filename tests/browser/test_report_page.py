"""The report as a reader meets it: on a desk and a phone, light and dark, by mouse and keyboard, with no network."""

import pytest

from tests.analysis.made_runs import RISING, make_run, simulated_run
from tests.browser.accessibility import contrast_faults, unnamed
from tppo.commands.report import run_report

PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="session")
def report_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    measured = [make_run(folder / f"{arm}-s{seed}", accuracies=RISING, seconds_per_step=s)
                for arm, s in (("ppo", 4.0), ("tppo", 2.0)) for seed in (0, 1)]  # fmt: skip
    workload = {"steps": 8, "prompts_per_step": 8}
    simulated = simulated_run(folder / "simulated", {"workload": workload})
    return run_report([run.path for run in (*measured, simulated)], folder / "report.html")


@pytest.fixture
def report(page, report_file):
    page.goto(report_file.as_uri())
    return page


def column(page, table, number):
    return page.locator(f"table[aria-label='{table}'] tbody tr > :nth-child({number})").all_inner_texts()


def test_it_opens_with_everything_in_it_and_asks_nothing_of_the_network(report):
    assert report.title() == "Run report: ppo, tppo, simulated"
    assert report.locator("figure svg").count() == report.locator("figure").count() >= 2
    assert report.get_by_text("Window:").count() == 3
    assert report.locator("figure svg image[href^='http']").count() == 0


def test_it_is_whole_without_scripts(browser, report_file):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report_file.as_uri())
    assert page.locator("table[aria-label='Speed'] th").first.inner_text() == "arm"
    assert page.locator("figure svg").first.is_visible()
    assert not page.locator("#theme").is_visible()
    context.close()


def test_a_click_sorts_a_column_and_a_second_one_turns_it_round(report):
    head = report.locator("table[aria-label='Speed'] thead th").nth(2)
    given = column(report, "Speed", 3)
    assert [float(value) for value in given][:2] == [4, 2]
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    ascending = [float(value) for value in column(report, "Speed", 3)]
    assert ascending == sorted(ascending)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(value) for value in column(report, "Speed", 3)] == sorted(ascending, reverse=True)
    assert report.locator("table[aria-label='Speed'] thead th").first.get_attribute("aria-sort") == "none"


def test_the_keyboard_sorts_too(report):
    head = report.locator("table[aria-label='Speed'] thead th").first
    head.locator("button").focus()
    report.keyboard.press("Enter")
    assert column(report, "Speed", 1) == ["ppo", "simulated", "tppo"]
    report.keyboard.press("Space")
    assert column(report, "Speed", 1) == ["tppo", "simulated", "ppo"]
    assert head.get_attribute("aria-sort") == "descending"


def test_what_is_not_known_stays_at_the_end_either_way(page, tmp_path, report_file):
    page.goto(report_file.as_uri())
    page.evaluate(
        """() => document.querySelector("table[aria-label='Speed'] tbody tr").cells[1].setAttribute("data-sort", "")"""
    )
    button = page.locator("table[aria-label='Speed'] thead th button").nth(1)
    for _ in range(2):
        button.click()
        assert column(page, "Speed", 1)[-1] == "ppo"


def test_the_first_key_leads_past_the_contents(report):
    report.keyboard.press("Tab")
    assert report.evaluate("document.activeElement.textContent") == "Skip to the report"
    assert report.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    report.keyboard.press("Enter")
    assert report.evaluate("document.activeElement.id") == "main"


def test_the_page_of_a_phone_does_not_scroll_sideways(browser, report_file):
    context = browser.new_context(viewport=PHONE, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(report_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    wide = page.locator(".scroll").first
    assert wide.evaluate("box => box.scrollWidth > box.clientWidth")  # the table does, inside its box
    assert page.locator("body").evaluate("body => parseFloat(getComputedStyle(body).fontSize)") >= 16
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser, report_file, scheme):
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto(report_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert contrast_faults(page) == []
    assert unnamed(page) == []
    context.close()


def test_the_theme_can_be_chosen_and_is_kept(report):
    background = "getComputedStyle(document.body).backgroundColor"
    assert report.evaluate(background) == "rgb(255, 255, 255)"
    report.get_by_role("button", name="Dark theme").click()
    assert report.evaluate(background) == "rgb(15, 20, 25)"
    assert contrast_faults(report) == []
    report.reload()
    assert report.evaluate(background) == "rgb(15, 20, 25)"
    report.get_by_role("button", name="Light theme").click()
    assert report.evaluate(background) == "rgb(255, 255, 255)"


def test_a_figure_takes_the_themes_ink_and_ground(report):
    used = """(figure) => {
      const style = (selector) => getComputedStyle(figure.querySelector(`svg ${selector}`));
      return [style("[style*='fill: #ffffff']").fill, style("[style*='stroke: #000000']").stroke,
        style("[style*='stroke: #e3e3e3']").stroke, style("use").fill];
    }"""
    figure = report.locator("figure").first
    assert figure.evaluate(used) == ["rgb(255, 255, 255)", "rgb(27, 31, 36)", "rgb(227, 227, 227)", "rgb(27, 31, 36)"]
    report.get_by_role("button", name="Dark theme").click()
    assert figure.evaluate(used) == ["rgb(24, 32, 41)", "rgb(230, 237, 243)", "rgb(58, 66, 76)", "rgb(230, 237, 243)"]
    ground = report.locator(".card").first.evaluate("card => getComputedStyle(card).backgroundColor")
    assert ground == "rgb(24, 32, 41)"


@pytest.mark.parametrize("width", [390, 1280])
def test_letters_of_figures_are_of_11_pixels_and_what_does_not_fit_scrolls(page, report_file, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(report_file.as_uri())
    scales = page.locator("figure svg").evaluate_all(
        "all => all.map((svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
    )
    assert min(scales) * 10 / 1.2 >= 11  # "small" is 10 points / 1.2, and a unit of the picture is a point
    hints = page.locator(".card").evaluate_all(
        "all => all.map((card) => [card.scrollWidth > card.clientWidth, getComputedStyle(card, '::before').content])"
    )
    assert all(("Scroll sideways" in content) == scrolls for scrolls, content in hints)
    assert any(scrolls for scrolls, _ in hints) == (width == 390)
