"""A real Chromium for tests of pages. A test fails on console errors and on requests that leave the machine."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

DEFAULT = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip
WAIT_MS = 90_000
"""Of a machine that does other things too."""
LOCAL_SCHEMES = ("file", "data", "blob", "about", "chrome-error")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")
def browser():
    """Chromium, started once a file; $CHROMIUM names another executable than /usr/bin/chromium.

    Not once a session: as long as it is open, Playwright's event loop counts as running in this thread, and a test of
    another room that calls `asyncio.run` fails.
    """
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = os.environ.get("CHROMIUM", DEFAULT)
    if shutil.which(executable) is None:
        pytest.skip(f"no Chromium at {executable}; install it, or set CHROMIUM")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, timeout=WAIT_MS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A desktop-sized page of its own; the test fails at its end for what `watch` found."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT_MS)
    opened = context.new_page()
    faults = watch(opened)
    yield opened
    context.close()
    assert faults == []


def watch(page):
    """A list that fills with what the page does wrong: console errors, exceptions, requests that leave the machine.

    Such requests are stopped, so that a test without a network sees what one with a network would.
    """
    faults = []

    def route(handler):
        if leaves_the_machine(handler.request.url):
            faults.append(f"request to {handler.request.url}")
            handler.abort()
        else:
            handler.continue_()

    page.context.route("**/*", route)
    page.on("websocket", lambda socket: leaves_the_machine(socket.url) and faults.append(f"socket to {socket.url}"))
    page.on("pageerror", lambda error: faults.append(f"exception: {error}"))
    page.on("console", lambda line: line.type == "error" and faults.append(f"console: {line.text}"))
    return faults


def leaves_the_machine(url):
    parts = urlsplit(url)
    return parts.scheme not in LOCAL_SCHEMES and parts.hostname not in LOCAL_HOSTS
