"""Figures that tests come by are printed at the end of the run, so that each claim has a command that shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_figures: list[str] = []


@pytest.fixture
def figure() -> Callable[[str], None]:
    return _figures.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("figures seen in this run")
        for line in _figures:
            terminalreporter.line(line)
