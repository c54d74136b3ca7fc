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
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = Path("/usr/bin/chromium")
# The order in which tests start: the longest modules, which share a Swarm of three nodes; netns, which needs no images
# (they are made in the meantime); the other long modules; then the folders.
ONE_CLUSTER = ("test_cluster", "test_node_loss")
LONG_MODULES = ("test_system", "test_updates", "test_unhealthy_backends", "test_page")
FOLDERS = ("netns", "e2e", "swarm", "browser", "unit")
WHOLE_MODULES = ("swarm", "e2e", "browser")  # folders
FIGURE = "figure"
_figures: list[str] = []


def folder_of(test: str) -> str:
    """The folder below tests/ of a test with this path or id, such as tests/e2e/test_system.py."""
    _, _, rest = test.rpartition("tests/")
    return rest.partition("/")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the tests as above. Otherwise their order stays."""

    def rank(item: pytest.Item) -> tuple[int, int]:
        folder, module = folder_of(str(item.path)), item.path.stem
        if module in ONE_CLUSTER:
            return 0, ONE_CLUSTER.index(module)
        if folder == "netns":
            return 1, 0
        if module in LONG_MODULES:
            return 2, LONG_MODULES.index(module)
        return 3, FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)  # it is pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distributes whole modules or single tests. (xdist's own groups by mark need a pytest before 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  -- only where tests run in several processes

    paired = config.getoption("markexpr") == "paired"

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, _ = nodeid.partition("::")
            module = Path(path).stem
            if paired:  # two processes: those that have engines of their own, and one other test at a time
                return module if module in (*ONE_CLUSTER, "test_chaos") else "others"
            if module in ONE_CLUSTER:
                return "one cluster"
            return path if folder_of(path) in WHOLE_MODULES else nodeid

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


# The pages share a context and so its cache: otherwise each would compile the 4 MB of the charts' library again.
@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context(viewport={"width": 1600, "height": 1000})
    made.set_default_timeout(15_000)
    yield made
    made.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    made = context.new_page()
    # What an earlier page has stored is not there when this one opens the manager's first.
    made.add_init_script("if (!sessionStorage.opened) { localStorage.clear(); sessionStorage.opened = 'yes'; }")
    yield made
    made.close()
