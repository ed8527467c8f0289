from tests.browser.accessibility import contrast, contrast_faults, unnamed
from tests.browser.conftest import leaves_the_machine, watch


def test_what_stays_on_the_machine_is_told_from_what_leaves_it():
    assert not leaves_the_machine("file:///home/me/report.html")
    assert not leaves_the_machine("data:image/png;base64,AAAA")
    assert not leaves_the_machine("http://127.0.0.1:8000/plan")
    assert not leaves_the_machine("ws://[::1]:8000/events")
    assert leaves_the_machine("https://example.org/font.woff2")
    assert leaves_the_machine("http://127.0.0.1.example.org/")


def test_a_page_that_calls_out_or_fails_is_told_on(browser):
    context = browser.new_context()
    page = context.new_page()
    faults = watch(page)
    page.set_content(
        "<title>x</title><img src='https://example.org/a.png'>"
        "<script>console.error('broken'); undefined_name()</script>"
    )
    page.wait_for_load_state("networkidle")
    context.close()
    assert any("request to https://example.org/a.png" in fault for fault in faults)
    assert any("console: broken" in fault for fault in faults)
    assert any("undefined_name is not defined" in fault for fault in faults)


def test_contrast_is_as_wcag_has_it():
    assert contrast([0, 0, 0], [255, 255, 255]) == 21
    assert round(contrast([119, 119, 119], [255, 255, 255]), 2) == 4.48  # the well-known #777: just too faint


def test_faint_text_and_unnamed_pictures_are_found(page):
    page.set_content(
        "<html lang=en><body style='background:#fff'><p style='color:#777'>faint</p><p style='color:#595959'>fine</p>"
        "<button></button><button>named</button><svg></svg></body></html>"
    )
    assert contrast_faults(page) == ["'faint': 4.48"]
    assert [fault.split(">")[0] for fault in unnamed(page)] == ["<button", "<svg"]
