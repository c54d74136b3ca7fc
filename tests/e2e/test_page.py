"""The page over the real system: what it shows is what is, and README's pictures are made here.

LBTEST_PICTURES=1 keeps the pictures in docs/pictures/, where README shows them from.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser.conftest import browser, page  # noqa: F401 - fixtures
from e2e.conftest import ROOT, Load, System, until

checks = pytest.importorskip("browser.checks", reason="needs the package playwright")

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = {"page-light": (1400, False), "page-dark": (1400, True), "page-phone": (390, False)}


def url(system: System) -> str:
    return f"http://127.0.0.1:{system.manager_port}"


def test_the_page_agrees_with_the_status_of_a_system_under_load(system: System, page: Page) -> None:  # noqa: F811
    load = Load(system.port, seconds=8, per_second=20)
    checks.agrees_with_the_status(page, url(system))
    load.result()
    checks.asks_nobody_else(page, url(system))


def test_a_scale_out_is_on_the_page_within_two_seconds_of_its_decision(
    system: System,
    page: Page,  # noqa: F811
    tmp_path: Path,
) -> None:
    page.goto(url(system))
    page.wait_for_selector("#fleet tr")
    assert len(checks.rows(page)) == 2
    load = Load(system.port, seconds=12, per_second=50)
    until(lambda: system.status()["desired"] > 2, "a decision to grow", 20)
    checks.until(page, lambda: len(checks.rows(page)) > 2, "the new backends are on the page", 2)
    load.result()
    checks.marks_the_last_decision(page, url(system))
    time.sleep(3)  # some of the quiet after the load, for the pictures
    place = ROOT / "docs" / "pictures" if os.environ.get("LBTEST_PICTURES") else tmp_path
    place.mkdir(exist_ok=True)
    for name, (width, dark) in PICTURES.items():
        page.set_viewport_size({"width": width, "height": 900})
        checks.screenshot(page, url(system), place / f"{name}.png", dark)
        assert (place / f"{name}.png").stat().st_size > 10_000
