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
