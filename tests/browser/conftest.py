"""One headless Chromium for all tests of a session, and pages in it that must not complain nor ask for anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pliant.records import Record
from pliant.reporting.page import render

NAMES = ("chromium", "chromium-browser", "google-chrome")

Opener = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The browser of the machine; nothing is downloaded."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    with driver.sync_playwright() as playwright:
        # In a container there is no sandbox to be had; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tabs:
    """Opens pages of records and listens to them."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser = browser
        self.folder = folder
        self.contexts: list[Any] = []
        self.complaints: list[str] = []

    def open(self, records: list[Record], width: int = 1280, dark: bool = False, **options: Any) -> Any:
        path = self.folder / f"report-{len(self.contexts)}.html"
        path.write_text(render(records, **options), encoding="utf-8")
        context = self.browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            permissions=["clipboard-read", "clipboard-write"],
        )
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        # plotly.js asks for pictures that lie inside the page itself.
        page.on("request", lambda request: self._ask(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    def _ask(self, url: str) -> None:
        if not url.startswith(("data:", "blob:")):
            self.complaints.append(f"request: {url}")

    def close(self) -> None:
        for context in self.contexts:
            context.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Opener]:
    """Return what opens the page of some records; at the end, none may have complained or asked for anything."""
    tabs = Tabs(browser, tmp_path)
    yield tabs.open
    tabs.close()
    assert tabs.complaints == []


@pytest.fixture(scope="session")
def tabs(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tabs]:
    """Pages that serve several tests, for opening one takes as long as testing it."""
    tabs = Tabs(browser, tmp_path_factory.mktemp("pages"))
    yield tabs
    tabs.close()


RESET = """() => {
    document.activeElement?.blur();
    document.querySelectorAll("fieldset").forEach(one => one.querySelector("input").click());
    document.querySelector(".legend .all").click();
    const slider = document.getElementById("keep-0");
    slider.value = 30;
    slider.dispatchEvent(new Event("input"));
    scrollTo(0, 0);
}"""
