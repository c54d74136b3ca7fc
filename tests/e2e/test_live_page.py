"""The page of a running system agrees with its /status; README's pictures are made here.

LBTEST_PICTURES=1 keeps the pictures in docs/pictures/, where README shows them from.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from e2e.conftest import ROOT, Load, System, wait_until

checks = pytest.importorskip("browser.checks", reason="needs the package playwright")

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = {"page-light": (1600, False), "page-dark": (1600, True), "page-phone": (390, False)}


def url(system: System) -> str:
    return f"http://127.0.0.1:{system.manager_port}"


def test_page_agrees_with_the_status_under_load(system: System, page: Page) -> None:
    load = Load(system.port, seconds=60, per_second=20)
    time.sleep(2)  # longer than an interval
    checks.agrees_with_the_status(page, url(system))
    load.stop()
    checks.requests_go_only_to_the_manager(page, url(system))


def test_scale_out_is_on_the_page_within_seconds_of_its_decision(
    system: System,
    page: Page,
) -> None:
    page.goto(url(system))
    page.wait_for_selector("#fleet tr")
    assert len(checks.rows(page)) == 2
    load = Load(system.port, seconds=60, per_second=50)
    wait_until(lambda: system.status()["desired"] > 2, "a decision to grow", 20)
    checks.until(page, lambda: len(checks.rows(page)) > 2, "the new backends are on the page", 5)
    load.stop()
    checks.marks_the_last_decision(page, url(system))


def test_demo_load_scales_the_system_and_draws_the_result(
    system: System,
    page: Page,
    tmp_path: Path,
) -> None:
    keep = bool(os.environ.get("LBTEST_PICTURES"))
    place, drawn = ROOT / "docs" / "pictures" if keep else tmp_path, tmp_path / "demo.html"
    command = [str(system.tree / "tests/load/run.sh"), "--project", system.project, "--peak", "70"]
    command += ["--seconds", "100" if keep else "20", "--out", str(drawn)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CREATE_SERVER" in drawn.read_text()
    place.mkdir(exist_ok=True)
    for name, (width, dark) in PICTURES.items():
        page.set_viewport_size({"width": width, "height": 1000})
        checks.screenshot(page, url(system), place / f"{name}.png", dark)
        assert (place / f"{name}.png").stat().st_size > 10_000
    page.set_viewport_size({"width": 1200, "height": 710})
    page.goto(drawn.as_uri())
    page.wait_for_selector(".scatterlayer .js-line", state="attached")
    page.screenshot(path=place / "demo.png")
