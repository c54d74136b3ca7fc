"""Figures that tests come by are printed at the end of the run, so that each claim has a command that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
_figures: list[str] = []


@pytest.fixture
def figure() -> Callable[[str], None]:
    return _figures.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("figures seen in this run")
        for line in _figures:
            terminalreporter.line(line)


@pytest.fixture(scope="module")  # while it is open, its loop is the thread's
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip("needs Debian's package chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has none
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(15_000)
    yield context.new_page()
    context.close()
