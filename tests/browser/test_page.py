"""The manager's page in a real browser, over the real application and a fake engine."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

from playwright.sync_api import Page

from browser import checks
from browser.stage import HOUR, Stage, a_busy_hour
from fakes import eventually

MARKUP = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """After an hour of use."""
    monkeypatch.setattr("core.settings.ROOT", tmp_path)
    made = Stage(tmp_path, past=HOUR)
    a_busy_hour(made)
    yield made
    made.close()


def test_the_page_agrees_with_the_status(page: Page, busy: Stage) -> None:
    checks.agrees_with_the_status(page, busy.base_url)
    displayed = {row["name"]: row for row in checks.rows(page)}
    assert displayed[f"{busy.name}1"]["state"] == "◑ draining"
    assert displayed[f"{busy.name}1"]["note"] == "drained by the operator"
    assert any(row["state"] == "✕ failed" and "exit code 137" in row["note"] for row in displayed.values())
    widths = page.eval_on_selector_all(".share i i", "bars => bars.map(bar => parseFloat(bar.style.width))")
    assert widths == pytest.approx([float(row["share"].split()[0]) for row in displayed.values()], abs=0.06)
    assert page.inner_text("#settings div:has(dt:text-is('stable-window')) dd") == "60"
    headers = page.eval_on_selector_all("thead th[scope=col]", "cells => cells.map(cell => cell.textContent)")
    assert headers == ["name", "address", "state", "share", "conn/s", "packets/s", "active"]


def test_a_scale_out_is_on_the_page_within_two_seconds(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    checks.agrees_with_the_status(page, stage.base_url)
    stage.report(690)
    decided_at = time.monotonic()
    checks.until(page, lambda: "CREATE_SERVER ▲ 2→5" in page.inner_text("#sentence"), "the decision")
    checks.until(page, lambda: len(checks.rows(page)) == 5, "the new backends")
    assert time.monotonic() - decided_at < 2
    assert page.inner_text("#desired").startswith("5 desired")
    spoken = page.locator("[aria-live=polite]").text_content()
    decided = "CREATE_SERVER 420 packets/s over 2 backends = 210 each, target 100 (2.10×)"
    assert spoken == f"2 of 5 backends serve. {decided}"
    assert page.get_attribute("#notices p", "class") == "note", "normal until they are ready"


def test_a_decision_is_marked_in_the_charts_with_its_reason(page: Page, busy: Stage) -> None:
    checks.marks_the_last_decision(page, busy.base_url)


def test_a_button_changes_the_time_range_and_is_remembered(page: Page, busy: Stage) -> None:
    page.goto(busy.base_url)
    checks.charts_are_drawn(page)
    span = """['load', 'size'].map(id => document.getElementById(id).layout.xaxis.range)
        .map(([from, to]) => Math.round((to - from) / 1000))"""
    assert page.evaluate(span) == [600, 600]
    page.click("text=24 h")
    assert page.evaluate(span) == [86400, 86400]
    page.reload()
    checks.charts_are_drawn(page)
    assert page.evaluate(span) == [86400, 86400]
    assert page.inner_text("[aria-pressed=true]") == "24 h"


def test_the_page_keeps_its_state_while_the_manager_does_not_answer(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    checks.agrees_with_the_status(page, stage.base_url)
    checks.charts_are_drawn(page)
    known = _points(page)
    stage.stop_server()
    checks.until(page, lambda: "The manager does not answer" in page.inner_text("#notices"), "the problem is displayed")
    assert len(checks.rows(page)) == 2, "the last state is kept"
    stage.report(160)
    stage.restart_server()
    checks.until(page, lambda: page.inner_text("#notices") == "", "the problem is over")
    checks.until(page, lambda: _points(page) == known + 1, "the chart continues")


def _points(page: Page) -> int:
    return int(page.evaluate("document.getElementById('load').data[0].x.length"))


def test_a_restarted_manager_adds_to_the_charts_of_an_open_page(page: Page, stage: Stage, tmp_path: Path) -> None:
    stage.report(150, 150, 150)
    page.goto(stage.base_url)
    checks.charts_are_drawn(page)
    assert _points(page) == 2
    stage.controller._history = type(stage.controller._history)()
    stage.report(160)
    checks.until(page, lambda: _points(page) == 3, "old and new")
    page.evaluate("updates = FULL_FETCH")
    checks.until(page, lambda: page.evaluate("updates > FULL_FETCH"), "the whole history came")
    assert _points(page) == 3


def test_problems_are_displayed(page: Page, stage: Stage) -> None:
    stage.report(150, 150)
    page.goto(stage.base_url)
    checks.until(page, lambda: len(checks.rows(page)) == 2, "the fleet")
    assert page.inner_text("#notices") == ""
    stage.controller.pause(True)
    stage.engine.die(f"{stage.name}1", 3)
    stage.controller.step()
    stage.engine.down = "connection refused"
    assert eventually(lambda: (stage.controller.step(), stage.controller.engine_trouble)[1])
    checks.until(page, lambda: page.locator("#notices p").count() == 5, "the notices")
    notices = page.inner_text("#notices")
    assert "Paused. Decisions are recorded, but not carried out." in notices
    assert "Problem: the engine is unreachable: connection refused" in notices
    assert "Problem: a launch failed: its container ended with exit code 3" in notices
    assert "Problem: 1 of 2 backends serve" in notices
    assert re.search(r"Launches wait: the next one is in [\d.]+ s", notices)
    spoken = page.locator("[aria-live=polite]").text_content() or ""
    assert "the engine is unreachable: connection refused. a launch failed: " in spoken
    assert "Paused." in spoken


def test_a_manager_without_any_report_is_no_error(page: Page, stage: Stage) -> None:
    failures: list[str] = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    checks.agrees_with_the_status(page, stage.base_url)
    assert "No report yet." in page.inner_text("#sentence")
    assert "no balancer reports" in page.inner_text("#notices")
    assert "No data yet" in page.inner_text("#load")
    assert failures == []


def test_on_a_phone_nothing_is_cut_off(page: Page, busy: Stage) -> None:
    checks.fits_the_width(page, busy.base_url)


def test_a_dark_scheme_is_dark_in_the_charts_too(page: Page, busy: Stage) -> None:
    checks.follows_the_scheme(page, busy.base_url)


def test_every_request_of_the_page_goes_to_the_manager(page: Page, busy: Stage) -> None:
    checks.requests_go_only_to_the_manager(page, busy.base_url)


def test_names_reasons_and_log_records_are_inserted_as_text(page: Page, stage: Stage) -> None:
    stage.engine.run(f"{stage.name}{MARKUP}")
    stage.controller.step()
    stage.report(150, 150, balancer=MARKUP)
    ip = stage.controller.status()["backends"][0]["ip"]
    stage.engine.stuck = True
    stage.controller.stop(ip, MARKUP)
    stage.report(900, balancer=MARKUP)
    decision = stage.controller._history.changes[-1]
    decision["reason"] = f"{MARKUP} &lt;b&gt; <b>bold</b> <a href='http://192.0.2.1'>link</a>"
    stage.controller.decisions[-1] = replace(stage.controller.decisions[-1], reason=MARKUP)
    logging.getLogger("manager").warning("a line of %s", MARKUP)
    checks.marks_the_last_decision(page, stage.base_url)
    names, notes = zip(*((row["name"], row["note"]) for row in checks.rows(page)), strict=True)
    assert f"{stage.name}{MARKUP}" in names
    assert MARKUP in notes
    assert MARKUP in page.inner_text("#sentence")
    checks.until(page, lambda: MARKUP in (page.text_content("#log") or ""), "the log record is displayed")
    assert decision["reason"] in page.inner_text("#changes")
    assert "taken" not in page.title()
    assert page.locator("body script, body img, .hoverlayer a").count() == 0


@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1600, False), ("dark", 1600, True), ("phone", 390, False)]
)
def test_a_screenshot_is_taken_when_the_charts_are_drawn(
    page: Page, busy: Stage, tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    checks.screenshot(page, busy.base_url, tmp_path / f"{name}.png", dark)
    assert (tmp_path / f"{name}.png").stat().st_size > 50_000
