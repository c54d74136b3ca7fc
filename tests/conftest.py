"""What all tests share: their order, their spread over several processes, the figures printed at the end, a browser.

Tests of one module in e2e, swarm or browser share a running system or a browser, so one process runs the whole module.
All other tests run in whichever process is free. Long modules start first, so that none of them runs alone at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loads
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")
FIRST_MODULE = "test_cluster"  # the longest
# The folders, in the order in which they start. The tests of netns need no images, which are made in the meantime.
FOLDERS = ("netns", "swarm", "e2e", "browser", "unit")
WHOLE_MODULES = ("swarm", "e2e", "browser")  # folders
LONG_MODULES = {"test_system", "test_unhealthy_backends", "test_updates", "test_run_sh", "test_datapath_host"}
FIGURE = "figure"
_figures: list[str] = []


def folder_of(test: str) -> str:
    """The folder below tests/ of a test with this path or id, such as tests/e2e/test_system.py."""
    _, _, rest = test.rpartition("tests/")
    return rest.partition("/")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests by folder, and within a folder the long modules first. Otherwise the order stays."""

    def rank(item: pytest.Item) -> tuple[bool, int, bool]:
        folder = folder_of(str(item.path))
        position = FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)
        return item.path.stem != FIRST_MODULE, position, item.path.stem not in LONG_MODULES

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)  # it is pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distributes whole modules or single tests. (xdist's own groups by mark need a pytest before 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  -- only where tests run in several processes

    paired = config.getoption("markexpr") == "paired"

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module, _, _ = nodeid.partition("::")
            folder = folder_of(module)
            if paired:  # two processes: a Swarm that mostly waits, and one test at a time of the others
                return "swarm" if folder == "swarm" else "others"
            return module if folder in WHOLE_MODULES else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _loads_end() -> Iterator[None]:
    yield
    loads.end_all()


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
