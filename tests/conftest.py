"""What all tests share: their order, the figures printed at the end of a run, and a browser.

The tests run in several processes. Tests that share a running system are one group, which one process runs (see
tests/e2e/conftest.py and tests/swarm/conftest.py). The longest groups start first, so that none runs alone at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
FOLDERS = ("swarm", "e2e", "browser", "netns", "unit")  # in the order in which they start
FIGURE = "figure"
_figures: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: by folder, and within one folder the groups before the single tests."""

    def rank(item: pytest.Item) -> tuple[int, bool]:
        folder = next((number for number, name in enumerate(FOLDERS) if name in item.path.parts), len(FOLDERS))
        return folder, item.get_closest_marker("xdist_group") is None

    items.sort(key=rank)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to the figures at the end of the run, so that each claim has a command that shows it."""

    def add(line: str) -> None:
        request.node.user_properties.append((FIGURE, line))

    return add


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects the figures of a test that has ended, whichever process ran it."""
    if report.when == "teardown":
        _figures.extend(str(value) for name, value in report.user_properties if name == FIGURE)


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
